"""Tracks of regions without corners, at a quarter of the resolution: a region that melts smoothly is seen by them only."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bundle
from .light import even_light
from .point_tracks import PointTracks, follow

# Resolution, side of the cells of corners and neighbourhood of the local normalisation.
COARSE, CELL, SHARE = 0.25, 8, 0.3
# Residuals below this, pixels, are tracking errors: a window covers 60 pixels, in which depth varies.
FLOOR = 1.5


@dataclass(frozen=True)
class SmoothRegions:
    """Tracks of regions without corners. place: [K, M, 2], pixels from the top left; visible: bool [K, M]; error:
    [K, M], px at 480 lines; moving: bool [M], tracks that move by themselves; mean: of the errors."""

    place: Tensor
    visible: Tensor
    error: Tensor
    moving: Tensor
    mean: float


def follow_smooth(grey: Tensor, fine: PointTracks, left_out: Tensor, tracker_type) -> PointTracks:
    """Tracks at COARSE resolution in the cells in which no track of `fine` lies; positions in pixels of `grey`."""
    size = [max(32, round(side * COARSE)) for side in grey.shape[1:]]
    ratio = fine.positions.new_tensor([size[1] / grey.shape[2], size[0] / grey.shape[1]])
    small = F.interpolate(grey[:, None], size, mode="area")[:, 0]
    small_out = F.interpolate(left_out[None, None].float(), size, mode="area")[0, 0] > 0
    even = even_light(small, small_out, SHARE)

    def covered(k: int) -> Tensor:
        return ((fine.positions[k, fine.visible[k]] + 0.5) * ratio - 0.5).clamp(min=0)

    found = follow(even, tracker_type(even), None, small_out, covered, CELL).usable()
    return replace(found, positions=(found.positions + 0.5) / ratio.to(found.positions) - 0.5)


def errors(tracks: PointTracks, scene: bundle.Scene, centre: Tensor, px: float, worst: float, moving: float) -> SmoothRegions:
    """Distances of the tracks from the scene seen by its cameras, less FLOOR, at most `worst`; px at 480 lines.

    tracks: of `follow_smooth`; centre: [2], pixels; px: factor from pixels to pixels at 480 lines; moving: mean error above
    which a track moves by itself.
    """
    seen, visible = tracks.from_centre(centre), tracks.visible
    if not visible.shape[1]:
        return SmoothRegions(seen, visible, seen[..., 0], visible[0], 0.0)
    scene = bundle.triangulate(scene, seen, visible, len(visible) // 2, 1.0 / (COARSE * px))
    distance = (bundle.project(scene) - seen).norm(dim=-1) * px
    error = torch.where(visible, (distance - FLOOR * px).clamp(0, worst), 0.0)
    each = error.sum(0) / visible.sum(0)
    return SmoothRegions(seen + centre, visible, error, each > moving, float(error.sum() / visible.sum()))
