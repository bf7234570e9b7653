"""Flow residual (Proprio, arXiv 2605.28230): how well the generator's own velocity explains a clip.

For a clean latent z, noise eps and a level s, z_s = (1 - s) z + s eps, and the residual is the mean of
(v(z_s, s, prompt) - (eps - z))^2. Proprio takes the mean over four levels and four noises; a weight of 1 / variance per
level changed nothing that could be measured here. The hybrid adds the residual where the latent moves:
(1 - motion) * mean + motion * mean weighted by the squared difference of neighbouring latent frames.
"""

import torch
from torch import Tensor

from .renoise import shared_noise
from .reward import CLEAN, FINISHED, ClipView, RewardInfo, SingleFigure

# Proprio's middle levels, and higher ones, which did better in the toy world (benchmarks/toy_world, results).
PUBLISHED_SIGMAS = (0.4, 0.5, 0.6)
SIGMAS = (0.7, 0.8, 0.9)
NOISES = 4


class FlowResidual(SingleFigure):
    """The residual of finished latents; lower is better.

    sigmas: levels; noises: draws per level, shared by all clips; seed: of the draws; motion: weight of the moving parts, 0.8
    for Proprio's hybrid.
    """

    def __init__(self, sigmas: tuple[float, ...] = SIGMAS, noises: int = NOISES, seed: int = 0, motion: float = 0.0):
        if not sigmas or not all(0 < s < 1 for s in sigmas) or noises < 1 or not 0 <= motion <= 1:
            raise ValueError(f"expected sigmas in 0..1, noises >= 1, motion in 0..1; found {sigmas}, {noises}, {motion}")
        self.sigmas, self.noises, self.seed, self.motion = tuple(sigmas), noises, seed, motion
        self.info = RewardInfo(
            name="flow residual",
            reads=CLEAN,
            meaning=(
                "mean squared error of the model's own velocity for the clip with noise added, 0 for a clip that the model "
                "explains perfectly; comparable for one prompt and size only"
            ),
            higher_is_better=False,
            sigmas=(FINISHED, FINISHED),
            forwards=len(sigmas) * noises,
        )

    @torch.no_grad()
    def measure(self, view: ClipView) -> Tensor:
        """Figures [B, 1]."""
        z = view.clean().float()
        weight = motion_weight(z) if self.motion else None
        total = torch.zeros(len(z), device=z.device)
        for level, sigma in enumerate(self.sigmas):
            for draw in range(self.noises):
                noise = shared_noise(z, self.seed, level * self.noises + draw)
                error = residual(view.velocity((1 - sigma) * z + sigma * noise, sigma).float(), noise, z)
                mean = error.mean(dim=(1, 2, 3))
                if weight is not None:
                    mean = (1 - self.motion) * mean + self.motion * (error * weight).mean(dim=(1, 2, 3))
                total += mean
        return (total / (len(self.sigmas) * self.noises))[:, None].cpu()


def residual(velocity: Tensor, noise: Tensor, z: Tensor) -> Tensor:
    """Squared error of the velocity, mean over channels: [B, C, T, H, W] -> [B, T, H, W]."""
    return (velocity - (noise - z)).square().mean(dim=1)


def motion_weight(z: Tensor) -> Tensor:
    """Weights [B, T, H, W] with mean 1: the squared difference to the neighbouring latent frames, mean over channels.

    All ones for a clip without motion or of a single frame.
    """
    if z.shape[2] < 2:
        return torch.ones_like(z[:, 0])
    change = z.diff(dim=2).square().mean(dim=1)
    # The first and the last frame have one neighbour each.
    both = torch.cat([change[:, :1], (change[:, 1:] + change[:, :-1]) / 2, change[:, -1:]], dim=1)
    mean = both.mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(mean > 0, both / mean.clamp_min(1e-12), torch.ones_like(both))
