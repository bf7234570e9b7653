"""Bundle adjustment of a few hundred tracks by robust Levenberg-Marquardt: cameras, points and one focal length.

A point is (a, b, w) in the reference camera: direction (a, b, 1) and inverse depth w, so points at infinity are allowed
(Civera et al. 2008) and small motions converge from w = 1 everywhere (Yu and Gallup 2014). Camera i sees it at
focal * (x / z, y / z) with (x, y, z) = R_i (a, b, 1) + w t_i. The points' 3x3 blocks are independent of one another and
are eliminated by the Schur complement.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Weak priors that pull inverse depths to 1 and the focal length to its start. They fix what the tracks do not determine
# (scale, planar scenes). NEAREST: smallest z that is divided by.
DEPTH_PRIOR = 0.02
FOCAL_PRIOR = 0.3
NEAREST = 0.05


@dataclass(frozen=True)
class Scene:
    """rotation [F, 3, 3], translation [F, 3]: from the reference camera to camera i; points [N, 3]: (a, b, w); focal: scalar
    tensor, pixels."""

    rotation: Tensor
    translation: Tensor
    points: Tensor
    focal: Tensor


def project(scene: Scene) -> Tensor:
    """Project all points into all cameras. Returns [F, N, 2], pixels from the image centre."""
    p = _in_camera(scene)
    return scene.focal * p[..., :2] / p[..., 2:].clamp(min=NEAREST)


def start(seen: Tensor, visible: Tensor, rotation: Tensor, reference: int, focal: float) -> Scene:
    """Initial scene: all points at depth 1, cameras that rotate but do not translate.

    seen: [F, N, 2] pixels from the image centre; visible: bool [F, N]; rotation: [F, 3, 3], reference to camera i; reference:
    index of the reference frame; focal: pixels.
    """
    # Each point's direction comes from its observation nearest in time to the reference frame, rotated into that frame.
    distance = (torch.arange(len(seen), device=seen.device) - reference).abs()[:, None].expand(visible.shape)
    first = torch.where(visible, distance, len(seen)).argmin(dim=0)
    at = seen[first, torch.arange(seen.shape[1], device=seen.device)] / focal
    ray = torch.einsum("nji,nj->ni", rotation[first], torch.cat([at, torch.ones_like(at[:, :1])], dim=1))
    ray = ray[:, :2] / ray[:, 2:].clamp(min=NEAREST)
    points = torch.cat([ray, torch.ones_like(ray[:, :1])], dim=1)
    return Scene(rotation, torch.zeros_like(rotation[:, 0]), points, seen.new_tensor(focal))


def refine(
    scene: Scene, seen: Tensor, visible: Tensor, reference: int, scale: float, rounds: int, tolerance: float = 1e-3
) -> tuple[Scene, float]:
    """Minimise the robust reprojection error. Returns the refined scene and its cost per observation, priors included.

    seen, visible: as in `start`; scale: pixels, scale of the Geman-McClure loss; rounds: maximum number of
    Levenberg-Marquardt iterations; tolerance: relative decrease of the cost below which they stop. The reference camera is
    held fixed.
    """
    focal_start, damping = scene.focal, 1e-3
    cost = _cost(scene, seen, visible, scale, focal_start)
    for _ in range(rounds):
        H, g, W, V, gp = _normal_equations(scene, seen, visible, scale, focal_start, reference)
        for _ in range(6):
            trial = _step(scene, H, g, W, V, gp, damping)
            lower = _cost(trial, seen, visible, scale, focal_start)
            if lower < cost:
                break
            damping *= 8
        else:
            break
        gain, scene, cost = (cost - lower) / cost, trial, lower
        damping = max(damping / 6, 1e-9)
        if gain < tolerance:
            break
    return scene, float(cost)


def triangulate(scene: Scene, seen: Tensor, visible: Tensor, reference: int, scale: float, rounds: int = 8) -> Scene:
    """Triangulate points for other tracks with the scene's cameras held fixed.

    seen: [F, N, 2]; visible: [F, N]; scale: as in `refine`; rounds: Levenberg-Marquardt iterations. Returns a scene with the
    same cameras and N new points.
    """
    middle = scene.points[:, 2].median()
    points = start(seen, visible, scene.rotation, reference, float(scene.focal)).points
    # Start at the median inverse depth of the existing points, sign included: inverse depths and translations may both be
    # negative.
    scene = replace(scene, points=torch.cat([points[:, :2], middle.expand(len(points), 1)], dim=1))
    damping = torch.full_like(scene.points[:, 0], 1e-2)
    cost = _point_costs(scene, seen, visible, scale)
    eye = torch.eye(3, dtype=seen.dtype, device=seen.device)
    for _ in range(rounds):
        residual, slope, weight = _linear(scene, seen, visible, scale)
        columns = torch.stack([scene.rotation[:, :, 0], scene.rotation[:, :, 1], scene.translation], dim=-1)
        point = (slope * weight[..., None, None]) @ columns[:, None]
        V = torch.einsum("fnij,fnik->njk", point, point)
        g = torch.einsum("fnij,fni->nj", point, residual * weight[..., None])
        V[:, 2, 2] += DEPTH_PRIOR**2
        g[:, 2] += DEPTH_PRIOR**2 * (scene.points[:, 2] - middle)
        V = V + damping[:, None, None] * torch.diag_embed(V.diagonal(dim1=1, dim2=2)) + 1e-9 * eye
        trial = replace(scene, points=scene.points - torch.linalg.solve(V, g[..., None])[..., 0])
        lower = _point_costs(trial, seen, visible, scale)
        better = lower < cost
        scene = replace(scene, points=torch.where(better[:, None], trial.points, scene.points))
        cost = torch.where(better, lower, cost)
        damping = torch.where(better, damping / 5, damping * 5).clamp(1e-9, 1e6)
    return scene


def resect(scene: Scene, seen: Tensor, visible: Tensor, scale: float, rounds: int = 6) -> Scene:
    """Fit each camera to its observations of the scene's points, which stay (Gauss-Newton with Geman-McClure weights).

    seen: [F, N, 2] pixels from the image centre; visible: bool [F, N]; scale: pixels, final scale of the loss, which starts
    four times as wide; rounds: number of iterations. A camera that sees fewer than four points stays where it is."""
    eye = 1e-6 * torch.eye(6, dtype=seen.dtype, device=seen.device)
    enough = (visible.sum(1) >= 4)[:, None]
    for round in range(rounds):
        p = _in_camera(scene)
        residual, slope, weight = _linear(scene, seen, visible, scale * max(1.0, 4.0 * 0.5**round))
        turned = p - scene.points[:, 2:] * scene.translation[:, None]
        tx, ty, tz = turned.unbind(-1)
        zero = torch.zeros_like(tx)
        cross = torch.stack([zero, tz, -ty, -tz, zero, tx, ty, -tx, zero], dim=-1).unflatten(-1, (3, 3))
        slope = slope * weight[..., None, None]
        pose = torch.cat([slope @ cross, slope * scene.points[:, 2, None, None]], dim=-1).flatten(1, 2)
        H = pose.transpose(1, 2) @ pose
        g = (pose.transpose(1, 2) @ (residual * weight[..., None]).flatten(1)[..., None])[..., 0]
        H = H + torch.diag_embed(1e-6 * H.diagonal(dim1=1, dim2=2)) + eye
        step = torch.where(enough, -torch.linalg.solve(H, g), 0.0)
        scene = replace(scene, rotation=rotation_of(step[:, :3]) @ scene.rotation, translation=scene.translation + step[:, 3:])
    return scene


def reverse_depth(scene: Scene) -> Scene:
    """The scene with near and far exchanged and all translations negated. Small motions hardly distinguish the two, so an
    optimisation that ended in the wrong one is restarted from this scene."""
    w = scene.points[:, 2:]
    low, high = w.min(), w.max()
    points = torch.cat([scene.points[:, :2], (low + high - w).clamp(min=0.05)], dim=1)
    return replace(scene, points=points, translation=-scene.translation)


def _in_camera(scene: Scene) -> Tensor:
    ray = torch.cat([scene.points[:, :2], torch.ones_like(scene.points[:, :1])], dim=1)
    return ray @ scene.rotation.transpose(1, 2) + scene.points[:, 2:] * scene.translation[:, None]


def _cost(scene: Scene, seen: Tensor, visible: Tensor, scale: float, focal_start: Tensor) -> float:
    squared = (project(scene) - seen).square().sum(-1) / (scale * scale)
    count = visible.sum()
    robust = torch.where(visible, squared / (1 + squared), 0.0).sum()
    prior = DEPTH_PRIOR**2 * (scene.points[:, 2] - 1).square().sum()
    prior = prior + ((scene.focal / focal_start).log() / FOCAL_PRIOR).square()
    return float((robust + prior) / count)


def _normal_equations(scene: Scene, seen: Tensor, visible: Tensor, scale: float, focal_start: Tensor, reference: int):
    """Blocks of the Gauss-Newton system: cameras and focal [M, M], [M]; mixed [M, 3, N]; points [N, 3, 3], [N, 3]."""
    frames, n = visible.shape
    p = _in_camera(scene)
    residual, slope, weight = _linear(scene, seen, visible, scale)
    xy = p[..., :2] / p[..., 2:].clamp(min=NEAREST)
    slope = slope * weight[..., None, None]
    residual = residual * weight[..., None]
    turned = p - scene.points[:, 2:] * scene.translation[:, None]
    # Rotations are updated on the left: d(R ray)/d(omega) = -[R ray]x.
    tx, ty, tz = turned.unbind(-1)
    zero = torch.zeros_like(tx)
    cross = torch.stack([zero, tz, -ty, -tz, zero, tx, ty, -tx, zero], dim=-1).unflatten(-1, (3, 3))
    pose = torch.cat([slope @ cross, slope * scene.points[:, 2, None, None]], dim=-1)
    columns = torch.stack([scene.rotation[:, :, 0], scene.rotation[:, :, 1], scene.translation], dim=-1)
    point = slope @ columns[:, None]
    lens = xy * (scene.focal * weight)[..., None]
    pose[reference] = 0
    m = 6 * frames + 1
    H, g = seen.new_zeros(m, m), seen.new_zeros(m)
    flat = pose.flatten(1, 2)
    blocks = flat.transpose(1, 2) @ flat
    index = torch.arange(6 * frames, device=seen.device).view(frames, 6)
    H[index[:, :, None], index[:, None, :]] = blocks
    mixed_focal = (flat.transpose(1, 2) @ lens.flatten(1)[..., None])[..., 0]
    H[-1, :-1] = H[:-1, -1] = mixed_focal.flatten()
    H[-1, -1] = lens.square().sum() + FOCAL_PRIOR**-2
    g[:-1] = (flat.transpose(1, 2) @ residual.flatten(1)[..., None])[..., 0].flatten()
    g[-1] = (lens * residual).sum() + (scene.focal / focal_start).log() * FOCAL_PRIOR**-2
    # As broadcast products over x and y: batched matrix products this small would take 5000 calls each.
    px, py = (pose[:, :, i].transpose(1, 2)[:, :, None] for i in (0, 1))
    qx, qy = (point[:, :, i].transpose(1, 2)[:, None] for i in (0, 1))
    W = seen.new_empty(m, 3, n)
    W[:-1] = torch.addcmul(px * qx, py, qy).flatten(0, 1)
    W[-1] = torch.einsum("fni,fnij->jn", lens, point)
    V = torch.einsum("fnij,fnik->njk", point, point)
    gp = torch.einsum("fnij,fni->nj", point, residual)
    V[:, 2, 2] += DEPTH_PRIOR**2
    gp[:, 2] += DEPTH_PRIOR**2 * (scene.points[:, 2] - 1)
    return H, g, W, V, gp


def _linear(scene: Scene, seen: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals [F, N, 2], Jacobians with respect to the point in camera i [F, N, 2, 3], square roots of weights [F, N]."""
    p = _in_camera(scene)
    # At z <= NEAREST the projection has no useful gradient, so the observation gets weight 0 in this iteration.
    ahead = p[..., 2] > NEAREST
    z = p[..., 2].clamp(min=NEAREST)
    x, y = p[..., 0] / z, p[..., 1] / z
    residual = scene.focal * torch.stack([x, y], dim=-1) - seen
    squared = residual.square().sum(-1) / (scale * scale)
    weight = torch.where(visible & ahead, (1 + squared).reciprocal(), 0.0) / scale
    f_z, zero = scene.focal / z, torch.zeros_like(x)
    slope = torch.stack([torch.stack([f_z, zero, -f_z * x], -1), torch.stack([zero, f_z, -f_z * y], -1)], dim=-2)
    return residual, slope, weight


