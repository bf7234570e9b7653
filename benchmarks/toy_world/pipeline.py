"""Text-to-video with the toy world's stack on a CPU, with a hook on every step's x0.

Sampling follows ComfyUI's stock workflow for Wan: noise from the seed by the CPU generator, the shifted schedule "simple",
classifier-free guidance on the predictions, Euler steps. Latents are normalised, [N, 16, 5, 8, 8].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.mini_vae import decode
from trainers.kernels.latent_space import WAN21
from trainers.wan.sampling import Denoiser, Hook, euler, noise, sigmas

from . import text_encoder, weights
from .clips import as_frames, as_video
from .text_encoder import TextEncoder

LATENT_SHAPE = (16, 5, 8, 8)
STEPS, CFG, SHIFT = 20, 2.0, 3.0
# Clips that the VAE is given at a time: torch's fast convolutions over time need at least two of these small ones.
BATCH = 16

__all__ = ["CFG", "SHIFT", "STEPS", "Hook", "ToyWorld", "initial_noise", "load", "schedule", "sigmas"]


@dataclass(frozen=True)
class ToyWorld:
    """The stack. dit: WanTransformer3DModel; vae: AutoencoderKLWan; both fp32."""

    dit: torch.nn.Module
    vae: torch.nn.Module
    text: TextEncoder

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        hook: Hook | None = None,
        steps: int = STEPS,
        cfg: float = CFG,
        shift: float = SHIFT,
        negative: str = "",
    ) -> Tensor:
        """Normalised latents [N, 16, 5, 8, 8] of one clip per caption and seed.

        hook: (x0 [N, 16, 5, 8, 8] after guidance, normalised; sigma in (0, 1]; step from 0) -> x0 to continue with.
        """
        denoiser = self.denoiser(captions, cfg, negative)
        return euler(denoiser, initial_noise(seeds), sigmas(steps, shift).tolist(), hook)

    @torch.no_grad()
    def predict_x0(self, x: Tensor, sigma: float, captions: Sequence[str], cfg: float = CFG, negative: str = "") -> Tensor:
        """The model's x0 for noisy latents x = sigma * noise + (1 - sigma) * z."""
        return self.denoiser(captions, cfg, negative).x0(x, sigma)

    def denoiser(self, captions: Sequence[str], cfg: float = CFG, negative: str = "") -> Denoiser:
        """A denoiser for a batch of captions."""
        return Denoiser(self.dit, self.text.words(captions), self.text.words([negative])[0], cfg)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents [N, 16, 5, 8, 8] -> frames uint8 [N, 17, 3, 64, 64]."""
        raw = WAN21.denormalise(z)
        return as_frames(torch.cat([decode(self.vae, part) for part in raw.split(BATCH)]))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [N, 17, 3, 64, 64] -> normalised latents [N, 16, 5, 8, 8], the means of the posterior."""
        return WAN21.normalise(torch.cat([self.vae.encode(x).latent_dist.mode() for x in as_video(frames).split(BATCH)]))


def load(folder: str | Path = weights.FOLDER) -> ToyWorld:
    """Loads the stack from a folder, by default the committed one."""
    folder = Path(folder)
    return ToyWorld(
        weights.load_dit(folder / weights.DIT),
        weights.load_vae(folder / weights.VAE),
        text_encoder.load(folder / weights.TEXT),
    )


def schedule() -> list[float]:
    """The STEPS + 1 noise levels of the default schedule, from 1 to 0."""
    return sigmas(STEPS, SHIFT).tolist()


def initial_noise(seeds: Sequence[int]) -> Tensor:
    """Unit noise [N, 16, 5, 8, 8], each clip's from its own seed, the same as ComfyUI's."""
    return noise(LATENT_SHAPE, seeds)
