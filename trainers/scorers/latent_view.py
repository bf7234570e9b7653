"""A ClipView outside ComfyUI: what a reward reads of latents, with diffusers' Wan transformer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.rewards.reward import FINISHED, RewardError
from ..wan.dit import WanDit
from ..wan.sampling import Denoiser
from ..wan.text_padding import fold_padding


class ConditionalNetwork:
    """Velocities and hidden states of a whole Wan transformer under one prompt, and velocities under the negative prompt.

    dit: diffusers' WanTransformer3DModel; words, negative: embedded texts [L, D] without padding, negative None without.
    """

    def __init__(self, dit: torch.nn.Module, words: Tensor, negative: Tensor | None):
        self.dit, self.words, self.negative = dit, words, negative
        self._denoisers: dict[tuple[bool, int], Denoiser] = {}

    @property
    def depth(self) -> int:
        return len(self.dit.blocks)

    def velocity(self, x: Tensor, sigma: float, negative: bool = False) -> Tensor:
        """Velocities of x [B, C, T, H, W] without classifier-free guidance. Raises RewardError without a negative prompt."""
        words = self.negative if negative else self.words
        if words is None:
            raise RewardError("there is no negative prompt, and the reward compares the prompt with one")
        key = (negative, len(x))
        if key not in self._denoisers:
            self._denoisers[key] = Denoiser(self.dit, [words] * len(x), None, 1.0)
        return self._denoisers[key].velocity(x, sigma)

    @torch.no_grad()
    def features(self, x: Tensor, sigma: float, taps: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Hidden states, embedded text and mask of its words, as ClipView.features."""
        weight = self.dit.patch_embedding.weight
        text, bias, mask = fold_padding([w.to(weight.device, weight.dtype) for w in [self.words] * len(x)])
        level = torch.full((len(x),), sigma, device=weight.device)
        visual, embedded = WanDit(self.dit, None, "").features(x.to(text), level, text, taps, bias)
        return visual, embedded, mask


class LatentView:
    """A ClipView of latents [B, C, T, H, W], normalised.

    z: finished latents, or the latest prediction where x is given; x, sigma: noisy latents and their level; decode: latents ->
    frames of each clip. blocks: transformer blocks run per clip by the methods.
    """

    def __init__(
        self, network: ConditionalNetwork, z: Tensor | None = None, x: Tensor | None = None, sigma: float = FINISHED,
        decode: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ):  # fmt: skip
        self._network, self._z, self._x, self._decode = network, z, x, decode
        self.sigma, self.blocks = sigma, 0

    def noisy(self) -> Tensor:
        if self._x is None:
            raise RewardError("the clips are finished: there is no noisy latent to score")
        return self._x

    def clean(self) -> Tensor:
        if self._z is None:
            raise RewardError("there is no prediction of the clean latent before the first step")
        return self._z

    def frames(self) -> Sequence[Tensor]:
        if self._decode is None:
            raise RewardError("the reward reads decoded frames, and there is no VAE to decode with")
        return self._decode(self.clean())

    def velocity(self, x: Tensor, sigma: float, negative: bool = False) -> Tensor:
        self.blocks += self._network.depth
        return self._network.velocity(x, sigma, negative)

    def features(self, x: Tensor, sigma: float, taps: Sequence[int]):
        self.blocks += max(taps) + 1
        return self._network.features(x, sigma, taps)
