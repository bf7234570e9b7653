"""What a reward is: a score of clips, what it reads, where it is valid, and what it costs.

A reward asks a ClipView for what it reads, so that one implementation serves a node inside a sampler, a node on finished
latents, and a trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# What a reward reads.
NOISY, PREDICTION, LATENT, FRAMES = "noisy latent", "predicted clean latent", "finished latent", "decoded frames"


class RewardError(ValueError):
    """A reward cannot score what it is given; the message gives the reason and what to do."""


@dataclass(frozen=True)
class RewardInfo:
    """Description of a reward.

    name: such as "flow residual"; reads: NOISY, PREDICTION, LATENT or FRAMES; meaning: what a score means, its unit and range,
    in words, without a full stop; higher_is_better: whether a larger score is a better clip; sigmas: (lowest, highest) noise
    level at which scores are valid, for NOISY and PREDICTION; blocks: transformer blocks that scoring one clip runs;
    decodes: clips that are decoded to score one; typical: (lowest, highest) score of most good clips where it is known.
    """

    name: str
    reads: str
    meaning: str
    higher_is_better: bool = True
    sigmas: tuple[float, float] = (0.0, 1.0)
    blocks: int = 0
    decodes: int = 0
    typical: tuple[float, float] | None = None

    @property
    def direction(self) -> str:
        """Such as "higher is better"."""
        return "higher is better" if self.higher_is_better else "lower is better"


class ClipView(Protocol):
    """Access to a batch of clips of one prompt. A method raises RewardError where the clips do not have what it returns.

    Latents are [B, C, T, H, W], normalised per channel; sigma is the share of noise, x = sigma * noise + (1 - sigma) * z.
    """

    def noisy(self) -> tuple[Tensor, float]:
        """The noisy latents and their sigma."""

    def prediction(self) -> Tensor:
        """The latest prediction of the clean latents."""

    def latent(self) -> Tensor:
        """The finished latents."""

    def frames(self) -> Sequence[Tensor]:
        """The decoded frames of each clip, [T, H, W, 3] in 0..1."""

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The network's velocity noise - z for noisy latents x, under the prompt alone (no classifier-free guidance)."""

    def features(self, x: Tensor, sigma: float, taps: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Hidden states [B, N, width] after the blocks `taps`, the embedded text [B, L, width], and the mask of its words
        [B, L], of a forward under the prompt that ends at the last tap."""


class Reward(Protocol):
    """A score of clips. info: its description."""

    info: RewardInfo

    def score(self, view: ClipView) -> Tensor:
        """Scores [B], float32 on the CPU, in the direction that `info` names. Raises RewardError."""


def oriented(scores: Tensor, info: RewardInfo) -> Tensor:
    """The scores with their sign such that higher is better."""
    return scores if info.higher_is_better else -scores
