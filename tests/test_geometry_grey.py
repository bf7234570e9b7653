"""Grey levels at the resolutions at which points are tracked."""

import pytest
import torch
from torch.nn import functional as F

from trainers.kernels.geometry.grey import LUMA, grey_levels, half_grey_levels, halved


def frame(height, width, kind="float"):
    levels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return levels if kind == "uint8" else (levels.float() / 255).to(torch.bfloat16 if kind == "bf16" else torch.float32)


@pytest.mark.parametrize("kind", ["uint8", "float", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels first", "every second column"])
def test_half_a_frame_is_the_mean_of_its_blocks(kind, layout):
    picture = frame(34, 52, kind)
    if layout == "channels first":
        picture = picture.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "every second column":
        picture = frame(34, 104, kind)[:, ::2]
    weights = (0.2, -0.5, 1.5)
    expected = F.avg_pool2d((picture.float() * torch.tensor(weights)).sum(-1)[None, None], 2)[0, 0]
    assert torch.allclose(halved(picture, weights), expected, atol=255e-6 if kind == "uint8" else 1e-6)


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("size", [(64, 96), (63, 97), (720, 40), (20, 30)])
def test_half_grey_levels_are_those_of_the_frame(kind, size):
    picture = frame(*size, kind)
    half = [max(16, round(side / 2)) for side in size]
    luma = (frame(*size, "uint8").float() * torch.tensor(LUMA)).sum(-1)
    # Sizes that are no multiple of two are pooled from rounded grey levels.
    exact = [2 * side for side in half] == list(size)
    expected = F.interpolate((luma if exact else luma.round())[None, None], half, mode="area")[0, 0]
    assert (half_grey_levels(picture, size) - expected).abs().max() < (1e-3 if exact else 0.3)


def test_grey_levels_are_rounded_luma():
    picture = frame(33, 47)
    expected = (frame(33, 47, "uint8").float() * torch.tensor(LUMA)).sum(-1).round()
    assert (grey_levels(picture, (33, 47)) - expected).abs().max() <= 1
    assert grey_levels(picture, (33, 47)).eq(expected).float().mean() > 0.99
