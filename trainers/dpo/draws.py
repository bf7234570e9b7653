"""What a training step sees: which pairs, at which noise level, with which noise and which part of the clip.

Everything follows from (seed, step, index of the pair in the step): pairs in a new random order each epoch, the rest from a
generator of the index's own. So it does not matter which process has a pair, or where a resumed run starts. With a table
(`slots` > 0) noise level, noise and part follow from (seed, pair, slot) instead, and come back: their reference errors can be
stored.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..kernels.tuning.noise_levels import NoiseLevels
from ..kernels.tuning.split_step import NoisyPair
from ..tuning.backbone import ImageCondition
from .data import PairData, PairRow

# Channels of the mask that image-to-video models take: frames of a latent frame.
IMAGE_MASK = 4


@dataclass(frozen=True)
class Draw:
    """A pair at a noise level. seed: of the noise; start, frames: the latent frames taken; slot: of the table, or None."""

    row: PairRow
    sigma: float
    seed: int
    start: int
    frames: int
    slot: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, T, h, w] of the latents taken."""
        return (self.row.shape[0], self.frames, *self.row.shape[2:])


@dataclass(frozen=True)
class Draws:
    """rows: the training pairs; count: pairs a step, over all processes; crop: latent frames taken, 0 for all; from_start:
    take the first ones, as image-to-video needs, instead of random ones; slots: of the table for each pair, 0 for none.
    """

    rows: Sequence[PairRow]
    levels: NoiseLevels
    seed: int
    count: int
    crop: int = 0
    from_start: bool = False
    slots: int = 0

    def of_step(self, step: int) -> list[Draw]:
        """The step's `count` draws, step from 0."""
        return [self._at(step * self.count + j) for j in range(self.count)]

    def entries(self, steps: int) -> list[Draw]:
        """The distinct entries of the table that `steps` steps use, in the order of their first use."""
        found = {}
        for step in range(steps):
            for draw in self.of_step(step):
                found.setdefault((draw.row.key, draw.slot), draw)
        return list(found.values())

    def _at(self, number: int) -> Draw:
        epoch, place = divmod(number, len(self.rows))
        row = self.rows[_order(self.seed, len(self.rows), epoch)[place]]
        if self.slots:
            slot = epoch % self.slots
            return self.draw(row, f"table {row.key} {slot}", slot)
        return self.draw(row, f"draw {number}")

    def draw(self, row: PairRow, name: str, slot: int | None = None) -> Draw:
        """The draw of a row that follows from the seed and the name."""
        g = torch.Generator().manual_seed(seed_of(self.seed, name))
        sigma = float(self.levels.draw(1, g))
        whole = row.shape[1]
        frames = min(self.crop, whole) if self.crop else whole
        start = 0 if self.from_start else int(torch.randint(0, whole - frames + 1, (), generator=g))
        return Draw(row, sigma, int(torch.randint(0, 2**62, (), generator=g)), start, frames, slot)


# A step asks for one or two epochs, over and over.
@lru_cache(maxsize=4)
def _order(seed: int, count: int, epoch: int) -> list[int]:
    g = torch.Generator().manual_seed(seed_of(seed, f"epoch {epoch}"))
    return torch.randperm(count, generator=g).tolist()


def seed_of(seed: int, name: str) -> int:
    """56 bits that follow from a seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def by_shape(draws: Sequence[Draw], most: int) -> list[list[Draw]]:
    """The draws in groups of one latent shape and at most `most`, in an order that follows from theirs."""
    groups: dict[tuple[int, ...], list[list[Draw]]] = {}
    for draw in draws:
        lists = groups.setdefault(draw.shape, [[]])
        if len(lists[-1]) == most:
            lists.append([])
        lists[-1].append(draw)
    return [group for lists in groups.values() for group in lists]


def image_of(data: PairData, draws: Sequence[Draw]) -> ImageCondition | None:
    """The image condition of draws of one shape, None for text-to-video: a mask of IMAGE_MASK channels, 1 in the first latent
    frame, and the latent of the image followed by grey, as Wan's image-to-video models are given it.
    """
    if draws[0].row.image is None:
        return None
    found = []
    for d in draws:
        z = data.latents(d.row.image, 0, d.frames)
        mask = torch.zeros(IMAGE_MASK, *z.shape[1:])
        mask[:, 0] = 1.0
        found.append(torch.cat([mask, z]))
    return ImageCondition(torch.stack(found))


def noisy_pair(data: PairData, draws: Sequence[Draw], device: torch.device, first: int) -> NoisyPair:
    """The pairs of draws of one shape, on the device. first: latent frames at the start that the errors leave out."""
    sides = [
        torch.stack([data.latents(getattr(d.row, side), d.start, d.frames) for d in draws]).to(device)
        for side in ("winner", "loser")
    ]
    noise = torch.stack([torch.randn(d.shape, generator=torch.Generator().manual_seed(d.seed)) for d in draws]).to(device)
    sigma = torch.tensor([d.sigma for d in draws], dtype=torch.float32, device=device)
    return NoisyPair(*sides, noise, sigma, first, draws[0].seed % 2**31)
