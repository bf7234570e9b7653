"""Strips of a clip's frames for contact sheets and montages."""

from PIL import Image
from torch import Tensor

HEIGHT = 96


def strip(frames: Tensor, height: int = HEIGHT) -> Image.Image:
    """First, middle and last of frames, uint8 [T, H, W, 3], side by side at one height in pixels."""
    chosen = [frames[i] for i in (0, len(frames) // 2, len(frames) - 1)]
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    found = Image.new("RGB", (3 * width, height))
    for i, frame in enumerate(chosen):
        picture = Image.fromarray(frame.contiguous().numpy()).resize((width, height), Image.Resampling.BICUBIC)
        found.paste(picture, (i * width, 0))
    return found


def stacked(rows: list[Image.Image]) -> Image.Image:
    """Rows one below the other on white, as wide as the widest."""
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def drawable(text: str) -> str:
    """The text with "?" for what Pillow's built-in font lacks: all but ASCII."""
    return text.encode("ascii", "replace").decode()
