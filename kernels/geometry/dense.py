"""Dense 3D consistency: reprojection error of each view, rendered from the others' depth (after VideoGPA).

VideoGPA (arXiv 2601.23286, section 3) renders the points of all views into each view, including the view's own points.
Those hide most of the errors, and the clip with the least motion gets the smallest error. Here each view is rendered from
the other views only, each point is compared with the view at its subpixel position, and the error is normalised by the
camera's translation. What a depth network errs, and what is no geometry, is removed first: small errors of depth and cameras
are fitted (refine.fit), brightness and contrast of the views are made equal, grain is smoothed and subtracted, and pixels of
low confidence or at edges of the depth are left out. VideoGPA's own score (3DCS) is computed as well if LPIPS weights are
given, from depth, cameras and images as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .cameras import motion, unproject
from .depth_error import OCCLUSION, edges, mvcs, neighbour_errors, sample
from .photometric import SMOOTHED_NOISE, dssim, grain, luminance, smoothed, squared_error
from .record import CONSISTENT, DENSE, INCONSISTENT, UNDETERMINED, VERSIONS, GeometryRecord, Scored, score_of
from .refine import fit
from .splat import splat, subpixel_positions
from .views import MAX_VIEWS, Views, doubtful_pixels, require_usable, sample_indices, take, usable_pixels

# Minimum camera translation, as a share of the median depth: below it there is no parallax to measure.
MIN_TRANSLATION = 0.05
# Half-saturation of the normalisation by motion: the error is divided by m / (m + this), m the translation.
HALF_TRANSLATION = 0.25
# Photometric error of a perfect clip, from resampling and rounding. It is added before the normalisation, so that of two clips
# without visible errors the one with more motion, which shows more, is better.
RESOLUTION = 0.003
# Minimum share of pixels that are compared.
MIN_COVERAGE = 0.1
# Mean squared difference of two frames below which the clip is static, regardless of the estimated cameras. Frames are
# averaged over BLOCK x BLOCK pixels first, so that film grain does not count.
STILL, BLOCK = 5e-5, 4
# Decision threshold for the error with exact depth and cameras: separates rigid from corrupted clips of a ray-caster
# (benchmarks/geometry/dense_noise.py).
BORDER = 0.032
# Corrections of depth and cameras in px at 480 lines: those of DOUBLING double the threshold, since what they leave over grows
# with them; above MAX_NOISE a warp of 2 px would not show, and clips are consistent or undetermined.
DOUBLING, MAX_NOISE = 16.0, 10.0
# Stride of the pixels used for depth_error; every second pixel and line is enough for a mean.
DEPTH_STEP = 2
MID_GREY = 0.5


@dataclass(frozen=True)
class Comparison:
    """One view compared with its rendering from the other views.

    drawn: [3, H, W], the rendering, mid grey where no point lands; mse, dssim: [H, W], NaN at pixels that were not measured;
    coverage: share of pixels that points reach, 0 to 1.
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
    """Score the 3D consistency of a clip from its views. Of more than 10 views, 10 evenly spaced ones are used.

    lpips: (images, images) [N, H, W, 3] in [0, 1] -> [N], for example from lpips.load_lpips; if given, the record also
    contains `lpips` and `3dcs`, and `mvcs` if no pixel lacks depth, as in VideoGPA's release. progress: called with the share
    done, 0 to 1; may raise to cancel. Runs on the device of views.depth, CPU or CUDA. Raises GeometryError for views that
    views.require_usable refuses.
    """
    require_usable(views, "geometry")
    notes = list(views.notes)
    if len(views.depth) > MAX_VIEWS:
        notes.append(f"{MAX_VIEWS} of {len(views.depth)} views measured")
        views = take(views, sample_indices(len(views.depth)))
    # Cameras are read one by one; on a GPU every read would synchronise.
    views = replace(views, K=views.K.cpu(), world_to_camera=views.world_to_camera.cpu())
    keep = usable_pixels(views)
    if not bool(keep.all()):
        notes.append(f"{1 - float(keep.float().mean()):.1%} of the pixels have no usable depth (sky?) and are excluded")
    exact = views.depth if views.depth.dtype == torch.float64 else views.depth.float()
    estimated = torch.where(keep, exact, torch.nan)
    doubtful = doubtful_pixels(views, keep)
    if bool(doubtful.any()):
        notes.append(f"{float(doubtful.float().mean()):.1%} of the pixels have the lowest confidence and are excluded")
    doubtful |= edges(estimated) & keep
    # Channels first and contiguous: the run time is mostly memory access.
    given = views.images.to(exact).permute(3, 0, 1, 2).contiguous()
    trusted = estimated.masked_fill(doubtful, torch.nan)
    corrections = fit(given, trusted, views.K, views.world_to_camera)
    depth, K, poses = corrections.of_geometry(trusted, views.K, views.world_to_camera)
    corrected = replace(views, K=K, world_to_camera=poses)
    images = corrections.of_images(given)
    grey = luminance(images)
    noise = grain(grey)
    changed = change(grey, noise)
    noise = float(noise.mean()) * 2 * SMOOTHED_NOISE
    images = smoothed(images)
    count = len(depth)
    went = motion(poses, K, float(estimated[keep].median()), depth.shape[2])
    points = unproject(depth, K, poses)
    compared = []
    for target in range(count):
        compared.append(compare(images, depth, points, corrected, target, doubtful[target], noise))
        if progress is not None:
            progress((target + 1) / (count if lpips is None else 2 * count))
    error_map = torch.stack([c.mse + c.dssim for c in compared])
    frame_errors = [float(e.nanmean()) for e in error_map]
    measurements = {
        "mse": _mean(float(c.mse.nanmean()) for c in compared),
        "dssim": _mean(float(c.dssim.nanmean()) for c in compared),
        "depth_error": float(neighbour_errors(estimated, views.K, views.world_to_camera, DEPTH_STEP).nanmean()),
        "noise": corrections.noise,
        "coverage": _mean(c.coverage for c in compared),
        "kept": float(error_map.isfinite().float().mean()),
        **went,
    }
    photometric = _mean(frame_errors) + RESOLUTION
    measurements["error"] = photometric * (1 + HALF_TRANSLATION / max(went["translation"], 1e-12))
    if lpips is None:
        notes.append("no LPIPS weights given: MSE and DSSIM only, no 3DCS")
    else:
        measurements |= published(given, estimated, views, lpips, progress)
    verdict, reason = _judge(measurements, changed)
    if verdict == UNDETERMINED:
        # A static clip has an error of almost 0 and must not rank first where clips are sorted by error alone.
        measurements["error"] = math.inf
    score = score_of(verdict, measurements["error"], border(corrections.noise))
    record = GeometryRecord(
        DENSE, VERSIONS[DENSE], score, verdict, reason, measurements, views.frames, views.frame_indices, frame_errors,
        notes=notes,
    )  # fmt: skip
    return Scored(record, error_map.float(), torch.stack([c.drawn for c in compared]).permute(0, 2, 3, 1).float())


