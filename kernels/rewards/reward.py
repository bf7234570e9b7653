"""What a reward is: a score of clips, what it reads, where it is valid, and what it costs.

A reward asks a ClipView for what it reads, so that one implementation serves a node inside a sampler, a node on finished
latents, and a trainer. It measures each clip on its own; candidates are ranked by `scores` over all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# What a reward reads. CLEAN: the finished latent, and before it is finished the latest prediction of it.
NOISY, CLEAN, FRAMES = "noisy latent", "clean latent", "decoded frames"
# Sampling at this noise level is over.
FINISHED = 0.0


class RewardError(ValueError):
    """A reward cannot score what it is given; the message gives the reason and what to do."""


@dataclass(frozen=True)
class RewardInfo:
    """Description of a reward.

    name: such as "flow residual"; reads: NOISY, CLEAN or FRAMES; meaning: what a score means, its unit and range, in words,
    without a full stop; higher_is_better: whether a larger figure is a better clip; sigmas: (lowest, highest) noise level of
    the clips at which the reward is known to work, FINISHED for finished clips; forwards: whole forwards of the network that
    scoring a clip takes; blocks: further single blocks; decodes: clips decoded to score one; typical: (lowest, highest)
    figure of most good clips where it is known.
    """

    name: str
    reads: str
    meaning: str
    higher_is_better: bool = True
    sigmas: tuple[float, float] = (FINISHED, 1.0)
    forwards: int = 0
    blocks: int = 0
    decodes: int = 0
    typical: tuple[float, float] | None = None

    @property
    def direction(self) -> str:
        """Such as "higher is better"."""
        return "higher is better" if self.higher_is_better else "lower is better"

    def cost(self, depth: int) -> int:
        """Transformer blocks that scoring a clip runs in a network of `depth` blocks."""
        return self.forwards * depth + self.blocks

    def valid_at(self, sigma: float) -> bool:
        """Whether the reward is known to work for clips at this noise level."""
        return self.sigmas[0] - 1e-3 <= sigma <= self.sigmas[1] + 1e-3


class ClipView(Protocol):
    """Access to a batch of clips of one prompt. A method raises RewardError where the clips do not have what it returns.

    Latents are [B, C, T, H, W], normalised per channel; sigma is the share of noise, x = sigma * noise + (1 - sigma) * z.
    """

    sigma: float
    """The noise level that the clips are at, FINISHED for finished ones."""

    def noisy(self) -> Tensor:
        """The noisy latents at `sigma`."""

    def clean(self) -> Tensor:
        """The finished latents, or the latest prediction of them."""

    def frames(self) -> Sequence[Tensor]:
        """The decoded frames of each clip, [T, H, W, 3] in 0..1."""

    def velocity(self, x: Tensor, sigma: float, negative: bool = False) -> Tensor:
        """The network's velocity noise - z for noisy latents x, under the prompt alone or under the negative prompt alone."""

    def features(self, x: Tensor, sigma: float, taps: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Hidden states [B, N, width] after the blocks `taps`, the embedded text [B, L, width], and the mask of its words
        [B, L], of a forward under the prompt that ends at the last tap."""


class Reward(Protocol):
    """A score of clips. info: its description."""

    info: RewardInfo

    def measure(self, view: ClipView) -> Tensor:
        """Figures [B, D] of the clips, float32 on the CPU; the first is the one that `info` describes. Raises RewardError."""

    def scores(self, figures: Tensor) -> Tensor:
        """Scores [N], higher is better, of N clips of one prompt with the figures [N, D]."""


class SingleFigure:
    """A reward of one figure: a clip's score is the figure, or minus the figure where lower is better."""

    info: RewardInfo

    def scores(self, figures: Tensor) -> Tensor:
        return figures[:, 0] if self.info.higher_is_better else -figures[:, 0]
