"""Geometry Consistency (no model): point tracks of a clip against a reconstruction of one rigid scene."""

import torch
from comfy_api.latest import io

from . import geometry_clips as shared

TITLE = "Geometry Consistency (no model)"


class GeometryTracks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_GeometryTracks",
            display_name=TITLE,
            category=shared.CATEGORY,
            description=(
                "Scores how well a clip shows one rigid scene under a moving camera: points are tracked through all frames, "
                "a rigid scene is reconstructed from them, and what it does not explain lowers the score. Needs no model. "
                "Clips without depth (still, slow, panned, zoomed, flat) are 'undetermined' and score 0."
            ),
            search_aliases=[
                "geometry consistency", "3d consistency", "multi-view consistency", "epipolar", "structure from motion",
                "warping", "flicker", "heat map", "intrinsic reward",
            ],
            inputs=[
                io.Image.Input("images", tooltip="The frames of a clip, at least 3; or of several clips one after another."),
                io.Int.Input(
                    "clips",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip=(
                        "Number of clips of equal length in images, one after another, as VAE Decode returns a batch of "
                        "video latents."
                    ),
                ),
                shared.backend_input(),
            ],
            outputs=[
                io.Float.Output(
                    display_name="score",
                    tooltip="0 to 1, higher is better; the mean of several clips.",
                ),
                io.String.Output(
                    display_name="verdict",
                    is_output_list=True,
                    tooltip="consistent, inconsistent or undetermined, for each clip, as a list.",
                ),
                io.Float.Output(
                    display_name="frame_errors",
                    is_output_list=True,
                    tooltip=(
                        "What a rigid scene does not explain, in pixels at 480 lines, lower is better: for each key frame, "
                        "clip after clip. The record also has the frames between."
                    ),
                ),
                io.Image.Output(
                    display_name="heat_map",
                    tooltip=(
                        "Errors as colours over the dimmed frames, one image per input frame; the shorter side is at most 240 "
                        "pixels."
                    ),
                ),
                io.Image.Output(
                    display_name="reprojection",
                    tooltip=(
                        "The key frames with the tracked points and their reprojections; the shorter side is at most 480 "
                        "pixels."
                    ),
                ),
                io.String.Output(
                    display_name="record",
                    is_output_list=True,
                    tooltip="All measurements of each clip as JSON, as a list, for Record Preference.",
                ),
                io.String.Output(display_name="report", tooltip="All results as text."),
                io.Float.Output(
                    display_name="clip_scores",
                    is_output_list=True,
                    tooltip="The score of each clip, as a list, for Select Top-K.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, images, clips, backend) -> io.NodeOutput:
        source = f"{TITLE}, input 'images'"
        parts = shared.split(images, clips, source)
        scored = shared.score(parts, backend, source)
        records = [s.record for s in scored]
        maps, full = shared.heat_maps(parts, scored)
        heat = shared.on_wire(torch.cat(maps))
        text = shared.report(scored)
        shared.add_metadata(cls, TITLE, scored)
        scores = [r.score for r in records]
        return io.NodeOutput(
            sum(scores) / len(scores),
            [r.verdict for r in records],
            [e for r in records for e in r.frame_errors],
            heat,
            shared.on_wire(torch.cat([s.preview for s in scored])),
            [r.dumps() for r in records],
            text,
            scores,
            ui=shared.show(cls, text, parts, maps, records, full),
        )


NODES = [GeometryTracks]
