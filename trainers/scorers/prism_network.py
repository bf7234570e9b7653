"""A PRISM head on its frozen backbone as one module: noisy latents and prompts in, scores out."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.prism.head import PrismHead
from ..wan.dit import WanDit
from ..wan.text_padding import fold_padding

# Noise levels to measure a head at where the data does not name its own.
SIGMAS = (0.99, 0.95, 0.9, 0.7, 0.5, 0.3, 0.1)


class Scorer(torch.nn.Module):
    """Backbone and head as one module: what DistributedDataParallel and autocast wrap. The backbone has no gradient."""

    def __init__(self, dit: WanDit, head: PrismHead):
        super().__init__()
        self.head = head
        # Not a submodule: its weights are neither trained nor synchronised nor saved.
        self.__dict__["dit"] = dit

    def forward(
        self, x: Tensor, sigma: Tensor, words: list[Tensor], kept: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Scores [B, dimensions] of noisy latents x [B, C, T, H, W] at sigma [B]; words: B texts [L_i, text width].

        kept: the share of visual tokens that the head is given, drawn for each pair: rows i and i + B / 2 are given the same.
        """
        # Some weights stay in fp32 whatever the rest is in.
        weight = self.dit.model.patch_embedding.weight
        text, bias, mask = fold_padding([w.to(weight.device, weight.dtype) for w in words])
        x, sigma = x.to(weight.device, weight.dtype), sigma.to(weight.device)
        visual, embedded = self.dit.features(x, sigma, text, self.head.config.taps, bias)
        if kept < 1.0:
            visual = some_tokens(visual, kept, generator)
        dtype = self.head.norm.weight.dtype
        # Scores are small differences: training computes them as scoring does, whatever the backbone is computed in.
        with torch.amp.autocast(weight.device.type, enabled=False):
            return self.head([v.to(dtype) for v in visual], embedded.to(dtype), mask, sigma)


def some_tokens(visual: Sequence[Tensor], share: float, generator: torch.Generator) -> list[Tensor]:
    """A random share of the tokens of [B, N, width] each; the same ones of every tap and of both halves of the batch."""
    batch, count = visual[0].shape[:2]
    chosen = torch.rand(batch // 2, count, generator=generator).argsort(dim=1)[:, : max(1, round(share * count))]
    index = torch.cat([chosen, chosen]).to(visual[0].device)[..., None]
    return [v.gather(1, index.expand(-1, -1, v.shape[2])) for v in visual]


def noised(z: Tensor, sigma: float, seed: int, prompt: str) -> Tensor:
    """sigma * noise + (1 - sigma) * z of normalised latents z [C, T, H, W]; the noise follows from the seed, the prompt's id
    and the shape, so that all clips of a prompt share it."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
    return sigma * noise + (1 - sigma) * z
