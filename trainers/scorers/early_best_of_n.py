"""Early Best-of-N with a PRISM head (arXiv 2606.20310) outside ComfyUI: at each checkpoint of a plan the worst drop out.

Forwards of dropped candidates are not computed, so that a search can be timed. Candidates run one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.prism import race
from ..kernels.prism.plan import Checkpoint, Plan
from ..wan.sampling import Denoiser, euler
from ..wan.text_padding import LENGTH
from .prism_network import Scorer


@dataclass(frozen=True)
class VelocityRequest:
    """A race.Call: the velocity of x [1, C, T, H, W] at noise level sigma in 0..1 is wanted."""

    x: Tensor
    sigma: float


@dataclass(frozen=True)
class RacedDenoiser:
    """What `euler` samples one candidate with: every velocity is asked of the race, which may pause the candidate there."""

    ask: race.Ask

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        return self.ask(VelocityRequest(x, sigma))


class GuidedNetwork:
    """A race.Network: velocities of a whole Wan transformer under classifier-free guidance, and a PRISM head's scores.

    dit: diffusers' WanTransformer3DModel; scorer: a head on the first blocks of the same weights, in the same dtype and on the
    same device; words, negative: embedded texts [L, D] without padding; cfg 1 runs the conditional pass alone.
    blocks: how many transformer blocks have been run so far.
    """

    def __init__(self, dit: torch.nn.Module, scorer: Scorer, words: Tensor, negative: Tensor | None, cfg: float):
        self.denoiser = Denoiser(dit, [words], negative, cfg)
        self.scorer, self.blocks = scorer, 0
        self.tapped = max(scorer.head.config.taps) + 1
        self.whole = len(dit.blocks) * (2 if self.denoiser.guided else 1)
        positions = torch.arange(self.denoiser.text.shape[1], device=self.denoiser.text.device)
        self.mask = positions[None] < min(len(words), LENGTH)

    def evaluate(self, calls: Sequence[VelocityRequest]) -> list[Tensor]:
        """The velocity of each call."""
        self.blocks += self.whole * len(calls)
        return [self.denoiser.velocity(call.x, call.sigma) for call in calls]

    @torch.no_grad()
    def score(self, calls: Sequence[VelocityRequest], checkpoint: Checkpoint) -> list[list[float]]:
        """The mean of the head's dimensions for each call, by a conditional forward that ends at the head's last tap."""
        # The prompt's row; the negative prompt's follows it.
        head, text, bias = self.scorer.head, self.denoiser.text[:1], self.denoiser.bias[:1]
        dtype = head.norm.weight.dtype
        out = []
        for call in calls:
            sigma = torch.tensor([call.sigma], device=text.device)
            visual, words = self.scorer.dit.features(call.x.to(text), sigma, text, head.config.taps, bias)
            self.blocks += self.tapped
            scores = head([v.to(dtype) for v in visual], words.to(dtype), self.mask, sigma)
            out.append([float(scores.mean())])
        return out


def search(plan: Plan, network: GuidedNetwork, noises: Sequence[Tensor], sigmas: Sequence[float]) -> race.RaceResult:
    """Early Best-of-N by Euler steps. noises: one [1, C, T, H, W] a candidate, unit variance; sigmas: the schedule from 1 to 0
    that the plan was made for. The outcome's results are the winners' latents [1, C, T, H, W], normalised, best first."""

    def sample(i: int, ask: race.Ask) -> Tensor:
        return euler(RacedDenoiser(ask), noises[i], sigmas)

    found = race.run(plan, sample, network)
    if not plan.restarts:
        return found
    again = [sample(i, lambda call: network.evaluate([call])[0]) for i in found.winners]
    return race.RaceResult(again, found.winners, found.board)
