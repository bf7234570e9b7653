"""Fundamental matrices: normalised 8-point algorithm (Hartley 1997), batched RANSAC with the MSAC cost, Sampson distance.

All functions take a batch of image pairs, padded to the same number of points; `fit` takes weights, `ransac` a mask.
"""

import torch
from torch import Tensor

SAMPLES = 8


def fit(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Least-squares fundamental matrix of rank 2 with b^T F a = 0. Returns F [..., 3, 3] with Frobenius norm 1.

    a, b: [..., N, 2] pixels; weights: [..., N], 0 to exclude a point. With fewer than eight points of nonzero weight the
    result is finite but meaningless.
    """
    pa, ta = _normalise(a, weights)
    pb, tb = _normalise(b, weights)
    x, y = pa.unbind(-1)
    u, v = pb.unbind(-1)
    rows = torch.stack([u * x, u * y, u, v * x, v * y, v, x, y, torch.ones_like(x)], dim=-1) * weights[..., None]
    _, vectors = torch.linalg.eigh(rows.transpose(-1, -2) @ rows)
    F = vectors[..., 0].unflatten(-1, (3, 3))
    left, s, right = torch.linalg.svd(F)
    F = left[..., :2] @ (s[..., :2, None] * right[..., :2, :])
    F = tb.transpose(-1, -2) @ F @ ta
    return F / F.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-30)


def sampson(F: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sampson distances [..., N] in pixels: first-order distance of (a, b) to the nearest pair with b^T F a = 0.

    F: [..., 3, 3]; a, b: [..., N, 2] pixels.
    """
    ha, hb = _homogeneous(a), _homogeneous(b)
    line_b, line_a = ha @ F.transpose(-1, -2), hb @ F
    above = (hb * line_b).sum(-1)
    below = line_b[..., :2].square().sum(-1) + line_a[..., :2].square().sum(-1)
    return above.abs() / below.clamp(min=1e-30).sqrt()


def ransac(
    a: Tensor, b: Tensor, valid: Tensor, limit: float, generator: torch.Generator, tries: int = 64, rounds: int = 3
) -> tuple[Tensor, Tensor]:
    """Robust fundamental matrices F [P, 3, 3] of P image pairs, and Sampson distances [P, N], truncated at `limit`.

    a, b: [P, N, 2] pixels; valid: bool [P, N]; limit: pixels; tries: number of random 8-point hypotheses; rounds: number of
    refits. The hypothesis with the smallest sum of truncated distances (as in MSAC, Torr and Zisserman 2000) is refitted to
    the points within the limit, and a refit is kept if it lowers the sum. Distances of invalid points are 0.
    """
    pairs, n = valid.shape
    draw = torch.rand(pairs, tries, n, generator=generator, dtype=torch.float32).to(a.device)
    chosen = torch.where(valid[:, None], draw, -1.0).topk(min(SAMPLES, n), dim=-1).indices
    few_a, few_b = (_gather(p, chosen) for p in (a, b))
    F = fit(few_a, few_b, torch.ones_like(few_a[..., 0]))
    cost = _cut(sampson(F, a[:, None], b[:, None]), valid[:, None], limit)
    best = cost.sum(-1).argmin(dim=1)
    rows = torch.arange(pairs, device=a.device)
    F, cost = F[rows, best], cost[rows, best]
    for _ in range(rounds):
        weights = ((cost < limit) & valid).to(a.dtype)
        refit = fit(a, b, weights)
        refit_cost = _cut(sampson(refit, a, b), valid, limit)
        better = refit_cost.sum(-1) < cost.sum(-1)
        F = torch.where(better[:, None, None], refit, F)
        cost = torch.where(better[:, None], refit_cost, cost)
    return F, cost


def _normalise(p: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Hartley's normalisation: points with weighted mean 0 and mean distance sqrt(2), and the matrix of the transform."""
    total = weights.sum(-1, keepdim=True).clamp(min=1e-12)
    centre = (p * weights[..., None]).sum(-2) / total
    moved = p - centre[..., None, :]
    mean_distance = ((moved.square().sum(-1)).sqrt() * weights).sum(-1) / total[..., 0]
    scale = 2**0.5 / mean_distance.clamp(min=1e-9)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    t = torch.stack([scale, zero, -scale * centre[..., 0], zero, scale, -scale * centre[..., 1], zero, zero, one], dim=-1)
    return moved * scale[..., None, None], t.unflatten(-1, (3, 3))


def _homogeneous(p: Tensor) -> Tensor:
    return torch.cat([p, torch.ones_like(p[..., :1])], dim=-1)


def _gather(p: Tensor, index: Tensor) -> Tensor:
    """p: [P, N, 2], index: [P, S, 8] -> [P, S, 8, 2]."""
    flat = index.flatten(1)[..., None].expand(-1, -1, 2)
    return p.gather(1, flat).view(*index.shape, 2)


def _cut(distance: Tensor, valid: Tensor, limit: float) -> Tensor:
    return torch.where(valid, distance.clamp(max=limit), 0.0)
