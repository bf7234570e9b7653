"""Grey levels of frames at the resolution at which points are tracked."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LINES = 480
# Luma of RGB (BT.601).
LUMA = (0.299, 0.587, 0.114)
# Shorter side to which smaller images are enlarged; Lucas-Kanade windows have 15 pixels.
SMALLEST = 128


def working_size(size: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """(height, width) with the shorter side between SMALLEST and LINES, and the scale from the clip's pixels."""
    short = min(size)
    scale = LINES / short if short > LINES else SMALLEST / short if short < SMALLEST else 1.0
    return tuple(max(32, round(side * scale)) for side in size), scale


def grey_levels(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Integer grey levels [h, w], float32, of a frame [H, W, 3], uint8 or in [0, 1], resized to `size`."""
    # Rounded, so that both trackers get the same values: OpenCV takes bytes.
    return resized(_luma(_levels(frame).float())[None], size)[0].round_().clamp_(0, 255)


def half_grey_levels(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """`grey_levels` at half of `size`, not rounded, without making them at `size` first."""
    half = tuple(max(16, round(side / 2)) for side in size)
    if [2 * side for side in half] != list(frame.shape[:2]):
        return F.interpolate(grey_levels(frame, frame.shape[:2])[None, None], half, mode="area")[0, 0]
    # Not rounded to 8 bits: for a clip of bytes as floats this differs by less than 1e-4 grey levels.
    return halved(frame, LUMA) * (1.0 if frame.dtype == torch.uint8 else 255.0)


def halved(frame: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted sums of the channels of a frame [H, W, 3], H and W even, averaged over blocks of 2x2 pixels: [H / 2, W / 2],
    float32."""
    if frame.dtype != torch.float32:
        frame = frame.float()
    # Two rows are added as they lie in memory, then one product takes in two pixels of three channels: a third of the time
    # of a pooling.
    rows = frame[::2] + frame[1::2]
    return rows.reshape(len(rows), -1, 6) @ rows.new_tensor([w / 4 for w in (*weights, *weights)])


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] resized to (h, w): averaged where it becomes smaller, else bicubic."""
    if tuple(planes.shape[1:]) == tuple(size):
        return planes
    mode = "area" if min(size) < min(planes.shape[1:]) else "bicubic"
    return F.interpolate(planes[None], size, mode=mode)[0]


def _levels(frame: Tensor) -> Tensor:
    # Floats are rounded to 8 bits first, so that a clip has the same score as floats and as bytes.
    return frame if frame.dtype == torch.uint8 else (frame * 255).round_()


def _luma(levels: Tensor) -> Tensor:
    # In one layout, so that sums are rounded alike however the frames lie in memory.
    return levels.contiguous() @ levels.new_tensor(LUMA)
