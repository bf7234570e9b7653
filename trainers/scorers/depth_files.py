"""Depth, intrinsics and camera poses of a clip, saved by our node or by any other tool, as views that can be scored.

  NAME.safetensors  of the Save Geometry node
  NAME.npz          depth or depths [S, h, w]; K or intrinsics [S, 3, 3] or [3, 3]; world_to_camera, extrinsics or poses
                    [S, 3, 4] or [S, 4, 4], OpenCV axes, world to camera; optionally frame_indices [S] (frames of the
                    clip; default all), images [S, h, w, 3] (the frames as that tool saw them) and
                    confidence [S, h, w]. A leading dimension of 1 is dropped everywhere.

K may be in pixels of the depth, in pixels of the video, or in units of the image's width and height: the unit in which its
principal point is nearest to the image centre is used.
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..kernels.geometry import view_files
from ..kernels.geometry.record import GeometryError
from ..kernels.geometry.views import Views, require_usable, rescale_K, square_poses, with_frames

SUFFIXES = (".npz", ".safetensors")
DEPTH = ("depth", "depths")
INTRINSICS = ("K", "intrinsics", "intrinsic")
POSES = ("world_to_camera", "extrinsics", "extrinsic", "poses")
CONFIDENCE = ("confidence", "depth_conf", "conf")
UNITS = ("pixels of the depth", "pixels of the video", "units of the picture's size")


@dataclass(frozen=True)
class Saved:
    """The content of a file. views: its images may be None; counted: whether the file has the number of frames of its clip."""

    path: Path
    views: Views
    counted: bool

    @property
    def frames(self) -> int:
        """The number of frames to read: one more than expected, where that detects another clip."""
        return self.views.frames + 1 if self.counted else max(self.views.frame_indices, default=0) + 1


def find(folder: Path, clip: str) -> Path | None:
    """The geometry file of a clip: its relative name with another suffix, or None. Raises GeometryError for two such files."""
    found = [p for p in (folder / Path(clip).with_suffix(suffix) for suffix in SUFFIXES) if p.is_file()]
    if len(found) > 1:
        raise GeometryError(f"{found[0]} and {found[1].name}: two files of geometry for one clip; remove one of them")
    return found[0] if found else None


def read(path: Path) -> Saved:
    """A file's content, not yet checked against its clip. Raises GeometryError or FileNotFoundError naming the file."""
    return Saved(path, view_files.load_views(path), True) if path.suffix.lower() == ".safetensors" else _read_npz(path)


def views_of(saved: Saved, frames: Tensor) -> Views:
    """Views for scoring, of a clip's frames [T, H, W, 3]. Raises GeometryError, also for a file of another clip."""
    views = saved.views if saved.counted else replace(saved.views, frames=len(frames))
    beyond = [i for i in views.frame_indices if not 0 <= i < views.frames]
    if beyond:
        raise GeometryError(
            f"{saved.path}: 'frame_indices' names frame {beyond[0]}, the clip has {views.frames}: another clip?"
        )
    if views.images is None and saved.counted and len(frames) != views.frames:
        more = "more" if len(frames) > views.frames else str(len(frames))
        raise GeometryError(
            f"{saved.path}: geometry of a clip of {views.frames} frames, the video has {more}; give the video that it was "
            "estimated from, or say in 'frame_indices' which frames these are"
        )
    if views.images is None:
        views = with_frames(views, frames, str(saved.path))
    if saved.path.suffix.lower() == ".npz":
        views = _with_K_in_pixels(views, (frames.shape[2], frames.shape[1]))
    require_usable(views, str(saved.path))
    return views


