"""What a training step sees: which prompt, at which noise level, from which noise, and with --start noised of which clip.

Everything follows from (seed, step, index in the step): prompts in a new random order each epoch, the rest from a generator of
the index's own. So it does not matter which process has an item, or where a resumed run starts.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.tuning.noise_levels import NoiseLevels

# What a prediction starts from: pure noise whatever the noise level, as published, or noised latents of real clips.
NOISE, NOISED = "noise", "noised"
STARTS = (NOISE, NOISED)


@dataclass(frozen=True)
class Draw:
    """prompt: text id; sigma: noise level in (0, 1]; seed: of the noise; clip: key of the real clip, None for NOISE."""

    prompt: str
    sigma: float
    seed: int
    clip: str | None = None


@dataclass(frozen=True)
class Draws:
    """items: (prompt's text id, clip or None) to draw from; count: items a step, over all processes."""

    items: Sequence[tuple[str, str | None]]
    levels: NoiseLevels
    seed: int
    count: int

    def of_step(self, step: int) -> list[Draw]:
        """The step's `count` draws, step from 0."""
        return [self._at(step * self.count + j) for j in range(self.count)]

    def _at(self, number: int) -> Draw:
        epoch, place = divmod(number, len(self.items))
        item = self.items[_order(self.seed, len(self.items), epoch)[place]]
        g = torch.Generator().manual_seed(seed_of(self.seed, f"draw {number}"))
        sigma = float(self.levels.draw(1, g))
        return Draw(item[0], sigma, int(torch.randint(0, 2**62, (), generator=g)), item[1])


def table_of(
    items: Sequence[tuple[str, str | None]], sigmas: Sequence[float], noises: int, seed: int, name: str
) -> list[Draw]:
    """`noises` draws at each noise level, over the items in their order, with noises of their own."""
    rows = [(sigma, i, *items[i % len(items)]) for sigma in sigmas for i in range(noises)]
    return [Draw(prompt, sigma, seed_of(seed, f"{name} {i} {sigma:.6f}"), clip) for sigma, i, prompt, clip in rows]


def start_of(draws: Sequence[Draw], shape: Sequence[int], latents: Callable[[str], Tensor] | None) -> tuple[Tensor, Tensor]:
    """(x [B, C, T, h, w], sigma [B]), fp32 on the CPU: what the model is given.

    x is noise, or for draws with a clip sigma noise + (1 - sigma) z. shape: [C, T, h, w]; latents: clip -> z of that shape.
    """
    found = []
    for draw in draws:
        noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(draw.seed))
        found.append(noise if draw.clip is None else draw.sigma * noise + (1 - draw.sigma) * latents(draw.clip))
    return torch.stack(found), torch.tensor([d.sigma for d in draws], dtype=torch.float32)


def seed_of(seed: int, name: str) -> int:
    """56 bits that follow from a seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


# A step asks for one or two epochs, over and over.
@lru_cache(maxsize=4)
def _order(seed: int, count: int, epoch: int) -> list[int]:
    g = torch.Generator().manual_seed(seed_of(seed, f"epoch {epoch}"))
    return torch.randperm(count, generator=g).tolist()
