"""Socket types of core's Depth Anything 3 nodes, and their conversion to Views."""

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..kernels.geometry.record import GeometryError
from ..kernels.geometry.views import Views, from_da3, sample_indices

DA3ModelType = io.Custom("DA3_MODEL")
DA3GeometryType = io.Custom("DA3_GEOMETRY")
# Two entries that core's geometry lacks: the frame number of each view, and the number of frames of the clip.
INDICES, FRAMES = "frame_indices", "frames"


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
    }
    if views.confidence is not None:
        geometry["confidence"] = views.confidence
    return geometry


def from_wire(geometry: dict, source: str) -> Views:
    """A DA3_GEOMETRY -> Views. Raises GeometryError naming `source` for mono geometry, missing poses and invalid values."""
    views = from_da3(geometry, source)
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
    from comfy_extras.nodes_depth_anything_3 import DA3Inference

    indices = sample_indices(images.shape[0], count)
    mode = {"mode": "multiview", "ref_view_strategy": "saddle_balanced", "pose_method": pose_method}
    (geometry,) = DA3Inference.execute(model, images[indices], resolution, "upper_bound_resize", mode).args
    return {**geometry, INDICES: indices, FRAMES: images.shape[0]}
