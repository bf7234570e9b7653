"""Sprite sheets for the panels in the browser: the frames of a short clip side by side in one JPEG file.

One file and one request per clip, any frame can be drawn at once, and no video codec is needed in the browser. The files are
in the temp folder of ComfyUI, which it empties when it starts.
"""

import base64
import io
import math
import os
import secrets
from pathlib import Path

import folder_paths
import torch
from PIL import Image

PREFIX = "intrinsic_reward"
# Browsers limit a picture's side to 8,192 to 16,384 pixels.
MOST_FRAMES, LARGEST_SIDE = 100, 8192
POSTER_WIDTH = 96


def new_name() -> str:
    """A name that no other sheet has, for `save`."""
    return f"{PREFIX}_{secrets.token_hex(6)}"


def save(frames: torch.Tensor, name: str, width: int | None = None) -> dict:
    """Writes frames uint8 [T, H, W, 3] as one sheet and returns what the browser needs to draw it.

    name: of the file, replaced if it exists; width: of a frame in the sheet, None for its own. Of more than MOST_FRAMES frames
    evenly spaced ones are kept; `indices` of the result are theirs. Raises OSError, and leaves no partial file then.
    """
    shown = chosen(len(frames))
    frames = frames[shown]
    count, height, own = frames.shape[:3]
    width = width or own
    tall = max(1, round(height * width / own))
    columns = math.ceil(math.sqrt(count * tall / width))
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    shrink = min(1.0, LARGEST_SIDE / (columns * width), LARGEST_SIDE / (rows * tall))
    width, tall = max(1, int(width * shrink)), max(1, int(tall * shrink))
    sheet = Image.new("RGB", (columns * width, rows * tall))
    for i, frame in enumerate(frames.cpu().numpy()):
        picture = Image.fromarray(frame)
        if picture.size != (width, tall):
            picture = picture.resize((width, tall), Image.Resampling.BILINEAR)
        sheet.paste(picture, (i % columns * width, i // columns * tall))
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jpg"
    # The browser may ask for the file while a newer one replaces it.
    partial = folder / f"{name}.{secrets.token_hex(4)}.partial"
    try:
        sheet.save(partial, "JPEG", quality=85)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "filename": path.name, "subfolder": "", "type": "temp", "version": secrets.token_hex(4),
        "count": count, "columns": columns, "width": width, "height": tall, "indices": shown,
    }  # fmt: skip


def chosen(count: int) -> list[int]:
    """Indices of at most MOST_FRAMES of `count` frames, evenly spaced, with the first and the last."""
    if count <= MOST_FRAMES:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_FRAMES - 1)) for i in range(MOST_FRAMES)]


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """uint8 of images in [0, 1], any shape."""
    # The conversion rounds down.
    return images.float().mul(255).add_(0.5).clamp_(0, 255).to(torch.uint8)


def poster(frame: torch.Tensor) -> str:
    """A frame uint8 [H, W, 3] as a data URI of about 2 kB, which a workflow file can hold."""
    picture = Image.fromarray(frame.cpu().numpy())
    picture.thumbnail((POSTER_WIDTH, POSTER_WIDTH))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
