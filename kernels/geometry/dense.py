"""3D consistency from depth and cameras: does every view look as the other views say it must?

VideoGPA (arXiv 2601.23286, section 3) draws the points of all views into each of them, the view's own points as well:
those hide most of what is wrong, and the clip that moves least has the least error. Here a view is drawn from the
others alone, each point is compared with the view where it lands and not where it is rounded to, and the error is
weighed against how far the camera went. VideoGPA's own figure (3DCS) is given beside it where LPIPS weights are there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .cameras import motion, unproject
from .depth_error import OCCLUSION, mvcs, neighbour_errors, sample
from .photometric import dssim, luminance, squared_error
from .record import CONSISTENT, DENSE, INCONSISTENT, UNDETERMINED, VERSIONS, GeometryRecord, Scored, score_of
from .splat import splat, subpixel_positions
from .views import MAX_VIEWS, Views, require_usable, sample_indices, take, usable_pixels

# Of the median depth: between cameras closer than this there is no parallax that could be wrong.
MIN_TRANSLATION = 0.03
# Where motion stops to make up for error: error is divided by m / (m + this).
HALF_TRANSLATION = 0.18
MIN_COVERAGE = 0.1
# Mean squared difference of two frames, averaged over blocks of this many pixels against grain, below which the clip
# stands still whatever estimated cameras say.
STILL, BLOCK = 5e-5, 4
# Between rigid and corrupted clips of a ray-caster, with true depth and cameras and with noisy ones.
BORDER = 0.06
# Every second pixel and line is enough for a mean.
DEPTH_STEP = 2
MID_GREY = 0.5


@dataclass(frozen=True)
class Comparison:
    """One view against the others' points. drawn: [3, H, W], mid grey where nothing lands; mse, dssim: [H, W], NaN where
    nothing was measured; coverage: share of pixels that points reach.
    """

    drawn: Tensor
    mse: Tensor
    dssim: Tensor
    coverage: float


def score_views(
    views: Views,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Scored:
    """Scores a clip by its views; of more than 10 views 10 are taken, evenly.

    lpips: (images, images) [N, H, W, 3] in [0, 1] -> [N], as lpips.load_lpips gives; with it the record also holds
    `lpips`, `3dcs` and `mvcs` as VideoGPA's release computes them. progress is called with a share 0 to 1 and may raise.
    Works where views.depth lies, CPU or CUDA. Raises GeometryError for what views.require_usable refuses.
    """
    require_usable(views, "geometry")
    notes = list(views.notes)
    if len(views.depth) > MAX_VIEWS:
        notes.append(f"{MAX_VIEWS} of {len(views.depth)} views measured")
        views = take(views, sample_indices(len(views.depth)))
    # Cameras are read one by one: on a GPU every look at them would wait for it.
    views = replace(views, K=views.K.cpu(), world_to_camera=views.world_to_camera.cpu())
    keep = usable_pixels(views)
    if not bool(keep.all()):
        notes.append(f"{1 - float(keep.float().mean()):.1%} of the pixels have no usable depth (sky?) and are left out")
    exact = views.depth if views.depth.dtype == torch.float64 else views.depth.float()
    depth = torch.where(keep, exact, torch.nan)
    # Planes of one channel: most of the time goes into reading and writing them.
    images = views.images.to(depth).permute(3, 0, 1, 2).contiguous()
    count = len(depth)
    went = motion(views.world_to_camera, views.K, float(depth[keep].median()), depth.shape[2])
    points = unproject(depth, views.K, views.world_to_camera)
    compared = []
    for target in range(count):
        compared.append(compare(images, depth, points, views, target))
        if progress is not None:
            progress((target + 1) / (count if lpips is None else 2 * count))
    error_map = torch.stack([c.mse + c.dssim for c in compared])
    frame_errors = [float(e.nanmean()) for e in error_map]
    measurements = {
        "mse": _mean(float(c.mse.nanmean()) for c in compared),
        "dssim": _mean(float(c.dssim.nanmean()) for c in compared),
        "depth_error": float(neighbour_errors(depth, views.K, views.world_to_camera, DEPTH_STEP).nanmean()),
        "coverage": _mean(c.coverage for c in compared),
        **went,
    }
    photometric = _mean(frame_errors)
    measurements["error"] = photometric * (1 + HALF_TRANSLATION / max(went["translation"], 1e-12))
    if lpips is None:
        notes.append("no LPIPS weights were given: MSE and DSSIM only, no 3DCS")
    else:
        measurements |= published(images, depth, views, lpips, progress)
    verdict, reason = _judge(measurements, change(images))
    if verdict == UNDETERMINED:
        # A frozen clip has no error at all: it must not come first where only errors are sorted.
        measurements["error"] = math.inf
    score = score_of(verdict, measurements["error"], BORDER)
    record = GeometryRecord(
        DENSE, VERSIONS[DENSE], score, verdict, reason, measurements, views.frames, views.frame_indices, frame_errors,
        notes=notes,
    )  # fmt: skip
    return Scored(record, error_map.float(), torch.stack([c.drawn for c in compared]).permute(0, 2, 3, 1).float())


def compare(images: Tensor, depth: Tensor, points: Tensor, views: Views, target: int) -> Comparison:
    """View `target` against the points of all the others.

    images [3, S, H, W], depth [S, H, W] (NaN: no point), points [3, S, H, W] in the world; cameras are those of views.
    A point that lies more than 5% behind the surface that the view itself sees shows through between the points of that
    surface; it is drawn but not measured.
    """
    h, w = depth.shape[1:]
    others = [i for i in range(len(depth)) if i != target]
    seen = splat(depth, views.K, views.world_to_camera, target, others)
    drawn = seen.gather(images, MID_GREY)
    u, v = subpixel_positions(points, views.K[target], views.world_to_camera[target], seen)
    frame = images[:, target]
    wanted = sample(frame, u.clamp_(0, w - 1), v.clamp_(0, h - 1))
    # Comparisons with NaN are false: where the view has no depth of its own, nothing is hidden.
    left_out = ~seen.covered | (seen.depth > depth[target] * (1 + OCCLUSION))
    # What is not measured is made equal, so that windows which reach there see no difference.
    a, b = (torch.where(left_out, frame, x) for x in (drawn, wanted))
    mse, unlike = squared_error(a, b), dssim(luminance(a)[None], luminance(b)[None])[0]
    coverage = float(seen.covered.float().mean())
    return Comparison(drawn, mse.masked_fill_(left_out, torch.nan), unlike.masked_fill_(left_out, torch.nan), coverage)


def published(images: Tensor, depth: Tensor, views: Views, lpips, progress=None) -> dict[str, float]:
    """VideoGPA's scores as released: {"lpips": ..., "3dcs": MSE + LPIPS}, means over the views, and "mvcs" where no pixel
    lacks its depth.

    All points, the view's own among them, on black, with colours cut down to 8 bits; MSE over all pixels. images: [3, S,
    H, W].
    """
    cut = (images * 255).clamp(0, 255).floor() / 255
    mse, distance = [], []
    for target in range(len(depth)):
        drawn = splat(depth, views.K, views.world_to_camera, target, range(len(depth))).gather(cut, 0.0)
        mse.append(float((drawn - images[:, target]).square().mean()))
        distance.append(float(lpips(drawn.permute(1, 2, 0)[None], images[:, target].permute(1, 2, 0)[None])[0]))
        if progress is not None:
            progress((len(depth) + target + 1) / (2 * len(depth)))
    found = {"lpips": _mean(distance), "3dcs": _mean(mse) + _mean(distance)}
    if bool(depth.isfinite().all()):
        found["mvcs"] = mvcs(depth, views.K, views.world_to_camera)
    return found


def change(images: Tensor) -> float:
    """Mean squared difference between frames as they are, [3, S, H, W] in [0, 1]: the frames' variance over time, twice."""
    small = F.avg_pool2d(images, min(BLOCK, *images.shape[2:]))
    return 2 * float(small.var(dim=1).mean())


def _judge(measurements: dict[str, float], change: float) -> tuple[str, str]:
    """Verdict and reason."""
    error, went, coverage = (measurements[k] for k in ("error", "translation", "coverage"))
    if change < STILL:
        return UNDETERMINED, "the frames hardly differ: in a clip that stands still consistency cannot be told"
    if went < MIN_TRANSLATION:
        return UNDETERMINED, (
            f"the camera moves {went:.2%} of the median depth; below {MIN_TRANSLATION:.0%} (static, slow, zoom or pan) "
            "consistency cannot be told"
        )
    if coverage < MIN_COVERAGE or not math.isfinite(error):
        return UNDETERMINED, (
            f"other views reach only {coverage:.0%} of a view; below {MIN_COVERAGE:.0%} consistency cannot be told"
        )
    if error <= BORDER:
        return CONSISTENT, f"views agree: error {error:.3g}, border {BORDER:.3g}"
    return INCONSISTENT, f"views do not agree: error {error:.3g}, border {BORDER:.3g}"


def _mean(values) -> float:
    """Of those that are finite; NaN where there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
