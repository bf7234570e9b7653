"""Diagnostics for Shell-LCC: degraded latents (blur, noise), high-frequency share and AUROC.

They measure what a manifold separates and how much detail a correction keeps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def blur(z: Tensor) -> Tensor:
    """3 x 3 box blur of z [..., H, W] with replicated edges; models over-smoothing."""
    flat = z.reshape(1, -1, *z.shape[-2:])
    return F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1).reshape(z.shape)


def half_blur(z: Tensor) -> Tensor:
    """Mean of z [..., H, W] and `blur(z)`."""
    return 0.5 * (z + blur(z))


def add_noise(z: Tensor, level: float = 0.3, seed: int = 0) -> Tensor:
    """z plus Gaussian noise of standard deviation `level`; same shape. The noise is drawn on the CPU with `seed`."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    return z + level * noise.to(z)


def high_frequency_share(z: Tensor) -> float:
    """Share (0 to 1) of the spatial FFT energy of z [..., H, W] above a quarter of Nyquist, without the spatial mean."""
    z = z.float()
    energy = torch.fft.fft2(z - z.mean(dim=(-2, -1), keepdim=True)).abs().square()
    fy, fx = (torch.fft.fftfreq(n, device=z.device) for n in z.shape[-2:])
    high = torch.hypot(fy[:, None], fx[None, :]) > 0.125
    return float(energy[..., high].sum() / energy.sum().clamp_min(1e-12))


def auroc(negative: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: probability that a value of `positive` exceeds one of `negative`, ties counted half.

    Tensors of any shape; 0 to 1, 0.5 is chance.
    """
    values = torch.cat([negative.flatten(), positive.flatten()]).double()
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse][negative.numel():]
    n, m = negative.numel(), positive.numel()
    return float((ranks.sum() - m * (m + 1) / 2) / (n * m))
