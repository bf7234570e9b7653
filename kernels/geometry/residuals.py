"""Residual vectors of tracks, taken apart: what neighbours share is an error of the scene, the rest is tracking noise.

A rigid fit leaves over a vector for every observation. Grain, compression and blur make these vectors point anywhere; a warp,
a swinging wall or an object that moves by itself moves neighbouring tracks alike. The mean over a neighbourhood keeps the
second and averages out the first, so that thresholds need not know how noisy a clip is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Cells along the shorter side; a neighbourhood is 3x3 cells with binomial weights, about one track in each.
CELLS = 18
KERNEL = (0.25, 0.5, 0.25)
# Median of the squared length of a 2-D Gaussian vector of unit variance per axis (Rayleigh distribution).
MEDIAN_SQUARE = 1.3863


@dataclass(frozen=True)
class Residuals:
    """shared: [K, N], length of the part of each residual that the neighbourhood shares, noise deducted, 0 where not visible;
    noise: root mean square length of the part that it does not share, robust; both in the unit of the vectors."""

    shared: Tensor
    noise: float


def take_apart(vectors: Tensor, at: Tensor, visible: Tensor, size: tuple[int, int], worst: float) -> Residuals:
    """Split residual vectors [K, N, 2] into the part that neighbours share and noise.

    at: [K, N, 2], positions in pixels (x, y) from the picture's top left; visible: bool [K, N]; size: (height, width) of the
    picture; worst: vectors are cut to this length first.
    """
    length = vectors.norm(dim=-1, keepdim=True)
    v = torch.where(visible[..., None], vectors * (worst / length.clamp(min=1e-9)).clamp(max=1), 0.0)
    own = KERNEL[1] ** 2
    summed = neighbourhood(torch.cat([v, visible[..., None].to(v), own * visible[..., None].to(v)], -1), at, visible, size)
    total, weight = summed[..., :2], summed[..., 2]
    mean = total / weight.clamp(min=1e-9)[..., None]
    others = weight - own
    apart = v - (total - own * v) / others.clamp(min=1e-9)[..., None]
    enough = visible & (others > own)
    # Sums of squared weights are bounded by the largest weight times the sum of the weights.
    spread = apart.square().sum(-1) / (1 + own / others.clamp(min=1e-9))
    variance = float(spread[enough].median()) / MEDIAN_SQUARE if bool(enough.any()) else 0.0
    bias = 2 * variance * own / weight.clamp(min=own)
    shared = (mean.square().sum(-1) - bias).clamp(min=0).sqrt()
    return Residuals(torch.where(visible, shared, 0.0), (2 * variance) ** 0.5)


def neighbourhood(values: Tensor, at: Tensor, counted: Tensor, size: tuple[int, int]) -> Tensor:
    """Binomially weighted sums over the neighbourhood of each track, the track itself included: [K, N, C].

    values: [K, N, C]; at: [K, N, 2] pixels; counted: bool [K, N], which of them are summed; size: (height, width).
    """
    keys, count, channels = values.shape
    cell = min(size) / CELLS
    columns, rows = int(size[1] / cell) + 1, int(size[0] / cell) + 1
    x = (at[..., 0] / cell).long().clamp(0, columns - 1)
    y = (at[..., 1] / cell).long().clamp(0, rows - 1)
    index = ((torch.arange(keys, device=at.device)[:, None] * rows + y) * columns + x).flatten()
    grid = values.new_zeros(keys * rows * columns, channels)
    grid.index_add_(0, index, (values * counted[..., None]).flatten(0, 1))
    grid = F.pad(grid.view(keys, rows, columns, channels), (0, 0, 1, 1, 1, 1))
    side, middle, _ = KERNEL
    grid = side * (grid[:, :-2] + grid[:, 2:]) + middle * grid[:, 1:-1]
    grid = side * (grid[:, :, :-2] + grid[:, :, 2:]) + middle * grid[:, :, 1:-1]
    return grid.reshape(-1, channels)[index].view(keys, count, channels)
