"""Shell-LCC (arXiv 2606.30248) as a reward of clean latents: how far a clip's tokens are from the shell of good ones."""

import torch
from torch import Tensor

from ..shell_lcc.manifold import ShellManifold
from .reward import CLEAN, FINISHED, ClipView, RewardError, RewardInfo, SingleFigure


class ShellReward(SingleFigure):
    """|root mean square distance of a clip's tokens - the shell's radius|; lower is better."""

    def __init__(self, manifold: ShellManifold):
        self.manifold = manifold
        self.info = RewardInfo(
            name=f"Shell-LCC manifold '{manifold.name}'",
            reads=CLEAN,
            meaning=(
                "distance of the clip's tokens from the shell of good latents, in thicknesses of the region around the "
                "skeleton, 0 on the shell"
            ),
            higher_is_better=False,
            sigmas=(FINISHED, FINISHED),
        )

    @torch.no_grad()
    def measure(self, view: ClipView) -> Tensor:
        """Figures [B, 1]."""
        z = view.clean()
        if z.shape[1] != self.manifold.space.channels:
            raise RewardError(
                f"manifold '{self.manifold.name}' is of '{self.manifold.space.id}' latents, found {z.shape[1]} channels"
            )
        distance = self.manifold.distance(z.to(self.manifold.device))
        rms = distance.double().square().flatten(1).mean(dim=1).sqrt()
        return (rms - self.manifold.radius).abs().float()[:, None].cpu()
