"""A ClipView inside a sampling run: what a reward reads of a call to the guider."""

from collections.abc import Sequence

import comfy.samplers
import torch

from ..kernels.rewards.reward import RewardError
from . import step_cache, wan_features


class GuiderView:
    """Clips while a guider samples them, or finished clips that it re-noises.

    guider: while it samples, with its model loaded; options: the model options of its calls. x [B, C, T, H, W] at sigma, x0
    and z in model space, which is the normalised space; each None where it does not exist. decode: z -> frames of each clip.
    blocks: transformer blocks that the methods have run, per clip.
    """

    def __init__(self, guider, options: dict, x=None, sigma=None, x0=None, z=None, decode=None):
        self._guider, self._options = guider, options
        self._x, self._sigma, self._x0, self._z, self._decode = x, sigma, x0, z, decode
        self.blocks = 0

    def noisy(self) -> tuple[torch.Tensor, float]:
        if self._x is None:
            raise RewardError("the clips are finished: there is no noisy latent to score")
        return self._x, self._sigma

    def prediction(self) -> torch.Tensor:
        if self._x0 is None:
            raise RewardError("there is no prediction yet: the sampler reports none, or this is before its first step")
        return self._x0

    def latent(self) -> torch.Tensor:
        if self._z is None:
            raise RewardError("the clips are not finished: this reward can only be used at the finish of a race")
        return self._z

    def frames(self) -> Sequence[torch.Tensor]:
        if self._decode is None:
            raise RewardError("this reward reads decoded frames: connect a VAE")
        return self._decode(self.latent() if self._z is not None else self.prediction())

    @torch.no_grad()
    def velocity(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        positive = wan_features.active_at(wan_features.positive_of(self._guider), sigma)
        inner = self._guider.inner_model
        level = torch.full((x.shape[0],), sigma, device=x.device)
        (x0,) = comfy.samplers.calc_cond_batch(inner, [[positive]], x, level, step_cache.without(self._options))
        self.blocks += len(inner.diffusion_model.blocks)
        return (x - x0) / sigma

    @torch.no_grad()
    def features(self, x: torch.Tensor, sigma: float, taps: Sequence[int]):
        positive = wan_features.positive_of(self._guider)
        level = torch.full((x.shape[0],), sigma, device=x.device)
        found = wan_features.read(self._guider.inner_model, positive, x, level, self._options, taps)
        self.blocks += max(taps) + 1
        return found.visual, found.text, found.mask
