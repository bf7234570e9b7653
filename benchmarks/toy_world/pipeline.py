"""Text to clip with the toy world's stack, on a CPU, with a hook on every step's x0.

Sampling is what ComfyUI does with a Wan model in its stock workflow: noise of the seed from the CPU generator, the shifted
schedule "simple", classifier-free guidance on the predictions, Euler steps. Latents are normalised, [N, 16, 5, 8, 8].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainers.kernels.latent_space import WAN21
from trainers.mini_vae import decode

from . import text_encoder, weights
from .clips import as_frames, as_video
from .text_encoder import LENGTH, TOKENS, TextEncoder

LATENT_SHAPE = (16, 5, 8, 8)
STEPS, CFG, SHIFT = 20, 4.0, 3.0
Hook = Callable[[Tensor, float, int], Tensor]


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

        hook: (x0 [N, 16, 5, 8, 8] after guidance, normalised; sigma in (0, 1]; step from 0) -> x0 to go on with.
        """
        x = initial_noise(seeds)
        text, empty = self._contexts(captions, negative)
        path = sigmas(steps, shift).tolist()
        for step, (sigma, following) in enumerate(zip(path, path[1:], strict=False)):
            v = self._velocity(x, sigma, text, empty, cfg)
            if hook is not None:
                v = (x - hook(x - sigma * v, sigma, step)) / sigma
            x = x + (following - sigma) * v
        return x

    @torch.no_grad()
    def predict_x0(self, x: Tensor, sigma: float, captions: Sequence[str], cfg: float = CFG, negative: str = "") -> Tensor:
        """The model's x0 for noisy latents x = sigma * noise + (1 - sigma) * z."""
        text, empty = self._contexts(captions, negative)
        return x - sigma * self._velocity(x, sigma, text, empty, cfg)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents [N, 16, 5, 8, 8] -> frames uint8 [N, 17, 3, 64, 64]."""
        raw = WAN21.denormalise(z)
        return as_frames(torch.cat([decode(self.vae, one) for one in raw.split(1)]))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [N, 17, 3, 64, 64] -> normalised latents [N, 16, 5, 8, 8], the posterior's means."""
        return WAN21.normalise(torch.cat([self.vae.encode(x).latent_dist.mode() for x in as_video(frames).split(1)]))

    def _contexts(self, captions: Sequence[str], negative: str) -> tuple[Tensor, Tensor]:
        longest = max(len(self.text.tokens(t)) for t in (*captions, negative))
        kept = min(LENGTH - 1, max(TOKENS, longest))
        fold_padding(self.dit, kept)
        text = self.text.encode([*captions, negative], kept + 1)
        return text[:-1], text[-1:].expand(len(captions), -1, -1)

    def _velocity(self, x: Tensor, sigma: float, text: Tensor, empty: Tensor, cfg: float) -> Tensor:
        time = torch.full((len(x),), 1000.0 * sigma)
        if cfg == 1.0:
            return self.dit(x, time, text, return_dict=False)[0]
        both = self.dit(x.repeat(2, 1, 1, 1, 1), time.repeat(2), torch.cat([text, empty]), return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        return unconditional + cfg * (conditional - unconditional)


def load(folder: str | Path = weights.FOLDER) -> ToyWorld:
    """The committed stack, or another folder's."""
    folder = Path(folder)
    return ToyWorld(
        weights.load_dit(folder / weights.DIT),
        weights.load_vae(folder / weights.VAE),
        text_encoder.load(folder / weights.TEXT),
    )


def initial_noise(seeds: Sequence[int]) -> Tensor:
    """Unit noise [N, 16, 5, 8, 8], each clip's from its own seed, as ComfyUI makes it."""
    shape = (1, *LATENT_SHAPE)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels [steps + 1] from 1 to 0: ComfyUI's "simple" schedule of a flow model with this shift."""
    t = 1.0 - (torch.arange(steps) * (1000 / steps)).floor() / 1000
    return torch.cat([shift * t / (1 + (shift - 1) * t), torch.zeros(1)])


def fold_padding(dit: torch.nn.Module, kept: int, total: int = LENGTH) -> None:
    """From now on `dit` takes texts of kept + 1 positions and treats the last as total - kept equal ones.

    Wan attends to the zeros after a text, too, hundreds of them and all alike: one stands for all with the logarithm of
    their number added to its attention logit. The result is the same to rounding, the cost a tenth.
    """
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class FoldedPadding(WanAttnProcessor):
        def __init__(self, bias: Tensor):
            super().__init__()
            self.bias = bias

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)

    bias = torch.zeros(1, 1, 1, kept + 1)
    bias[..., -1] = math.log(total - kept)
    processor = FoldedPadding(bias)
    for block in dit.blocks:
        block.attn2.set_processor(processor)
