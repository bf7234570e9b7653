"""Structure from motion of a clip's tracks: one rigid scene and one moving camera, and how much depth it shows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bundle, fundamental, homography
from .rotation import fit_rotation_and_zoom

# Truncation of Sampson distances and of parallax, pixels at 480 lines.
WORST, MOST_PARALLAX = 3.0, 8.0
# Least share of the motion that counts as parallax, however much the residuals deduct.
LEAST_SHARE = 0.25
# Number of tracks used for bundle adjustment; the points of the others are triangulated.
REFINED = 300
# Initial focal lengths, as shares of the longer side. The others are tried if the fit from the first leaves more than SURE.
FOCALS = (0.9, 0.6, 1.4, 2.2)
# Loss scales of the refinement, px at 480 lines, with the maximum number of rounds at each. Wide first: with all points at
# depth 1, inliers have larger residuals than outliers have after convergence.
WIDE, NARROWING = (16.0, 8), ((16.0, 6), (4.0, 6), (1.0, 6))
# Robust cost per observation (0 to 1) above which other focal lengths and the depth-reversed scene are tried as well.
SURE = 0.06


@dataclass(frozen=True)
class Structure:
    """A scene fitted to tracks. at: [K, N, 2], reprojected points, pixels from the image centre."""

    scene: bundle.Scene
    at: Tensor


def reconstruct(seen: Tensor, visible: Tensor, side: int, px: float) -> Structure:
    """Fit one rigid scene and one moving camera to tracks by bundle adjustment, from several focal lengths.

    seen: [K, N, 2] pixels from the image centre, float64, CPU; visible: bool [K, N]; side: longer side of the picture, pixels;
    px: factor from these pixels to pixels at 480 lines.
    """
    keys, count = visible.shape
    generator = torch.Generator().manual_seed(0)
    order = visible.sum(0) + 4 * torch.rand(count, generator=generator)
    few = order.topk(min(REFINED, count)).indices.sort().values
    some, shown = seen[:, few], visible[:, few]
    reference, scale = keys // 2, 1.0 / px
    best, lowest = None, math.inf
    for share in FOCALS:
        scene, cost = _refined(_start(some, shown, reference, share * side, scale), some, shown, reference, scale)
        if cost < lowest:
            best, lowest = scene, cost
        if lowest <= SURE:
            break
    else:
        # The fit may have converged to the depth-reversed scene.
        scene, cost = _narrow(bundle.reverse_depth(best), some, shown, reference, scale)
        best = scene if cost < lowest else best
    scene, _ = bundle.refine(best, some, shown, reference, scale, 20, 1e-4)
    scene = bundle.triangulate(scene, seen, visible, reference, scale)
    return Structure(scene, bundle.project(scene))


def _start(seen: Tensor, visible: Tensor, reference: int, focal: float, scale: float) -> bundle.Scene:
    """Points at depth 1, cameras that turn from key frame to key frame as the tracks do."""
    steps, _, _ = fit_rotation_and_zoom(seen[:-1], seen[1:], visible[:-1] & visible[1:], seen.new_tensor(focal), 2 * scale)
    rotation = [torch.eye(3, dtype=seen.dtype)]
    for step in bundle.rotation_of(steps):
        rotation.append(step @ rotation[-1])
    rotation = torch.stack(rotation) @ rotation[reference].T
    return bundle.start(seen, visible, rotation, reference, focal)


def _refined(scene: bundle.Scene, seen: Tensor, visible: Tensor, reference: int, scale: float) -> tuple[bundle.Scene, float]:
    wide, rounds = WIDE
    scene, _ = bundle.refine(scene, seen, visible, reference, wide * scale, rounds)
    return _narrow(scene, seen, visible, reference, scale)


def _narrow(scene: bundle.Scene, seen: Tensor, visible: Tensor, reference: int, scale: float) -> tuple[bundle.Scene, float]:
    for wide, rounds in NARROWING:
        scene, cost = bundle.refine(scene, seen, visible, reference, wide * scale, rounds)
    return scene, cost


def parallax_of(seen: Tensor, at: Tensor, visible: Tensor, px: float, shared: float) -> tuple[float, float, float]:
    """Parallax, and the motion that no homography and no two homographies explain: means over tracks, pixels at 480 lines.

    seen: [K, N, 2], tracks; at: [K, N, 2], their reprojections, pixels from the image centre; visible: bool [K, N]; px: factor
    to pixels at 480 lines; shared: mean residual that neighbouring tracks share, pixels at 480 lines. Both must show it: a
    warp is no parallax, and reprojections do not follow it; a zoom is none, and a homography explains the tracks. Measured
    between key frames a quarter of the clip apart: over a longer time, trackers drift by as much under a zoom."""
    gap = max(1, len(visible) // 4)
    i = torch.arange(0, len(visible) - gap, 2)
    both = visible[i] & visible[i + gap]
    pair = [homography.parallax(p[i] * px, p[i + gap] * px, both, MOST_PARALLAX) for p in (seen, at)]
    one, two = (float(torch.minimum(a, b).mean()) for a, b in zip(*pair, strict=True))
    # A warp that the scene follows in part adds to the motion what it leaves over, in both key frames.
    return max(one * one - 2 * shared * shared, (LEAST_SHARE * one) ** 2) ** 0.5, one, two


def sampson(seen: Tensor, visible: Tensor, px: float) -> float:
    """Mean Sampson distance between key frames half a clip apart, truncated at WORST, pixels at 480 lines. Arguments as in
    `parallax_of`."""
    gap = len(visible) // 2
    i = torch.arange(0, len(visible) - gap, 2)
    both = visible[i] & visible[i + gap]
    _, cut = fundamental.ransac(seen[i], seen[i + gap], both, WORST / px, torch.Generator().manual_seed(0), 32, 2)
    return float(cut.sum() / both.sum().clamp(min=1)) * px
