"""Encode the video files of a folder with a VAE, one clip in memory at a time."""

import logging
import os
from collections.abc import Iterator

import av
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from server import PromptServer

from ..kernels.video.clips import DecodeOptions, SourceReport, VideoError, clips_of, video_stream
from .latents import SOURCES
from .model_files import file_state

TITLE = "Encode Clips from Folder"
MOST_FRAMES = 1001
NO_FOLDERS = "(no folder in input yet)"


def decode_clips(
    path: str, width: int, height: int, frames: int, fps: float, max_clips: int, report: SourceReport
) -> Iterator[torch.Tensor]:
    """Consecutive clips [frames, height, width, 3] in [0, 1] of a video, read as `trainers.encode` reads them (see
    kernels/video/clips.py), scaled to cover the size and cropped to the centre. Fills report.notes.

    Raises VideoError for a damaged or short file, and for colours that cannot be converted.
    """
    options = DecodeOptions(lambda w, h: (width, height), fps, frames, frames, max_clips)
    cancelled = comfy.model_management.throw_exception_if_processing_interrupted
    try:
        # Titles and comments are not read, so it does not matter whether they are text.
        with av.open(path, metadata_errors="replace", options={"protocol_whitelist": "file"}) as container:
            stream = video_stream(container, report.name)
            for clip in clips_of(container, stream, options, report, cancelled):
                yield clip.frames.movedim(1, -1).float() / 255
    except av.FFmpegError as e:
        raise VideoError(f"{report.name}: damaged or not a video ({e.strerror or e})") from e


class EncodeClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_EncodeClips",
            display_name=TITLE,
            category="model/latent",
            description=(
                "Reads the video files of a folder in ComfyUI's input directory, cuts clips of equal size and length from "
                "them and encodes each with a video VAE, one at a time. The latents are meant for Fit Shell-LCC. "
                "HDR video is tone-mapped; rotated and mirrored video is shown as a player shows it."
            ),
            search_aliases=["encode videos", "load clips", "video folder", "dataset", "intrinsic reward", "batch encode"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Vae.Input("vae", tooltip="A video VAE, such as Wan2.1's."),
                io.Combo.Input(
                    "folder",
                    options=folder_paths.get_input_subfolders() or [NO_FOLDERS],
                    tooltip="A folder inside ComfyUI's input directory with video files; its subfolders are not searched.",
                ),
                io.Int.Input(
                    "width", default=832, min=64, max=8192, step=16, tooltip="Clips are scaled to cover width x height."
                ),
                io.Int.Input(
                    "height", default=480, min=64, max=8192, step=16, tooltip="The excess is cropped equally on both sides."
                ),
                io.Int.Input(
                    "frames", default=33, min=5, max=MOST_FRAMES, step=4,
                    tooltip="Frames per clip, 4n+1. Shorter files are skipped.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=120.0,
                    step=0.01,
                    tooltip="Frames per second to sample at; 16 is Wan2.1's. Slower videos are sampled at their own rate.",
                ),
                io.Int.Input(
                    "max_clips",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip=(
                        "Maximum clips per file. Clips of one file resemble each other: many files with one clip each are "
                        "better."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="All clips as one batch (raw, as from VAE Encode)."),
                io.String.Output(
                    display_name="report", tooltip="How many clips came from each file, and what was skipped and why."
                ),
            ],
        )

    @classmethod
    def execute(cls, vae, folder, width, height, frames, fps, max_clips) -> io.NodeOutput:
        if vae.latent_dim != 3:
            raise ValueError(f"{TITLE}, input 'vae': found an image VAE, expected a video VAE such as Wan2.1's")
        if frames % 4 != 1:
            raise ValueError(f"{TITLE}, input 'frames': found {frames}, expected 4n+1, such as {frames // 4 * 4 + 1}")
        path, names = list_videos(folder)
        bar = comfy.utils.ProgressBar(len(names) * max_clips)
        latents, sources, lines = [], [], []
        for number, name in enumerate(names):
            before, source = len(latents), SourceReport(name)
            try:
                clips = decode_clips(os.path.join(path, name), width, height, frames, fps, max_clips, source)
                for count, clip in enumerate(clips, start=1):
                    latents.append(vae.encode(clip))
                    sources.append(f"{folder}/{name}")
                    bar.update_absolute(number * max_clips + count)
            except VideoError as e:
                source.note(str(e).removeprefix(f"{name}: "))
                logging.warning("%s: %s", TITLE, e)
            lines.append(line_of(name, len(latents) - before, source.notes))
            bar.update_absolute((number + 1) * max_clips)
        text = "\n".join(lines)
        if not latents:
            raise ValueError(
                f"{TITLE}: no clip of {frames} frames at {fps:g} frames per second in {path}; "
                f"give longer videos or fewer frames.\n{text}"
            )
        text = f"{len(latents)} clips of {width}x{height}, {frames} frames\n{text}"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput({"samples": torch.cat(latents), SOURCES: sources}, text)

    @classmethod
    def validate_inputs(cls, folder, frames=None):
        # ComfyUI leaves the whole check of an input that is named here to this function.
        if frames is not None and not (5 <= frames <= MOST_FRAMES and frames % 4 == 1):
            near = min(max(5, frames // 4 * 4 + 1), MOST_FRAMES)
            return f"input 'frames': found {frames}, expected 4n+1 of 5 to {MOST_FRAMES}, such as {near}"
        if folder is None or folder in folder_paths.get_input_subfolders():
            return True
        root = folder_paths.get_input_directory()
        if folder == NO_FOLDERS:
            return f"there is no folder in {root}: upload clips with this node's button, or put a folder of videos there"
        return f"there is no folder '{folder}' in {root}: make it, put videos into it and refresh, or choose another folder"

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        path, names = list_videos(folder)
        return [[name, *file_state(os.path.join(path, name))] for name in names]


def line_of(name: str, found: int, notes: list[str]) -> str:
    """A file's line of the report."""
    clips = f"{found} clip{'' if found == 1 else 's'}" if found else "skipped"
    return f"{name}: {', '.join([clips, *notes])}"


def list_videos(folder: str) -> tuple[str, list[str]]:
    """(path, names of the video files, sorted) of a folder in the input directory. Raises ValueError when there are none."""
    if folder not in folder_paths.get_input_subfolders():
        raise ValueError(f"{TITLE}, input 'folder': {folder!r} is not a folder in the input directory")
    path = os.path.join(folder_paths.get_input_directory(), folder)
    names = sorted(folder_paths.filter_files_content_types(os.listdir(path), ["video"]))
    if not names:
        raise ValueError(f"{TITLE}: no video file in {path}; put some there, such as .mp4 or .mkv")
    return path, names


NODES = [EncodeClips]
