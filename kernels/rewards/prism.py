"""PRISM (arXiv 2606.20310) as a reward of noisy latents: a query head on the hidden states of the frozen network."""

import torch
from torch import Tensor

from ..prism.files import LoadedHead
from .reward import NOISY, ClipView, RewardInfo


class PrismReward:
    """The mean of a head's dimensions for noisy latents."""

    def __init__(self, loaded: LoadedHead):
        self.loaded = loaded
        self.info = RewardInfo(
            name=f"PRISM head '{loaded.name}'",
            reads=NOISY,
            meaning=(
                "PRISM's preference score without a unit: of two clips, the one with the higher score is more likely to be "
                "preferred; comparable for one prompt, head and noise level only"
            ),
            sigmas=loaded.sigmas,
            blocks=max(loaded.head.config.taps) + 1,
        )

    @torch.no_grad()
    def score(self, view: ClipView) -> Tensor:
        """Scores [B] of the view's noisy latents."""
        head = self.loaded.head
        device = next(head.parameters()).device
        x, sigma = view.noisy()
        visual, text, mask = view.features(x, sigma, head.config.taps)
        level = torch.full((x.shape[0],), sigma, device=device)
        scores = head([v.to(device) for v in visual], text.to(device), mask.to(device), level)
        return scores.float().mean(dim=1).cpu()
