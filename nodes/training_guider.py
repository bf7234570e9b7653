"""A training inside a sampling run of ComfyUI, whose guider loads, conditions and offloads the model."""

import hashlib
from collections.abc import Callable, Mapping

import comfy.conds
import comfy.model_management
import comfy.samplers
import torch

from . import step_cache

# Of noise levels: a velocity is (x - x0) / sigma.
LOWEST = 1e-3


class Training(comfy.samplers.Sampler):
    """A SAMPLER that samples nothing: it calls train(guider, model options) while the guider holds its model loaded.

    outcome: what it returned.
    """

    def __init__(self, train: Callable):
        self.train = train
        self.outcome = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        with torch.enable_grad():
            self.outcome = self.train(model_wrap, extra_args["model_options"])
        return torch.zeros_like(latent_image)


class Prompts:
    """A MODEL under one of several prompts, while a guider has it loaded with `empty_prompt`.

    words: {prompt: embedded words [L, width]}, padded to `length` by zeros, as the text encoder pads them. inner: the
    BaseModel; options: the model options, without step caches.
    """

    def __init__(self, guider, options: dict, words: Mapping[str, torch.Tensor], length: int):
        self.inner, self.device = guider.inner_model, guider.model_patcher.load_device
        self.template, self.options = guider.conds["positive"][0], step_cache.without(options)
        self.words, self.length = words, length

    def conditioning(self, prompt: str) -> dict:
        """The processed conditioning of a prompt."""
        text = comfy.conds.CONDRegular(_padded(self.words[prompt], self.length).to(self.device))
        return self.template | {"model_conds": self.template["model_conds"] | {"c_crossattn": text}}

    def velocity(self, prompt: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(x [B, C, T, H, W], sigma [B] from LOWEST to 1) -> velocity, fp32, differentiable, under a prompt."""
        known = self.conditioning(prompt)

        def velocity(x, sigma):
            # Layers look for an interruption as well, but not while a graph is walked backwards.
            comfy.model_management.throw_exception_if_processing_interrupted()
            (x0,) = comfy.samplers.calc_cond_batch(self.inner, [[known]], x, sigma, self.options)
            return (x - x0) / sigma.view(-1, 1, 1, 1, 1)

        return velocity


def empty_prompt(words: Mapping[str, torch.Tensor], length: int) -> list:
    """A CONDITIONING of the shape of all prompts, for a guider to process: `Prompts` puts the words in."""
    return [[_padded(next(iter(words.values())), length), {}]]


def generator_of(seed: int, name: str) -> torch.Generator:
    """A random generator on the CPU that follows from a seed and a name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _padded(words: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(words, (0, 0, 0, length - len(words)))[None]
