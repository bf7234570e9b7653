"""Figures that say what a manifold can tell apart and what a correction does to detail."""

import torch
import torch.nn.functional as F
from torch import Tensor


def blur(z: Tensor) -> Tensor:
    """z [..., H, W] averaged over 3 x 3 positions (edges replicated): what over-smoothing does to a latent."""
    flat = z.reshape(1, -1, *z.shape[-2:])
    return F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1).reshape(z.shape)


def half_blur(z: Tensor) -> Tensor:
    """The mean of z [..., H, W] and its blur."""
    return 0.5 * (z + blur(z))


def add_noise(z: Tensor, level: float = 0.3, seed: int = 0) -> Tensor:
    """z plus Gaussian noise of standard deviation `level`, from a CPU generator of its own."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    return z + level * noise.to(z)


def high_frequency_share(z: Tensor) -> float:
    """Share of the spatial FFT energy of z [..., H, W] above a quarter of Nyquist, the mean left out; 0 to 1."""
    z = z.float()
    energy = torch.fft.fft2(z - z.mean(dim=(-2, -1), keepdim=True)).abs().square()
    fy, fx = (torch.fft.fftfreq(n, device=z.device) for n in z.shape[-2:])
    high = torch.hypot(fy[:, None], fx[None, :]) > 0.125
    return float(energy[..., high].sum() / energy.sum().clamp_min(1e-12))


def auroc(negative: Tensor, positive: Tensor) -> float:
    """Probability that a value of `positive` exceeds one of `negative`, ties counted half; 0.5 is chance."""
    values = torch.cat([negative.flatten(), positive.flatten()]).double()
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse][negative.numel():]
    n, m = negative.numel(), positive.numel()
    return float((ranks.sum() - m * (m + 1) / 2) / (n * m))
