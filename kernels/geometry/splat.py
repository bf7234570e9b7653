"""Z-buffered point splatting of several views into one camera, one pixel per point, bitwise deterministic.

Scattering with repeated indices does not define which of two points is kept. Here each point is a 64-bit key, its depth's
float32 bits above its index, and each pixel keeps the minimum: for depths above zero, bit patterns sort like the depths,
and of equal depths the lower index is kept. Not differentiable.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import EPSILON, pixel_transform, project, warp

# float32 represents all integers up to this exactly.
FLOAT32_INTEGERS = 1 << 24
UPPER = 1 if sys.byteorder == "little" else 0
EMPTY = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Splat:
    """Z-buffer of one camera. winner: [H, W] int64, index of the visible point, view * H * W + pixel, -1 where there is none;
    depth: [H, W] float32 in this camera, infinite where there is none; covered: bool [H, W], True where a point is visible.
    """

    winner: Tensor
    depth: Tensor
    covered: Tensor

    def gather(self, values: Tensor, background: float) -> Tensor:
        """Values of the visible points: [C, S, H, W] -> [C, H, W], `background` at uncovered pixels."""
        seen = values.reshape(len(values), -1).index_select(1, self.winner.clamp(min=0).view(-1))
        return seen.view(-1, *self.winner.shape).masked_fill_(~self.covered, background)


def splat(depth: Tensor, K: Tensor, world_to_camera: Tensor, target: int, sources: Sequence[int]) -> Splat:
    """Splat the pixels of views `sources` into view `target` at (u, v) = (x, y) / z, rounded half to even.

    depth: [S, H, W] float32 or float64, NaN for pixels without a point; K: [S, 3, 3]; world_to_camera: [S, 4, 4]. A point is
    drawn if 0 <= u < W, 0 <= v < H and its depth z in the target is finite and above zero. Raises ValueError for more than
    2^32 points.
    """
    s, h, w = depth.shape
    if s * h * w > 1 << 32:
        raise ValueError(f"{s} views of {w}x{h} pixels: expected at most 2^32 points; score fewer views at a time")
    # A margin of one pixel around the image receives all points outside it.
    nearest = torch.full(((h + 2) * (w + 2),), EMPTY, dtype=torch.int64, device=depth.device)
    key = torch.empty(h * w, dtype=torch.int64, device=depth.device)
    upper = key.view(torch.int32).view(h, w, 2)[:, :, UPPER]
    for source in sources:
        x, y, z = warp(depth[source], *pixel_transform(K, world_to_camera, source, target))
        missed = ~((z > 0) & (z < torch.inf))
        nonzero = z + EPSILON
        u = x.div_(nonzero).round_().clamp_(-1, w)
        v = y.div_(nonzero).round_().clamp_(-1, h)
        if (h + 2) * (w + 2) >= FLOAT32_INTEGERS:
            u, v = u.double(), v.double()
        at = u.add_(w + 3).add_(v, alpha=w + 2).masked_fill_(missed, 0).long().view(-1)
        torch.arange(source * h * w, (source + 1) * h * w, out=key)
        # Written through an int32 view: a shift and an addition take three times as long.
        upper.copy_(z.float().view(torch.int32))
        nearest.scatter_reduce_(0, at, key, "amin")
    nearest = nearest.view(h + 2, w + 2)[1:-1, 1:-1]
    covered = nearest != EMPTY
    bits = (nearest >> 32).to(torch.int32).view(torch.float32)
    winner = torch.where(covered, nearest & 0xFFFFFFFF, -1)
    return Splat(winner, torch.where(covered, bits, torch.inf), covered)


def subpixel_positions(points: Tensor, K: Tensor, world_to_camera: Tensor, seen: Splat) -> tuple[Tensor, Tensor]:
    """Positions of the visible points before rounding: u, v, each [H, W]; the pixel's own position where there is none.

    points: [3, S, H, W] in world coordinates; K [3, 3] and world_to_camera [4, 4]: of the camera of the splat `seen`.
    """
    h, w = seen.winner.shape
    at = torch.arange(h * w, device=points.device).view(h, w)
    u, v, _ = project(seen.gather(points, torch.nan), K, world_to_camera)
    return tuple(torch.where(seen.covered, e, p.to(e.dtype)) for e, p in ((u, at % w), (v, at // w)))
