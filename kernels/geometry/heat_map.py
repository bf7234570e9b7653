"""Error heat map over dimmed frames."""

from bisect import bisect_left, bisect_right

import torch
from torch import Tensor
from torch.nn import functional as F

from ..colours import heat_map_colour
from .record import DENSE, TRACKS

# Brightness of the grey frames.
DIM = 0.5
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


def heat_map(frames: Tensor, error_map: Tensor, frame_indices: list[int], full: float) -> Tensor:
    """Blend the error's colours over dimmed grey frames. Returns float32 [T, H, W, 3] in [0, 1].

    frames: [T, H, W, 3] in [0, 1]; error_map: [F, h, w], the errors of the frames frame_indices (ascending), NaN where nothing
    was measured, which stays grey; full: the error at full colour, see `full_error`. Errors are interpolated linearly in time
    between measured frames; before the first and after the last one they are constant.
    """
    size = frames.shape[1:3]
    grey = DIM * frames[..., :3].float().nan_to_num().mean(dim=-1, keepdim=True)
    out = grey.expand(*grey.shape[:3], 3).clone()
    at = frame_indices
    for t in range(frames.shape[0]):
        left, right = max(bisect_right(at, t) - 1, 0), min(bisect_left(at, t), len(at) - 1)
        along = 0.0 if left == right else (t - at[left]) / (at[right] - at[left])
        error, measured = _between(error_map[left].float(), error_map[right].float(), along)
        share = (error / full).clamp(0, 1)
        # Half-way to a frame in which a pixel was not measured, the opacity is halved.
        opacity = _resized(share.sqrt() * measured, size)[..., None]
        out[t] = torch.lerp(out[t], heat_map_colour(_resized(share, size)).to(out), opacity.to(out))
    return out


def _between(left: Tensor, right: Tensor, along: float) -> tuple[Tensor, Tensor]:
    """Interpolate between two error maps at `along`, 0 to 1: (error, weight of the measured values, 0 to 1), both [h, w]."""
    weights = [(1 - along) * left.isfinite(), along * right.isfinite()]
    measured = weights[0] + weights[1]
    error = weights[0] * left.nan_to_num() + weights[1] * right.nan_to_num()
    return error / measured.clamp_min(1e-6), measured


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    if values.shape == size:
        return values
    return F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