def _point_costs(scene: Scene, seen: Tensor, visible: Tensor, scale: float) -> Tensor:
    squared = (project(scene) - seen).square().sum(-1) / (scale * scale)
    return torch.where(visible, squared / (1 + squared), 0.0).sum(0)


def _step(scene: Scene, H: Tensor, g: Tensor, W: Tensor, V: Tensor, gp: Tensor, damping: float) -> Scene:
    eye = torch.eye(3, dtype=V.dtype, device=V.device)
    inverse = torch.linalg.inv(V + damping * torch.diag_embed(V.diagonal(dim1=1, dim2=2)) + 1e-9 * eye)
    m = len(g)
    rows = inverse.permute(1, 2, 0).contiguous()
    WV = (W[:, :1] * rows[0]).addcmul_(W[:, 1:2], rows[1]).addcmul_(W[:, 2:], rows[2]).reshape(m, -1)
    W = W.view(m, -1)
    A = H + torch.diag(damping * H.diagonal() + 1e-9) - WV @ W.T
    right = g - WV @ gp.T.flatten()
    solved, bad = torch.linalg.solve_ex(A, -right)
    if int(bad):
        return scene
    change = -torch.einsum("njk,nk->nj", inverse, gp + (solved @ W).view(3, -1).T)
    pose = solved[:-1].view(-1, 6)
    points = scene.points + change
    return Scene(
        rotation_of(pose[:, :3]) @ scene.rotation,
        scene.translation + pose[:, 3:],
        points,
        scene.focal * solved[-1].clamp(-0.3, 0.3).exp(),
    )


def rotation_of(omega: Tensor) -> Tensor:
    """Rodrigues' formula: rotation vectors [..., 3] in radians to rotation matrices [..., 3, 3]."""
    squared = omega.square().sum(-1)[..., None, None]
    angle = squared.clamp(min=1e-12).sqrt()
    small = squared < 1e-8
    first = torch.where(small, 1 - squared / 6, angle.sin() / angle)
    second = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / squared.clamp(min=1e-12))
    x, y, z = omega.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    return torch.eye(3, dtype=omega.dtype, device=omega.device) + first * cross + second * (cross @ cross)
