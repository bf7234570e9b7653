"""3D consistency of a clip from point tracks, without a network: what a rigid structure-from-motion fit leaves over.

1. Bars and static overlays are found and left out (overlays.py); brightness and contrast are normalised locally (light.py).
2. Corners are tracked through at most 17 key frames (point_tracks.py), regions without corners at a quarter of the resolution
   (smooth_regions.py), so that a region that melts smoothly is seen; losses.py tells how tracks are lost.
3. Bundle adjustment fits one rigid scene and one moving camera, from several focal lengths (structure.py, bundle.py).
4. Residual vectors are split into what neighbouring tracks share, which is an error of the scene, and tracking noise
   (residuals.py). Tracks that follow a motion of their own are told apart from the rest.
5. The frames between the key frames are searched for the scene's points (between_frames.py).

The error is the residual of what does not move by itself, normalised by the parallax: the fitted motion that no homography
explains (homography.py), both in pixels at 480 lines. The residuals of what moves by itself or flows are added, and so are the
shares of lost, missing and replaced points. A camera that turns or zooms, a sliding still and a flat scene show no
parallax, and two flat layers show none that two homographies do not explain: the verdict is then "undetermined".

Limitations: the focal length is assumed constant, so a zoom during camera motion counts as an error; a region without any
structure is not seen (see the measurement "coverage"); whether a part that moves by itself should move is not judged; a
subject with more tracks than the largest plane of the scene may be taken for the scene.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import between_frames, drawing, losses, overlays, residuals, smooth_regions, structure, track_verdict
from .cuts import find_cuts, longest_shot
from .grey import LINES, grey_levels, half_grey_levels, resized, working_size
from .light import even_light
from .point_tracks import LEAST_SEEN, TorchTracker, follow, trackable
from .record import TRACKS, UNDETERMINED, VERSIONS, GeometryError, GeometryRecord, Scored, score_of

BACKENDS = ("auto", "torch", "opencv")
MOST_KEYS = 17
# Minimum number of tracks.
LEAST_TRACKS = 30
# Truncation of an observation's residual, pixels at 480 lines.
WORST = 3.0
# A track moves by itself if its mean shared residual is above MOVING, or above MOVING_NOISE times the noise if that is more.
MOVING, MOVING_NOISE = 1.0, 2.0
# Weight of the residuals of what moves by itself, for each px at 480 lines: they say nothing about depth, so parallax does not
# normalise them.
MOVING_WEIGHT = 0.5
# The residual is divided by p / (p + this), p the parallax in pixels at 480 lines.
HALF_PARALLAX = 3.0
# A frame between key frames does not show the scene if more than the share BROKEN of the points is missing, or if its error is
# above BROKEN_ERROR pixels at 480 lines and BROKEN_TIMES the key frames' median.
BROKEN, BROKEN_ERROR, BROKEN_TIMES = 0.5, 1.2, 4.0
# Share of the picture that tracks must cover for full confidence.
FULL_COVERAGE = 0.8


def score_clip(
    frames: Tensor, backend: str = "auto", progress: Callable[[float], None] | None = None, pictures: bool = True
) -> Scored:
    """Score the 3D consistency of a clip: record, error map and preview.

    frames: [T, H, W, 3], T >= 3, H and W >= 32, uint8 or float in [0, 1]; backend: "torch", "opencv" or "auto" (OpenCV if it
    is installed and the frames are on the CPU, else torch); progress: called with the share done, 0 to 1; may raise to cancel;
    pictures: False skips error_map and preview (both empty).

    Verdicts do not depend on the backend; measurements agree to a few percent. Raises GeometryError for frames of a wrong
    shape, size, number or value range, ValueError for an unknown backend, and ImportError for "opencv" if it is not installed.
    """
    _require_clip(frames)
    name, tracker_type = _tracker(backend, frames)
    tell = progress or (lambda share: None)
    cuts = find_cuts(frames)
    first, end = longest_shot(cuts, len(frames))
    keys = [first + k for k in key_frames(end - first)]
    notes = [f"tracks by {name}"]
    if len(keys) < LEAST_SEEN:
        return _nothing(frames, keys, cuts, f"the longest shot has {end - first} frames, too few to track", pictures=pictures)
    size, scale = working_size(frames.shape[1:3])
    if scale > 1:
        notes.append(f"only {min(frames.shape[1:3])} lines: compare errors; verdicts are calibrated for 240 lines and more")
    grey = torch.stack([grey_levels(frames[t], size) for t in keys])
    apart = overlays.find_overlays(grey)
    notes += overlays.describe(apart, scale)
    left_out = apart.left_out if bool(apart.left_out.any()) else None
    even = even_light(grey, left_out)

    def between(k: int):
        pictures = even_light(
            torch.stack([grey_levels(frames[t], size) for t in range(keys[k], keys[k + 1] + 1)]), left_out
        )
        return tracker_type(pictures), len(pictures)

    dense = between if len(keys) > 1 and keys[1] - keys[0] > 1 else None
    fine = follow(even, tracker_type(even), lambda share: tell(0.1 + 0.3 * share), apart.left_out, between=dense)
    coarse = smooth_regions.follow_smooth(grey, fine, apart.left_out, tracker_type)
    px = LINES / min(size)
    lost = float(fine.lost.sum()) / max(1, int(fine.alive.sum()))
    tracks = fine.usable()
    count = tracks.visible.shape[1]
    measured = {"lost": lost, "tracks": float(count), "static": apart.static}
    if count < LEAST_TRACKS:
        why = "most tracks were lost" if lost > 0.5 else "too few corners to track"
        why = f"{why} ({count} tracks, minimum {LEAST_TRACKS})"
        return _nothing(frames, keys, cuts, why, measured, notes, pictures)
    centre = torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2], dtype=torch.float64)
    seen, visible = tracks.from_centre(centre), tracks.visible
    fit = structure.reconstruct(seen, visible, max(size), px)
    tell(0.6)
    place = seen + centre
    found = residuals.take_apart((fit.at - seen) * px, place, visible, size, WORST)
    replaced, when = losses.replaced(tracks, place, size)
    unstable = losses.unstable(fine, size)
    exchanged, sudden = losses.exchanged(fine)
    each = found.shared.sum(0) / visible.sum(0)
    moving = each > max(MOVING, MOVING_NOISE * found.noise)
    rest = visible & ~moving
    greys: dict[int, Tensor] = {}

    def grey_of(t: int) -> Tensor:
        greys[t] = half_grey_levels(frames[t], size)
        return greys[t]

    looked = between_frames.look_at(
        grey_of, keys, place, visible, fit.scene, tracker_type, size, left_out, lambda share: tell(0.6 + 0.2 * share)
    )
    shared_between, missing = _between_errors(looked, size, px)
    frames_between = shared_between + WORST * missing
    smooth = smooth_regions.errors(coarse, fit.scene, centre, px, WORST, MOVING)
    # A track that is lost inside the image gets the largest error.
    at = torch.cat([place, smooth.place], dim=1)
    error = torch.cat([found.shared + torch.where(tracks.ended, WORST, 0.0), smooth.error], dim=1)
    weight = torch.cat([visible.double() + tracks.ended.double(), smooth.visible.double()], dim=1)
    key_errors = error.sum(1) / weight.sum(1).clamp(min=1e-9)
    judged = ~looked.plain
    left_over = torch.cat([found.shared, smooth.error], dim=1).sum(1) / torch.cat([visible, smooth.visible], dim=1).sum(1)
    left_over = float(torch.cat([left_over, shared_between[judged]]).mean())
    gone = float(torch.cat([tracks.ended.sum(1) / visible.sum(1).clamp(min=1), missing[judged]]).mean())
    residual = float(found.shared[rest].mean()) if bool(rest.any()) else WORST
    # A subject that crosses the picture is no parallax; where most moves by itself, there is no scene to tell it from.
    scene_tracks = rest if float(moving.double().mean()) < 0.5 else visible
    parallax, unexplained, layers = structure.parallax_of(seen, fit.at, scene_tracks, px, residual)
    coverage = _coverage(at, weight > 0, apart.left_out, size)
    bad = judged & ((missing > BROKEN) | (frames_between > max(BROKEN_ERROR, BROKEN_TIMES * float(key_errors.median()))))
    broken = [t for t, b in zip(looked.indices, bad.tolist(), strict=True) if b]
    confidence = max(min(1.0, coverage / FULL_COVERAGE), 1e-9)
    # What the rest contributes to the mean over all observations; the remainder is of what moves by itself or flows.
    at_rest = residual * float(rest.sum() / visible.sum())
    per_px = 1 / HALF_PARALLAX + 1 / max(parallax, 1e-9)
    measured |= {
        "error": (residual * per_px + MOVING_WEIGHT * max(left_over - at_rest, 0.0) + gone + WORST * replaced) / confidence,
        "rest_error": residual * per_px / confidence,
        "residual": residual,
        "worst_residual": worst_region(seen, found.shared, visible.double()),
        "smooth_residual": smooth.mean,
        "between_residual": float(frames_between[judged].mean()) if bool(judged.any()) else math.nan,
        "noise": found.noise,
        "moving": float(visible[:, moving].sum() / visible.sum()),
        "flowing": float(smooth.visible[:, smooth.moving].sum() / weight.sum()),
        "unstable": unstable,
        "replaced": replaced,
        "exchanged": exchanged,
        "sudden": sudden,
        "parallax": parallax,
        "unexplained": unexplained,
        "layers": layers,
        "sampson": structure.sampson(seen, visible, px),
        "motion": _motion(seen, visible, math.hypot(*size)),
        "coverage": coverage,
        "plain": float(looked.plain.double().mean()) if len(looked.plain) else 0.0,
    }  # fmt: skip
    measured = {k: v for k, v in measured.items() if not math.isnan(v)}
    verdict, reason = track_verdict.judge(measured, cuts, apart, broken, keys[when + 1], px)
    notes.append(_frames_looked_at(keys, looked.indices, len(frames)))
    record = GeometryRecord(
        scorer=TRACKS, version=VERSIONS[TRACKS],
        score=score_of(verdict, measured["error"], track_verdict.MOST_ERROR),
        verdict=verdict, reason=reason, measurements=measured, frames=len(frames), frame_indices=keys,
        frame_errors=key_errors.tolist(), cuts=cuts, notes=notes, between_indices=looked.indices,
        between_errors=torch.where(judged, frames_between, math.nan).tolist(),
    )  # fmt: skip
    if not pictures:
        return _without_pictures(record, size, frames.device)
    maps = drawing.error_maps(at, error, weight, size)
    shown = [_small(frames[t], size) for t in keys]
    preview = drawing.draw_tracks(shown, place, fit.at + centre, visible, found.shared, WORST)
    tell(1.0)
    return Scored(record, maps.to(frames.device), preview, greys)


def key_frames(frames: int) -> list[int]:
    """Indices of at most MOST_KEYS evenly spaced key frames, starting at 0. frames: number of frames of the clip."""
    step = max(1, -(-(frames - 1) // (MOST_KEYS - 1)))
    return list(range(0, frames, step))


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


def _between_errors(looked: between_frames.BetweenFrames, size: tuple[int, int], px: float) -> tuple[Tensor, Tensor]:
    """Mean shared residual of each frame between key frames, px at 480 lines, and the share of the points missing in it."""
    if not looked.indices:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    shared = residuals.take_apart(looked.vectors * px, looked.at, looked.found, size, WORST).shared
    found, missing = looked.found.sum(1), looked.missing.sum(1)
    return shared.sum(1) / found.clamp(min=1), missing / (missing + found).clamp(min=1)


def _coverage(at: Tensor, visible: Tensor, left_out: Tensor, size: tuple[int, int]) -> float:
    """Share of the cells of the picture with a track in them or next to them, mean over key frames; bars, overlays and what is
    too near to them or to the edge to be tracked do not count. at: [K, N, 2] pixels; visible: bool [K, N]."""
    cell = min(size) / residuals.CELLS
    rows, columns = int(size[0] / cell), int(size[1] / cell)
    x = (at[..., 0] / cell).long().clamp(0, columns - 1)
    y = (at[..., 1] / cell).long().clamp(0, rows - 1)
    index = (torch.arange(len(at))[:, None] * rows + y) * columns + x
    filled = torch.zeros(len(at) * rows * columns)
    filled[index[visible]] = 1
    near = F.max_pool2d(filled.view(-1, 1, rows, columns), 3, 1, 1)[:, 0]
    allowed = trackable(size, left_out, left_out.device)
    wanted = F.interpolate(allowed[None, None].float().cpu(), (rows, columns), mode="area")[0, 0] > 0.5
    return float(near[:, wanted].mean()) if bool(wanted.any()) else 0.0


def _frames_looked_at(keys: list[int], between: list[int], frames: int) -> str:
    shot = f"frames {keys[0]} to {keys[-1]} of {frames}"
    return f"{shot}: {len(keys)} key frames measured, {len(between)} between them looked at"


def _motion(seen: Tensor, visible: Tensor, diagonal: float) -> float:
    both = visible[1:] & visible[:-1]
    return float((seen[1:] - seen[:-1]).norm(dim=-1)[both].median()) / diagonal * 100 if both.any() else 0.0


def _nothing(
    frames: Tensor, indices: list[int], cuts: list[int], why: str, measured: dict | None = None,
    notes: list[str] | None = None, pictures: bool = True,
) -> Scored:  # fmt: skip
    record = GeometryRecord(
        TRACKS, VERSIONS[TRACKS], 0.0, UNDETERMINED, why, measured or {}, len(frames), indices,
        [math.nan] * len(indices), cuts, notes or [],
    )  # fmt: skip
    size, _ = working_size(frames.shape[1:3])
    if not pictures:
        return _without_pictures(record, size, frames.device)
    shown = torch.stack([_small(frames[t], size) for t in indices]) if indices else torch.zeros(0, *size, 3)
    return Scored(record, torch.full((len(indices), *drawing.map_size(size)), math.nan, device=frames.device), shown)


def _without_pictures(record: GeometryRecord, size: tuple[int, int], device: torch.device) -> Scored:
    return Scored(record, torch.zeros(0, *drawing.map_size(size), device=device), torch.zeros(0, *size, 3))


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
        # One pass: the extremes are NaN where any value is.
        low, high = (float(v) for v in frames.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise GeometryError("frames contain NaN or Inf; expected finite values: the latent may be broken")
        if low < -0.01 or high > 1.01:
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


def _small(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """A frame [H, W, 3] as float in [0, 1], resized to `size`, on the CPU."""
    unit = frame.float() / 255 if frame.dtype == torch.uint8 else frame.float()
    if tuple(frame.shape[:2]) == tuple(size):
        return unit.cpu()
    return resized(unit.permute(2, 0, 1), size).permute(1, 2, 0).clamp(0, 1).cpu()
