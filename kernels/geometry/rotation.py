"""Image motion under pure camera rotation and zoom, which is independent of depth, and its robust fit (Gauss-Newton)."""

import torch
from torch import Tensor

from .bundle import rotation_of


def rotate_and_zoom(a: Tensor, omega: Tensor, zoom: Tensor, focal: Tensor) -> Tensor:
    """Positions of points after a camera rotation and zoom, [P, N, 2], pixels from the image centre.

    a: [P, N, 2] pixels from the image centre; omega: rotation vectors [P, 3], radians; zoom: [P], natural logarithm of the
    scale; focal: pixels.
    """
    ray = torch.cat([a / focal, torch.ones_like(a[..., :1])], dim=-1) @ rotation_of(omega).transpose(-1, -2)
    return focal * zoom.exp()[:, None, None] * ray[..., :2] / ray[..., 2:].clamp(min=0.05)


def fit_rotation_and_zoom(
    a: Tensor, b: Tensor, valid: Tensor, focal: Tensor, scale: float, rounds: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a rotation and zoom to P sets of correspondences by iteratively reweighted Gauss-Newton, starting from identity.

    a, b: [P, N, 2] pixels from the image centre; valid: bool [P, N]; focal: pixels; scale: pixels, scale of the Geman-McClure
    loss; rounds: number of iterations.

    Returns rotation vectors [P, 3], radians; zooms [P], logarithms, -3 to 3; residuals [P, N], pixels, 0 where invalid.
    """
    omega, zoom = a.new_zeros(len(a), 3), a.new_zeros(len(a))
    for round in range(rounds):
        at = rotate_and_zoom(a, omega, zoom, focal)
        residual = at - b
        x, y = (at / focal).unbind(-1)
        one = torch.ones_like(x)
        # d(x, y)/d(omega): the motion field of a rotation (Longuet-Higgins and Prazdny 1980).
        rows_x = torch.stack([-x * y, one + x * x, -y, x], dim=-1) * focal
        rows_y = torch.stack([-one - y * y, x * y, x, y], dim=-1) * focal
        # A wide loss in the first rounds: the rotation may have moved points by a hundred pixels.
        width = scale * max(1.0, 8.0 * 0.5**round)
        weight = torch.where(valid, (1 + residual.square().sum(-1) / width**2).reciprocal().square(), 0.0)
        J = torch.stack([rows_x, rows_y], dim=-2)
        Jw = J * weight[..., None, None]
        A = torch.einsum("pnik,pnil->pkl", Jw, J) + 1e-6 * torch.eye(4, dtype=a.dtype, device=a.device)
        g = torch.einsum("pnik,pni->pk", Jw, residual)
        step = -torch.linalg.solve(A, g)
        omega = compose(step[:, :3], omega)
        zoom = (zoom + step[:, 3]).clamp(-3, 3)
    left = (rotate_and_zoom(a, omega, zoom, focal) - b).square().sum(-1).sqrt()
    return omega, zoom, torch.where(valid, left, 0.0)


def compose(second: Tensor, first: Tensor) -> Tensor:
    """Rotation vector of `first` followed by `second`; all [..., 3] in radians. The angle must be below 180 degrees."""
    R = rotation_of(second) @ rotation_of(first)
    cosine = ((R.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1)
    angle = cosine.acos()
    axis = torch.stack([R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]], dim=-1)
    factor = torch.where(angle < 1e-4, 0.5, angle / (2 * angle.sin()).clamp(min=1e-9))
    return axis * factor[..., None]
