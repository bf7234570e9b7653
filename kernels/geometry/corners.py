"""Shi-Tomasi corners (Shi and Tomasi 1994): smaller eigenvalue of the structure tensor, one corner per grid cell."""

import torch
from torch import Tensor
from torch.nn import functional as F

SCHARR = (3.0 / 32, 10.0 / 32, 3.0 / 32)
# Minimum eigenvalue of the window-averaged structure tensor, squared grey levels per pixel; below it, noise of one grey
# level looks like corners.
MIN_EIGENVALUE = 2.0
# Lines that are computed at once on a CPU, so that intermediate planes stay in its cache; and neighbouring lines that matter.
STRIP, HALO = 64, 4


def gradients(image: Tensor) -> tuple[Tensor, Tensor]:
    """Scharr derivatives in x and y of images [B, 1, H, W], grey levels per pixel; two tensors of the same shape."""
    side, middle, _ = SCHARR
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    # Shifted sums are ten times as fast as a one-channel convolution on a CPU.
    across = padded[..., 2:] - padded[..., :-2]
    along_x = side * (across[..., :-2, :] + across[..., 2:, :]) + middle * across[..., 1:-1, :]
    down = padded[..., 2:, :] - padded[..., :-2, :]
    along_y = side * (down[..., :-2] + down[..., 2:]) + middle * down[..., 1:-1]
    return along_x, along_y


def corner_strength(image: Tensor) -> Tensor:
    """Smaller eigenvalue of the structure tensor averaged over 7x7 pixels, zero-padded.

    image: [B, 1, H, W] grey levels. Returns [B, 1, H, W], squared grey levels per pixel.
    """
    lines = image.shape[2]
    if image.device.type != "cpu" or lines <= STRIP:
        return _strength(image)
    strips = []
    for first in range(0, lines, STRIP):
        above = min(first, HALO)
        strip = _strength(image[:, :, first - above : first + STRIP + HALO])
        strips.append(strip[:, :, above : above + STRIP])
    return torch.cat(strips, dim=2)


def _strength(image: Tensor) -> Tensor:
    """`corner_strength` in one piece."""
    x, y = gradients(image)
    products = F.pad(torch.cat([x * x, y * y, x * y], dim=1), (3, 3, 3, 3))
    a, c, b = (_sum_of_7(_sum_of_7(products, -2), -1) / 49).unbind(1)
    half = 0.5 * (a - c)
    return (0.5 * (a + c) - (half * half + b * b).sqrt())[:, None]


def _sum_of_7(x: Tensor, dim: int) -> Tensor:
    """Sums over windows of seven along a dimension, without padding (six shorter), in four additions."""
    n = x.shape[dim]
    two = x.narrow(dim, 0, n - 1) + x.narrow(dim, 1, n - 1)
    four = two.narrow(dim, 0, n - 3) + two.narrow(dim, 2, n - 3)
    return four.narrow(dim, 0, n - 6) + two.narrow(dim, 4, n - 6) + x.narrow(dim, 6, n - 6)


def find_corners(
    image: Tensor, cell: int, allowed: Tensor, taken: Tensor | None = None, least: float = MIN_EIGENVALUE
) -> Tensor:
    """The strongest corner of each grid cell, [N, 2] pixels (x, y), in the image's dtype.

    image: [H, W], grey levels 0 to 255; cell: side of a cell, pixels; allowed: bool [H, W], pixels that may be corners; taken:
    [M, 2] points whose cells are skipped; least: minimum corner strength. One corner per cell spreads the corners evenly, so
    that objects with little texture are not left out.
    """
    h, w = image.shape
    strength = corner_strength(image[None, None])
    strength = torch.where(allowed, strength, 0.0)
    strength = F.pad(strength, (0, -w % cell, 0, -h % cell))
    best, at = F.max_pool2d(strength, cell, cell, return_indices=True)
    keep = best[0, 0] >= least
    if taken is not None and len(taken):
        columns, rows = (taken / cell).floor().long().unbind(1)
        inside = (rows >= 0) & (rows < keep.shape[0]) & (columns >= 0) & (columns < keep.shape[1])
        keep[rows[inside], columns[inside]] = False
    index = at[0, 0][keep]
    wide = strength.shape[-1]
    return torch.stack([index % wide, torch.div(index, wide, rounding_mode="floor")], dim=1).to(image.dtype)