def _read_npz(path: Path) -> Saved:
    arrays = _arrays(path)
    depth = _pick(arrays, DEPTH, "[S, h, w]", path)
    if depth.ndim > 3 and depth.shape[-1] == 1:
        depth = depth.squeeze(-1)
    depth = _shaped(depth, 3, DEPTH[0], "[S, h, w]", path)
    count = len(depth)
    K = _pick(arrays, INTRINSICS, "[S, 3, 3]", path)
    K = K.expand(count, 3, 3).clone() if K.shape == (3, 3) else _shaped(K, 3, INTRINSICS[0], "[S, 3, 3]", path)
    poses = _shaped(_pick(arrays, POSES, "[S, 3, 4]", path), 3, POSES[0], "[S, 3, 4] or [S, 4, 4]", path)
    if K.shape[1:] != (3, 3) or poses.shape[1:] not in ((3, 4), (4, 4)):
        raise GeometryError(
            f"{path}: {INTRINSICS[0]} of shape {list(K.shape)} and {POSES[0]} of shape {list(poses.shape)}, expected "
            "[S, 3, 3] and [S, 3, 4] or [S, 4, 4]"
        )
    confidence = next((_numbers(arrays[n], n, path) for n in CONFIDENCE if n in arrays), None)
    if confidence is not None:
        confidence = _shaped(confidence, 3, CONFIDENCE[0], "[S, h, w]", path)
    indices = arrays.get("frame_indices")
    counted = indices is None
    if counted:
        indices = range(count)
    elif indices.dtype.kind not in "iu":
        raise GeometryError(f"{path}: 'frame_indices' holds {indices.dtype}, expected whole numbers")
    else:
        indices = indices.reshape(-1).tolist()
        if len(indices) != count:
            raise GeometryError(f"{path}: 'frame_indices' names {len(indices)} frames, the depth has {count} views")
    images = _images(arrays["images"], path) if "images" in arrays else None
    return Saved(path, Views(images, depth, K, square_poses(poses), confidence, list(indices), count, []), counted)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise GeometryError(f"{path}: damaged or not an .npz; save it again")
    try:
        # numpy loads no Python objects unless asked to.
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, KeyError, NotImplementedError, OSError, zlib.error, zipfile.BadZipFile) as e:
        if "Object arrays" in str(e):
            raise GeometryError(f"{path}: holds Python objects, none of which was run; save plain arrays of numbers") from e
        raise GeometryError(f"{path}: damaged ({' '.join(str(e).split())[:160]}); save it again") from e


def _with_K_in_pixels(views: Views, video: tuple[int, int]) -> Views:
    size = (views.depth.shape[2], views.depth.shape[1])
    cx, cy = (float(views.K[:, i, 2].mean()) for i in (0, 1))
    sizes = dict(zip(UNITS, (size, video, (1, 1)), strict=True))
    unit = min(UNITS, key=lambda u: abs(cx / sizes[u][0] - 0.5) + abs(cy / sizes[u][1] - 0.5))
    if sizes[unit] == size:
        return views
    return replace(views, K=rescale_K(views.K, sizes[unit], size), notes=[*views.notes, f"K was assumed to be in {unit}"])


def _images(array: np.ndarray, path: Path) -> Tensor:
    images = _shaped(_numbers(array, "images", path), 4, "images", "[S, h, w, 3]", path)
    if images.shape[-1] != 3 and images.shape[1] == 3:
        images = images.movedim(1, -1).contiguous()
    return images / 255.0 if array.dtype == np.uint8 else images


def _pick(arrays: dict[str, np.ndarray], names: Sequence[str], wanted: str, path: Path) -> Tensor:
    for name in names:
        if name in arrays:
            return _numbers(arrays[name], name, path)
    held = ", ".join(f"{k} {list(v.shape)}" for k, v in sorted(arrays.items())) or "nothing"
    raise GeometryError(f"{path}: no '{names[0]}' {wanted} in it, nor {', '.join(names[1:])}; it holds {held}")


def _numbers(array: np.ndarray, name: str, path: Path) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise GeometryError(f"{path}: '{name}' holds {array.dtype}, expected numbers")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _shaped(tensor: Tensor, ndim: int, name: str, wanted: str, path: Path) -> Tensor:
    while tensor.ndim > ndim and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise GeometryError(f"{path}: '{name}' has shape {list(tensor.shape)}, expected {wanted}")
    return tensor
