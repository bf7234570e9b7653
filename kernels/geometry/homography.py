"""Robust homographies between sets of points, and what they leave over: the parallax that no flat scene and no turn explains.

A homography takes in every motion of a camera that only turns or zooms, with any focal length, and every motion before a
plane. Two of them take in two flat layers. Iteratively reweighted linear least squares (normalised DLT, Hartley and Zisserman
2003, section 4.4), batched over pairs of pictures."""

import torch
from torch import Tensor

# Scales of the weights, from wide to narrow, pixels: a narrow start would keep whatever the first fit happened to pass
# through.
WIDTHS = (16.0, 8.0, 4.0, 2.0, 1.0, 1.0)
# Local samples: how many, of how many points, within how many times the spread of all points; and the distance, pixels, up to
# which a point follows a homography.
TRIES, SAMPLE, NEAR, LIMIT = 24, 8, 0.3, 2.0
# Indices of the products of (x, y, 1) with themselves among the monomials x^2, xy, y^2, x, y, 1.
_OUTER = [[0, 1, 3], [1, 2, 4], [3, 4, 5]]


def fit(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Least-squares homographies H [P, 3, 3] with b ~ H a.

    a, b: [P, N, 2] pixels from the picture's centre; weights: [P, N], 0 to exclude a point. With fewer than four points of
    nonzero weight the result is finite but meaningless.
    """
    scale = _spread(a, weights)
    x, y = (a / scale).unbind(-1)
    u, v = (b / scale).unbind(-1)
    # The rows (x, y, 1, 0, 0, 0, -u x, -u y) and (0, 0, 0, x, y, 1, -v x, -v y) of a point repeat few products: their normal
    # equations are sums of the monomials of (x, y) times 1, u, v and u^2 + v^2.
    one = torch.ones_like(x)
    monomials = torch.stack([x * x, x * y, y * y, x, y, one], dim=1)
    factors = torch.stack([one, u, v, u * u + v * v], dim=-1) * weights[..., None]
    sums = monomials @ factors
    outer = sums[:, _OUTER]
    A = a.new_zeros(len(a), 8, 8)
    A[:, :3, :3] = A[:, 3:6, 3:6] = outer[..., 0]
    A[:, :3, 6:] = -outer[..., :2, 1]
    A[:, 3:6, 6:] = -outer[..., :2, 2]
    A[:, 6:, :6] = A[:, :6, 6:].transpose(1, 2)
    A[:, 6:, 6:] = outer[:, :2, :2, 3]
    right = torch.cat([sums[:, 3:, 1], sums[:, 3:, 2], -sums[:, 3:5, 3]], dim=1)
    A = A + 1e-9 * (1 + A.diagonal(dim1=1, dim2=2).sum(-1))[:, None, None] * torch.eye(8, dtype=a.dtype, device=a.device)
    h = torch.linalg.solve(A, right)
    H = torch.cat([h, torch.ones_like(h[:, :1])], dim=1).view(-1, 3, 3)
    T = torch.diag_embed(torch.cat([(1 / scale[:, 0]).expand(-1, 2), torch.ones_like(scale[:, 0])], dim=1))
    return torch.linalg.inv(T) @ H @ T


def apply(H: Tensor, a: Tensor) -> Tensor:
    """Points [P, N, 2] moved by homographies H [P, 3, 3]."""
    moved = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1) @ H.transpose(-1, -2)
    below = moved[..., 2:]
    return moved[..., :2] / torch.where(below.abs() < 1e-6, 1e-6, below)


def robust(a: Tensor, b: Tensor, valid: Tensor, scale: float = 1.0) -> Tensor:
    """Distances [P, N] of b from the homographies that most of the points follow, pixels; 0 where invalid.

    a, b: [P, N, 2] pixels from the picture's centre; valid: bool [P, N]; scale: factor on WIDTHS. Of the fit from all points
    and the fits from the best local samples, the one with the smaller distances, truncated at LIMIT, is taken: where two
    layers have about as many points, the fit from all of them follows neither."""
    everywhere = _reweighted(a, b, valid, valid.to(a.dtype), scale, WIDTHS)
    locally = _reweighted(a, b, valid, _best_sample(a, b, valid, scale), scale, WIDTHS[-3:])
    costs = [left.clamp(max=LIMIT * scale).sum(1, keepdim=True) for left in (everywhere, locally)]
    return torch.where(costs[0] <= costs[1], everywhere, locally)


def parallax(a: Tensor, b: Tensor, valid: Tensor, most: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean distances that one homography and that two leave over, truncated at `most`, pixels; two tensors [P].

    The second homography is fitted to the points that the first leaves over by more than `scale` pixels, and every point
    counts with the nearer of the two. Arguments as in `robust`.
    """
    one = robust(a, b, valid, scale)
    rest = valid & (one > scale)
    two = torch.where(rest, torch.minimum(one, robust(a, b, rest, scale)), one)
    count = valid.sum(1).clamp(min=1)
    return one.clamp(max=most).sum(1) / count, two.clamp(max=most).sum(1) / count


def _reweighted(a: Tensor, b: Tensor, valid: Tensor, weights: Tensor, scale: float, widths: tuple[float, ...]) -> Tensor:
    """Distances [P, N] after one refit with Geman-McClure weights for each width, starting from `weights`."""
    for width in widths:
        left = (apply(fit(a, b, weights), a) - b).norm(dim=-1)
        weights = torch.where(valid, (1 + (left / (width * scale)).square()).reciprocal().square(), 0.0)
    left = (apply(fit(a, b, weights), a) - b).norm(dim=-1)
    return torch.where(valid, left, 0.0)


def _best_sample(a: Tensor, b: Tensor, valid: Tensor, scale: float) -> Tensor:
    """Weights [P, N], 1 for the points within LIMIT of the best homography of TRIES local samples of SAMPLE points."""
    pairs, count = valid.shape
    size = min(SAMPLE, count)
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(pairs, TRIES, count, generator=generator, dtype=torch.float64).to(a)
    first = torch.rand(pairs, count, generator=generator, dtype=torch.float64).to(a)
    seeds = torch.where(valid, first, -1.0).topk(min(TRIES, count), dim=1).indices
    draw = draw[:, : seeds.shape[1]]
    at = a.gather(1, seeds[..., None].expand(-1, -1, 2))
    near = torch.cdist(at, a) / (NEAR * _spread(a, valid.to(a.dtype)))
    chosen = torch.where(valid[:, None], near + draw, torch.inf).topk(size, dim=-1, largest=False).indices
    flat = chosen.flatten(1)[..., None].expand(-1, -1, 2)
    few_a, few_b = (p.gather(1, flat).view(-1, size, 2) for p in (a, b))
    H = fit(few_a, few_b, torch.ones_like(few_a[..., 0])).view(pairs, -1, 3, 3)
    left = (apply(H, a[:, None]) - b[:, None]).norm(dim=-1)
    cost = torch.where(valid[:, None], left.clamp(max=LIMIT * scale), 0.0).sum(-1)
    best = left[torch.arange(pairs, device=a.device), cost.argmin(dim=1)]
    return (valid & (best < LIMIT * scale)).to(a.dtype)


def _spread(a: Tensor, weights: Tensor) -> Tensor:
    """Weighted root mean square distance from the centre, [P, 1, 1]."""
    total = weights.sum(1).clamp(min=1e-12)
    return ((a.square().sum(-1) * weights).sum(1) / total).sqrt().clamp(min=1e-6)[:, None, None]
