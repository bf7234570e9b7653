"""Synthetic latents with a known manifold: curved 4-d sheets in 16 dimensions, surrounded by a noise shell.

A clip is a smooth random field of sheet coordinates over (t, h, w), mapped to 16 channels by a random smooth function,
plus isotropic noise of a fixed level: points on the sheet are the skeleton, and the noise puts tokens on a shell around it.
Blurring over space averages the noise out and moves tokens inside the shell; added noise moves them outside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHELL_NOISE = 0.25


def smooth_field(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[D, T, H, W] with unit variance, varying slowly over t, h and w."""
    d, t, h, w = shape
    coarse = torch.randn(1, d, max(2, t // 3 + 1), max(2, h // 4 + 1), max(2, w // 4 + 1), generator=generator)
    field = F.interpolate(coarse, size=(t, h, w), mode="trilinear", align_corners=True)[0]
    return field / field.std()


def sheet_map(channels: int = 16, intrinsic: int = 4, seed: int = 0):
    """A fixed smooth map from sheet coordinates [intrinsic, ...] to [channels, ...]: linear plus sine waves."""
    g = torch.Generator().manual_seed(seed)
    linear = torch.randn(channels, intrinsic, generator=g) * 0.45
    waves = torch.randn(channels, intrinsic, generator=g) * 0.9
    phase = torch.rand(channels, generator=g) * 6.283
    height = torch.rand(channels, generator=g) * 0.5 + 0.25

    def apply(u: Tensor) -> Tensor:
        flat = u.reshape(intrinsic, -1)
        out = linear @ flat + height[:, None] * torch.sin(waves @ flat + phase[:, None])
        return out.reshape(channels, *u.shape[1:])

    return apply


def sheet_clips(
    count: int, shape: tuple[int, int, int] = (5, 24, 32), channels: int = 16, noise: float = SHELL_NOISE, seed: int = 1
) -> list[Tensor]:
    """`count` clips [C, T, H, W] on the same sheet, each with its own coordinates and shell noise."""
    to_sheet, g = sheet_map(channels), torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(count):
        on_sheet = to_sheet(smooth_field((4, *shape), g))
        clips.append(on_sheet + noise * torch.randn(on_sheet.shape, generator=g))
    return clips
