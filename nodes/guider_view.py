"""A ClipView inside a sampling run: what a reward reads of a call to the guider, or of finished clips."""

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.samplers
import torch

from ..kernels.rewards.reward import FINISHED, RewardError
from . import step_cache, wan_features

DECODER = "connect a VAE to the node's input 'vae': the reward reads decoded frames"


class GuiderView:
    """Clips while a guider samples them, or finished ones.

    guider: while it samples, with its model loaded; options: the model options of its calls. x [B, C, T, H, W] at sigma, and
    z, the finished clip or the latest prediction, in model space, which is the normalised space; each None where it does not
    exist. decode: z -> frames of each clip, None without a VAE. blocks: transformer blocks that the methods ran, per clip.
    """

    def __init__(self, guider, options: dict, x=None, z=None, sigma: float = FINISHED, decode: Callable | None = None):
        self._guider, self._options, self._x, self._z, self._decode = guider, options, x, z, decode
        self.sigma, self.blocks = sigma, 0

    def noisy(self) -> torch.Tensor:
        if self._x is None:
            raise RewardError("the clips are finished: there is no noisy latent to score")
        return self._x

    def clean(self) -> torch.Tensor:
        if self._z is None:
            raise RewardError(
                "there is no prediction of the clip at this checkpoint: the sampler reports none before it; score later"
            )
        return self._z

    def frames(self) -> Sequence[torch.Tensor]:
        if self._decode is None:
            raise RewardError(DECODER)
        return self._decode(self.clean())

    @torch.no_grad()
    def velocity(self, x: torch.Tensor, sigma: float, negative: bool = False) -> torch.Tensor:
        found = wan_features.conditioning_of(self._guider, "negative" if negative else "positive")
        wan_features.require_readable(self._options)
        prompt, inner = wan_features.active_at(found, sigma), self._guider.inner_model
        level = torch.full((x.shape[0],), sigma, device=x.device)
        (x0,) = comfy.samplers.calc_cond_batch(inner, [[prompt]], x, level, step_cache.without(self._options))
        self.blocks += len(inner.diffusion_model.blocks)
        return (x - x0) / sigma

    @torch.no_grad()
    def features(self, x: torch.Tensor, sigma: float, taps: Sequence[int]):
        positive = wan_features.conditioning_of(self._guider, "positive")
        level = torch.full((x.shape[0],), sigma, device=x.device)
        found = wan_features.read(self._guider.inner_model, positive, x, level, self._options, taps)
        self.blocks += max(taps) + 1
        return found.visual, found.text, found.mask


def decoder(vae, guider) -> Callable | None:
    """A function from latents in model space to the frames [T, H, W, 3] of each clip; None without a VAE.

    The guider's models are loaded again afterwards, since the VAE may have taken their memory.
    """
    if vae is None:
        return None

    def decode(z: torch.Tensor) -> list[torch.Tensor]:
        frames = []
        for item in guider.inner_model.process_latent_out(z).split(1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            images = vae.decode(item)
            frames.append(images.reshape(-1, *images.shape[-3:])[..., :3])
        comfy.model_management.load_models_gpu([guider.model_patcher, *guider.loaded_models])
        return frames

    return decode


class Scoring(comfy.samplers.Sampler):
    """A SAMPLER that samples nothing: it measures a reward of the finished latents that a guider is given.

    figures [B, D] and blocks hold the result after sampling.
    """

    def __init__(self, reward, vae=None, progress: Callable[[int], None] = lambda clips: None):
        self.reward, self.vae, self.progress = reward, vae, progress
        self.figures: torch.Tensor | None = None
        self.blocks = 0

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        options, found = extra_args["model_options"], []
        # Clip by clip, so that memory does not depend on the number of clips.
        for item in latent_image.split(1):
            view = GuiderView(model_wrap, options, z=item, decode=decoder(self.vae, model_wrap))
            found.append(self.reward.measure(view))
            self.blocks += view.blocks
            self.progress(1)
        self.figures = torch.cat(found)
        return noise


def measure_finished(guider, raw: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Figures [B, D] of finished raw latents [B, C, T, H, W] under a guider's prompts, by a sampling run of no steps."""
    # One step from a little noise to none: ComfyUI normalises the latent and loads the models.
    schedule = torch.tensor([0.5, 0.0])
    guider.sample(torch.zeros_like(raw), raw, scoring, schedule, disable_pbar=True, seed=0)
    return scoring.figures
