"""VideoGPA's splat and scores (arXiv 2601.23286 and its release): slow reference implementation for tests.

The released splat writes all points of a view at once with repeated indices, so that the result is undefined where several
points fall into one pixel. Here points are written one by one from far to near, as intended.
"""

import math

import torch
from torch import Tensor

EPSILON = 1e-8


def unproject(depth: Tensor, K: Tensor, world_to_camera: Tensor) -> Tensor:
    """Unproject depth [S, H, W] to world points [S, H, W, 3]: X = R^T (D K^-1 (u, v, 1) - t)."""
    s, h, w = depth.shape
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).to(depth).view(1, h * w, 3)
    local = (pixels @ torch.linalg.inv(K.to(depth)).transpose(1, 2)) * depth.reshape(s, h * w, 1)
    poses = world_to_camera.to(depth)
    return ((local - poses[:, None, :3, 3]) @ poses[:, :3, :3]).view(s, h, w, 3)


def project(points: Tensor, K: Tensor, world_to_camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project points [N, 3] to u, v, z, each [N]: (x, y, z) = K (R X + t), u = x / (z + 1e-8), v = y / (z + 1e-8)."""
    pose = world_to_camera.to(points)
    x, y, z = ((points @ pose[:3, :3].t() + pose[:3, 3]) @ K.to(points).t()).unbind(-1)
    return x / (z + EPSILON), y / (z + EPSILON), z


def render(points: Tensor, colours: Tensor, K: Tensor, world_to_camera: Tensor, size: tuple[int, int]) -> Tensor:
    """Render points [N, 3] with colours [N, 3] in [0, 1] by the painter's algorithm on black: [H, W, 3] in [0, 1].

    u, v are rounded half to even; a point is drawn if 0 <= u < W, 0 <= v < H and z > 0; colours are truncated to 8 bits. Of
    points at the same depth, the first one is visible.
    """
    h, w = size
    canvas = torch.zeros(h, w, 3, dtype=torch.uint8)
    u, v, z = project(points, K, world_to_camera)
    colours = (colours * 255).clamp(0, 255).to(torch.uint8)
    order = torch.argsort(z.flip(0), descending=True, stable=True)
    for i in (len(z) - 1 - order).tolist():
        column, row = u[i].round(), v[i].round()
        if z[i] > 0 and 0 <= column < w and 0 <= row < h:
            canvas[int(row), int(column)] = colours[i]
    return canvas.to(points.dtype) / 255


def reproject(images: Tensor, depth: Tensor, K: Tensor, world_to_camera: Tensor) -> Tensor:
    """Render the points of all views, including the target's own, into every view: [S, H, W, 3]."""
    points = unproject(depth, K, world_to_camera).reshape(-1, 3)
    colours = images.reshape(-1, 3)
    return torch.stack([render(points, colours, K[t], world_to_camera[t], depth.shape[1:]) for t in range(len(depth))])


def score_3dcs(images: Tensor, depth: Tensor, K: Tensor, world_to_camera: Tensor, lpips) -> tuple[float, float]:
    """3DCS and MSE of the reprojected frames over all pixels: (MSE + LPIPS, MSE).

    lpips: (images, images) [S, H, W, 3] -> [S].
    """
    drawn = reproject(images, depth, K, world_to_camera)
    mse = float((drawn - images).square().mean())
    return mse + float(lpips(drawn, images).mean()), mse


def mvcs(depth: Tensor, K: Tensor, world_to_camera: Tensor) -> float:
    """MVCS: exp(-mean over neighbours of mean (D_{i+1}(u') - z')^2), pixel by pixel; 0 if no pixel lands in the next view.

    D is sampled bilinearly, zero-padded; a pixel counts if 0 <= u' < W, 0 <= v' < H, z' > 0.
    """
    s, h, w = depth.shape
    points = unproject(depth, K, world_to_camera)
    errors = []
    for i in range(s - 1):
        squares = []
        u, v, _ = project(points[i].reshape(-1, 3), K[i + 1], world_to_camera[i + 1])
        pose = world_to_camera[i + 1].to(points)
        ahead = (points[i].reshape(-1, 3) @ pose[:3, :3].t() + pose[:3, 3])[:, 2]
        for x, y, z in zip(u.tolist(), v.tolist(), ahead.tolist(), strict=True):
            if not (0 <= x < w and 0 <= y < h and z > 0):
                continue
            left, top = math.floor(x), math.floor(y)
            value = 0.0
            for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
                if column < w and row < h:
                    value += float(depth[i + 1, row, column]) * (1 - abs(x - column)) * (1 - abs(y - row))
            squares.append((value - z) ** 2)
        if squares:
            errors.append(sum(squares) / len(squares))
    return math.exp(-sum(errors) / len(errors)) if errors else 0.0
