"""Pixel by pixel difference of two pictures: squared error and structural dissimilarity."""

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """[3, ...] in [0, 1], twice -> [...], mean over the channels."""
    return (a - b).square_().mean(dim=0)


def luminance(x: Tensor) -> Tensor:
    """[3, ...] -> [...], the weights of Rec. 601."""
    return (x[0] * 0.299).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114)


def dssim(a: Tensor, b: Tensor) -> Tensor:
    """(1 - SSIM) / 2 pixel by pixel (Wang et al. 2004), 0 to 1. a, b: [N, H, W] in [0, 1].

    Gaussian window of 11 pixels and sigma 1.5, normalised at the border by what of it lies in the picture.
    """
    stack = torch.stack([a, b, a * a + b * b, a * b], dim=1)
    mean_a, mean_b, squares, product = _blur(stack).unbind(1)
    both, energy = mean_a * mean_b, mean_a.square() + mean_b.square()
    ssim = (2 * both + C1) * (2 * (product - both) + C2) / ((energy + C1) * (squares - energy + C2))
    return (1 - ssim).div_(2).clamp_(0, 1)


def gaussian(like: Tensor) -> Tensor:
    """The window's weights [11], of sum 1."""
    at = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    weights = (-at.square() / (2 * SIGMA**2)).exp()
    return weights / weights.sum()


def _blur(x: Tensor) -> Tensor:
    """[..., H, W], column by column and row by row; a window that leaves the picture is renormalised.

    Eleven shifted sums an axis: on a CPU several times as fast as a convolution of one channel.
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
