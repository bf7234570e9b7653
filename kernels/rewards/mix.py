"""A weighted mix of rewards, each normalised among the candidates: figures of different units have no common scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reward import FRAMES, NOISY, ClipView, Reward, RewardInfo

RANK, Z = "rank", "z-score"
NORMALISATIONS = (Z, RANK)


class Mix:
    """The weighted sum of rewards' scores, normalised over the clips of a prompt. parts: (reward, weight)."""

    def __init__(self, parts: Sequence[tuple[Reward, float]], normalise: str = Z):
        if not parts:
            raise ValueError("a mix needs at least one reward")
        if normalise not in NORMALISATIONS:
            raise ValueError(f"unknown normalisation '{normalise}': expected one of {', '.join(NORMALISATIONS)}")
        self.parts, self.normalise = tuple(parts), normalise
        infos = [reward.info for reward, _ in self.parts]
        reads = {info.reads for info in infos}
        self.info = RewardInfo(
            name="mix of " + ", ".join(f"{w:g} {i.name}" for i, (_, w) in zip(infos, self.parts, strict=True)),
            reads=next((kind for kind in (FRAMES, NOISY) if kind in reads), infos[0].reads),
            meaning=(
                f"weighted sum of rewards, each as its {normalise} among the candidates, 0 for an average candidate; it "
                "compares candidates of one run only"
            ),
            sigmas=(max(i.sigmas[0] for i in infos), min(i.sigmas[1] for i in infos)),
            forwards=sum(i.forwards for i in infos),
            blocks=sum(i.blocks for i in infos),
            decodes=sum(i.decodes for i in infos),
        )

    def measure(self, view: ClipView) -> Tensor:
        """Figures [B, D] of all parts, one after another."""
        return torch.cat([reward.measure(view) for reward, _ in self.parts], dim=1)

    def scores(self, figures: Tensor) -> Tensor:
        """Scores [N] of N clips with the figures [N, D]."""
        total, start = torch.zeros(len(figures)), 0
        for reward, weight in self.parts:
            width = getattr(reward, "width", 1)
            total += weight * normalised(reward.scores(figures[:, start : start + width]), self.normalise)
            start += width
        return total

    @property
    def width(self) -> int:
        """Number of figures of a clip."""
        return sum(getattr(reward, "width", 1) for reward, _ in self.parts)


def normalised(scores: Tensor, how: str) -> Tensor:
    """Scores [N] as z-scores, or as ranks from -1 (worst) to 1 (best), equal scores sharing the mean of their ranks.

    All zeros for equal scores. NaN stays NaN.
    """
    scores = scores.float()
    if len(scores) < 2:
        return scores * 0
    if how == Z:
        spread = scores.std(unbiased=False)
        return (scores - scores.mean()) / spread if float(spread) > 0 else scores * 0
    above = (scores[:, None] > scores[None, :]).sum(dim=1) - (scores[:, None] < scores[None, :]).sum(dim=1)
    return above / (len(scores) - 1) + scores * 0
