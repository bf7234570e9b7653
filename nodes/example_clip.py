"""A short clip that the pack has with it, so that nodes of clips can be tried before there is one."""

from pathlib import Path

import av
import torch
from comfy_api.latest import io

from ..kernels.video.clips import DecodeOptions, SourceReport, clips_of, video_stream

TITLE = "Example Clip"
FOLDER = Path(__file__).resolve().parents[1] / "web" / "examples"
CLIPS = {"rigid room": "rigid_room.mp4", "warped room": "warped_room.mp4"}
FRAMES, FPS = 33, 16.0


class ExampleClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_ExampleClip",
            display_name=TITLE,
            category="image/video",
            description=(
                "The frames of a short clip of this pack, to try nodes without a video of your own: a rendered room under a "
                "moving camera, rigid, or warped by up to 3 pixels. Replace it by Load Video and Get Video Components for a "
                "clip of yours."
            ),
            search_aliases=["example video", "sample video", "test clip", "demo", "intrinsic reward"],
            inputs=[
                io.Combo.Input(
                    "clip",
                    options=list(CLIPS),
                    tooltip="rigid room: a consistent clip. warped room: the same clip, with a world that bends.",
                )
            ],
            outputs=[
                io.Image.Output(tooltip=f"{FRAMES} frames of 640x368."),
                io.Float.Output(display_name="fps", tooltip="Frames per second, for Create Video."),
            ],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        if clip not in CLIPS:
            raise ValueError(f"{TITLE}, input 'clip': found {clip!r}, expected one of {', '.join(CLIPS)}")
        return io.NodeOutput(read(FOLDER / CLIPS[clip]), FPS)


def read(path: Path) -> torch.Tensor:
    """Frames [33, 368, 640, 3] in [0, 1]."""
    options = DecodeOptions(lambda w, h: (round(w), round(h)), FPS, FRAMES)
    with av.open(str(path)) as container:
        (clip,) = clips_of(container, video_stream(container, path.name), options, SourceReport(path.name))
    return clip.frames.movedim(1, -1).float() / 255


NODES = [ExampleClip]
