"""One-step predictions of the model in training: x0 = x - sigma v, from pure noise or from noised clips."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..running.progress import Bar
from ..wan.text_padding import fold_padding
from .draws import Draw, start_of


@dataclass(frozen=True)
class Network:
    """The model in training. velocity: (x, sigma, text, bias) -> [B, C, T, h, w] in fp32; reference: a context in which it is
    the frozen base, None where that is another model; change: norm of the change.
    """

    velocity: Callable
    reference: Callable[[], AbstractContextManager] | None
    change: Callable[[], float]
    device: torch.device


@dataclass(frozen=True)
class OneStep:
    """texts: {text id: [words, width]}; shape: [C, T, h, w]; latents: clip -> latent of that shape, for draws with a clip."""

    network: Network
    texts: dict[str, Tensor]
    shape: tuple[int, ...]
    latents: Callable[[str], Tensor] | None = None

    def predict(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """(x0 [B, C, T, h, w], sigma [B]) of draws, fp32 on the device, differentiable."""
        x, sigma = (v.to(self.network.device) for v in start_of(draws, self.shape, self.latents))
        text, bias, _ = fold_padding([self.texts[d.prompt] for d in draws])
        v = self.network.velocity(x, sigma, text, bias)
        return x - sigma.view(-1, 1, 1, 1, 1) * v, sigma

    @torch.no_grad()
    def each(self, draws: Sequence[Draw], title: str, shown: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """`predict` of one draw after the other, so that how draws are batched does not matter, with a progress bar."""
        with Bar(title, len(draws), "prediction", shown) as bar:
            for draw in draws:
                yield self.predict([draw])
                bar.add()
