"""Early Best-of-N with a PRISM head (arXiv 2606.20310) outside ComfyUI: at each checkpoint of a plan the worst drop out.

Forwards of dropped candidates are not computed, so that a search can be timed. A conditional forward that was scored is
resumed from its tokens after the head's last tap. Candidates run one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.prism import race
from ..kernels.prism.plan import Plan
from ..wan.sampling import Denoiser, euler
from ..wan.text_padding import LENGTH, use_bias
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

    def evaluate(self, calls: Sequence[VelocityRequest], features: Sequence[Tensor | None]) -> list[Tensor]:
        """The velocity of each call; with features (what `score` gave for it), the conditional pass is resumed there."""
        out = []
        for call, tokens in zip(calls, features, strict=True):
            if tokens is None:
                self.blocks += self.whole
                out.append(self.denoiser.velocity(call.x, call.sigma))
            else:
                self.blocks += self.whole - self.tapped
                out.append(self._resume(call, tokens))
        return out

    @torch.no_grad()
    def score(self, calls: Sequence[VelocityRequest]) -> list[tuple[float, Tensor]]:
        """(mean of the head's dimensions, tokens [1, N, width] after its last tap) of each call."""
        head, text, bias = self.scorer.head, *self._text(0)
        dtype = head.norm.weight.dtype
        out = []
        for call in calls:
            sigma = torch.tensor([call.sigma], device=text.device)
            visual, words = self.scorer.dit.features(call.x.to(text), sigma, text, head.config.taps, bias)
            self.blocks += self.tapped
            scores = head([v.to(dtype) for v in visual], words.to(dtype), self.mask, sigma)
            out.append((float(scores.mean()), visual[-1]))
        return out

    @torch.no_grad()
    def _resume(self, call: VelocityRequest, tokens: Tensor) -> Tensor:
        dit, (text, bias) = self.denoiser.dit, self._text(0)
        conditional = resume_forward(dit, call.x.to(text), call.sigma, text, bias, tokens, self.tapped).to(call.x)
        if not self.denoiser.guided:
            return conditional
        text, bias = self._text(1)
        use_bias(dit, bias)
        time = torch.tensor([1000.0 * call.sigma], device=text.device)
        unconditional = dit(call.x.to(text), time, text, return_dict=False)[0].to(call.x)
        return unconditional + self.denoiser.cfg * (conditional - unconditional)

    def _text(self, row: int) -> tuple[Tensor, Tensor]:
        """Text [1, L, D] and attention bias of the prompt (0) or of the negative prompt (1)."""
        return self.denoiser.text[row : row + 1], self.denoiser.bias[row : row + 1]


def search(plan: Plan, network: GuidedNetwork, noises: Sequence[Tensor], sigmas: Sequence[float]) -> race.RaceResult:
    """Early Best-of-N by Euler steps. noises: one [1, C, T, H, W] a candidate, unit variance; sigmas: the schedule from 1 to 0
    that the plan was made for. The outcome's results are the winners' latents [1, C, T, H, W], normalised, best first."""
    return race.run(plan, lambda i, ask: euler(RacedDenoiser(ask), noises[i], sigmas), network)


def resume_forward(
    dit: torch.nn.Module, x: Tensor, sigma: float, text: Tensor, bias: Tensor | None, tokens: Tensor, first_block: int
) -> Tensor:
    """The output [1, C, T, H, W] of diffusers' WanTransformer3DModel, given the tokens [1, N, width] before `first_block`.

    x: the model's input, for its shape; sigma: 0..1; text: [1, L, D]; bias: of `text_padding`, or None.
    """
    use_bias(dit, bias)
    rotary = dit.rope(x)
    time = torch.tensor([1000.0 * sigma], device=text.device)
    embedding, projection, words, _ = dit.condition_embedder(time, text, None)
    projection = projection.unflatten(1, (6, -1))
    hidden = tokens
    for block in dit.blocks[first_block:]:
        hidden = block(hidden, words, projection, rotary)
    shift, scale = (dit.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
    hidden = dit.proj_out((dit.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
    _, _, frames, height, width = x.shape
    a, b, c = dit.config.patch_size
    grid = hidden.view(1, frames // a, height // b, width // c, a, b, c, -1)
    return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(1, -1, frames, height, width)
