"""Per-pixel image differences: squared error and DSSIM (SSIM: Wang et al. 2004)."""

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Squared error, mean over the channels. a, b: [3, ...] in [0, 1]; returns [...]."""
    return (a - b).square_().mean(dim=0)


def luminance(x: Tensor) -> Tensor:
    """Luma of RGB [3, ...] by the Rec. 601 weights: [...]."""
    return (x[0] * 0.299).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114)


def dssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural dissimilarity (1 - SSIM) / 2 per pixel, [N, H, W], 0 to 1. a, b: [N, H, W] in [0, 1].

    The window is a Gaussian of 11 pixels and sigma 1.5, renormalised at the border to its part inside the image.
    """
    stack = torch.stack([a, b, a * a + b * b, a * b], dim=1)
    mean_a, mean_b, squares, product = _blur(stack).unbind(1)
    both, energy = mean_a * mean_b, mean_a.square() + mean_b.square()
    ssim = (2 * both + C1) * (2 * (product - both) + C2) / ((energy + C1) * (squares - energy + C2))
    return (1 - ssim).div_(2).clamp_(0, 1)


def gaussian(like: Tensor) -> Tensor:
    """Weights [11] of the SSIM window, with sum 1 and the dtype and device of `like`."""
    at = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    weights = (-at.square() / (2 * SIGMA**2)).exp()
    return weights / weights.sum()


def _blur(x: Tensor) -> Tensor:
    """Separable Gaussian blur of [N, C, H, W], renormalised at the border.

    Eleven shifted sums per axis are several times as fast as a one-channel convolution on a CPU.
    """
    weights = gaussian(x).tolist()
    for axis in (-1, -2):
        x = _along(x, weights, axis) / _along(torch.ones_like(x[:1, :1]), weights, axis)
    return x


def _along(x: Tensor, weights: list[float], axis: int) -> Tensor:
    middle, length = len(weights) // 2, x.shape[axis]
    out = x * weights[middle]
    for shift in range(1, min(middle, length - 1) + 1):
        out.narrow(axis, shift, length - shift).add_(x.narrow(axis, 0, length - shift), alpha=weights[middle - shift])
        out.narrow(axis, 0, length - shift).add_(x.narrow(axis, shift, length - shift), alpha=weights[middle + shift])
    return out
