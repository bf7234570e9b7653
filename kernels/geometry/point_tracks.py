"""Point tracking through a clip with the forward-backward check (Kalal et al. 2010).

Points are tracked from key frame to key frame, starting from a constant-velocity prediction, and back; a point that does
not return to its start is lost. Corners are added in cells without tracks; a track ends when it leaves the image or is lost.

A tracker (TorchTracker or OpenCVTracker) is a callable (i, j, points [N, 2], guess [N, 2], levels) -> (positions in key
frame j [N, 2], residuals of the windows [N] in grey levels). It tracks from key frame i to j on `levels` pyramid levels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import lucas_kanade
from .corners import find_corners

# Cells of the corner grid along the shorter side, and the minimum side of a cell in pixels.
CELLS, LEAST_CELL = 18, 8
# Width of the margin without tracks, pixels.
BORDER = 8
# Corners are added every REFILL key frames.
REFILL = 2
# A track is lost from this forward-backward error in pixels, or from this residual in grey levels.
RETURN = 0.5
DIFFERENCE = 25.0
# Pyramid levels of the backward pass.
BACK_LEVELS = 2


@dataclass(frozen=True)
class PointTracks:
    """N tracks over K key frames.

    positions: [K, N, 2] pixels (x, y), 0 where not visible; visible: bool [K, N]; alive: [K - 1], number of tracks whose new
    position in a step is inside the image, less BORDER; lost: [K - 1], number of those that were lost; ended: bool [K, N],
    True at the last key frame before such a loss.
    """

    positions: Tensor
    visible: Tensor
    lost: Tensor
    alive: Tensor
    ended: Tensor

    def select(self, which: Tensor) -> "PointTracks":
        """The tracks given by a mask or indices; `lost` and `alive` still count all tracks."""
        return PointTracks(self.positions[:, which], self.visible[:, which], self.lost, self.alive, self.ended[:, which])


class TorchTracker:
    """Lucas-Kanade tracker in torch on key frames [K, H, W], grey levels 0 to 255. Pyramids are computed once."""

    def __init__(self, grey: Tensor):
        self.pyramids = [lucas_kanade.pyramid(g[None, None]) for g in grey]

    def __call__(self, i: int, j: int, points: Tensor, guess: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        return lucas_kanade.track(self.pyramids[i][:levels], self.pyramids[j][:levels], points, guess)


def follow(grey: Tensor, tracker, progress: Callable[[float], None] | None = None) -> PointTracks:
    """Track corners through all key frames.

    grey: [K, H, W], grey levels 0 to 255; tracker: see the module's docstring; progress: called with the share done, 0 to 1,
    after each step.
    """
    count, height, width = grey.shape
    cell = max(LEAST_CELL, min(height, width) // CELLS)
    limit = grey.new_tensor([width - 1 - BORDER, height - 1 - BORDER])
    positions = grey.new_zeros(count, 0, 2)
    visible = torch.zeros(count, 0, dtype=torch.bool, device=grey.device)
    ended, velocity, lost, alive = visible, grey.new_zeros(0, 2), [], []
    for k in range(count - 1):
        # No corners in the last two key frames: they could not be visible in three.
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
