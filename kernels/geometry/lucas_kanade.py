"""Pyramidal Lucas-Kanade optical flow of points (Lucas and Kanade 1981; pyramids after Bouguet 2001)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .corners import gradients

RADIUS = 7
LEVELS = 4
ITERATIONS = 12
# A point has converged when its step is at most this many pixels of the pyramid level.
STEP = 0.02


def pyramid(image: Tensor, levels: int = LEVELS) -> list[Tensor]:
    """Gaussian pyramid: the image [1, 1, H, W] and up to `levels` - 1 halvings, each smoothed first. No side below 16 pixels
    after halving.
    """
    kernel = image.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    out = [image]
    while len(out) < levels and min(out[-1].shape[-2:]) >= 32:
        padded = F.pad(out[-1], (2, 2, 2, 2), mode="reflect")
        out.append(F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, 5), stride=(1, 2)), kernel.view(1, 1, 5, 1), stride=(2, 1)))
    return out


def sample(image: Tensor, at: Tensor) -> Tensor:
    """Bilinear samples [C, N, P] of image [1, C, H, W] at pixels [N, P, 2] (x, y), with border padding."""
    h, w = image.shape[-2:]
    scale = at.new_tensor([2.0 / (w - 1), 2.0 / (h - 1)])
    return F.grid_sample(image, (at * scale - 1)[None], mode="bilinear", padding_mode="border", align_corners=True)[0]


def track(first: list[Tensor], second: list[Tensor], points: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Track points from one image to the next. Returns their positions [N, 2], pixels, and the residuals [N].

    first, second: pyramids of the two images; points: [N, 2] pixels (x, y) in the first; guess: initial positions in the
    second, [N, 2] (None: the same as in the first). The residual is the mean absolute difference over the window, grey
    levels. Points in windows without texture stay at their initial positions.
    """
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=points.dtype, device=points.device)
    window = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), dim=-1).view(1, -1, 2)
    moved = torch.zeros_like(points) if guess is None else guess - points
    for level in reversed(range(len(first))):
        scale = 0.5**level
        moved, left = _track_level(first[level], second[level], points * scale, moved * scale, window)
        moved = moved / scale
    return points + moved, left


def _track_level(first: Tensor, second: Tensor, points: Tensor, moved: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    at = points[:, None] + window
    template, gx, gy = sample(torch.cat([first, *gradients(first)], dim=1), at).unbind(0)
    a, b, c = (gx * gx).sum(1), (gx * gy).sum(1), (gy * gy).sum(1)
    determinant = (a * c - b * b).clamp(min=1e-3)
    moved = moved.clone()
    going = torch.arange(len(points), device=points.device)
    for _ in range(ITERATIONS):
        difference = template[going] - sample(second, at[going] + moved[going, None])[0]
        p, q = (difference * gx[going]).sum(1), (difference * gy[going]).sum(1)
        det, a_, b_, c_ = determinant[going], a[going], b[going], c[going]
        # The linearisation is valid only within the window, so steps are clamped to its radius.
        step = torch.stack([c_ * p - b_ * q, a_ * q - b_ * p], dim=1).div_(det[:, None]).clamp_(-RADIUS, RADIUS)
        moved[going] += step
        going = going[step.abs().amax(1) > STEP]
        if not len(going):
            break
    left = (template - sample(second, at + moved[:, None])[0]).abs().mean(1)
    return moved, left
