"""Noise that all candidates of a prompt share, so that differences between their scores are differences between the clips."""

import torch
from torch import Tensor

# Seeds of consecutive draws; any constant that keeps the draws of neighbouring seeds apart will do.
STRIDE = 1_000_003


def shared_noise(z: Tensor, seed: int, index: int) -> Tensor:
    """Standard normal noise [1, C, T, H, W] of draw `index` for latents z [B, C, T, H, W], in z's dtype and on its device.

    It follows from the seed, the index and the shape of one clip, and is drawn on the CPU, so that it is the same on any
    device.
    """
    generator = torch.Generator().manual_seed((seed * STRIDE + index) % (1 << 63))
    return torch.randn(1, *z.shape[1:], generator=generator).to(z)
