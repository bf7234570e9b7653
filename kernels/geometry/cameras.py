"""Pinhole cameras: pixels to points and back, and how far a camera went.

Axes and pixel centres as in views.py: a point X of the world is seen at (x / z, y / z) with (x, y, z) = K (R X + t).
"""

import math

import torch
from torch import Tensor

# VideoGPA's release divides by z plus this.
EPSILON = 1e-8


def camera_centres(world_to_camera: Tensor) -> Tensor:
    """[S, 4, 4] -> [S, 3]: where the cameras stand in the world."""
    rotation, shift = world_to_camera[:, :3, :3], world_to_camera[:, :3, 3:]
    return -(rotation.transpose(1, 2) @ shift)[:, :, 0]


def unproject(depth: Tensor, K: Tensor, world_to_camera: Tensor) -> Tensor:
    """Depth [S, H, W] -> points in the world [3, S, H, W], one plane a coordinate; NaN where depth is."""
    poses = world_to_camera.cpu().double()
    rays = poses[:, :3, :3].transpose(1, 2) @ torch.linalg.inv(K.cpu().double())
    centres = camera_centres(poses)
    out = torch.empty(3, *depth.shape, dtype=depth.dtype, device=depth.device)
    for i, (A, b) in enumerate(zip(rays.tolist(), centres.tolist(), strict=True)):
        for plane, c in zip(out[:, i], warp(depth[i], A, b), strict=True):
            plane.copy_(c)
    return out


def project(points: Tensor, K: Tensor, world_to_camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points [3, ...] of the world -> pixel coordinates u, v and depth z [...] in one camera; z <= 0 is behind it."""
    matrix = (K.cpu().double() @ world_to_camera.cpu().double()[:3]).tolist()
    x, y, z = ((points[0] * a).add_(points[1], alpha=b).add_(points[2], alpha=c).add_(d) for a, b, c, d in matrix)
    return x.div_(z + EPSILON), y.div_(z + EPSILON), z


def pixel_transform(K: Tensor, world_to_camera: Tensor, source: int, target: int) -> tuple[list[list[float]], list[float]]:
    """Matrix A and vector b with (x, y, z) in the target's pixels = depth * A (u, v, 1) + b for the source's pixels.

    One map from pixel to pixel without the world between; in float64, so that it is exact for float32 pixels.
    """
    K, poses = K.cpu().double(), world_to_camera.cpu().double()
    relative = poses[target] @ torch.linalg.inv(poses[source])
    A = K[target] @ relative[:3, :3] @ torch.linalg.inv(K[source])
    return A.tolist(), (K[target] @ relative[:3, 3]).tolist()


def warp(depth: Tensor, A: list[list[float]], b: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """All pixels at their depth [H, W] -> x, y, z [H, W] in another camera, by what `pixel_transform` gave."""
    h, w = depth.shape
    u, v = (torch.arange(n, dtype=depth.dtype, device=depth.device) for n in (w, h))
    # A (u, v, 1) is a sum of a row and a column: three operations a pixel instead of a product of matrices.
    return tuple(torch.add((a[1] * v + a[2])[:, None], a[0] * u).mul_(depth).add_(c) for a, c in zip(A, b, strict=True))


def motion(world_to_camera: Tensor, K: Tensor, median_depth: float, width: int) -> dict[str, float]:
    """How the camera moved over its S views.

    translation: the largest distance between two camera centres over the median depth, so that the unit of the geometry
    cancels (a path summed from view to view would grow with the jitter of estimated poses); rotation: mean degrees
    between neighbours; field_of_view_change: degrees between the widest and the narrowest view, across the picture.
    """
    poses = world_to_camera.cpu().double()
    centres = camera_centres(poses)
    turn = poses[1:, :3, :3] @ poses[:-1, :3, :3].transpose(1, 2) - torch.eye(3, dtype=torch.float64)
    # The chord of a rotation keeps its accuracy at small angles, where the arc cosine of the trace has none.
    angles = 2 * torch.asin((turn.flatten(1).norm(dim=1) / math.sqrt(8)).clamp(max=1))
    view = 2 * torch.atan(width / 2 / K[:, 0, 0].cpu().double())
    return {
        "translation": float((centres[:, None] - centres[None]).norm(dim=-1).max()) / median_depth,
        "rotation": math.degrees(float(angles.mean())),
        "field_of_view_change": math.degrees(float(view.max() - view.min())),
    }
