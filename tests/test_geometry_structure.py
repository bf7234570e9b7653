"""Structure from motion of tracks: the dominant rigid motion among others, and what of the motion is parallax."""

import math

import pytest
import torch

from trainers.kernels.geometry import bundle, structure


def tracks_of(count, seed=0, keys=9, noise=0.05, turn=0.04, step=(0.35, 0.03, 0.1), flat=False):
    """Tracks [keys, count, 2], pixels from the centre of an 832x480 picture, of a camera that moves through random points."""
    g = torch.Generator().manual_seed(seed)
    double = {"generator": g, "dtype": torch.float64}
    rays = (torch.rand(count, 2, **double) - 0.5) * torch.tensor([1.0, 0.58], dtype=torch.float64)
    depth = torch.full((count, 1), 0.6, dtype=torch.float64) if flat else 0.3 + 0.7 * torch.rand(count, 1, **double)
    s = torch.linspace(-0.5, 0.5, keys, dtype=torch.float64)[:, None]
    rotation = bundle.rotation_of(s * torch.tensor([0.2 * turn, turn, 0.0], dtype=torch.float64))
    scene = bundle.Scene(
        rotation, s * torch.tensor(step, dtype=torch.float64), torch.cat([rays, depth], 1), rays.new_tensor(750.0)
    )
    return bundle.project(scene) + noise * torch.randn(keys, count, 2, **double)


def everywhere(seen):
    return torch.ones(seen.shape[:2], dtype=torch.bool)


def test_a_subject_with_a_quarter_of_the_tracks_does_not_pull_the_fit(monkeypatch):
    # A wall and what stands before it.
    scene = torch.cat([tracks_of(120, flat=True), tracks_of(80, seed=4)], dim=1)
    # It crosses the picture and bobs.
    subject = tracks_of(70, seed=1, step=(0.0, 0.0, 0.0), turn=0.0) * 0.4
    s = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64)
    subject = subject + torch.stack([320 * s, 12 * (9 * s).sin()], dim=-1)[:, None]
    seen = torch.cat([scene, subject], dim=1)
    fit = structure.reconstruct(seen, everywhere(seen), 832, 1.0)
    left = (fit.at - seen).norm(dim=-1)
    assert left[:, :200].mean() < 0.2
    assert left[:, 200:].mean() > 5
    # The first fit alone goes wrong.
    monkeypatch.setattr(structure, "TRIMMED", -1)
    once = structure.reconstruct(seen, everywhere(seen), 832, 1.0)
    assert (once.at - seen).norm(dim=-1)[:, :200].mean() > 1


@pytest.mark.parametrize("focal", [450.0, 750.0, 1400.0])
def test_a_rigid_scene_fits_from_any_of_the_focal_lengths(focal):
    seen = tracks_of(150, seed=2) * (focal / 750)
    fit = structure.reconstruct(seen, everywhere(seen), 832, 1.0)
    assert (fit.at - seen).norm(dim=-1).mean() < 0.2


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [({}, 2.0, 8.0), ({"step": (0.0, 0.0, 0.0), "turn": 0.3}, 0.0, 0.1), ({"flat": True}, 0.0, 0.1)],
    ids=["rigid", "turn", "flat"],
)
def test_parallax_is_what_no_homography_explains(kind, least, most):
    seen = tracks_of(150, seed=3, noise=0.01, **kind)
    parallax, unexplained, layers = structure.parallax_of(seen, seen, everywhere(seen), 1.0, 0.0)
    assert least <= layers <= unexplained <= most
    assert math.isclose(parallax, unexplained)
    less, same, _ = structure.parallax_of(seen, seen, everywhere(seen), 1.0, 0.5 * unexplained)
    assert same == unexplained
    assert math.isclose(less, unexplained * 0.5**0.5)
    least_share, _, _ = structure.parallax_of(seen, seen, everywhere(seen), 1.0, 10 * unexplained)
    assert math.isclose(least_share, structure.LEAST_SHARE * unexplained)
