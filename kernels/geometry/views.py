"""Views: frames of one clip with depth and cameras from any estimator, the input of the dense scorer.

Cameras follow OpenCV (x right, y down, z forward); pixel centres are at integers, as in VideoGPA (arXiv 2601.23286).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .record import GeometryError

MAX_VIEWS = 10
# A principal point farther from the image centre than this share of the image's side means that K is for another size.
CENTRE_TOLERANCE = 0.2
# Largest absolute element of R R^T - I.
ORTHONORMAL_TOLERANCE = 0.02
# As in VideoGPA's release. Depth Anything 3's confidence is never below 1.
MIN_CONFIDENCE = 1e-5
# Share of a clip's pixels, those of lowest confidence, that are left out, as in Depth Anything 3's export of point clouds.
DOUBTFUL = 0.4
# Number of pixels from which that confidence is found.
SAMPLES = 100_000
# ComfyUI runs Depth Anything 3 with the longest or the shortest side at one of these lengths, and both sides rounded to
# multiples of the patch.
PATCH, LENGTHS = 14, range(140, 2521, 14)
# Largest distance of a size from twice the principal points, as a share, at which it is taken for the model's.
SIZE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Views:
    """S views of a clip.

    images: [S, H, W, 3] float in [0, 1], or None if a file contains geometry only (see with_frames); depth: [S, H, W], z in
    camera coordinates, in any unit that is the same in all views; K: [S, 3, 3], intrinsics in pixels of these images;
    world_to_camera: [S, 4, 4], translations in the unit of depth; confidence: [S, H, W] or None; frame_indices: index of each
    view's frame in the clip; frames: number of frames of the clip; notes: remarks, copied to the record.
    """

    images: Tensor | None
    depth: Tensor
    K: Tensor
    world_to_camera: Tensor
    confidence: Tensor | None
    frame_indices: list[int]
    frames: int
    notes: list[str] = field(default_factory=list)


def sample_indices(frames: int, count: int = MAX_VIEWS) -> list[int]:
    """At most `count` evenly spaced frame indices, first and last included, rounded down as in VideoGPA's release."""
    count = min(frames, count)
    return [0] if count == 1 else [i * (frames - 1) // (count - 1) for i in range(count)]


def take(views: Views, indices: list[int]) -> Views:
    """The subset of views at positions `indices`, from 0 to S - 1."""
    at = torch.tensor(indices, dtype=torch.long, device=views.depth.device)
    return replace(
        views,
        images=None if views.images is None else views.images[at.to(views.images.device)],
        depth=views.depth[at],
        K=views.K[at.to(views.K.device)],
        world_to_camera=views.world_to_camera[at.to(views.world_to_camera.device)],
        confidence=None if views.confidence is None else views.confidence[at.to(views.confidence.device)],
        frame_indices=[views.frame_indices[i] for i in indices],
    )


def usable_pixels(views: Views) -> Tensor:
    """Mask of usable pixels, bool [S, H, W]: finite depth above zero and, if there is confidence, confidence above 1e-5."""
    keep = views.depth.isfinite() & (views.depth > 0)
    if views.confidence is not None:
        keep &= (views.confidence > MIN_CONFIDENCE).to(keep.device)
    return keep


def doubtful_pixels(views: Views, keep: Tensor) -> Tensor:
    """Mask of the pixels whose confidence is below that of 60% of the clip's, bool [S, H, W]; none without confidence or where
    it is the same everywhere. keep: bool [S, H, W], pixels that count.
    """
    if views.confidence is None:
        return torch.zeros_like(keep)
    confidence = views.confidence.to(keep.device).float()
    values = confidence[keep]
    values = values[:: -(-len(values) // SAMPLES)]
    # Below, not equal: of equal values, none is left out.
    return keep & (confidence < values.kthvalue(int(DOUBTFUL * (len(values) - 1)) + 1).values)


def with_frames(views: Views, frames: Tensor, source: str) -> Views:
    """The views with images taken from the whole clip and resized to the size of the depth maps.

    frames: [T, H, W, 3], float in [0, 1] or uint8; source: name for error messages. Raises GeometryError if the clip's number
    of frames differs from the geometry's, or its aspect ratio by 10% or more.
    """
    if frames.shape[0] != views.frames:
        raise GeometryError(
            f"{source}: geometry of a clip of {views.frames} frames, but the video has {frames.shape[0]}; expected geometry "
            "that was estimated from this video: estimate it again"
        )
    h, w = views.depth.shape[1:]
    picked = frames[views.frame_indices][..., :3]
    picked = picked.float() / 255.0 if picked.dtype == torch.uint8 else picked.float()
    if picked.shape[1:3] != (h, w):
        stretch = (w / picked.shape[2]) / (h / picked.shape[1])
        if not 0.9 < stretch < 1.1:
            raise GeometryError(
                f"{source}: depth maps of {w}x{h} pixels, but the video is {picked.shape[2]}x{picked.shape[1]}; expected the "
                "same aspect ratio: a cropped video needs its own geometry"
            )
        picked = F.interpolate(picked.permute(0, 3, 1, 2), (h, w), mode="bilinear", antialias=True, align_corners=False)
        picked = picked.clamp(0, 1).permute(0, 2, 3, 1).contiguous()
    return replace(views, images=picked)


def rescale_K(K: Tensor, size_of_K: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Rescale intrinsics [..., 3, 3] from pixels of an image of size_of_K to pixels of an image of `size`.

    Sizes are (width, height). The principal point scales with the image, so cx = W' / 2 becomes W / 2, as in the depth models.
    """
    K = K.clone()
    K[..., 0, :] *= size[0] / size_of_K[0]
    K[..., 1, :] *= size[1] / size_of_K[1]
    return K


def model_size(size: tuple[int, int], centre: tuple[float, float]) -> tuple[int, int] | None:
    """The size at which ComfyUI ran Depth Anything 3: of those that it gives to images of `size`, the nearest to twice the
    principal point `centre`; None if it is not within 10% of any. Sizes are (width, height).
    """

    def rounded(side: int, scale: float) -> int:
        # Half-way up, as in ComfyUI's preprocessing.
        return max((round(side * scale) + PATCH // 2) // PATCH * PATCH, 1)

    def distance(candidate: tuple[int, int]) -> float:
        return max(abs(n / (2 * c) - 1) for n, c in zip(candidate, centre, strict=True))

    found = {tuple(rounded(n, length / side) for n in size) for side in (max(size), min(size)) for length in LENGTHS}
    best = min(sorted(found), key=distance)
    return best if distance(best) <= SIZE_TOLERANCE else None


def from_da3(geometry: dict, source: str = "DA3_GEOMETRY", size_of_K: tuple[int, int] | None = None) -> Views:
    """Convert ComfyUI's DA3_GEOMETRY (Depth Anything 3, multi-view mode) to Views, with all of its frames.

    Depth has the images' size, but K is in pixels of the size at which the model ran. size_of_K: that size, (width, height),
    if it is known. It is not in the dict; principal points are at its centre, exactly with pose_method cam_dec and nearly with
    ray_pose, so that it is otherwise found from their median, see model_size. Pixels of the sky get depth NaN.

    Raises GeometryError for monocular geometry, for poses that are missing or all identity, and for views that
    require_usable refuses.
    """
    if not isinstance(geometry, dict) or "depth" not in geometry:
        raise GeometryError(f"{source}: no 'depth' in it; expected the output of Run Depth Anything 3 in multi-view mode")
    mode = geometry.get("mode", "mono" if "extrinsics" not in geometry else "multiview")
    if mode != "multiview":
        raise GeometryError(
            f"{source}: geometry of mode '{mode}', without cameras; expected multi-view: in Run Depth Anything 3 set mode to "
            "'multiview' and use a Small or Base model"
        )
    missing = [k for k in ("image", "extrinsics", "intrinsics") if geometry.get(k) is None]
    if missing:
        raise GeometryError(
            f"{source}: no {' and no '.join(missing)} in it; expected multi-view geometry with cameras: use a Small or Base "
            "model of Depth Anything 3"
        )
    depth, images = geometry["depth"].float(), geometry["image"][..., :3].float()
    poses, K = (geometry[k].float() for k in ("extrinsics", "intrinsics"))
    poses, K = (t[0] if t.ndim == 4 and t.shape[0] == 1 else t for t in (poses, K))
    _expect_shape(poses, (None, None, 4), "extrinsics", source)
    _expect_shape(K, (None, 3, 3), "intrinsics", source)
    poses = square_poses(poses)
    _refuse_identity(poses, source)
    h, w = depth.shape[-2:]
    centre = K[:, :2, 2].nanmedian(dim=0).values
    if not bool((centre > 1).all()):
        raise GeometryError(
            f"{source}: principal points at about ({centre[0]:.3g}, {centre[1]:.3g}); expected the image centre in "
            "pixels, from which K is rescaled to the images' size: the model gave no usable cameras"
        )
    notes = []
    assumed = size_of_K is None
    if assumed:
        size_of_K = (2 * float(centre[0]), 2 * float(centre[1]))
    if abs(size_of_K[0] - w) > 1 or abs(size_of_K[1] - h) > 1:
        stretch = (size_of_K[0] / w) / (size_of_K[1] / h)
        if not 0.8 < stretch < 1.25:
            raise GeometryError(
                f"{source}: principal points at the centre of an image of {size_of_K[0]:.0f}x{size_of_K[1]:.0f}, but the "
                f"images are {w}x{h}; expected the same aspect ratio: use the images that the geometry was estimated from"
            )
        if assumed:
            size_of_K = model_size((w, h), (float(centre[0]), float(centre[1]))) or size_of_K
        K = rescale_K(K, size_of_K, (w, h))
        notes.append(f"intrinsics rescaled from {size_of_K[0]:.0f}x{size_of_K[1]:.0f} to {w}x{h} pixels")
        if assumed:
            notes.append("the size at which the depth model ran was assumed from the principal points")
    confidence = geometry.get("confidence")
    sky = geometry.get("sky")
    if sky is not None:
        # The sky has no depth that views could agree on.
        depth = torch.where(sky < 0.5, depth, torch.nan)
    count = depth.shape[0]
    confidence = None if confidence is None else confidence.float()
    views = Views(images, depth, K, poses, confidence, list(range(count)), count, notes)
    require_usable(views, source)
    return views


def square_poses(poses: Tensor) -> Tensor:
    """World-to-camera matrices [..., 3, 4] or [..., 4, 4] -> [..., 4, 4], with the row (0, 0, 0, 1) added to the former."""
    if poses.shape[-2] == 4:
        return poses
    last = torch.tensor([0.0, 0.0, 0.0, 1.0]).to(poses).expand(*poses.shape[:-2], 1, 4)
    return torch.cat([poses, last], dim=-2)


def require_usable(views: Views, source: str) -> None:
    """Check that views can be scored. Raises GeometryError, naming `source`, if not. Pixels without depth (sky) are allowed,
    and so are views without any, as long as two views have some.
    """
    depth = views.depth
    if depth.ndim != 3:
        raise GeometryError(f"{source}: depth of shape {tuple(depth.shape)}; expected [views, height, width]")
    s, h, w = depth.shape
    if views.images is None:
        raise GeometryError(f"{source}: geometry without images; give the video as well, or save the geometry with its images")
    parts = {"images": (s, h, w, 3), "K": (s, 3, 3), "world_to_camera": (s, 4, 4)}
    if views.confidence is not None:
        parts["confidence"] = (s, h, w)
    for name, wanted in parts.items():
        found = tuple(getattr(views, name).shape)
        if found != wanted:
            raise GeometryError(
                f"{source}: {name} of shape {found} does not match depth of shape {(s, h, w)}; expected {wanted}: all parts "
                "must come from the same frames at the same size"
            )
    if len(views.frame_indices) != s:
        raise GeometryError(f"{source}: {len(views.frame_indices)} frame indices for {s} views; expected one for each")
    if any(not 0 <= i < views.frames for i in views.frame_indices):
        raise GeometryError(
            f"{source}: frame indices {views.frame_indices} in a clip of {views.frames} frames; expected 0 to "
            f"{views.frames - 1}"
        )
    if list(views.frame_indices) != sorted(set(views.frame_indices)):
        raise GeometryError(f"{source}: frame indices {views.frame_indices}; expected ascending ones, each once")
    if s < 2:
        raise GeometryError(f"{source}: {s} view; expected at least 2, 10 recommended: give more frames of the clip")
    _require_images(views.images, source)
    good = usable_pixels(views).flatten(1).sum(dim=1)
    if int((good > 0).sum()) < 2:
        raise GeometryError(
            f"{source}: finite depth above zero in {int((good > 0).sum())} of {s} views; expected it in nearly all pixels: "
            "the depth model failed on this clip, or this is not depth"
        )
    _require_K(views.K, (w, h), source)
    _require_poses(views.world_to_camera, source)


def _require_images(images: Tensor, source: str) -> None:
    if not images.is_floating_point():
        raise GeometryError(f"{source}: images of {images.dtype}; expected floats from 0 to 1: divide by 255")
    low, high = (float(v) for v in images.aminmax())
    # Comparisons with NaN are false.
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise GeometryError(f"{source}: images from {low:.3g} to {high:.3g}; expected finite values from 0 to 1")


def _require_K(K: Tensor, size: tuple[int, int], source: str) -> None:
    for i, k in enumerate(K.cpu().double()):
        last_row = bool((k[2] - torch.tensor([0, 0, 1.0])).abs().max() < 1e-6)
        if not (k.isfinite().all() and k[0, 0] > 0 and k[1, 1] > 0 and last_row and abs(torch.linalg.det(k)) > 1e-9):
            raise GeometryError(
                f"{source}: intrinsics of view {i} are {k.tolist()}; expected [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with "
                "focal lengths above zero (this matrix is singular or not an intrinsic matrix)"
            )
        away = max(abs(float(k[j, 2]) / size[j] - 0.5) for j in (0, 1))
        if away > CENTRE_TOLERANCE:
            raise GeometryError(
                f"{source}: principal point of view {i} at ({k[0, 2]:.1f}, {k[1, 2]:.1f}) in images of {size[0]}x{size[1]}; "
                f"expected it near the centre. Intrinsics seem to be in pixels of an image of {2 * k[0, 2]:.0f}x"
                f"{2 * k[1, 2]:.0f}: rescale them to the images' size"
            )


def _require_poses(poses: Tensor, source: str) -> None:
    poses = poses.cpu().double()
    if not bool(poses.isfinite().all()):
        raise GeometryError(f"{source}: poses that are not finite; expected world-to-camera matrices: pose estimation failed")
    _refuse_identity(poses, source)
    rotation = poses[:, :3, :3]
    off = (rotation @ rotation.transpose(1, 2) - torch.eye(3, dtype=torch.float64)).abs().amax(dim=(1, 2))
    for i, (worst, det) in enumerate(zip(off.tolist(), torch.linalg.det(rotation).tolist(), strict=True)):
        if worst > ORTHONORMAL_TOLERANCE or det < 0:
            raise GeometryError(
                f"{source}: the rotation of view {i} is not a rotation matrix (off by {worst:.2g}, determinant {det:.2g}); "
                "expected world-to-camera matrices [R | t] with orthonormal R: remove a scale or a mirrored axis"
            )


def _refuse_identity(poses: Tensor, source: str) -> None:
    if poses.shape[0] > 1 and bool((poses == torch.eye(4).to(poses)).all()):
        raise GeometryError(
            f"{source}: all {poses.shape[0]} camera poses are the identity, which stands for 'no poses'; expected one "
            "world-to-camera matrix per view: use a Small or Base model of Depth Anything 3 in multi-view mode (clips of a "
            "static camera cannot be scored)"
        )


def _expect_shape(value: Tensor, wanted: tuple, name: str, source: str) -> None:
    fits = value.ndim == len(wanted) and all(w in (None, n) for w, n in zip(wanted, value.shape, strict=True))
    if not fits:
        shape = ", ".join("any" if w is None else str(w) for w in wanted)
        raise GeometryError(f"{source}: {name} of shape {tuple(value.shape)}; expected [{shape}]")
