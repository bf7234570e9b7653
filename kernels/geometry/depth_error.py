"""Relative depth error between two views, with occlusion masking; edges; VideoGPA's MVCS (arXiv 2601.23286)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .cameras import EPSILON, pixel_transform, warp

# Relative errors are truncated here.
TRUNCATION = 0.2
# A point farther behind the other view's surface than this share of that surface's depth is occluded and not measured.
OCCLUSION = 0.05
# Second difference of the inverse depth, as a share of it, from which on a pixel is at an edge. It is 0 on all planes.
EDGE = 0.05


def sample(values: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear samples [C, h, w] of values [C, H, W] at pixel coordinates u, v [h, w], zero-padded."""
    grid = torch.stack([u * (2 / max(values.shape[2] - 1, 1)) - 1, v * (2 / max(values.shape[1] - 1, 1)) - 1], dim=-1)
    return F.grid_sample(values[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def edges(depth: Tensor) -> Tensor:
    """Mask of the pixels that are at most one pixel away from a jump of the depth, bool [S, H, W].

    Depth models place such pixels between the two surfaces. depth: [S, H, W], NaN where there is none; that is an edge too.
    """
    inverse = 1 / depth
    found = torch.zeros_like(depth, dtype=torch.bool)
    for axis in (1, 2):
        length = depth.shape[axis] - 2
        if length > 0:
            before, middle, after = (inverse.narrow(axis, i, length) for i in range(3))
            # Comparisons with NaN are false.
            flat = ((before + after - 2 * middle).abs_() <= EDGE * middle).logical_not_()
            found.narrow(axis, 1, length).logical_or_(flat)
    for axis in (1, 2):
        length, wider = depth.shape[axis] - 1, found.clone()
        wider.narrow(axis, 1, length).logical_or_(found.narrow(axis, 0, length))
        wider.narrow(axis, 0, length).logical_or_(found.narrow(axis, 1, length))
        found = wider
    return found


def relative_error(depth: Tensor, K: Tensor, world_to_camera: Tensor, source: int, target: int, step: int = 1) -> Tensor:
    """Relative depth error min(|D(u') - z'| / z', 0.2) of every step-th pixel of view `source`, warped into view `target`.

    u' is the pixel's position and z' its depth in the target; D is the target's depth map. depth: [S, H, W], NaN for pixels
    without depth; K: [S, 3, 3]; world_to_camera: [S, 4, 4].

    Returns [ceil(H / step), ceil(W / step)], NaN where the pixel has no depth, falls outside the target's image, or is
    occluded there, that is more than 5% behind the surface: z' > 1.05 D. A surface in only one of the two depth maps may be
    masked as occluded in one direction but is measured in the other, so compute both directions.
    """
    h, w = depth.shape[1:]
    A, b = pixel_transform(K, world_to_camera, source, target)
    A = [[row[0] * step, row[1] * step, row[2]] for row in A]
    x, y, z = warp(depth[source, ::step, ::step], A, b)
    nonzero = z + EPSILON
    u, v = x.div_(nonzero), y.div_(nonzero)
    # A tolerance of 5e-4 pixels, so that pixels at the border are not lost to rounding.
    seen = (z > 0) & (u >= -5e-4) & (u <= w - 1 + 5e-4) & (v >= -5e-4) & (v <= h - 1 + 5e-4)
    there = sample(depth[target][None], u.masked_fill_(~seen, 0).clamp_(0, w - 1), v.masked_fill_(~seen, 0).clamp_(0, h - 1))[
        0
    ]
    error = ((there - z).abs_() / z).clamp_(max=TRUNCATION)
    return error.masked_fill_(~(seen & (z <= there * (1 + OCCLUSION))), torch.nan)


def neighbour_errors(depth: Tensor, K: Tensor, world_to_camera: Tensor, step: int = 1) -> Tensor:
    """Mean of each view's relative_error to the previous and to the next view, [S, ...]; NaN where both are NaN."""
    s = len(depth)
    maps = []
    for i in range(s):
        pair = [relative_error(depth, K, world_to_camera, i, j, step) for j in (i - 1, i + 1) if 0 <= j < s]
        maps.append(torch.stack(pair).nanmean(dim=0))
    return torch.stack(maps)


def mvcs(depth: Tensor, K: Tensor, world_to_camera: Tensor) -> float:
    """VideoGPA's multi-view consistency score (MVCS) as published: exp(-mean over neighbours of mean (D_{i+1}(u') - z')^2).

    Returns 0 to 1, higher is better; 0 if no pixel lands in the next view. The exponent is in squared units of depth, so
    the score depends on the scene's scale. depth: [S, H, W], all finite; K: [S, 3, 3]; world_to_camera: [S, 4, 4].
    """
    h, w = depth.shape[1:]
    errors = []
    for i in range(len(depth) - 1):
        x, y, z = warp(depth[i], *pixel_transform(K, world_to_camera, i, i + 1))
        u, v = x / z.clamp(min=EPSILON), y / z.clamp(min=EPSILON)
        lands = (u >= 0) & (u < w) & (v >= 0) & (v < h) & (z > 0)
        if bool(lands.any()):
            errors.append(float((sample(depth[i + 1][None], u, v)[0] - z)[lands].square().mean()))
    return math.exp(-sum(errors) / len(errors)) if errors else 0.0
