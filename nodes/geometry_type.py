"""Socket types of core's Depth Anything 3 nodes, and their conversion to Views."""

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..kernels.geometry.record import GeometryError
from ..kernels.geometry.views import Views, from_da3, sample_indices

DA3ModelType = io.Custom("DA3_MODEL")
DA3GeometryType = io.Custom("DA3_GEOMETRY")
# Three entries that core's geometry lacks: the frame number of each view, the number of frames of the clip, and the size
# (width, height) in whose pixels the intrinsics are.
INDICES, FRAMES, SIZE = "frame_indices", "frames", "intrinsics_size"


def to_wire(views: Views) -> dict:
    """Views with images -> a DA3_GEOMETRY as core's Run Depth Anything 3 gives it in multi-view mode."""
    geometry = {
        "depth": views.depth,
        "image": views.images,
        "mode": "multiview",
        "extrinsics": views.world_to_camera[None, :, :3],
        "intrinsics": views.K[None],
        INDICES: list(views.frame_indices),
        FRAMES: views.frames,
        SIZE: (views.depth.shape[2], views.depth.shape[1]),
    }
    if views.confidence is not None:
        geometry["confidence"] = views.confidence
    return geometry


def from_wire(geometry: dict, source: str) -> Views:
    """A DA3_GEOMETRY -> Views. Raises GeometryError naming `source` for mono geometry, missing poses and invalid values."""
    views = from_da3(geometry, source, geometry.get(SIZE) if isinstance(geometry, dict) else None)
    indices = geometry.get(INDICES)
    if indices is None:
        return views
    if len(indices) != len(views.frame_indices):
        raise GeometryError(
            f"{source}: {len(indices)} frame indices for {len(views.frame_indices)} views; connect geometry whose views no "
            "other node has removed"
        )
    return replace(views, frame_indices=list(indices), frames=int(geometry[FRAMES]))


def run_da3(model, images: torch.Tensor, count: int, resolution: int, pose_method: str) -> dict:
    """The DA3_GEOMETRY of `count` frames of a clip [T, H, W, 3], by core's own node."""
    # Imported here: some ComfyUI versions load extra nodes after custom nodes, and extra nodes can be disabled.
    from comfy.ldm.depth_anything_3.preprocess import compute_target_size
    from comfy_extras.nodes_depth_anything_3 import DA3Inference

    resize = "upper_bound_resize"
    indices = sample_indices(images.shape[0], count)
    mode = {"mode": "multiview", "ref_view_strategy": "saddle_balanced", "pose_method": pose_method}
    (geometry,) = DA3Inference.execute(model, images[indices], resolution, resize, mode).args
    height, width = compute_target_size(images.shape[1], images.shape[2], resolution, resize)
    return {**geometry, INDICES: indices, FRAMES: images.shape[0], SIZE: (width, height)}
