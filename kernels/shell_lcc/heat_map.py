"""A picture of where a latent leaves the shell: blue is smoother than real video, red is noisier, dark is neither."""

import torch
from torch import Tensor

from ..colours import heat_map_colour
from .calibration import BAND
from .manifold import ShellManifold


def position(manifold: ShellManifold, distance: Tensor) -> Tensor:
    """Where distances lie on the colour axis, -1 to 1; same shape.

    Within the calibrated band by percentile, cubed so that ordinary tokens stay dark; beyond an edge by octaves of
    distance from it. Without calibration by octaves around the radius.
    """
    if manifold.calibration is None:
        return torch.log2(distance.clamp_min(1e-6) / manifold.radius).clamp(-1, 1)
    low, high = manifold.band
    middle = (BAND[0] + BAND[1]) / 2
    inside = ((manifold.token_percentile(distance) - middle) / (BAND[1] - middle)).clamp(-1, 1)
    octaves = torch.log2(distance.clamp_min(1e-6) / distance.clamp(low, high)).clamp(-1, 1)
    return 0.5 * (inside.pow(3) + octaves)


def heat_map(manifold: ShellManifold, distance: Tensor, video_frames: bool) -> Tensor:
    """IMAGE [N, height, width, 3] in pixels of distances [B, T, H, W], the items of a batch one after another.

    video_frames: as many images as the decoded clips have frames, instead of one a latent frame.
    """
    space = manifold.space
    images = heat_map_colour(position(manifold, distance))
    if video_frames:
        repeats = torch.full((distance.shape[1],), space.temporal_stride, device=distance.device)
        repeats[0] = 1
        images = images.repeat_interleave(repeats, dim=1)
    images = images.flatten(0, 1)
    return images.repeat_interleave(space.spatial_stride, dim=1).repeat_interleave(space.spatial_stride, dim=2)
