"""Early Best-of-N outside ComfyUI, for real and not from tables: what is pruned does not run, so that it can be timed.

A conditional forward that was scored goes on from its tokens after the tap. Candidates run one after another.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.kernels.prism import race
from trainers.kernels.prism.plan import Plan
from trainers.prism import train_loop as prism_train
from trainers.wan import sampling as wan_sampling
from trainers.wan.text_padding import use_bias

from . import pipeline
from .candidates import Caption, finished, seeds


@dataclass(frozen=True)
class Call:
    """What a candidate asks for: the velocity of x [1, C, T, H, W] at sigma."""

    x: Tensor
    sigma: float


class Network:
    """Answers and scores calls, one at a time. blocks: of the transformer, that were run."""

    def __init__(self, world: pipeline.ToyWorld, scorer: prism_train.Scorer, caption: Caption):
        self.denoiser = world.denoiser([caption.text])
        self.scorer, self.caption, self.blocks = scorer, caption, 0
        self.depth = len(world.dit.blocks)
        self.tap = max(scorer.head.config.taps)

    def evaluate(self, calls: Sequence[Call], features: Sequence[Tensor | None]) -> list[Tensor]:
        """As race.Network."""
        out = []
        for call, known in zip(calls, features, strict=True):
            if known is None:
                self.blocks += 2 * self.depth
                out.append(self.denoiser.velocity(call.x, call.sigma))
            else:
                self.blocks += 2 * self.depth - (self.tap + 1)
                out.append(self._go_on(call, known))
        return out

    @torch.no_grad()
    def score(self, calls: Sequence[Call]) -> list[tuple[float, Tensor]]:
        """As race.Network; features are the tokens after the tap."""
        out = []
        for call in calls:
            dit, config = self.scorer.dit, self.scorer.head.config
            text, bias = self.denoiser.text[:1], self._bias(0)
            sigma = torch.tensor([call.sigma])
            visual, words = dit.features(call.x, sigma, text, config.taps, bias)
            mask = torch.ones(words.shape[:2], dtype=torch.bool)
            mask[:, len(self.caption.words) :] = False
            self.blocks += self.tap + 1
            out.append((float(self.scorer.head(visual, words, mask, sigma).mean()), visual[-1]))
        return out

    @torch.no_grad()
    def _go_on(self, call: Call, tokens: Tensor) -> Tensor:
        """The velocity, the conditional pass being done up to the tap."""
        conditional = velocity(self.denoiser.dit, call, self.denoiser.text[:1], self._bias(0), tokens, self.tap + 1)
        unconditional = velocity(self.denoiser.dit, call, self.denoiser.text[1:], self._bias(1))
        return unconditional + self.denoiser.cfg * (conditional - unconditional)

    def _bias(self, row: int) -> Tensor | None:
        return None if self.denoiser.bias is None else self.denoiser.bias[row : row + 1]


def velocity(dit, call: Call, text: Tensor, bias: Tensor | None, tokens: Tensor | None = None, first: int = 0) -> Tensor:
    """One forward of diffusers' WanTransformer3DModel for one text; from block `first` on where tokens are given."""
    use_bias(dit, bias)
    if tokens is None:
        return dit(call.x, torch.tensor([1000.0 * call.sigma]), text, return_dict=False)[0]
    rotary = dit.rope(call.x)
    embedding, projection, words, _ = dit.condition_embedder(torch.tensor([1000.0 * call.sigma]), text, None)
    projection = projection.unflatten(1, (6, -1))
    hidden = tokens
    for block in dit.blocks[first:]:
        hidden = block(hidden, words, projection, rotary)
    shift, scale = (dit.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
    hidden = dit.proj_out((dit.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
    _, _, frames, height, width = call.x.shape
    a, b, c = dit.config.patch_size
    grid = hidden.view(1, frames // a, height // b, width // c, a, b, c, -1)
    return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(1, -1, frames, height, width)


@dataclass(frozen=True)
class Timed:
    """One search. winner: which candidate; seconds; blocks: that ran."""

    winner: int
    z: Tensor
    seconds: float
    blocks: int


def search(world, scorer, caption: Caption, index: int, plan: Plan) -> Timed:
    """Best-of-N by a plan, over the candidates of caption `index`."""
    network = Network(world, scorer, caption)
    path = pipeline.sigmas(pipeline.STEPS, pipeline.SHIFT).tolist()
    noises = pipeline.initial_noise(seeds(index, plan.candidates)).split(1)

    def start(i: int, ask: race.Ask) -> Tensor:
        class Asking:
            def velocity(self, x: Tensor, sigma: float) -> Tensor:
                return ask(Call(x, sigma))

        return wan_sampling.euler(Asking(), noises[i], path)

    began = time.perf_counter()
    found = race.run(plan, start, network)
    seconds = time.perf_counter() - began
    return Timed(found.winners[0], found.results[0], seconds, network.blocks)


def full(world, scorer, caption: Caption, index: int, count: int) -> Timed:
    """Plain Best-of-N: every candidate to the end, then scored as PRISM Score does. Blocks are the sampling's."""
    path = pipeline.sigmas(pipeline.STEPS, pipeline.SHIFT).tolist()
    began = time.perf_counter()
    denoiser = world.denoiser([caption.text])
    z = [wan_sampling.euler(denoiser, x, path) for x in pipeline.initial_noise(seeds(index, count)).split(1)]
    seconds = time.perf_counter() - began
    scores = torch.cat([finished({"head": scorer}, one, caption, index)["head"] for one in z])
    winner = int(scores.argmax())
    return Timed(winner, z[winner], seconds, 2 * len(world.dit.blocks) * pipeline.STEPS * count)
