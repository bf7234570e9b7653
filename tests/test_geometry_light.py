"""Local normalisation of brightness and contrast."""

import pytest
import torch

from trainers.kernels.geometry.light import CONTRAST, FLOOR, MIDDLE, even_light


def picture(height, width, seed=0):
    return (torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) * 200).round()


def by_hand(grey, left_out):
    """even_light where the neighbourhood is 3x3 pixels, pixel by pixel."""
    height, width = grey.shape
    means, deviations = torch.zeros(height, width), torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            near = [
                float(grey[v, u])
                for v in range(max(0, y - 1), min(height, y + 2))
                for u in range(max(0, x - 1), min(width, x + 2))
                if not left_out[v, u]
            ]
            mean = sum(near) / max(len(near), 1)
            means[y, x] = mean
            deviations[y, x] = (sum((v - mean) ** 2 for v in near) / max(len(near), 1)) ** 0.5
    gain = CONTRAST / (deviations + FLOOR * deviations.median()).clamp(min=1e-3)
    found = (grey - means) * gain
    return torch.where(left_out, MIDDLE, (found + MIDDLE).round().clamp(0, 255))


@pytest.mark.parametrize("masked", [False, True])
def test_every_pixel_is_what_it_is_by_hand(masked):
    grey, left_out = picture(15, 21), torch.zeros(15, 21, dtype=torch.bool)
    left_out[:3] = masked
    found = even_light(grey[None], left_out if masked else None)[0]
    assert (found - by_hand(grey, left_out)).abs().max() <= 1


@pytest.mark.parametrize(("gain", "bias"), [(0.6, 0.0), (1.0, -30.0), (0.8, 25.0)])
def test_gain_and_bias_cancel(gain, bias):
    grey = torch.stack([picture(90, 130, s) for s in range(2)])
    assert (even_light(gain * grey + bias) - even_light(grey)).abs().max() <= 1


def test_a_gradient_of_light_that_is_smooth_hardly_remains():
    grey = picture(120, 160)
    ramp = torch.linspace(0.7, 1.3, 160)
    change = (even_light((grey * ramp)[None]) - even_light(grey[None])).abs()
    assert change.mean() < 2


def test_odd_sizes_strides_and_a_plain_picture():
    grey = picture(61, 83)
    turned = grey.T.contiguous().T[None]
    assert not turned.is_contiguous()
    assert torch.equal(even_light(turned), even_light(grey[None]))
    assert even_light(torch.full((1, 33, 47), 7.0)).eq(MIDDLE).all()
