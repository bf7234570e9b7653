"""Visualisation of point tracks: Gaussian-smoothed error maps, and dots with lines to the expected positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..colours import EXPECTED_POSITION, track_colour

# Radius (sigma) over which one track's error is spread, as a share of the shorter side; tracks are about a cell apart.
REACH = 1 / 16
# Least weight of the tracks at a place, as a share of the largest: a lonely track would colour all of its surroundings.
LEAST_WEIGHT = 0.1


def map_size(size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of an error map of a picture of `size`: about 48 cells along the shorter side."""
    step = max(1, min(size) // 48)
    return math.ceil(size[0] / step), math.ceil(size[1] / step)


def error_maps(at: Tensor, error: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread the errors of tracks over their surroundings: Gaussian-weighted mean error, float32 [K, *map_size(size)], NaN far
    from tracks.

    at: [K, N, 2] pixels (x, y); error: [K, N], summed over observations; weight: [K, N], number of observations in each sum;
    size: (H, W) of the picture.
    """
    keys, step, (rows, columns) = len(at), max(1, min(size) // 48), map_size(size)
    x = (at[..., 0] / step).long().clamp(0, columns - 1)
    y = (at[..., 1] / step).long().clamp(0, rows - 1)
    index = (torch.arange(keys)[:, None] * rows + y) * columns + x
    totals = torch.zeros(2, keys * rows * columns, dtype=torch.float32)
    totals[0].index_add_(0, index.flatten(), error.flatten().float())
    totals[1].index_add_(0, index.flatten(), weight.flatten().float())
    totals = _blur(totals.view(2, keys, rows, columns), REACH * min(size) / step)
    return torch.where(totals[1] > LEAST_WEIGHT * totals[1].amax().clamp(min=1e-6), totals[0] / totals[1], math.nan)


def draw_tracks(
    frames: Sequence[Tensor], at: Tensor, expected: Tensor, visible: Tensor, error: Tensor, worst: float
) -> Tensor:
    """Draw each track as a dot, green to red by its error, with a yellow line to its expected position.

    frames: K pictures [H, W, 3] in [0, 1], dimmed to 70%; at, expected: [K, N, 2] pixels (x, y); visible: bool [K, N]; error:
    [K, N]; worst: the error from which dots are fully red. Returns [K, H, W, 3] on the CPU.
    """
    height, width = frames[0].shape[:2]
    out = torch.empty(len(frames), height, width, 3)
    for picture, frame in zip(out, frames, strict=True):
        torch.mul(frame.cpu(), 0.7, out=picture)
    big = max(1, round(min(height, width) / 240))
    k, n = visible.nonzero().unbind(1)
    a, b = at[k, n], expected[k, n]
    # No line to distant expected positions: those outside the image would be clamped to a line along its border.
    b = torch.where(((b - a).norm(dim=1) < 0.1 * min(height, width))[:, None], b, a)
    share = (error[k, n] / worst).clamp(0, 1).float()
    for s in torch.linspace(0, 1, 12):
        _dot(out, k, a + (b - a) * s, torch.tensor(EXPECTED_POSITION).expand(len(k), 3), 1)
    _dot(out, k, a, track_colour(share), 2 * big)
    return out


def _dot(out: Tensor, k: Tensor, at: Tensor, colour: Tensor, side: int) -> None:
    height, width = out.shape[1:3]
    for dy in range(side):
        for dx in range(side):
            x = (at[:, 0].round().long() + dx - side // 2).clamp(0, width - 1)
            y = (at[:, 1].round().long() + dy - side // 2).clamp(0, height - 1)
            out[k, y, x] = colour.to(out.dtype)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [A, K, H, W] with an unnormalised kernel, zero-padded; sigma: pixels."""
    reach = max(1, round(3 * sigma))
    kernel = (-torch.arange(-reach, reach + 1, dtype=x.dtype).square() / (2 * max(sigma, 0.3) ** 2)).exp()
    flat = x.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, reach))[:, 0].view_as(x)
