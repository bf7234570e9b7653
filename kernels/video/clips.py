"""Clips of RGB frames at one frame rate and one size from an opened video (PyAV); opening is left to the caller.

Time: the frames nearest to the instants start, start + 1/fps, ... by their timestamps. A video slower than `fps` is
sampled at its own rate instead, because repeated frames would look like a still scene; Clip.fps is the rate used.
Colour: by the stream's own matrix and range; where they are unspecified, BT.709 from 1280 columns or 577 lines and
BT.601 below, limited range, as players do. HDR is tone-mapped (see tone_mapping). Rotated and mirrored pictures (see
orientation) and non-square pixels are corrected.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import orientation, tone_mapping
from .sizes import cover_crop, cover_scale

# A clip with a larger share of repeated frames (a slide show, a broken recording) is left out: its stillness is not real.
MAX_REPEATED = 0.25
# Seconds between two frames: a wrong timestamp can say years, and a still picture of years would be sampled frame by frame.
MAX_GAP = 300.0

# libav's constants. Matrix: AVColorSpace -> swscale's coefficient table; 0 is RGB, which needs none.
UNSPECIFIED = 2
MATRICES = {0: 1, 1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
LIMITED, FULL = 1, 2
TRANSFERS = {16: "pq", 18: "hlg"}
BT2020_PRIMARIES = 9
# bicubic, full chroma interpolation, accurate rounding, bit-exact: without them swscale truncates, up to 2 levels darker.
SCALER = 0x4 | 0x2000 | 0x4000 | 0x40000 | 0x80000


# libav's names of formats that say where the video is: any file, or a server.
PLAYLISTS = {"hls", "dash", "concat", "sdp", "rtsp"}


class VideoError(ValueError):
    """A video file cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class DecodeOptions:
    """How videos are decoded.

    size: (width, height) as displayed -> (width, height) wanted; fps: frames per second wanted; frames: length of a
    clip (4n+1); min_frames: shortest clip kept; max_clips: per video, 0 for all; hdr: "tonemap" or "refuse"; enlarge:
    whether a video smaller than the wanted size is accepted.
    """

    size: Callable[[float, float], tuple[int, int]]
    fps: float = 16.0
    frames: int = 81
    min_frames: int = 5
    max_clips: int = 1
    hdr: str = "tonemap"
    enlarge: bool = True


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [T, 3, height, width], T = 4n+1; index: 0, 1, ... in its video; start_frame: in units of 1 / fps."""

    frames: Tensor
    index: int
    start_frame: int
    start_s: float
    fps: float


@dataclass
class SourceReport:
    """Notes on one video for the report. name: used in messages; fps: frames per second that it was sampled at."""

    name: str
    fps: float = 0.0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def clips_of(
    container, stream, options: DecodeOptions, report: SourceReport, each_frame: Callable[[], None] | None = None
) -> Iterator[Clip]:
    """The clips of a video stream (PyAV), in order; one is held in memory at a time. Fills report.fps and report.notes.

    each_frame: called for each frame that is decoded; may raise to cancel. Raises VideoError when the file is damaged, has no
    usable clip, or its colours cannot be converted; libav's own errors pass through.
    """
    name, images, repeated, first, found, picked, time, last = report.name, [], 0, None, 0, 0, None, None
    rate = _source_rate(stream)
    fps = report.fps = min(options.fps, rate) if rate else options.fps
    if fps < 0.99 * options.fps:
        report.note(f"taken at its own {fps:.3g} frames per second, below the {options.fps:g} asked for")
    convert = _Converter(stream, options, report)
    for time, frame in resample(timed_frames(container, stream, name, each_frame), fps):
        first = time if first is None else first
        repeated += frame is last
        images.append(images[-1] if frame is last and images else convert(frame))
        picked, last = picked + 1, frame
        if len(images) == options.frames:
            if _has_few_repeats(repeated, images, picked, report):
                start = picked - len(images)
                yield Clip(torch.stack(images), found, start, start / fps, fps)
                found += 1
            images, repeated = [], 0
            if options.max_clips and found == options.max_clips:
                return
    length = len(images) - (len(images) - 1) % 4 if images else 0
    expected = _duration(container, stream)
    if expected and picked and time - first < 0.9 * expected - 0.5:
        report.note(f"ends after {time - first:.1f} of {expected:.1f} s: the file seems to be cut short")
    if length >= options.min_frames and _has_few_repeats(repeated, images, picked, report):
        start = picked - len(images)
        yield Clip(torch.stack(images[:length]), found, start, start / fps, fps)
        found += 1
    if not found:
        if picked >= options.min_frames:
            raise VideoError(f"{name}: no usable clip ({'; '.join(report.notes)})")
        count = f"{picked} frame{'' if picked == 1 else 's'}"
        raise VideoError(f"{name}: {count} at {fps:.3g} frames per second, at least {options.min_frames} needed")


def video_stream(container, name: str):
    """The first video stream of an opened file (PyAV), set to decode on several threads.

    Raises VideoError where there is none, or no decoder for it, and for a list of other files.
    """
    if container.format.name in PLAYLISTS:
        raise VideoError(f"{name}: a list of other files; give the videos themselves")
    if not container.streams.video:
        raise VideoError(f"{name}: no video stream in this file")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(f"{name}: this build of PyAV has no decoder for its video stream")
    stream.thread_type = "AUTO"
    return stream


def timed_frames(
    container, stream, name: str, each_frame: Callable[[], None] | None = None
) -> Iterator[tuple[float, object]]:
    """(time in s, frame) of each decoded frame, times strictly increasing. Raises VideoError at a corrupt frame, and where
    there is none for MAX_GAP."""
    rate, previous = float(stream.average_rate or stream.guessed_rate or 25), None
    for index, frame in enumerate(container.decode(stream)):
        if each_frame is not None:
            each_frame()
        time = index / rate if frame.pts is None else float(frame.pts * frame.time_base)
        if frame.is_corrupt:
            raise VideoError(f"{name}: damaged at {time:.2f} s")
        if previous is not None and time - previous > MAX_GAP:
            raise VideoError(f"{name}: no frame from {previous:.2f} s to {time:.6g} s: its timestamps are wrong; remux it")
        if previous is None or time > previous:
            yield time, frame
            previous = time


def resample(timed: Iterator[tuple[float, object]], fps: float) -> Iterator[tuple[float, object]]:
    """(time, frame) of the frame nearest to each of the instants t0, t0 + 1/fps, ... until the frames end."""
    count, previous, taken = 0, None, None
    for time, frame in timed:
        if previous is None:
            origin = time
        else:
            while (instant := origin + count / fps) <= time:
                # On a tie the earlier frame: it is the one on screen.
                taken = previous if instant - previous[0] <= time - instant + 1e-6 else (time, frame)
                yield taken
                count += 1
        previous = (time, frame)
    # Containers round timestamps, so the last instant may lie just after the last frame.
    if previous is not None and taken is not previous and origin + count / fps <= previous[0] + 0.5 / fps:
        yield previous


def to_rgb(frame, name: str = "frame") -> tuple[Tensor, str]:
    """(RGB code values float32 [3, h, w] in [0, 1], transfer) of a frame; transfer: "bt709", "pq", "hlg" or "sdr".

    "bt709" needs no conversion; the others have BT.2020 primaries. Raises VideoError for an unsupported colour matrix.
    """
    transfer = TRANSFERS.get(frame.color_trc, "sdr" if frame.color_primaries == BT2020_PRIMARIES else "bt709")
    matrix = frame.colorspace
    if frame.format.is_rgb:
        matrix = 0
    elif matrix == UNSPECIFIED and transfer != "bt709":
        matrix = 9
    elif matrix == UNSPECIFIED:
        matrix = 1 if frame.width >= 1280 or frame.height > 576 else 5
    elif matrix not in MATRICES:
        raise VideoError(f"{name}: colour matrix {matrix} (libav's number) is not supported; convert it to BT.709 first")
    full = frame.color_range == FULL or (frame.color_range != LIMITED and frame.format.name.startswith("yuvj"))
    deep = transfer != "bt709"
    table = MATRICES[matrix]
    rgb = frame.reformat(
        format="rgb48le" if deep else "rgb24",
        src_colorspace=table,
        dst_colorspace=table,
        src_color_range=FULL if full else LIMITED,
        dst_color_range=FULL,
        interpolation=SCALER,
    ).to_ndarray()
    scale = 65535.0 if deep else 255.0
    return torch.from_numpy(rgb.astype("float32")).movedim(-1, 0) / scale, transfer


class _Converter:
    """Frames of one video -> uint8 [3, height, width], at the size that options.size gives for the first frame."""

    def __init__(self, stream, options: DecodeOptions, report: SourceReport):
        self.options, self.report, self.size, self.matrix = options, report, None, None
        self.pixel_aspect = float(stream.sample_aspect_ratio or 1) or 1.0

    def __call__(self, frame) -> Tensor:
        name = self.report.name
        if self.size is None:
            # Of the first frame only: PyAV's side data refers back to its frame, so that every frame whose side data is read
            # lives, with the threads that convert it, until garbage is collected.
            self.matrix = orientation.display_matrix(frame)
        matrix = self.matrix
        pixel_aspect = 1.0 / self.pixel_aspect if orientation.swaps_axes(matrix) else self.pixel_aspect
        if not orientation.is_axis_aligned(matrix):
            self.report.note("turned by an angle that is no multiple of 90 degrees: the nearest one is taken")
        rgb, transfer = to_rgb(frame, name)
        if transfer in ("pq", "hlg") and self.options.hdr == "refuse":
            raise VideoError(f"{name}: HDR video ({transfer.upper()}), refused by --hdr refuse; --hdr tonemap converts it")
        if transfer != "bt709":
            rgb = tone_mapping.to_bt709(rgb, transfer)
            self.report.note(
                "BT.2020 colours mapped to BT.709" if transfer == "sdr" else f"HDR ({transfer.upper()}) tone-mapped"
            )
        rgb = orientation.shown(rgb, matrix)
        if self.size is None:
            self.size = self._choose(rgb.shape[2] * pixel_aspect, rgb.shape[1])
            if frame.interlaced_frame:
                self.report.note("interlaced, taken as it is: deinterlace it first to keep combing out of the latents")
        return (cover_crop(rgb, *self.size, pixel_aspect) * 255.0).round().to(torch.uint8)

    def _choose(self, width: float, height: float) -> tuple[int, int]:
        size = self.options.size(width, height)
        scale = cover_scale((width, height), size)
        if scale > 1.01:
            shown = f"{width:.0f}x{height:.0f}"
            if not self.options.enlarge:
                raise VideoError(f"{self.report.name}: {shown} is smaller than {size[0]}x{size[1]}, refused by --no_upscale")
            self.report.note(f"enlarged {scale:.2f} times from {shown}: it has less detail than its size")
        return size


def _has_few_repeats(repeated: int, images: list, picked: int, report: SourceReport) -> bool:
    if not repeated:
        return True
    start = (picked - len(images)) / report.fps
    keep = repeated <= MAX_REPEATED * len(images)
    fate = "" if keep else ": left out"
    report.note(f"{repeated} of {len(images)} frames from {start:.1f} s on repeat their neighbour{fate}")
    return keep


def _source_rate(stream) -> float | None:
    rates = [float(r) for r in (stream.average_rate, stream.guessed_rate, stream.base_rate) if r]
    return next((r for r in rates if 0 < r <= 1000), None)


def _duration(container, stream) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None
