"""Point tracking through a clip with the forward-backward check (Kalal et al. 2010).

Points are tracked from key frame to key frame, starting from a constant-velocity prediction, and back; a point that does
not return to its start is lost. Corners are added in cells without tracks; a track ends when it leaves the image or is lost.

A tracker (TorchTracker or OpenCVTracker) is a callable (i, j, points [N, 2], guess [N, 2], levels) -> (positions in key
frame j [N, 2], residuals of the windows [N] in grey levels). It tracks from key frame i to j on `levels` pyramid levels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import lucas_kanade
from .corners import MIN_EIGENVALUE, find_corners

# Cells of the corner grid along the shorter side, and the minimum side of a cell in pixels.
CELLS, LEAST_CELL = 18, 8
# Width of the margin without tracks, pixels.
BORDER = 8
# Corners are added every REFILL key frames.
REFILL = 2
# Minimum number of key frames in which a track must be visible.
LEAST_SEEN = 3
# A track is lost from this forward-backward error in pixels, or from a window difference in grey levels (of normalised
# pictures, see light.py) between these limits, USUAL times the median in between.
RETURN = 0.5
DIFFERENCE, USUAL = (10.0, 25.0), 5.0
# Pyramid levels of the backward pass.
BACK_LEVELS = 2
# Share of the points lost in a step from which the lost ones are tracked through the frames between.
LOST = 0.05
# Number of neighbours whose steps tell where a lost point is looked for again.
NEIGHBOURS = 7


@dataclass(frozen=True)
class PointTracks:
    """N tracks over K key frames.

    positions: [K, N, 2] pixels (x, y), 0 where not visible; visible: bool [K, N]; alive: [K - 1], number of tracks whose new
    position in a step is inside the image, less BORDER; lost: [K - 1], number of those that were lost before they were looked
    for by the steps of their neighbours; ended: bool [K, N], True at the last key frame before a final loss.
    """

    positions: Tensor
    visible: Tensor
    lost: Tensor
    alive: Tensor
    ended: Tensor

    def select(self, which: Tensor) -> "PointTracks":
        """The tracks given by a mask or indices; `lost` and `alive` still count all tracks."""
        return PointTracks(self.positions[:, which], self.visible[:, which], self.lost, self.alive, self.ended[:, which])

    def usable(self) -> "PointTracks":
        """The tracks that are visible in LEAST_SEEN key frames or more, on the CPU."""
        found = self.select(self.visible.sum(0) >= LEAST_SEEN)
        return replace(found, positions=found.positions.cpu(), visible=found.visible.cpu(), ended=found.ended.cpu())

    def from_centre(self, centre: Tensor) -> Tensor:
        """Positions from the image centre [2], float64 [K, N, 2], 0 where not visible."""
        return torch.where(self.visible[..., None], self.positions.double() - centre, 0.0)


class TorchTracker:
    """Lucas-Kanade tracker in torch on key frames [K, H, W], grey levels 0 to 255. Pyramids are computed once."""

    def __init__(self, grey: Tensor):
        self.pyramids = [lucas_kanade.pyramid(g[None, None]) for g in grey]

    def __call__(self, i: int, j: int, points: Tensor, guess: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        return lucas_kanade.track(self.pyramids[i][:levels], self.pyramids[j][:levels], points, guess)


def follow(
    grey: Tensor,
    tracker,
    progress: Callable[[float], None] | None = None,
    left_out: Tensor | None = None,
    covered: Callable[[int], Tensor] | None = None,
    cell: int | None = None,
    least: float = MIN_EIGENVALUE,
    between: Callable[[int], tuple[object, int]] | None = None,
) -> PointTracks:
    """Track corners through all key frames.

    grey: [K, H, W], grey levels 0 to 255; tracker: see the module's docstring; progress: called with the share done, 0 to 1,
    after each step; left_out: bool [H, W], pixels whose windows are not tracked (a track that enters them ends without being
    lost); covered: key frame -> points [M, 2] whose cells need no corner; cell: side of a cell of corners, pixels (None: by
    the picture's size); least: minimum corner strength; between: key frame k -> (tracker, count) over the frames from k to k +
    1: if more than LOST of the points are lost in a step, those are tracked again through the frames between."""
    count, height, width = grey.shape
    cell = cell or max(LEAST_CELL, min(height, width) // CELLS)
    allowed = trackable(grey.shape[1:], left_out, grey.device)
    positions = grey.new_zeros(count, 0, 2)
    visible = torch.zeros(count, 0, dtype=torch.bool, device=grey.device)
    ended, velocity, lost, alive = visible, grey.new_zeros(0, 2), [], []
    for k in range(count - 1):
        # No corners in the last two key frames: they could not be visible in three.
        if k % REFILL == 0 and k < max(1, count - 2):
            taken = positions[k, visible[k]]
            if covered is not None:
                taken = torch.cat([taken, covered(k).to(taken)])
            new = find_corners(grey[k], cell, allowed, taken, least)
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
        good = returns(tracker, k, k + 1, at, there, left)
        inside = _allowed(there, allowed)
        again = ~good & inside
        if between is not None and int(again.sum()) > LOST * len(again):
            # Frame by frame, points are not lost by a jerk, but follow whatever fades in: the end must look like the start.
            near = _through(*between(k), at[again])
            found, left = tracker(k, k + 1, at[again], near, BACK_LEVELS)
            there[again], good[again] = found, returns(tracker, k, k + 1, at[again], found, left)
            inside = _allowed(there, allowed)
        lost.append(int((~good & inside).sum()))
        alive.append(int(inside.sum()))
        again = ~good & inside
        if int(again.sum()) > LOST * len(again) and int(good.sum()) >= NEIGHBOURS:
            # The neighbours that were found tell where to look for a point that a large step carried out of reach.
            near = at[again] + _nearest_steps(at, there, good, at[again])
            found, left = tracker(k, k + 1, at[again], near, BACK_LEVELS)
            there[again], good[again] = found, returns(tracker, k, k + 1, at[again], found, left)
            inside = _allowed(there, allowed)
        kept = here[good & inside]
        positions[k + 1, kept], visible[k + 1, kept] = there[good & inside], True
        velocity[here] = there - at
        ended[k, here[~good & inside]] = True
        if progress is not None:
            progress((k + 1) / (count - 1))
    return PointTracks(positions, visible, torch.tensor(lost), torch.tensor(alive), ended)


def trackable(size: tuple[int, int], left_out: Tensor | None, device=None) -> Tensor:
    """bool [H, W]: pixels at least BORDER away from the picture's edge and from what is left out."""
    height, width = size
    allowed = torch.zeros(height, width, dtype=torch.bool, device=device)
    allowed[BORDER : height - BORDER, BORDER : width - BORDER] = True
    return allowed if left_out is None else allowed & ~widened(left_out, BORDER)


def returns(tracker, i: int, j: int, at: Tensor, there: Tensor, left: Tensor) -> Tensor:
    """Whether points look the same at `there` in key frame j and are tracked back to `at` in key frame i, bool [N]."""
    back, _ = tracker(j, i, there, at, BACK_LEVELS)
    return ((back - at).norm(dim=1) < RETURN) & (left < most_difference(left))


def most_difference(left: Tensor) -> float:
    """Largest difference of a window that shows the same point, grey levels: USUAL times the median of the differences [N] of
    windows of which most do, between the limits of DIFFERENCE."""
    low, high = DIFFERENCE
    known = left[left.isfinite()]
    return min(max(low, USUAL * float(known.median())), high) if len(known) else high


def _nearest_steps(at: Tensor, there: Tensor, good: Tensor, points: Tensor) -> Tensor:
    """Median step of the NEIGHBOURS nearest points that were found, for each of `points` [M, 2]."""
    nearest = torch.cdist(points, at[good]).topk(NEIGHBOURS, largest=False).indices
    return (there - at)[good][nearest].median(dim=1).values


def _through(tracker, count: int, at: Tensor) -> Tensor:
    """Positions of points in the last of `count` frames, tracked from frame to frame."""
    step = torch.zeros_like(at)
    for i in range(count - 1):
        there, _ = tracker(i, i + 1, at, at + step, lucas_kanade.LEVELS)
        step, at = there - at, there
    return at


def _allowed(at: Tensor, allowed: Tensor) -> Tensor:
    height, width = allowed.shape
    x, y = at.round().long().unbind(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return inside & allowed[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def widened(mask: Tensor, reach: int) -> Tensor:
    """Pixels within `reach` of a mask [H, W], in x and in y."""
    if not bool(mask.any()):
        return mask
    for dim in (0, 1):
        # Twice as wide in each round: a maximum over a window of this size takes a hundred times as long.
        done = 0
        while done < reach:
            step = min(max(1, done), reach - done)
            wide = mask.clone()
            size = mask.shape[dim]
            wide.narrow(dim, step, size - step).logical_or_(mask.narrow(dim, 0, size - step))
            wide.narrow(dim, 0, size - step).logical_or_(mask.narrow(dim, step, size - step))
            mask, done = wide, done + step
    return mask
