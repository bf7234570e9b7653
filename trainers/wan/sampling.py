"""Euler sampling of rectified flow with a Wan transformer outside ComfyUI, with the same steps as ComfyUI's Wan workflow.

Noise from the CPU generator with the given seed, the shifted "simple" schedule, classifier-free guidance on the predicted
velocity, Euler steps. Latents are normalised, [N, C, T, H, W].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .text_padding import fold_padding, use_bias

Hook = Callable[[Tensor, float, int], Tensor]
Watch = Callable[[Tensor, float, int], None]


def sigmas(steps: int, shift: float) -> Tensor:
    """ComfyUI's "simple" schedule of a flow model with this shift: noise levels [steps + 1] from 1 to 0."""
    t = 1.0 - (torch.arange(steps) * (1000 / steps)).floor() / 1000
    return torch.cat([shift * t / (1 + (shift - 1) * t), torch.zeros(1)])


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal noise [N, *shape], each clip's from its own seed, as ComfyUI draws it for a batch of one."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(s)) for s in seeds])


class Denoiser:
    """Velocity of a batch of clips with classifier-free guidance. dit: diffusers' WanTransformer3DModel, with all blocks.

    words: one text [L_i, D] per clip, without padding; negative: one for all clips; cfg 1 runs the conditional pass only.
    """

    def __init__(self, dit: torch.nn.Module, words: Sequence[Tensor], negative: Tensor | None, cfg: float):
        self.dit, self.cfg = dit, cfg
        self.guided = cfg != 1.0
        every = [*words, *([negative] * len(words) if self.guided else [])]
        weight = dit.patch_embedding.weight
        self.text, self.bias, _ = fold_padding([w.to(weight.device, weight.dtype) for w in every])

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The guided velocity noise - x0 of x [N, C, T, H, W] at sigma, in x's dtype and on its device."""
        weight = self.dit.patch_embedding.weight
        use_bias(self.dit, self.bias)
        both = x.repeat(2, 1, 1, 1, 1) if self.guided else x
        time = torch.full((len(both),), 1000.0 * sigma, device=weight.device)
        v = self.dit(both.to(weight.device, weight.dtype), time, self.text, return_dict=False)[0].to(x)
        if not self.guided:
            return v
        conditional, unconditional = v.chunk(2)
        return unconditional + self.cfg * (conditional - unconditional)

    def x0(self, x: Tensor, sigma: float) -> Tensor:
        """The predicted clean latent [N, C, T, H, W] of x at sigma."""
        return x - sigma * self.velocity(x, sigma)


def euler(
    denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], hook: Hook | None = None, watch: Watch | None = None
) -> Tensor:
    """Euler steps from x [N, C, T, H, W] at sigmas[0] to sigmas[-1].

    hook: (x0 after guidance, sigma, step from 0) -> the x0 to use instead; watch: called with each step's input (x, sigma,
    step).
    """
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        if watch is not None:
            watch(x, sigma, step)
        v = denoiser.velocity(x, sigma)
        if hook is not None:
            v = (x - hook(x - sigma * v, sigma, step)) / sigma
        x = x + (following - sigma) * v
    return x
