"""Error heat map over dimmed frames."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..colours import heat_map_colour
from .grey import LUMA, halved
from .record import DENSE, TRACKS

# Brightness of the grey frames.
DIM = 0.5
# Pixels of a heat map along the shorter side, at most.
MOST_LINES = 240
# The error at full colour is the 99.5th percentile of all errors, but at least this, in the unit of a record's
# frame_errors, so that the small errors of a consistent clip stay dark.
LEAST = {TRACKS: 3.0, DENSE: 0.3}
PERCENTILE = 0.995
# Number of values after which errors are subsampled for the percentile.
SAMPLE = 1 << 20


def full_error(error_maps: list[Tensor], scorer: str) -> float:
    """The error at full colour for a set of clips: one value for all, so that their heat maps can be compared.

    error_maps: tensors of any shape, NaN where nothing was measured; scorer: record.TRACKS or record.DENSE. Returns a value in
    the unit of that scorer's frame_errors.
    """
    found = [m[m.isfinite()] for m in error_maps]
    values = torch.cat([v[:: v.numel() // SAMPLE + 1] for v in found]) if found else torch.zeros(0)
    if not values.numel():
        return LEAST[scorer]
    values = values[:: values.numel() // SAMPLE + 1].float().sort().values
    return max(LEAST[scorer], float(values[int(PERCENTILE * (values.numel() - 1))]))


def heat_map(
    frames: Tensor, error_map: Tensor, frame_indices: list[int], full: float, greys: Mapping[int, Tensor] | None = None
) -> Tensor:
    """Blend the error's colours over dimmed grey frames. Returns float32 [T, h, w, 3] in [0, 1], the frames' size but with at
    most MOST_LINES pixels along the shorter side: more show no more of the errors and take gigabytes for a long clip.

    frames: [T, H, W, 3] in [0, 1]; error_map: [F, h, w], the errors of the frames frame_indices (ascending), of any size, NaN
    where nothing was measured, which stays grey; full: the error at full colour, see `full_error`; greys: of record.Scored,
    used if they have the result's size. Errors are interpolated linearly in time between measured frames; before the first
    and after the last one they are constant.
    """
    size = shown_size(frames.shape[1:3])
    out = torch.empty(len(frames), *size, 3, device=frames.device)
    at = frame_indices
    known = {t: grey for t, grey in (greys or {}).items() if grey.shape == size}
    for t, frame in enumerate(frames):
        left, right = max(bisect_right(at, t) - 1, 0), min(bisect_left(at, t), len(at) - 1)
        along = 0.0 if left == right else (t - at[left]) / (at[right] - at[left])
        error, measured = _between(error_map[left].float(), error_map[right].float(), along)
        share = (error / full).clamp_(0, 1)
        # Half-way to a frame in which a pixel was not measured, the opacity is halved.
        opacity = share.sqrt() * measured
        glow = heat_map_colour(share).permute(2, 0, 1) * opacity
        # The colours of a coarse map are enlarged, not its errors: a colour for every pixel of every frame takes seconds.
        planes = resized(torch.cat([glow, opacity[None]]).to(out), size)
        grey = known[t] if t in known else _grey(frame, size)
        through = (1 - planes[3]) * (DIM / 255)
        for channel in range(3):
            torch.addcmul(planes[channel], grey, through, out=out[t, ..., channel])
    return out


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) with at most MOST_LINES along the shorter side; reduced sides are even, as video encoders want them."""
    scale = MOST_LINES / min(size)
    return tuple(size) if scale >= 1 else tuple(2 * round(side * scale / 2) for side in size)


def _grey(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Grey levels 0 to 255 of a frame [H, W, C] in [0, 1], resized to (h, w), 0 where a channel is not finite."""
    if [2 * side for side in size] == list(frame.shape[:2]) and frame.shape[2] == 3:
        grey = halved(frame, LUMA)
    else:
        grey = resized((frame[..., :3].float() @ torch.tensor(LUMA, device=frame.device))[None], size)[0]
    return 255 * grey.nan_to_num_()


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] resized to (h, w): averaged where it becomes less than half, else linearly interpolated."""
    if tuple(planes.shape[1:]) == tuple(size):
        return planes
    if 2 * size[0] < planes.shape[1]:
        return F.interpolate(planes[None], size=tuple(size), mode="area")[0]
    return F.interpolate(planes[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def _between(left: Tensor, right: Tensor, along: float) -> tuple[Tensor, Tensor]:
    """Interpolate between two error maps at `along`, 0 to 1: (error, weight of the measured values, 0 to 1), both [h, w]."""
    weights = [(1 - along) * left.isfinite(), along * right.isfinite()]
    measured = weights[0] + weights[1]
    error = weights[0] * left.nan_to_num() + weights[1] * right.nan_to_num()
    return error / measured.clamp_min(1e-6), measured
