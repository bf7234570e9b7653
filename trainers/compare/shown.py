"""What people look at: a montage of frames, and videos side by side, of pairs that no score has chosen."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..kernels.files.atomic import write_atomic
from ..preferences.clips import BAD_CLIP, ClipReader
from ..preferences.groups import Group
from ..reporting import embed
from ..reporting.strips import HEIGHT, drawable, stacked, strip
from .pictures import frames_of

LINE, MARGIN = 14, 6
LABEL = 20
WIDEST = 1920


def spread(groups: Sequence[Group], count: int) -> list[Group]:
    """At most `count` groups, evenly spaced in their order, so that they are neither the best nor the first."""
    if count >= len(groups):
        return list(groups)
    return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]


def frames(group: Group, reader: ClipReader) -> list[tuple[Tensor, float]] | None:
    """(frames uint8 [T, H, W, 3], frames per second) of every side; None where one cannot be read any more."""
    try:
        return [frames_of(c, reader, reader.options.frames) for c in group.candidates]
    except BAD_CLIP:
        return None


def montage_row(group: Group, sides: Sequence[str], clips: Sequence[Tensor]) -> Image.Image:
    """First, middle and last frame of every side in a row."""
    strips = [strip(c) for c in clips]
    row = Image.new("RGB", (sum(s.width + MARGIN for s in strips) + MARGIN, 2 * LINE + HEIGHT + 2 * MARGIN), "white")
    pen, left = ImageDraw.Draw(row), MARGIN
    pen.text((MARGIN, 1), drawable(f"{group.name}: {group.prompt}" if group.prompt else group.name), fill="black")
    for side, shown in zip(sides, strips, strict=True):
        pen.text((left, 1 + LINE), drawable(side), fill=(0, 80, 150))
        row.paste(shown, (left, 2 * LINE + MARGIN))
        left += shown.width + MARGIN
    return row


def write_montage(path: Path, rows: Sequence[Image.Image]) -> None:
    """Raises OSError."""
    sheet = stacked(list(rows))
    write_atomic(path, lambda partial: sheet.save(partial, format="PNG"))


def write_side_by_side(folder: Path, group: Group, sides: Sequence[str], clips: Sequence[Tensor], fps: float) -> Path:
    """Writes clips of one size, uint8 [T, H, W, 3], as one video with the sides' names above. Raises OSError."""
    height, width = clips[0].shape[1:3]
    header = Image.new("RGB", (width * len(clips), LABEL), "white")
    pen = ImageDraw.Draw(header)
    for i, side in enumerate(sides):
        pen.text((i * width + MARGIN, 4), drawable(side), fill="black")
    above = torch.frombuffer(bytearray(header.tobytes()), dtype=torch.uint8).view(1, LABEL, width * len(clips), 3)
    joined = torch.cat([above.expand(len(clips[0]), -1, -1, -1), torch.cat(list(clips), dim=2)], dim=1)
    media = embed.video(joined, fps, WIDEST, None)
    path = folder / (file_name(group.name) + media.suffix)
    write_atomic(path, lambda partial: Path(partial).write_bytes(media.data))
    return path


def file_name(name: str) -> str:
    """A group's name as a file name."""
    return re.sub(r"[^\w.-]+", "_", name.replace("/", "__"))[:120]
