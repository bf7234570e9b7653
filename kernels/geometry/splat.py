"""Points of several views drawn into one camera, one pixel a point, the nearest wins: the same bits on every run.

Drawing with repeated indices leaves it to chance which of two points stays. Here every point is one 64-bit number, its
depth's bits above its own number, and every pixel keeps the smallest: for depths above zero the bits order as the
depths do, and of equal depths the lower number wins. No gradients: which point is seen has none.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import EPSILON, pixel_transform, project, warp

# float32 holds whole numbers up to this exactly.
FLOAT32_INTEGERS = 1 << 24
UPPER = 1 if sys.byteorder == "little" else 0
EMPTY = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Splat:
    """What one camera sees. winner: [H, W] int64, view * H * W + pixel of the point that is seen, -1 where there is none;
    depth: [H, W] float32 in this camera, infinite where there is none; covered: bool [H, W].
    """

    winner: Tensor
    depth: Tensor
    covered: Tensor

    def gather(self, values: Tensor, background: float) -> Tensor:
        """values [C, S, H, W] of the points that are seen -> [C, H, W], `background` where there is none."""
        seen = values.reshape(len(values), -1).index_select(1, self.winner.clamp(min=0).view(-1))
        return seen.view(-1, *self.winner.shape).masked_fill_(~self.covered, background)


def splat(depth: Tensor, K: Tensor, world_to_camera: Tensor, target: int, sources: Sequence[int]) -> Splat:
    """The pixels of views `sources`, at their depth, drawn into view `target` at round half to even of (x, y) / z.

    depth: [S, H, W] float32 or float64; pixels without finite depth above zero are no points. A point counts if
    0 <= u < W, 0 <= v < H and z > 0 there. Raises ValueError for more than 2^32 points.
    """
    s, h, w = depth.shape
    if s * h * w > 1 << 32:
        raise ValueError(f"{s} views of {w}x{h} pixels: expected at most 2^32 points; score fewer views at a time")
    # A frame of one pixel around the picture takes all points that miss it.
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
        # Through int32, since the sum of a shifted and a plain number takes three times as long.
        upper.copy_(z.float().view(torch.int32))
        nearest.scatter_reduce_(0, at, key, "amin")
    nearest = nearest.view(h + 2, w + 2)[1:-1, 1:-1]
    covered = nearest != EMPTY
    bits = (nearest >> 32).to(torch.int32).view(torch.float32)
    winner = torch.where(covered, nearest & 0xFFFFFFFF, -1)
    return Splat(winner, torch.where(covered, bits, torch.inf), covered)


def subpixel_positions(points: Tensor, K: Tensor, world_to_camera: Tensor, seen: Splat) -> tuple[Tensor, Tensor]:
    """Where the seen points lie before rounding: u, v [H, W] in one camera, the pixel itself where there is none.

    points: [3, S, H, W] in the world; K [3, 3] and world_to_camera [4, 4] of the camera that `seen` was drawn into.
    """
    h, w = seen.winner.shape
    at = torch.arange(h * w, device=points.device).view(h, w)
    u, v, _ = project(seen.gather(points, torch.nan), K, world_to_camera)
    return tuple(torch.where(seen.covered, e, p.to(e.dtype)) for e, p in ((u, at % w), (v, at // w)))
