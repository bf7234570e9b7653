"""Homographies between points, and the parallax that one and two of them leave over."""

import math

import pytest
import torch

from trainers.kernels.geometry import homography


def matrix(seed):
    g = torch.Generator().manual_seed(seed)
    change = torch.randn(3, 3, generator=g, dtype=torch.float64) * torch.tensor([0.05, 0.05, 12.0], dtype=torch.float64)
    change[2] *= torch.tensor([0.002, 0.002, 0.0], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + change


def points(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 2, generator=g, dtype=torch.float64) - 0.5) * torch.tensor([800.0, 460.0], dtype=torch.float64)


def test_a_homography_is_found_and_moves_points_as_by_hand():
    a = torch.stack([points(50), points(50, 1)])
    H = torch.stack([matrix(2), matrix(3)])
    b = homography.apply(H, a)
    for i in range(2):
        for p, q in zip(a[i, :5], b[i, :5], strict=True):
            u, v, w = (H[i] @ torch.cat([p, p.new_ones(1)])).tolist()
            assert q.tolist() == pytest.approx([u / w, v / w])
    weights = torch.ones(2, 50, dtype=torch.float64)
    weights[1, 40:] = 0
    b[1, 40:] += 100
    found = homography.fit(a, b, weights)
    left = (homography.apply(found, a) - b).norm(dim=-1)
    assert left[weights > 0].max() < 1e-3


def test_the_normal_equations_are_those_of_the_rows():
    a, b = points(60)[None], points(60, 1)[None]
    weights = torch.rand(1, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, y, u, v = *(a[0] / 200).T, *(b[0] / 200).T
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    first = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=1)
    second = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=1)
    rows = torch.cat([first, second]) * torch.cat([weights[0], weights[0]]).sqrt()[:, None]
    right = torch.cat([u, v]) * torch.cat([weights[0], weights[0]]).sqrt()
    h = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
    T = torch.diag(torch.tensor([1 / 200, 1 / 200, 1.0], dtype=torch.float64))
    H = T.inverse() @ torch.cat([h, h.new_ones(1)]).view(3, 3) @ T
    found = homography.fit(a, b, weights)[0]
    assert torch.allclose(found / found[2, 2], H, rtol=1e-5, atol=1e-8)


def test_outliers_do_not_pull_it():
    a = points(200)[None]
    b = homography.apply(matrix(4)[None], a)
    b[0, :60] += 30 * torch.randn(60, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    valid = torch.ones(1, 200, dtype=torch.bool)
    valid[0, 190:] = False
    left = homography.robust(a, b, valid)
    assert left[0, 60:190].max() < 0.05
    assert left[0, 190:].eq(0).all()


def test_two_layers_of_equal_size_are_two_homographies():
    a = points(300)[None]
    near = a[0, :, 0] > 0
    b = torch.where(near[:, None], homography.apply(matrix(6)[None], a)[0], homography.apply(matrix(7)[None], a)[0])[None]
    one, two = homography.parallax(a, b, torch.ones(1, 300, dtype=torch.bool), 8.0)
    assert float(one) > 1.5
    assert float(two) < 0.05
    deep = torch.rand(300, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    c = a + 20 * torch.stack([deep, torch.zeros_like(deep)], dim=-1)
    one, two = homography.parallax(a, c, torch.ones(1, 300, dtype=torch.bool), 8.0)
    assert float(one) > float(two) > 1.0


def test_few_points_give_finite_numbers():
    a = points(5)[None]
    one, two = homography.parallax(a, a + 3, torch.tensor([[True, True, True, False, False]]), 8.0)
    assert math.isfinite(float(one))
    assert math.isfinite(float(two))
