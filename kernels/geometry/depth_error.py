"""Do the depth maps of two views tell of one surface?"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .cameras import EPSILON, pixel_transform, warp

TRUNCATION = 0.2
# A point this share behind the surface that the other view sees is hidden by it and tells nothing.
OCCLUSION = 0.05


def sample(values: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """values [C, H, W] at pixel coordinates u, v [h, w] -> [C, h, w], bilinear, zero outside the picture."""
    grid = torch.stack([u * (2 / max(values.shape[2] - 1, 1)) - 1, v * (2 / max(values.shape[1] - 1, 1)) - 1], dim=-1)
    return F.grid_sample(values[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def relative_error(depth: Tensor, K: Tensor, world_to_camera: Tensor, source: int, target: int, step: int = 1) -> Tensor:
    """min(|D(u') - z'| / z', 0.2) for every step-th pixel of view `source`: z' its depth in `target`, D that view's own.

    [ceil(H / step), ceil(W / step)], NaN where nothing can be said: the pixel has no depth, it leaves the target's
    picture, or it is hidden there. Hidden is what lies more than 5% behind the surface: z' > 1.05 D. A surface that only
    one view believes in still counts, since it stands in front of the other's when the pair is looked at from the other
    side; so use both directions.
    """
    h, w = depth.shape[1:]
    A, b = pixel_transform(K, world_to_camera, source, target)
    A = [[row[0] * step, row[1] * step, row[2]] for row in A]
    x, y, z = warp(depth[source, ::step, ::step], A, b)
    nonzero = z + EPSILON
    u, v = x.div_(nonzero), y.div_(nonzero)
    # Half a thousandth of a pixel, lest a pixel at the border is lost to rounding.
    seen = (z > 0) & (u >= -5e-4) & (u <= w - 1 + 5e-4) & (v >= -5e-4) & (v <= h - 1 + 5e-4)
    there = sample(depth[target][None], u.masked_fill_(~seen, 0).clamp_(0, w - 1), v.masked_fill_(~seen, 0).clamp_(0, h - 1))[
        0
    ]
    error = ((there - z).abs_() / z).clamp_(max=TRUNCATION)
    return error.masked_fill_(~(seen & (z <= there * (1 + OCCLUSION))), torch.nan)


def neighbour_errors(depth: Tensor, K: Tensor, world_to_camera: Tensor, step: int = 1) -> Tensor:
    """relative_error of every view to the one before and the one after it, their mean [S, ...], NaN where neither tells."""
    s = len(depth)
    maps = []
    for i in range(s):
        pair = [relative_error(depth, K, world_to_camera, i, j, step) for j in (i - 1, i + 1) if 0 <= j < s]
        maps.append(torch.stack(pair).nanmean(dim=0))
    return torch.stack(maps)


def mvcs(depth: Tensor, K: Tensor, world_to_camera: Tensor) -> float:
    """VideoGPA's multi-view consistency score as published: exp(-mean over neighbours of mean (D_{i+1}(u') - z')^2).

    0 to 1, higher is better, 0 where no pixel lands in the next view; in the geometry's unit squared, so that it changes
    with the scene's scale. depth: [S, H, W], all finite.
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
