"""Pinhole camera model: projection, unprojection, warps between views, and the amount of camera motion.

A world point X projects to (x / z, y / z) with (x, y, z) = K (R X + t). Axes and pixel centres are those of views.py.
"""

import math

import torch
from torch import Tensor

# Added to z before dividing, as in VideoGPA's release.
EPSILON = 1e-8


def camera_centres(world_to_camera: Tensor) -> Tensor:
    """Camera centres in world coordinates, -R^T t: [S, 4, 4] -> [S, 3]."""
    rotation, shift = world_to_camera[:, :3, :3], world_to_camera[:, :3, 3:]
    return -(rotation.transpose(1, 2) @ shift)[:, :, 0]


def unproject(depth: Tensor, K: Tensor, world_to_camera: Tensor) -> Tensor:
    """Unproject depth [S, H, W] to world points [3, S, H, W]. Points are NaN where depth is NaN.

    K: [S, 3, 3]; world_to_camera: [S, 4, 4].
    """
    poses = world_to_camera.cpu().double()
    rays = poses[:, :3, :3].transpose(1, 2) @ torch.linalg.inv(K.cpu().double())
    centres = camera_centres(poses)
    out = torch.empty(3, *depth.shape, dtype=depth.dtype, device=depth.device)
    for i, (A, b) in enumerate(zip(rays.tolist(), centres.tolist(), strict=True)):
        for plane, c in zip(out[:, i], warp(depth[i], A, b), strict=True):
            plane.copy_(c)
    return out


def project(points: Tensor, K: Tensor, world_to_camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project world points [3, ...] into one camera: pixel coordinates u, v and depth z, each [...]; z <= 0 is behind it.

    K: [3, 3]; world_to_camera: [4, 4].
    """
    matrix = (K.cpu().double() @ world_to_camera.cpu().double()[:3]).tolist()
    x, y, z = ((points[0] * a).add_(points[1], alpha=b).add_(points[2], alpha=c).add_(d) for a, b, c, d in matrix)
    return x.div_(z + EPSILON), y.div_(z + EPSILON), z


def pixel_transform(K: Tensor, world_to_camera: Tensor, source: int, target: int) -> tuple[list[list[float]], list[float]]:
    """Matrix A and vector b of the warp (x, y, z) = depth * A (u, v, 1) + b from the source's pixels to the target's.

    The target's pixel is (x / z, y / z). Computed in float64 without a step through world coordinates, so that it
    is exact for float32 pixels.
    """
    K, poses = K.cpu().double(), world_to_camera.cpu().double()
    relative = poses[target] @ torch.linalg.inv(poses[source])
    A = K[target] @ relative[:3, :3] @ torch.linalg.inv(K[source])
    return A.tolist(), (K[target] @ relative[:3, 3]).tolist()


def warp(depth: Tensor, A: list[list[float]], b: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Warp all pixels at their depth [H, W] into another camera: x, y, z, each [H, W]. A, b: from `pixel_transform`."""
    h, w = depth.shape
    u, v = (torch.arange(n, dtype=depth.dtype, device=depth.device) for n in (w, h))
    # A (u, v, 1) is the sum of a row and a column: three operations per pixel instead of a matrix product.
    return tuple(torch.add((a[1] * v + a[2])[:, None], a[0] * u).mul_(depth).add_(c) for a, c in zip(A, b, strict=True))


def motion(world_to_camera: Tensor, K: Tensor, median_depth: float, width: int) -> dict[str, float]:
    """Camera motion over S views.

    world_to_camera: [S, 4, 4]; K: [S, 3, 3]; median_depth: in the unit of the translations; width: of the images, pixels.

    Returns translation: the largest distance between two camera centres divided by the median depth, so that the unit
    cancels (the length of the path would grow with the jitter of estimated poses); rotation: mean angle between
    neighbouring views, degrees; field_of_view_change: largest minus smallest horizontal field of view, degrees.
    """
    poses = world_to_camera.cpu().double()
    centres = camera_centres(poses)
    turn = poses[1:, :3, :3] @ poses[:-1, :3, :3].transpose(1, 2) - torch.eye(3, dtype=torch.float64)
    # From the Frobenius norm of R - I: accurate at small angles, unlike the arc cosine of the trace.
    angles = 2 * torch.asin((turn.flatten(1).norm(dim=1) / math.sqrt(8)).clamp(max=1))
    view = 2 * torch.atan(width / 2 / K[:, 0, 0].cpu().double())
    return {
        "translation": float((centres[:, None] - centres[None]).norm(dim=-1).max()) / median_depth,
        "rotation": math.degrees(float(angles.mean())),
        "field_of_view_change": math.degrees(float(view.max() - view.min())),
    }
