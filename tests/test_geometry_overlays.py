"""Bars, logos and subtitles are found; a moving scene has none; a standing camera is told from an overlay."""

import pytest
import torch

from trainers.kernels.geometry.overlays import find_overlays


def moving(frames=9, height=160, width=240, speed=6, seed=0):
    """A texture that slides by `speed` pixels a frame."""
    noise = torch.rand(1, 1, 60, 120, generator=torch.Generator().manual_seed(seed))
    wide = torch.nn.functional.interpolate(noise, (height, 2 * width), mode="bicubic")[0, 0] * 200
    return torch.stack([wide[:, speed * t : speed * t + width] for t in range(frames)]).clamp(0, 255).round()


def mark(size=24, seed=3):
    cells = (torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    return torch.nn.functional.interpolate(cells, (size, size), mode="nearest")[0, 0] * 255


def test_a_moving_scene_has_none():
    found = find_overlays(moving())
    assert found.bars == (0, 0, 0, 0)
    assert found.overlay == 0
    assert not found.stands
    assert not found.left_out.any()


@pytest.mark.parametrize("level", [0.0, 255.0])
def test_bars_on_any_side(level):
    clip = moving()
    clip[:, :20] = clip[:, -30:] = level
    clip[:, :, :12] = level
    found = find_overlays(clip)
    assert found.bars == (20, 30, 12, 0)
    assert found.left_out[:20].all()
    assert found.left_out[60, :12].all()
    assert not found.left_out[60, 40:].any()


def test_a_plain_wall_beside_a_bar_is_no_bar():
    clip = moving()
    clip[:, :20] = 0
    clip[:, 20:40] = 90
    assert find_overlays(clip).bars[:2] == (20, 0)


def test_a_logo_is_left_out_and_noise_does_not_hide_it():
    clip = moving()
    clip[:, 100:124, 180:204] = mark()
    clip = (clip + 4 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255).round()
    found = find_overlays(clip)
    assert found.left_out[104:120, 184:200].float().mean() > 0.9
    assert found.left_out[:80].float().mean() < 0.01
    assert 0 < found.overlay < 0.1


def test_a_standing_camera_is_no_overlay():
    still = moving()[:1].expand(9, -1, -1).clone()
    still[:, 60:100, 60:100] = moving(seed=5)[:, :40, :40]
    found = find_overlays(still)
    assert found.stands
    assert found.static > 0.5
    assert not found.left_out.any()


def test_a_picture_without_texture_is_no_bar():
    found = find_overlays(torch.full((5, 64, 64), 30.0))
    assert found.bars == (0, 0, 0, 0)
    assert found.static == 0
