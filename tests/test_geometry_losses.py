"""How tracks are lost: a region at once, or many points in every step."""

import pytest
import torch

from trainers.kernels.geometry import losses
from trainers.kernels.geometry.point_tracks import PointTracks

SIZE = (240, 400)


def grid(lost_of_hundred):
    """Six key frames of 24 x 40 points; those of the left eighth are lost after the third one. lost_of_hundred: what the
    tracker counted as lost of each step, whatever became of the points."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(40.0), indexing="ij")
    place = (torch.stack([x, y], dim=-1).flatten(0, 1) * 10 + 5).expand(6, -1, -1)
    visible, ended = torch.ones(6, 960, dtype=torch.bool), torch.zeros(6, 960, dtype=torch.bool)
    left = place[0, :, 0] < 50
    visible[3:, left], ended[2, left] = False, True
    lost = torch.full((5,), lost_of_hundred)
    return PointTracks(place, visible, lost, torch.full((5,), 100), ended), place.double()


def test_a_region_that_is_lost_at_once_is_found_with_its_step():
    share, step = losses.replaced(*grid(0), SIZE)
    assert step == 2
    assert 0.05 < share <= 0.125


@pytest.mark.parametrize(("lost", "known"), [(10, 0.7), (20, 0.4), (34, 0.0), (60, 0.0)])
def test_it_counts_less_where_many_points_are_lost_in_every_step(lost, known):
    alone, _ = losses.replaced(*grid(0), SIZE)
    found, _ = losses.replaced(*grid(lost), SIZE)
    assert found == pytest.approx(known * alone, abs=1e-9)
    assert losses.usual_loss(grid(lost)[0]) == pytest.approx(lost / 100)
