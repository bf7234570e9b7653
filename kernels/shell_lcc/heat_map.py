"""Heat map of Shell-LCC distances (arXiv 2606.30248): blue is smoother than real video, red noisier, dark typical."""

import torch
from torch import Tensor

from ..colours import heat_map_colour
from .calibration import BAND
from .manifold import ShellManifold


def position(manifold: ShellManifold, distance: Tensor) -> Tensor:
    """Map distances to colour positions from -1 (smoother) to 1 (noisier); same shape.

    Inside the calibrated band: -0.5 to 0.5 by percentile, cubed so that typical tokens stay dark. Outside: from there to
    -1 or 1, at one octave (factor 2) beyond the band's edge. Without calibration: log2(distance / radius).
    """
    if manifold.calibration is None:
        return torch.log2(distance.clamp_min(1e-6) / manifold.radius).clamp(-1, 1)
    low, high = manifold.band
    middle = (BAND[0] + BAND[1]) / 2
    inside = ((manifold.token_percentile(distance) - middle) / (BAND[1] - middle)).clamp(-1, 1)
    octaves = torch.log2(distance.clamp_min(1e-6) / distance.clamp(low, high)).clamp(-1, 1)
    return 0.5 * (inside.pow(3) + octaves)


def heat_map(manifold: ShellManifold, distance: Tensor, video_frames: bool) -> Tensor:
    """Images [N, height, width, 3], RGB in [0, 1] at pixel resolution, of distances [B, T, H, W], one clip after another.

    video_frames: if True, one image per frame of the decoded clips, else one per latent frame.
    """
    space = manifold.space
    images = heat_map_colour(position(manifold, distance))
    if video_frames:
        repeats = torch.full((distance.shape[1],), space.temporal_stride, device=distance.device)
        repeats[0] = 1
        images = images.repeat_interleave(repeats, dim=1)
    images = images.flatten(0, 1)
    return images.repeat_interleave(space.spatial_stride, dim=1).repeat_interleave(space.spatial_stride, dim=2)
