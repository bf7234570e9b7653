"""PRISM (arXiv 2606.20310) as a reward: a query head on the hidden states of the frozen network for a noisy latent."""


import torch
from torch import Tensor

from ..prism.files import LoadedHead
from .renoise import shared_noise
from .reward import FINISHED, NOISY, ClipView, RewardInfo, SingleFigure

# Finished clips are scored at the lowest noise levels of these that the head was trained on.
FINISHED_SIGMAS = (0.1, 0.2, 0.3)


class PrismReward(SingleFigure):
    """The mean of a head's dimensions for noisy latents; for finished ones the mean over a little noise."""

    def __init__(self, loaded: LoadedHead, seed: int = 0):
        self.loaded, self.seed = loaded, seed
        low, high = loaded.sigmas
        self.finished_sigmas = tuple(s for s in FINISHED_SIGMAS if low <= s <= high) or (low,)
        self.info = RewardInfo(
            name=f"PRISM head '{loaded.name}'",
            reads=NOISY,
            meaning=(
                "PRISM's preference score without a unit: of two clips the one with the higher score is more likely to be "
                "preferred; comparable for one prompt, head and noise level only"
            ),
            sigmas=(FINISHED, high),
            blocks=max(loaded.head.config.taps) + 1,
        )

    @torch.no_grad()
    def measure(self, view: ClipView) -> Tensor:
        """Figures [B, 1]."""
        if view.sigma > FINISHED:
            return self._score(view, view.noisy(), view.sigma)
        z, found = view.clean(), []
        for index, sigma in enumerate(self.finished_sigmas):
            found.append(self._score(view, sigma * shared_noise(z, self.seed, index) + (1 - sigma) * z, sigma))
        return torch.stack(found).mean(dim=0)

    def _score(self, view: ClipView, x: Tensor, sigma: float) -> Tensor:
        head = self.loaded.head
        device = next(head.parameters()).device
        visual, text, mask = view.features(x, sigma, head.config.taps)
        level = torch.full((x.shape[0],), sigma, device=device)
        # Layers of a head may be in another dtype than the network.
        dtype = head.norm.weight.dtype
        scores = head([v.to(device, dtype) for v in visual], text.to(device, dtype), mask.to(device), level)
        return scores.float().mean(dim=1, keepdim=True).cpu()
