"""Residual vectors taken apart into what neighbours share and noise."""

import math

import pytest
import torch

from trainers.kernels.geometry import residuals

SIZE = (480, 832)


def scattered(keys=3, count=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    at = torch.rand(keys, count, 2, generator=g, dtype=torch.float64) * torch.tensor([831.0, 479.0], dtype=torch.float64)
    return at, torch.rand(keys, count, generator=g) > 0.1


def test_neighbourhoods_are_binomial_sums_over_nine_cells():
    at, visible = scattered(2, 60)
    values = torch.arange(240, dtype=torch.float64).view(2, 60, 2)
    found = residuals.neighbourhood(values, at, visible, SIZE)
    cell = SIZE[0] / residuals.CELLS
    weight = {-1: residuals.KERNEL[0], 0: residuals.KERNEL[1], 1: residuals.KERNEL[2]}
    for k in range(2):
        cells = (at[k] / cell).floor().long().tolist()
        for n in range(0, 60, 7):
            expected = torch.zeros(2, dtype=torch.float64)
            for m in range(60):
                dx, dy = cells[m][0] - cells[n][0], cells[m][1] - cells[n][1]
                if visible[k, m] and abs(dx) <= 1 and abs(dy) <= 1:
                    expected += weight[dx] * weight[dy] * values[k, m]
            assert torch.allclose(found[k, n], expected)


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_noise_is_not_shared_and_its_size_is_found(sigma):
    at, visible = scattered(6, 900)
    vectors = sigma * torch.randn(at.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = residuals.take_apart(vectors, at, visible, SIZE, 3.0)
    assert math.isclose(found.noise, sigma * 2**0.5, rel_tol=0.1)
    assert found.shared[visible].mean() < 0.3 * sigma
    assert found.shared[~visible].eq(0).all()


def test_a_common_shift_is_shared_whatever_the_noise():
    at, visible = scattered(6, 900)
    noise = 0.4 * torch.randn(at.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shifted = at[..., 0] > 416
    vectors = noise + torch.where(shifted[..., None], torch.tensor([0.9, -1.2], dtype=torch.float64), 0.0)
    found = residuals.take_apart(vectors, at, visible, SIZE, 3.0)
    far = (at[..., 0] - 416).abs() > 60
    assert math.isclose(float(found.shared[visible & shifted & far].mean()), 1.5, rel_tol=0.1)
    assert found.shared[visible & ~shifted & far].mean() < 0.2


def test_long_vectors_are_cut_and_lonely_ones_are_their_own_neighbourhood():
    at = torch.tensor([[[50.0, 50.0], [700.0, 400.0]]], dtype=torch.float64)
    vectors = torch.tensor([[[30.0, 40.0], [0.3, 0.4]]], dtype=torch.float64)
    found = residuals.take_apart(vectors, at, torch.ones(1, 2, dtype=torch.bool), SIZE, 3.0)
    assert found.shared[0].tolist() == pytest.approx([3.0, 0.5])
    assert found.noise == 0
