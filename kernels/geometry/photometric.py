"""Per-pixel image differences: squared error and DSSIM (SSIM: Wang et al. 2004); noise of images (Immerkaer 1996)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
# Variance of white noise after `smoothed`, as a share.
SMOOTHED_NOISE = (6 / 16) ** 2
# The noise of an image is that of the smoothest tenth of its blocks, so that texture does not count.
BLOCK, SMOOTHEST = 16, 0.1
# Standard deviation above which it is no grain, but the content of the image.
MOST_GRAIN = 25 / 255


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Squared error, mean over the channels. a, b: [3, ...] in [0, 1]; returns [...]."""
    return (a - b).square_().mean(dim=0)


def luminance(x: Tensor) -> Tensor:
    """Luma of RGB [3, ...] by the Rec. 601 weights: [...]."""
    return (x[0] * 0.299).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114)


def dssim(a: Tensor, b: Tensor, noise: float | Tensor = 0.0) -> Tensor:
    """Structural dissimilarity (1 - SSIM) / 2 per pixel, [N, H, W], 0 to 1. a, b: [N, H, W] in [0, 1].

    noise: variances of the noise of a and of b, added up; independent noise adds them to the variances, and to no covariance,
    so that they are subtracted. The window is a Gaussian of 11 pixels and sigma 1.5, renormalised at the border to its part
    inside the image.
    """
    stack = torch.stack([a, b, a * a + b * b, a * b], dim=1)
    mean_a, mean_b, squares, product = _blur(stack).unbind(1)
    both, energy = mean_a * mean_b, mean_a.square() + mean_b.square()
    covariance = 2 * (product - both)
    # Twice the covariance is at most the sum of the variances.
    variances = torch.maximum(squares - energy - noise, covariance.abs())
    ssim = (2 * both + C1) * (covariance + C2) / ((energy + C1) * (variances + C2))
    return (1 - ssim).div_(2).clamp_(0, 1)


def smoothed(x: Tensor) -> Tensor:
    """[..., H, W] blurred with the kernel (1, 2, 1) / 4 along rows and columns, replicated at the border."""
    for axis in (-1, -2):
        last = x.shape[axis] - 1
        out = x * 0.5
        out.narrow(axis, 1, last).add_(x.narrow(axis, 0, last), alpha=0.25)
        out.narrow(axis, 0, last).add_(x.narrow(axis, 1, last), alpha=0.25)
        for end in (0, last):
            out.select(axis, end).add_(x.select(axis, end), alpha=0.25)
        x = out
    return x


def grain(x: Tensor) -> Tensor:
    """Variance [S] of the white noise of images [S, H, W], from the smoothest blocks; 0 for images of less than 3 x 3 pixels.

    The difference of two Laplacians leaves noise of six times its standard deviation, and little of edges and ramps.
    """
    if min(x.shape[1:]) < 3:
        return x.new_zeros(len(x))
    rows = x[:, :-2] - 2 * x[:, 1:-1] + x[:, 2:]
    size = (rows[:, :, :-2] - 2 * rows[:, :, 1:-1] + rows[:, :, 2:]).abs_()[:, None]
    blocks = F.avg_pool2d(size, tuple(min(BLOCK, n) for n in size.shape[2:])).flatten(1)
    return (blocks.quantile(SMOOTHEST, dim=1) * (math.sqrt(math.pi / 2) / 6)).clamp(max=MOST_GRAIN).square()


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
