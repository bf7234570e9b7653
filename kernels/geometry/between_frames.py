"""The frames between the key frames: points of the reconstructed scene are looked for in each of them.

A point starts where the key frames before and behind predict it and is tracked there from the key frame before, at half the
resolution. A camera is fitted to the positions found (resection: six parameters, the scene and the focal length stay), and the
distances that it leaves over are the frame's residuals. A point whose surroundings look different there is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bundle
from .light import even_light
from .point_tracks import most_difference

# Number of points looked for in a frame, and the resolution, as a share of the key frames'.
POINTS, SCALE = 200, 0.5
# Pyramid levels of the tracker and iterations of the camera's fit.
LEVELS, ROUNDS = 2, 4
# A frame whose mean steepness is below this share of its neighbours' is plain (a flash, a fade to black, a smear): nothing can
# be looked for in it.
PLAIN = 0.4


@dataclass(frozen=True)
class BetweenFrames:
    """indices: of the frames looked at, of the clip; vectors: [F, P, 2], from the position found to the one expected, pixels
    of the key frames; at: [F, P, 2], positions found, pixels from the picture's top left; found, missing: bool [F, P], points
    that were looked for with and without success; plain: bool [F], frames in which nothing can be looked for."""

    indices: list[int]
    vectors: Tensor
    at: Tensor
    found: Tensor
    missing: Tensor
    plain: Tensor


def look_at(
    grey_of: Callable[[int], Tensor],
    keys: Sequence[int],
    positions: Tensor,
    visible: Tensor,
    scene: bundle.Scene,
    tracker_type,
    size: tuple[int, int],
    left_out: Tensor | None = None,
    progress: Callable[[float], None] | None = None,
) -> BetweenFrames:
    """Look for POINTS points of the scene in every frame between two key frames.

    grey_of: index of a frame -> its grey levels at SCALE times the key frames' resolution; keys: indices of the key frames;
    positions: [K, N, 2], pixels from the picture's top left, float64, CPU; visible: bool [K, N]; scene: of the N points, with
    the cameras of the key frames; tracker_type: of point_tracks; size: (height, width) of the key frames; left_out: bool of
    that size, as in point_tracks.follow; progress: called with the share done.
    """
    height, width = size
    small_out = before = None
    order = torch.rand(visible.shape[1], generator=torch.Generator().manual_seed(1))
    parts, indices = [], []
    for k in range(len(keys) - 1):
        frames = list(range(keys[k] + 1, keys[k + 1]))
        if frames:
            both = (visible[k] & visible[k + 1]).nonzero()[:, 0]
            chosen = both[order[both].argsort()[:POINTS]]
            new = torch.stack([grey_of(t) for t in (*([] if before else [keys[k]]), *frames, keys[k + 1])])
            if left_out is not None and small_out is None:
                small_out = F.interpolate(left_out[None, None].float(), new.shape[1:], mode="area")[0, 0] > 0
            steep, even = _steepness(new), even_light(new, small_out)
            if before:
                # A key frame ends one gap and begins the next one.
                steep, even = torch.cat([before[0], steep]), torch.cat([before[1], even])
            before = steep[-1:], even[-1:]
            ends = positions[k : k + 2, chosen]
            cameras = _cameras(scene, k, len(frames), chosen)
            plain = steep[1:-1] < PLAIN * torch.minimum(steep[0], steep[-1])
            parts.append((*_look(even, ends, cameras, tracker_type, (width, height)), plain))
            indices += frames
        if progress is not None:
            progress((k + 1) / (len(keys) - 1))
    if not parts:
        nothing, none = positions.new_zeros(0, POINTS, 2), torch.zeros(0, POINTS, dtype=torch.bool)
        return BetweenFrames([], nothing, nothing, none, none, none[:, 0])
    return BetweenFrames(indices, *(torch.cat(part) for part in zip(*parts, strict=True)))


def _steepness(pictures: Tensor) -> Tensor:
    """Mean absolute difference of diagonal neighbours, [K], on the CPU. pictures: [K, h, w]."""
    return (pictures[:, 1:, 1:] - pictures[:, :-1, :-1]).abs().mean(dim=(1, 2)).cpu()


def _look(pictures: Tensor, ends: Tensor, cameras: bundle.Scene, tracker_type, size: tuple[int, int]) -> list[Tensor]:
    """One gap between key frames: vectors, at, found and missing of BetweenFrames.

    pictures: [f + 2, h, w], key frames first and last, at SCALE, with even light; ends: [2, n, 2], positions in the key frames
    before and behind; size: (width, height) of a key frame.
    """
    tracker = tracker_type(pictures)
    # Centres of pixels, not their corners, are at integers.
    full = ends.new_tensor(size)
    ratio = ends.new_tensor([pictures.shape[2], pictures.shape[1]]) / full
    small = [((p + 0.5) * ratio - 0.5).to(pictures) for p in ends]
    count, n = len(pictures) - 2, ends.shape[1]
    # The key frames are known to show the same points: what their windows differ by is no difference.
    _, usual = tracker(0, count + 1, *small, LEVELS)
    limit = most_difference(usual)
    at, found = ends.new_zeros(count, n, 2), torch.zeros(count, n, dtype=torch.bool)
    for i in range(count):
        expected = torch.lerp(*small, (i + 1) / (count + 1))
        there, left = tracker(0, i + 1, small[0], expected, LEVELS)
        at[i] = (there.to(ends) + 0.5) / ratio - 0.5
        found[i] = (left < limit).cpu()
    seen = torch.where(found[..., None], at - (full - 1) / 2, 0.0)
    cameras = bundle.resect(cameras, seen, found, 1.0 / SCALE, ROUNDS)
    vectors = torch.where(found[..., None], bundle.project(cameras) - seen, 0.0)
    spare = (0, 0, 0, POINTS - n)
    return [F.pad(v, spare) for v in (vectors, at)] + [F.pad(v, spare[2:]) for v in (found, ~found)]


def _cameras(scene: bundle.Scene, k: int, count: int, chosen: Tensor) -> bundle.Scene:
    """The chosen points, and cameras between those of the key frames k and k + 1, interpolated."""
    along = torch.arange(1, count + 1, dtype=scene.points.dtype)[:, None] / (count + 1)
    left, _, right = torch.linalg.svd(torch.lerp(scene.rotation[k], scene.rotation[k + 1], along[..., None]))
    translation = torch.lerp(scene.translation[k], scene.translation[k + 1], along)
    return bundle.Scene(left @ right, translation, scene.points[chosen], scene.focal)
