"""Prompt gap: how much better the generator explains a clip with the prompt than with the negative prompt.

For a clean latent z, noise eps and a high level s, z_s = (1 - s) z + s eps:
gap = mean (v(z_s, s, negative) - (eps - z))^2 - mean (v(z_s, s, prompt) - (eps - z))^2.
It is DiffusionITM's score (arXiv 2305.16397), the difference that diffusion classifiers (arXiv 2303.16203) read, for a flow
model. At high noise the model must guess the clip's content from the prompt, so the gap measures whether the clip shows it.
"""

import torch
from torch import Tensor

from .flow_residual import residual
from .renoise import shared_noise
from .reward import CLEAN, FINISHED, ClipView, RewardInfo, SingleFigure

SIGMAS = (0.93,)
NOISES = 4
# Predictions of the clean latent tell something from here on.
HIGHEST = 0.97


class PromptGap(SingleFigure):
    """The gap of finished latents or of predictions of them; higher is better.

    sigmas: levels; noises: draws per level, shared by all clips; seed: of the draws.
    """

    def __init__(self, sigmas: tuple[float, ...] = SIGMAS, noises: int = NOISES, seed: int = 0):
        if not sigmas or not all(0 < s < 1 for s in sigmas) or noises < 1:
            raise ValueError(f"expected sigmas between 0 and 1, and noises >= 1; found {sigmas}, {noises}")
        self.sigmas, self.noises, self.seed = tuple(sigmas), noises, seed
        self.info = RewardInfo(
            name="prompt gap",
            reads=CLEAN,
            meaning=(
                "how much smaller the model's error for the clip with noise added is with the prompt than with the negative "
                "prompt, around 0 for a clip that does not show the prompt; comparable for one prompt and size only"
            ),
            sigmas=(FINISHED, HIGHEST),
            forwards=2 * len(sigmas) * noises,
        )

    @torch.no_grad()
    def measure(self, view: ClipView) -> Tensor:
        """Figures [B, 1]."""
        z = view.clean().float()
        total = torch.zeros(len(z), device=z.device)
        for level, sigma in enumerate(self.sigmas):
            for draw in range(self.noises):
                noise = shared_noise(z, self.seed, level * self.noises + draw)
                x = (1 - sigma) * z + sigma * noise
                for sign, negative in ((1.0, True), (-1.0, False)):
                    error = residual(view.velocity(x, sigma, negative).float(), noise, z)
                    total += sign * error.mean(dim=(1, 2, 3))
        return (total / (len(self.sigmas) * self.noises))[:, None].cpu()
