"""The heat map over a clip's frames: what glows, where, and between measured frames."""

import math

import pytest
import torch

from trainers.kernels.colours import HEAT_MAP, heat_map_colour
from trainers.kernels.geometry.grey import LUMA, half_grey_levels, working_size
from trainers.kernels.geometry.heat_map import DIM, LEAST, MOST_LINES, full_error, heat_map
from trainers.kernels.geometry.record import DENSE, TRACKS


def luma(frames):
    return frames @ frames.new_tensor(LUMA)


def pixel(grey, left, right, along, full):
    """One pixel by hand: errors of the measured frames before and after, None where nothing was measured."""
    parts = [(1 - along, left), (along, right)]
    measured = sum(w for w, e in parts if e is not None)
    error = sum(w * e for w, e in parts if e is not None) / measured if measured else 0.0
    share = min(max(error / full, 0.0), 1.0)
    glow = heat_map_colour(torch.tensor(share)).tolist()
    opacity = math.sqrt(share) * measured
    return [DIM * grey + opacity * (g - DIM * grey) for g in glow]


def test_every_pixel_is_what_it_is_by_hand():
    generator = torch.Generator().manual_seed(0)
    frames, errors, at = torch.rand(8, 5, 6, 3, generator=generator), torch.rand(3, 5, 6, generator=generator), [1, 4, 6]
    errors[0, 0], errors[1, 0, :3] = torch.nan, torch.nan
    found = heat_map(frames, errors, at, 0.7)
    places = [(0, 0, 0), (0, 0, 0), (0, 1, 1 / 3), (0, 1, 2 / 3), (1, 1, 0), (1, 2, 0.5), (2, 2, 0), (2, 2, 0)]
    for t, (left, right, along) in enumerate(places):
        for y in range(5):
            for x in range(6):
                values = [float(errors[k, y, x]) for k in (left, right)]
                values = [None if math.isnan(v) else v for v in values]
                expected = pixel(float(luma(frames[t, y, x])), *values, along, 0.7)
                assert found[t, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_what_was_not_measured_stays_the_dimmed_frame():
    frames = torch.rand(3, 4, 4, 3)
    plain = heat_map(frames, torch.full((2, 4, 4), torch.nan), [0, 2], 1.0)
    assert torch.allclose(plain, DIM * luma(frames)[..., None].expand_as(frames))
    assert torch.equal(plain, heat_map(frames, torch.zeros(2, 4, 4), [0, 2], 1.0))


def test_the_full_error_glows_in_the_last_colour_and_a_map_of_another_size_is_stretched():
    errors = torch.zeros(1, 4, 8)
    errors[0, :, 4:] = 5.0
    found = heat_map(torch.zeros(2, 8, 16, 3), errors, [0], 5.0)
    assert found.shape == (2, 8, 16, 3)
    assert found[1, 4, 15].tolist() == pytest.approx(HEAT_MAP[-1])
    assert found[1, 4, 0].tolist() == [0, 0, 0]


def test_the_scale_is_the_worst_of_all_clips_but_never_less_than_it_takes():
    quiet, loud = torch.full((2, 3, 3), 0.01), torch.full((2, 300, 300), 0.01)
    assert full_error([quiet], TRACKS) == LEAST[TRACKS]
    assert full_error([quiet, torch.full_like(quiet, torch.nan)], DENSE) == LEAST[DENSE]
    loud[0, :30] = 7.0
    assert full_error([quiet, loud], DENSE) == 7.0
    assert full_error([torch.full((1, 2, 2), torch.nan)], DENSE) == LEAST[DENSE]


@pytest.mark.parametrize(("size", "expected"), [((480, 832), (240, 416)), ((720, 1280), (240, 426)), ((832, 480), (416, 240))])
def test_large_clips_are_drawn_smaller_with_even_sides(size, expected):
    frames = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(1))
    found = heat_map(frames, torch.zeros(1, 12, 20), [0], 1.0)
    assert found.shape == (1, *expected, 3)
    assert min(expected) == MOST_LINES
    assert float(found.mean()) == pytest.approx(DIM * float(frames.mean()), rel=0.02)


@pytest.mark.parametrize("size", [(480, 832), (720, 1280), (96, 160)])
def test_grey_levels_of_the_scorer_give_the_same_map(size):
    """The greys of 96 lines have another size than the map: the frames are read."""
    generator = torch.Generator().manual_seed(2)
    frames, errors = torch.rand(3, *size, 3, generator=generator), torch.rand(2, 12, 20, generator=generator)
    greys = {t: half_grey_levels(frames[t], working_size(size)[0]) for t in (0, 2)}
    expected = heat_map(frames, errors, [0, 2], 1.0)
    assert torch.allclose(heat_map(frames, errors, [0, 2], 1.0, greys), expected, atol=0.02 if size[0] == 720 else 1e-5)
    if size[0] == 480:
        dark = {0: torch.zeros(240, 416)}
        assert not torch.allclose(heat_map(frames, errors, [0, 2], 1.0, dark)[0], expected[0], atol=0.02)