def compare(
    images: Tensor, depth: Tensor, points: Tensor, views: Views, target: int, doubtful: Tensor, noise: float
) -> Comparison:
    """Compare view `target` with its rendering from the points of all other views.

    images: [3, S, H, W] in [0, 1]; depth: [S, H, W], NaN for pixels without a point; points: [3, S, H, W] in world
    coordinates; views: only its cameras are used; doubtful: bool [H, W], pixels of the target that are not measured; noise:
    variance of the images' noise, of rendering and target added up. A point more than 5% behind the target's own surface is
    occluded and visible only through gaps between that surface's points; it is drawn but not measured.
    """
    h, w = depth.shape[1:]
    others = [i for i in range(len(depth)) if i != target]
    seen = splat(depth, views.K, views.world_to_camera, target, others)
    drawn = seen.gather(images, MID_GREY)
    u, v = subpixel_positions(points, views.K[target], views.world_to_camera[target], seen)
    frame = images[:, target]
    wanted = sample(frame, u.clamp_(0, w - 1), v.clamp_(0, h - 1))
    # Comparisons with NaN are false: where the target has no depth, nothing counts as occluded.
    left_out = doubtful | ~seen.covered | (seen.depth > depth[target] * (1 + OCCLUSION))
    # Excluded pixels are made equal in both images, so that SSIM windows that overlap them see no difference there.
    a, b = (torch.where(left_out, frame, x) for x in (drawn, wanted))
    mse, unlike = squared_error(a, b), dssim(luminance(a)[None], luminance(b)[None], noise)[0]
    coverage = float(seen.covered.float().mean())
    return Comparison(
        drawn.clamp_(0, 1), mse.masked_fill_(left_out, torch.nan), unlike.masked_fill_(left_out, torch.nan), coverage
    )


