"""3D consistency of a clip without a depth network: do its point tracks fit one rigid scene and one moving camera?

Corners are tracked through at most 17 key frames, a small structure from motion explains the tracks, and what it cannot
explain (residual, pixels at 480 lines) is set against how much the clip shows (parallax: the explained motion that no turning
and zooming of the camera gives). The ratio keeps slow and still clips from winning, as they do under Epipolar-DPO's and
VideoGPA's scores; below a least motion and parallax nothing can be said, and the verdict is "undetermined".

Blind spots: objects that move on purpose count as errors; a small object that drifts moves the score little; a scene without
corners, and a plane seen head-on, give no verdict; a lens that zooms while the camera moves is taken for a fixed one.
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
# A smaller picture is enlarged to this: Lucas-Kanade's windows are of 15 pixels.
SMALLEST = 128
MOST_KEYS = 17
# Pixels at 480 lines: where an observation stops getting worse, and where parallax stops telling more.
WORST, MOST_PARALLAX = 3.0, 8.0
LEAST_SEEN = 3
LEAST_TRACKS = 30
REFINED = 300
FOCAL = 0.9
# Scales of the refinement, times 1 px at 480 lines, and rounds at each. A wide scale first: at depth 1 everywhere, tracks are
# further off than outliers will be.
WIDE, NARROWING = (16.0, 8), ((16.0, 6), (4.0, 6), (1.0, 6))
# A robust cost per observation (0 to 1) that only the right scene has.
SURE = 0.06
# The measurability gate and the border between verdicts; set on seeds 0 to 35 of benchmarks/geometry/room.py.
LEAST_MOTION = 0.15
LEAST_PARALLAX = 1.0
MOST_RESIDUAL = 0.5
MOST_ERROR = 0.25


@dataclass(frozen=True)
class _Explained:
    """distance [K, N]: of observations from the rigid scene, px at 480 lines; at [K, N, 2]: where it has them, pixels from
    the middle; parallax, sampson: px at 480 lines."""

    distance: Tensor
    at: Tensor
    parallax: float
    sampson: float


def score_clip(
    frames: Tensor, backend: str = "auto", progress: Callable[[float], None] | None = None, pictures: bool = True
) -> Scored:
    """One clip's record, error map and preview.

    frames: [T, H, W, 3], T >= 3, uint8 or float in [0, 1]; backend: "torch", "opencv" (ImportError where it is not installed)
    or "auto", OpenCV where there is one; progress: called with the share done, and may raise to stop; pictures: False leaves
    out error_map and preview (both empty), a third of the time. Raises GeometryError for frames that are no clip. Verdicts do
    not depend on the backend; figures agree to a few percent.
    """
    _require_clip(frames)
    name, tracker_type = _tracker(backend, frames)
    tell = progress or (lambda share: None)
    cuts = find_cuts(frames if frames.dtype == torch.uint8 else frames * 255)
    first, end = longest_shot(cuts, len(frames))
    keys = key_frames(end - first)
    indices = [first + k for k in keys]
    if len(indices) < LEAST_SEEN:
        return _nothing(frames, indices, cuts, f"its longest shot has {end - first} frames, too few to follow")
    grey, scale = _grey(frames[indices])
    px = LINES / min(grey.shape[1:])
    tracks = follow(grey, tracker_type(grey), lambda share: tell(0.1 + 0.5 * share))
    usable = tracks.select(tracks.visible.sum(0) >= LEAST_SEEN)
    lost = float(tracks.lost.sum()) / max(1, int(tracks.alive.sum()))
    count = usable.visible.shape[1]
    if count < LEAST_TRACKS:
        why = "most tracks are lost on the way" if lost > 0.5 else "there are too few corners to follow"
        measured = {"lost": lost, "tracks": float(count)}
        return _nothing(frames, indices, cuts, f"{why} ({count} tracks, {LEAST_TRACKS} are needed)", measured)
    middle = grey.new_tensor([(grey.shape[2] - 1) / 2, (grey.shape[1] - 1) / 2])
    seen = torch.where(usable.visible[..., None], usable.positions - middle, 0.0).to("cpu", torch.float64)
    visible, ended = usable.visible.cpu(), usable.ended.cpu()
    explained = explain(seen, visible, max(grey.shape[1:]) * FOCAL, px)
    tell(0.8)
    distance = torch.where(visible, explained.distance.clamp(max=WORST), 0.0)
    residual = float(distance.sum() / visible.sum())
    # A track that is lost though it stays in the picture is as wrong as one can be.
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
        notes.append(f"{min(frames.shape[1:3])} lines are few: compare errors, verdicts are made for pictures of 240 and more")
    record = GeometryRecord(
        scorer=TRACKS, version=VERSIONS[TRACKS],
        score=score_of(verdict, measured["error"], MOST_ERROR),
        verdict=verdict, reason=reason, measurements=measured, frames=len(frames), frame_indices=indices,
        frame_errors=(error.sum(1) / weight.sum(1).clamp(min=1e-9)).tolist(), cuts=cuts, notes=notes,
    )  # fmt: skip
    if not pictures:
        empty = frames.new_zeros(0, *frames.shape[1:]).float()
        return Scored(record, empty[..., 0], empty.cpu())
    # Back to the pixels of the clip.
    size = frames.shape[1:3]
    on_picture = (seen + middle.cpu()) / scale
    maps = drawing.error_maps(on_picture, error, weight, size)
    preview = drawing.draw_tracks(
        _unit(frames[indices]), on_picture, (explained.at + middle.cpu()) / scale, visible, error, WORST
    )
    tell(1.0)
    return Scored(record, maps.to(frames.device), preview)


def key_frames(frames: int) -> list[int]:
    """At most MOST_KEYS frames of a clip, evenly spaced from the first on."""
    step = max(1, -(-(frames - 1) // (MOST_KEYS - 1)))
    return list(range(0, frames, step))


def explain(seen: Tensor, visible: Tensor, focal: float, px: float) -> _Explained:
    """The rigid scene that explains tracks best. seen: [K, N, 2] pixels from the middle, double; visible: bool [K, N]."""
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
    # The first search may end with near and far exchanged: unless it explains the tracks well, both are followed to the end.
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
    # Of the explained tracks, not of the tracks: what is wrong with a clip must not count as depth.
    _, _, beyond = fit_rotation_and_zoom(at[i], at[i + gap], both, scene.focal, 2 * scale)
    parallax = float((beyond * px).clamp(max=MOST_PARALLAX).sum() / total)
    _, cut = fundamental.ransac(seen[i], seen[i + gap], both, WORST * scale, generator, 32, 2)
    return _Explained(distance, at, parallax, float(cut.sum() / total) * px)


def _narrow(scene: bundle.Scene, seen: Tensor, visible: Tensor, reference: int, scale: float) -> tuple[bundle.Scene, float]:
    for wide, rounds in NARROWING:
        scene, cost = bundle.refine(scene, seen, visible, reference, wide * scale, rounds)
    return scene, cost


def worst_region(seen: Tensor, error: Tensor, weight: Tensor, neighbours: int = 8) -> float:
    """Mean error of the twentieth of the tracks whose neighbours do worst (median of the nearest). All: [K, N, ...]."""
    shown = weight > 0
    mean = torch.where(shown[..., None], seen, 0.0).sum(0) / shown.sum(0)[:, None]
    each = error.sum(0) / weight.sum(0)
    near = torch.cdist(mean, mean).topk(min(neighbours, len(each)), largest=False).indices
    local = each[near].median(dim=1).values
    return float(local.topk(max(1, len(local) // 20)).values.mean())


def _verdict(measured: dict[str, float], cuts: list[int]) -> tuple[str, str]:
    if cuts:
        where = ", ".join(map(str, cuts))
        return UNDETERMINED, f"a cut at frame {where}: two shots are no single scene (figures are of the longest)"
    motion, parallax, error = (measured[k] for k in ("motion", "parallax", "error"))
    if motion < LEAST_MOTION:
        return UNDETERMINED, f"hardly anything moves ({motion:.2f} % of the diagonal per key frame, {LEAST_MOTION} are needed)"
    if parallax < LEAST_PARALLAX:
        return UNDETERMINED, (
            f"the camera hardly moves through the scene (parallax {parallax:.2f} px, {LEAST_PARALLAX} are needed; turning and "
            "zooming show no depth)"
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
        raise GeometryError(f"a clip is [frames, height, width, 3], found {list(frames.shape)}")
    if len(frames) < LEAST_SEEN:
        raise GeometryError(f"{len(frames)} frames: geometry needs at least {LEAST_SEEN} frames of one clip")
    if min(frames.shape[1:3]) < 32:
        raise GeometryError(
            f"frames of {frames.shape[2]}x{frames.shape[1]} pixels are too small to follow points; 32 is least"
        )
    if frames.dtype != torch.uint8:
        if not torch.isfinite(frames).all():
            raise GeometryError("the frames hold NaN or Inf; the clip was decoded from a broken latent")
        if float(frames.min()) < -0.01 or float(frames.max()) > 1.01:
            low, high = float(frames.min()), float(frames.max())
            raise GeometryError(f"frames of floats must be in 0 to 1, found {low:.3g} to {high:.3g}")


def _tracker(backend: str, frames: Tensor):
    if backend not in BACKENDS:
        raise ValueError(f"backend '{backend}': known are {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and frames.device.type != "cpu"):
        return "torch", TorchTracker
    try:
        from .opencv_tracker import OpenCVTracker
    except ImportError as e:
        if backend == "opencv":
            raise ImportError(f"backend 'opencv' needs the package opencv-python-headless ({e}); or take 'torch'") from e
        return "torch", TorchTracker
    return "opencv", OpenCVTracker


def _grey(frames: Tensor) -> tuple[Tensor, float]:
    """Whole grey levels [K, h, w], the shorter side between SMALLEST and LINES, and the factor from the clip's pixels."""
    # Floats as the bytes they are saved as: a clip has one score, whichever form it comes in.
    levels = frames if frames.dtype == torch.uint8 else (frames * 255).round_()
    grey = levels[..., 0].float().mul_(0.299)
    grey.add_(levels[..., 1], alpha=0.587).add_(levels[..., 2], alpha=0.114)
    short = min(grey.shape[1:])
    scale = LINES / short if short > LINES else SMALLEST / short if short < SMALLEST else 1.0
    if scale != 1.0:
        size = [max(32, round(side * scale)) for side in grey.shape[1:]]
        mode = "area" if scale < 1 else "bicubic"
        grey = F.interpolate(grey[:, None], size, mode=mode)[:, 0]
    # Both trackers see the same: OpenCV takes bytes.
    return grey.round().clamp(0, 255), scale


def _unit(frames: Tensor) -> Tensor:
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
