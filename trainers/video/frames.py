"""All frames of a clip at its own rate, as one tensor."""

from pathlib import Path

import torch
from torch import Tensor

from ..kernels.video.clips import DecodeOptions, SourceReport
from ..kernels.video.sizes import nearest_bucket
from .read import decode_clips

# More than any video has, so that each is taken at its own rate.
OWN_RATE = 1000.0


def read_frames(path: Path, source: SourceReport, count: int, size: str | None = None) -> Tensor:
    """uint8 [T, H, W, 3], T at most `count`; size: a bucket of sizes.BUCKETS, None for the clip's own. Raises VideoError.

    Fills source.notes and source.fps, 0 where the file does not state its rate.
    """
    wanted = (lambda w, h: nearest_bucket(size, w, h)) if size else (lambda w, h: (round(w), round(h)))
    # Windows of one frame: any number of frames, and none is left out to make 4n+1.
    reading = DecodeOptions(wanted, OWN_RATE, 1, 1, count)
    seen = SourceReport(source.name)
    frames = torch.cat([window.frames for window in decode_clips(path, reading, seen)])
    # Without a rate of its own the file is sampled at the wanted one.
    source.fps = seen.fps if seen.fps < OWN_RATE else 0.0
    repeats = [note for note in seen.notes if "repeat their neighbour" in note]
    for note in seen.notes:
        if note not in repeats and not note.startswith("taken at its own"):
            source.note(note)
    if repeats:
        source.note(f"{len(repeats)} instants without a frame of their own were left out")
    return frames.movedim(1, -1).contiguous()
