"""How tracks are lost: a region that is replaced at once, a picture that dissolves into another, a texture that boils."""

import torch
from torch import Tensor

from . import residuals
from .point_tracks import PointTracks

# A neighbourhood of LEAST_NEAR tracks or more in which more than GONE are lost at one step is replaced, not occluded.
GONE, LEAST_NEAR = 0.8, 3.0
# Unless more than this share of the other tracks is lost in the same step.
MOST_ELSEWHERE = 0.1
# Usual loss from which a neighbourhood that is lost at once says nothing.
MOST_USUAL = 1 / 3
# Share of the tracks that are lost from key frame to key frame from which a place is unstable.
BOILING = 0.35


def replaced(tracks: PointTracks, place: Tensor, size: tuple[int, int]) -> tuple[float, int]:
    """Largest share of the tracks whose whole neighbourhood is lost in one step, and the step.

    The share is reduced in proportion to the usual loss, and is 0 where that is MOST_USUAL or more: where the tracker loses
    many points in every step, losses say little about the scene.
    """
    both = torch.stack([tracks.ended.double(), tracks.visible.double()], dim=-1)
    ended, near = residuals.neighbourhood(both, place, tracks.visible, size).unbind(-1)
    gone = tracks.visible & (near >= LEAST_NEAR * residuals.KERNEL[1] ** 2) & (ended > GONE * near)
    share = gone[:-1].sum(1) / tracks.visible[:-1].sum(1).clamp(min=1)
    # Where points are lost everywhere, the tracker fails (a jerk, blur), and nothing is known. The rim of a replaced region is
    # lost in part, so it does not count.
    others = tracks.visible & (ended <= GONE / 2 * near)
    elsewhere = (tracks.ended & others)[:-1].sum(1) / others[:-1].sum(1).clamp(min=1)
    share = torch.where(elsewhere < MOST_ELSEWHERE, share, 0.0)
    known = max(0.0, 1 - usual_loss(tracks) / MOST_USUAL)
    return known * float(share.max()), int(share.argmax())


def usual_loss(tracks: PointTracks) -> float:
    """Median over the steps of the share of points that are lost."""
    return float((tracks.lost / tracks.alive.clamp(min=1)).median())


def exchanged(tracks: PointTracks) -> tuple[float, float]:
    """Sum of the shares of lost tracks over the worst third of the clip's steps, about 1 where a picture dissolves into
    another, and the share lost in the worst step; both beyond the median step's."""
    lost = tracks.lost / tracks.alive.clamp(min=1)
    window = max(1, len(lost) // 3)
    usual = usual_loss(tracks)
    return float(lost.unfold(0, window, 1).sum(1).max()) - window * usual, float(lost.max()) - usual


def unstable(tracks: PointTracks, size: tuple[int, int]) -> float:
    """Share of the tracks in places where tracks are lost again and again: a texture that boils."""
    visible, ended = tracks.visible.cpu(), tracks.ended.cpu()
    place = tracks.positions.double().cpu().flatten(0, 1)[None]
    both = torch.stack([ended.double(), visible.double()], dim=-1).flatten(0, 1)[None]
    lost, near = residuals.neighbourhood(both, place, visible.flatten()[None], size).unbind(-1)
    boils = visible.flatten() & (lost[0] > BOILING * near[0])
    return float(boils.sum() / visible.sum().clamp(min=1))
