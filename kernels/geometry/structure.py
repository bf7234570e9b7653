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
REFINED = 250
# Initial focal lengths, as shares of the longer side. The others are tried if the fit from the first leaves more than SURE.
FOCALS = (0.9, 0.6, 1.4, 2.2)
# Loss scales of the refinement, px at 480 lines, with the maximum number of rounds at each. Wide first: with all points at
# depth 1, inliers have larger residuals than outliers have after convergence.
WIDE, NARROWING = (16.0, 8), ((16.0, 6), (4.0, 6), (1.0, 6))
# If more than this share of the tracks leaves FOLLOWS px at 480 lines or more, the share KEPT of them that fits best is fitted
# again, at most TRIMMED times.
TRIM_FROM, FOLLOWS, KEPT, TRIMMED = 0.1, 1.0, 0.6, 3
# Scale, px at 480 lines, of the measure by which two fits are compared: the sum of 1 / (1 + (distance / scale)^2).
CLOSE = 0.5
# The second fit leaves out tracks that move, against the dominant plane, by more than PLANE px at 480 lines and more than
# PLANE_TIMES the median: a subject that crosses the picture. With fewer than LEAST_KEPT tracks left, all are used.
PLANE, PLANE_TIMES, LEAST_KEPT = 15.0, 3.0, 30
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
    px: factor from these pixels to pixels at 480 lines. If more than TRIM_FROM of the tracks do not follow the scene, it is
    fitted again without the tracks that differ most from the dominant plane's motion, and then to the tracks that follow it
    best (as in least trimmed squares, Rousseeuw 1984). The fit that more observations follow closely is kept: a subject with a
    quarter of the tracks pulls the first fit towards its own motion.
    """
    reference, scale = len(visible) // 2, 1.0 / px
    order = visible.sum(0) + 4 * torch.rand(visible.shape[1], generator=torch.Generator().manual_seed(0))
    kept = torch.ones(visible.shape[1], dtype=torch.bool)
    best, most = None, -1.0
    for trial in range(2 + TRIMMED):
        scene = _fitted(seen, visible, torch.where(kept, order, -1.0), side, reference, scale)
        at = bundle.project(scene)
        distance = torch.where(visible, (at - seen).norm(dim=-1) * px, 0.0)
        followed = float(torch.where(visible, 1 / (1 + (distance / CLOSE).square()), 0.0).sum())
        better = followed > most
        if better:
            best, most = Structure(scene, at), followed
            each = distance.clamp(max=WORST).sum(0) / visible.sum(0)
            if float((each > FOLLOWS).double().mean()) <= TRIM_FROM:
                break
        elif trial > 1:
            break
        kept = _near_the_dominant_plane(seen, visible, px) if trial == 0 else each <= each.quantile(KEPT)
    return best


def _near_the_dominant_plane(seen: Tensor, visible: Tensor, px: float) -> Tensor:
    """bool [N]: tracks whose motion differs from the homography that most of them follow by no more than depth may explain."""
    gap = max(1, len(visible) // 4)
    i = torch.arange(0, len(visible) - gap, 2)
    both = visible[i] & visible[i + gap]
    left = homography.robust(seen[i] * px, seen[i + gap] * px, both).sum(0) / both.sum(0).clamp(min=1)
    known = both.any(dim=0)
    if int(known.sum()) < LEAST_KEPT:
        return torch.ones_like(known)
    kept = ~known | (left <= max(PLANE, PLANE_TIMES * float(left[known].median())))
    return kept if int(kept.sum()) >= LEAST_KEPT else torch.ones_like(known)


def _fitted(seen: Tensor, visible: Tensor, order: Tensor, side: int, reference: int, scale: float) -> bundle.Scene:
    """The best scene from several initial focal lengths, with the points of all tracks.

    order: [N], the cameras are fitted to the tracks with the REFINED largest values, of those of 0 and more.
    """
    few = order.topk(min(REFINED, int((order >= 0).sum()))).indices.sort().values
    some, shown = seen[:, few], visible[:, few]
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
    return bundle.triangulate(scene, seen, visible, reference, scale)


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
    to pixels at 480 lines; shared: their mean residual, pixels at 480 lines. Both must show it: a
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
    _, cut = fundamental.ransac(seen[i], seen[i + gap], both, WORST / px, torch.Generator().manual_seed(0), 16, 2)
    return float(cut.sum() / both.sum().clamp(min=1)) * px