def published(images: Tensor, depth: Tensor, views: Views, lpips, progress=None) -> dict[str, float]:
    """VideoGPA's scores as in its release: {"lpips": LPIPS, "3dcs": MSE + LPIPS}, means over the views; also "mvcs" if all
    depth is finite.

    Each view is rendered from the points of all views, including its own, on black, with colours truncated to 8 bits; MSE is
    over all pixels. images: [3, S, H, W] in [0, 1]; depth: [S, H, W]; lpips and progress: as in `score_views`.
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


def change(grey: Tensor, noise: Tensor) -> float:
    """Mean squared difference between frames, without warping: twice their variance over time, after block averaging.

    grey: [S, H, W] in [0, 1]; noise: [S], variance of its noise, which is subtracted.
    """
    block = [min(BLOCK, n) for n in grey.shape[1:]]
    small = F.avg_pool2d(grey[:, None], block)
    return 2 * (float(small.var(dim=0).mean()) - float(noise.mean()) / math.prod(block))


def _judge(measurements: dict[str, float], change: float) -> tuple[str, str]:
    """Verdict and reason."""
    error, went, coverage, kept, noise = (measurements[k] for k in ("error", "translation", "coverage", "kept", "noise"))
    if change < STILL:
        return UNDETERMINED, "the frames hardly differ: the consistency of a static clip cannot be measured"
    if went < MIN_TRANSLATION:
        return UNDETERMINED, (
            f"the camera moves {went:.2%} of the median depth; below {MIN_TRANSLATION:.0%} (static, slow, zoom or pan) "
            "consistency cannot be measured"
        )
    if kept < MIN_COVERAGE or not math.isfinite(error):
        return UNDETERMINED, (
            f"other views reach only {coverage:.0%} of a view, and {kept:.0%} of the pixels can be compared (not occluded, at "
            f"an edge of the depth or of low confidence); below {MIN_COVERAGE:.0%} consistency cannot be measured"
        )
    measured = f"rendered from the other views, a view differs from its frame by {error:.3g} (lower is better)"
    if noise > MAX_NOISE and error > BORDER:
        return UNDETERMINED, (
            f"{measured}, but depth and cameras had to be corrected by {noise:.1f} px; above {MAX_NOISE:.0f} px that may be "
            "their error: estimate them at a higher resolution or with a larger model"
        )
    if error <= border(noise):
        return CONSISTENT, f"{measured}, not above the threshold {border(noise):.3g}"
    return INCONSISTENT, f"{measured}, above the threshold {border(noise):.3g}"


def border(noise: float) -> float:
    """Decision threshold for the error where depth and cameras were corrected by `noise`, px at 480 lines."""
    return BORDER * (1 + min(noise, MAX_NOISE) / DOUBLING)


def _mean(values) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
