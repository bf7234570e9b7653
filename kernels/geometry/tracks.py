"""3D consistency of a clip from point tracks, without a network: residual of a rigid structure-from-motion fit.

Corners are tracked through at most 17 key frames and bundle adjustment fits one rigid scene and one moving camera to the
tracks. The error is the reprojection residual divided by the parallax (the fitted motion that camera rotation and zoom do not
explain), both in pixels at 480 lines. Without this normalisation slow and static clips win, as with Epipolar-DPO's and
VideoGPA's scores. Below a minimum of motion and parallax the verdict is "undetermined".

Limitations: moving objects count as errors; a small drifting object changes the score little; scenes without corners, and
planes seen head-on, are undetermined; the focal length is assumed constant, so a zoom during camera motion is not modelled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bundle, drawing, fundamental
from .cuts import find_cuts, longest_shot
from .point_tracks import TorchTracker, follow
from .record import CONSISTENT, INCONSISTENT, TRACKS, UNDETERMINED, VERSIONS, GeometryError, GeometryRecord, Scored, score_of
from .rotation import fit_rotation_and_zoom

BACKENDS = ("auto", "torch", "opencv")
LINES = 480
# Shorter side to which smaller images are enlarged; Lucas-Kanade windows have 15 pixels.
SMALLEST = 128
MOST_KEYS = 17
# Truncation of an observation's distance and of parallax, pixels at 480 lines.
WORST, MOST_PARALLAX = 3.0, 8.0
# Minimum number of key frames in which a track is visible, and of tracks; number of tracks used for bundle adjustment.
LEAST_SEEN = 3
LEAST_TRACKS = 30
REFINED = 300
# Initial focal length, as a share of the longer side.
FOCAL = 0.9
# Loss scales of the refinement, px at 480 lines, with the maximum number of rounds at each. Wide first: with all points at
# depth 1, inliers have larger residuals than outliers have after convergence.
WIDE, NARROWING = (16.0, 8), ((16.0, 6), (4.0, 6), (1.0, 6))
# Robust cost per observation (0 to 1) above which the depth-reversed scene is tried as well.
SURE = 0.06
# Minimum motion and parallax for a verdict, and its thresholds; chosen on seeds 0 to 35 of benchmarks/geometry/room.py.
LEAST_MOTION = 0.15
LEAST_PARALLAX = 1.0
MOST_RESIDUAL = 0.5
MOST_ERROR = 0.25


@dataclass(frozen=True)
class _Explained:
    """Result of `explain`. distance: [K, N], observation to reprojected point, px at 480 lines; at: [K, N, 2], reprojected
    points, pixels from the image centre; parallax, sampson: px at 480 lines."""

    distance: Tensor
    at: Tensor
    parallax: float
    sampson: float


def score_clip(
    frames: Tensor, backend: str = "auto", progress: Callable[[float], None] | None = None, pictures: bool = True
) -> Scored:
    """Score the 3D consistency of a clip: record, error map and preview.

    frames: [T, H, W, 3], T >= 3, H and W >= 32, uint8 or float in [0, 1]; backend: "torch", "opencv" or "auto" (OpenCV if it
    is installed and the frames are on the CPU, else torch); progress: called with the share done, 0 to 1; may raise to cancel;
    pictures: False skips error_map and preview (both empty), which take a third of the time.

    Verdicts do not depend on the backend; measurements agree to a few percent. Raises GeometryError for frames of a wrong
    shape, size, number or value range, ValueError for an unknown backend, and ImportError for "opencv" if it is not installed.
    """
    _require_clip(frames)
    name, tracker_type = _tracker(backend, frames)
    tell = progress or (lambda share: None)
    cuts = find_cuts(frames if frames.dtype == torch.uint8 else frames * 255)
    first, end = longest_shot(cuts, len(frames))
    keys = key_frames(end - first)
    indices = [first + k for k in keys]
    if len(indices) < LEAST_SEEN:
        return _nothing(frames, indices, cuts, f"the longest shot has {end - first} frames, too few to track")
    grey, scale = _grey(frames[indices])
    px = LINES / min(grey.shape[1:])
    tracks = follow(grey, tracker_type(grey), lambda share: tell(0.1 + 0.5 * share))
    usable = tracks.select(tracks.visible.sum(0) >= LEAST_SEEN)
    lost = float(tracks.lost.sum()) / max(1, int(tracks.alive.sum()))
    count = usable.visible.shape[1]
    if count < LEAST_TRACKS:
        why = "most tracks were lost" if lost > 0.5 else "too few corners to track"
        measured = {"lost": lost, "tracks": float(count)}
        return _nothing(frames, indices, cuts, f"{why} ({count} tracks, minimum {LEAST_TRACKS})", measured)
    middle = grey.new_tensor([(grey.shape[2] - 1) / 2, (grey.shape[1] - 1) / 2])
    seen = torch.where(usable.visible[..., None], usable.positions - middle, 0.0).to("cpu", torch.float64)
    visible, ended = usable.visible.cpu(), usable.ended.cpu()
    explained = explain(seen, visible, max(grey.shape[1:]) * FOCAL, px)
    tell(0.8)
    distance = torch.where(visible, explained.distance.clamp(max=WORST), 0.0)
    residual = float(distance.sum() / visible.sum())
    # A track that is lost inside the image gets the largest error.
    error = distance + torch.where(ended, WORST, 0.0)
    weight = visible.double() + ended.double()
    parallax = explained.parallax
    measured = {
        "error": (residual + WORST * lost) / parallax if parallax > 0 else math.inf,
        "residual": residual,
        "worst_residual": worst_region(seen, error, weight),
        "parallax": parallax,
        "sampson": explained.sampson,
        "motion": _motion(seen, visible, math.hypot(*grey.shape[1:])),
        "lost": lost,
        "tracks": float(count),
    }
    verdict, reason = _verdict(measured, cuts)
    notes = [f"tracks by {name}"]
    if scale > 1:
        notes.append(f"only {min(frames.shape[1:3])} lines: compare errors; verdicts are calibrated for 240 lines and more")
    record = GeometryRecord(
        scorer=TRACKS, version=VERSIONS[TRACKS],
        score=score_of(verdict, measured["error"], MOST_ERROR),
        verdict=verdict, reason=reason, measurements=measured, frames=len(frames), frame_indices=indices,
        frame_errors=(error.sum(1) / weight.sum(1).clamp(min=1e-9)).tolist(), cuts=cuts, notes=notes,
    )  # fmt: skip
    if not pictures:
        empty = frames.new_zeros(0, *frames.shape[1:]).float()
        return Scored(record, empty[..., 0], empty.cpu())
    # Back to the clip's own resolution.
    size = frames.shape[1:3]
    on_picture = (seen + middle.cpu()) / scale
    maps = drawing.error_maps(on_picture, error, weight, size)
    preview = drawing.draw_tracks(
        _unit(frames[indices]), on_picture, (explained.at + middle.cpu()) / scale, visible, error, WORST
    )
    tell(1.0)
    return Scored(record, maps.to(frames.device), preview)


def key_frames(frames: int) -> list[int]:
    """Indices of at most MOST_KEYS evenly spaced key frames, starting at 0. frames: number of frames of the clip."""
    step = max(1, -(-(frames - 1) // (MOST_KEYS - 1)))
    return list(range(0, frames, step))


def explain(seen: Tensor, visible: Tensor, focal: float, px: float) -> _Explained:
    """Fit one rigid scene to tracks by bundle adjustment and measure residuals, parallax and Sampson distance.

    seen: [K, N, 2] pixels from the image centre, float64, CPU; visible: bool [K, N]; focal: initial focal length, pixels; px:
    factor from these pixels to pixels at 480 lines.
    """
    keys, count = visible.shape
    generator = torch.Generator().manual_seed(0)
    order = visible.sum(0) + 4 * torch.rand(count, generator=generator)
    few = order.topk(min(REFINED, count)).indices.sort().values
    some, shown = seen[:, few], visible[:, few]
    reference, scale = keys // 2, 1.0 / px
    steps, _, _ = fit_rotation_and_zoom(some[:-1], some[1:], shown[:-1] & shown[1:], seen.new_tensor(focal), 2 * scale)
    rotation = [torch.eye(3, dtype=seen.dtype)]
    for step in bundle.rotation_of(steps):
        rotation.append(step @ rotation[-1])
    rotation = torch.stack(rotation) @ rotation[reference].T
    # The first fit may converge to the depth-reversed scene: unless its cost is low, both scenes are refined and compared.
    wide, rounds = WIDE
    scene, _ = bundle.refine(
        bundle.start(some, shown, rotation, reference, focal), some, shown, reference, wide * scale, rounds
    )
    narrowed, cost = _narrow(scene, some, shown, reference, scale)
    if cost > SURE:
        other, lower = _narrow(bundle.reverse_depth(scene), some, shown, reference, scale)
        narrowed = other if lower < cost else narrowed
    scene, _ = bundle.refine(narrowed, some, shown, reference, scale, 20, 1e-4)
    scene = bundle.triangulate(scene, seen, visible, reference, scale)
    at = bundle.project(scene)
    distance = (at - seen).norm(dim=-1) * px
    gap = keys // 2
    i = torch.arange(0, keys - gap, 2)
    both = visible[i] & visible[i + gap]
    total = both.sum().clamp(min=1)
    # From the reprojected points, not the observed tracks: errors of the clip must not count as parallax.
    _, _, beyond = fit_rotation_and_zoom(at[i], at[i + gap], both, scene.focal, 2 * scale)
    parallax = float((beyond * px).clamp(max=MOST_PARALLAX).sum() / total)
    _, cut = fundamental.ransac(seen[i], seen[i + gap], both, WORST * scale, generator, 32, 2)
    return _Explained(distance, at, parallax, float(cut.sum() / total) * px)


def _narrow(scene: bundle.Scene, seen: Tensor, visible: Tensor, reference: int, scale: float) -> tuple[bundle.Scene, float]:
    for wide, rounds in NARROWING:
        scene, cost = bundle.refine(scene, seen, visible, reference, wide * scale, rounds)
    return scene, cost


def worst_region(seen: Tensor, error: Tensor, weight: Tensor, neighbours: int = 8) -> float:
    """Mean error in the worst region: mean of the largest 5% of local errors, each the median over the nearest tracks.

    seen: [K, N, 2] pixels; error, weight: [K, N], sums of errors and numbers of observations; neighbours: number of nearest
    tracks, including the track itself. Returns a value in the unit of `error`.
    """
    shown = weight > 0
    mean = torch.where(shown[..., None], seen, 0.0).sum(0) / shown.sum(0)[:, None]
    each = error.sum(0) / weight.sum(0)
    near = torch.cdist(mean, mean).topk(min(neighbours, len(each)), largest=False).indices
    local = each[near].median(dim=1).values
    return float(local.topk(max(1, len(local) // 20)).values.mean())


def _verdict(measured: dict[str, float], cuts: list[int]) -> tuple[str, str]:
    if cuts:
        where = ", ".join(map(str, cuts))
        return UNDETERMINED, f"cut at frame {where}: the clip is not one continuous shot (measurements are of the longest one)"
    motion, parallax, error = (measured[k] for k in ("motion", "parallax", "error"))
    if motion < LEAST_MOTION:
        return UNDETERMINED, f"too little motion ({motion:.2f} % of the diagonal per key frame, minimum {LEAST_MOTION})"
    if parallax < LEAST_PARALLAX:
        return UNDETERMINED, (
            f"too little camera translation (parallax {parallax:.2f} px, minimum {LEAST_PARALLAX}; rotation and zoom give no "
            "depth)"
        )
    share = f"residual {measured['residual']:.2f} px at parallax {parallax:.2f} px"
    if error <= MOST_ERROR and measured["residual"] <= MOST_RESIDUAL:
        return CONSISTENT, f"the tracks fit one rigid scene ({share})"
    return INCONSISTENT, f"no rigid scene explains the tracks ({share})"


def _motion(seen: Tensor, visible: Tensor, diagonal: float) -> float:
    both = visible[1:] & visible[:-1]
    return float((seen[1:] - seen[:-1]).norm(dim=-1)[both].median()) / diagonal * 100 if both.any() else 0.0


def _nothing(frames: Tensor, indices: list[int], cuts: list[int], why: str, measured: dict | None = None) -> Scored:
    record = GeometryRecord(
        TRACKS, VERSIONS[TRACKS], 0.0, UNDETERMINED, why, measured or {}, len(frames), indices,
        [math.nan] * len(indices), cuts,
    )  # fmt: skip
    maps = torch.full((len(indices), *frames.shape[1:3]), math.nan, device=frames.device)
    return Scored(record, maps, _unit(frames[indices]).cpu())


def _require_clip(frames: Tensor) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise GeometryError(f"frames of shape {list(frames.shape)}; expected [frames, height, width, 3]")
    if len(frames) < LEAST_SEEN:
        raise GeometryError(f"{len(frames)} frames: geometry needs at least {LEAST_SEEN} frames of one clip")
    if min(frames.shape[1:3]) < 32:
        raise GeometryError(
            f"frames of {frames.shape[2]}x{frames.shape[1]} pixels are too small to track points; expected at least 32x32"
        )
    if frames.dtype != torch.uint8:
        if not torch.isfinite(frames).all():
            raise GeometryError("frames contain NaN or Inf; expected finite values: the latent may be broken")
        if float(frames.min()) < -0.01 or float(frames.max()) > 1.01:
            low, high = float(frames.min()), float(frames.max())
            raise GeometryError(f"frames of floats from {low:.3g} to {high:.3g}; expected 0 to 1")


def _tracker(backend: str, frames: Tensor):
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend '{backend}'; expected one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and frames.device.type != "cpu"):
        return "torch", TorchTracker
    try:
        from .opencv_tracker import OpenCVTracker
    except ImportError as e:
        if backend == "opencv":
            raise ImportError(f"backend 'opencv' needs the package opencv-python-headless ({e}); or use 'torch'") from e
        return "torch", TorchTracker
    return "opencv", OpenCVTracker


def _grey(frames: Tensor) -> tuple[Tensor, float]:
    """Integer grey levels [K, h, w] with the shorter side between SMALLEST and LINES, and the scale from the clip's pixels."""
    # Floats are rounded to 8 bits first, so that a clip has the same score as floats and as bytes.
    levels = frames if frames.dtype == torch.uint8 else (frames * 255).round_()
    grey = levels[..., 0].float().mul_(0.299)
    grey.add_(levels[..., 1], alpha=0.587).add_(levels[..., 2], alpha=0.114)
    short = min(grey.shape[1:])
    scale = LINES / short if short > LINES else SMALLEST / short if short < SMALLEST else 1.0
    if scale != 1.0:
        size = [max(32, round(side * scale)) for side in grey.shape[1:]]
        mode = "area" if scale < 1 else "bicubic"
        grey = F.interpolate(grey[:, None], size, mode=mode)[:, 0]
    # Rounded, so that both trackers get the same values: OpenCV takes bytes.
    return grey.round().clamp(0, 255), scale


def _unit(frames: Tensor) -> Tensor:
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
