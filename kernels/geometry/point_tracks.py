"""Points followed through a clip: new corners where the picture has none, each kept until it leaves or is lost.

A step goes from key frame to key frame with the velocity of the last one as a first guess, and back again: what does not
return to where it came from is lost (Kalal et al. 2010). A tracker is (i, j, points [N, 2], guess [N, 2], levels) ->
(points in key frame j [N, 2], what is left of the windows' difference [N], grey levels): TorchTracker, or OpenCV's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lucas_kanade
from .corners import find_corners

# One corner a cell: a share of the shorter side, and least pixels.
CELLS, LEAST_CELL = 18, 8
BORDER = 8
REFILL = 2
RETURN = 0.5
DIFFERENCE = 25.0
BACK_LEVELS = 2


@dataclass(frozen=True)
class PointTracks:
    """positions [K, N, 2]: pixels (x, y), 0 where not visible; visible: bool [K, N]; lost, alive: [K - 1] counts of tracks
    that were lost in a step though still in the picture, and of those that were not or were; ended: bool [K, N], where a
    track was lost after this key frame."""

    positions: Tensor
    visible: Tensor
    lost: Tensor
    alive: Tensor
    ended: Tensor

    def select(self, which: Tensor) -> "PointTracks":
        """The tracks of a mask or list of indices."""
        return PointTracks(self.positions[:, which], self.visible[:, which], self.lost, self.alive, self.ended[:, which])


class TorchTracker:
    """Lucas-Kanade in torch on key frames [K, H, W] of grey levels; pyramids are made once."""

    def __init__(self, grey: Tensor):
        self.pyramids = [lucas_kanade.pyramid(g[None, None]) for g in grey]

    def __call__(self, i: int, j: int, points: Tensor, guess: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        return lucas_kanade.track(self.pyramids[i][:levels], self.pyramids[j][:levels], points, guess)


def follow(grey: Tensor, tracker, progress: Callable[[float], None] | None = None) -> PointTracks:
    """Tracks through key frames [K, H, W], grey levels 0 to 255. progress: called with the share done after each step."""
    count, height, width = grey.shape
    cell = max(LEAST_CELL, min(height, width) // CELLS)
    limit = grey.new_tensor([width - 1 - BORDER, height - 1 - BORDER])
    positions = grey.new_zeros(count, 0, 2)
    visible = torch.zeros(count, 0, dtype=torch.bool, device=grey.device)
    ended, velocity, lost, alive = visible, grey.new_zeros(0, 2), [], []
    for k in range(count - 1):
        # A corner found late could not be seen three times.
        if k % REFILL == 0 and k < max(1, count - 2):
            new = find_corners(grey[k], cell, BORDER, positions[k, visible[k]])
            positions = torch.cat([positions, grey.new_zeros(count, len(new), 2)], dim=1)
            visible, ended = (
                torch.cat([m, torch.zeros(count, len(new), dtype=torch.bool, device=grey.device)], dim=1)
                for m in (visible, ended)
            )
            velocity = torch.cat([velocity, torch.zeros_like(new)])
            first = positions.shape[1] - len(new)
            positions[k, first:], visible[k, first:] = new, True
        here = visible[k].nonzero()[:, 0]
        at = positions[k, here]
        there, left = tracker(k, k + 1, at, at + velocity[here], lucas_kanade.LEVELS)
        back, _ = tracker(k + 1, k, there, at, BACK_LEVELS)
        inside = ((there >= BORDER) & (there <= limit)).all(1)
        good = ((back - at).norm(dim=1) < RETURN) & (left < DIFFERENCE)
        kept = here[good & inside]
        positions[k + 1, kept], visible[k + 1, kept] = there[good & inside], True
        velocity[here] = there - at
        ended[k, here[~good & inside]] = True
        lost.append(int((~good & inside).sum()))
        alive.append(int(inside.sum()))
        if progress is not None:
            progress((k + 1) / (count - 1))
    return PointTracks(positions, visible, torch.tensor(lost), torch.tensor(alive), ended)
