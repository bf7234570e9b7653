"""Shell-LCC (arXiv 2606.30248), reference implementation by the plain formulas; the fast code is tested against it.

Tokens are z [N, C] in the normalised latent space. A coder gives each token a point s [N, C] on the skeleton and a
per-dimension thickness [N, C] of the shell there; the distance is d = || (z - s) / thickness ||_2. The coders are
differentiable by autograd and store [N, K] tensors (tokens x bases): they serve only tests and benchmarks.
"""

import torch
from torch import Tensor

from .knn import knn_naive

EPSILON = 1e-6


def predictor_code(z: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Skeleton points and shell thickness [N, C] of the amortised coder, from a state dict with the released code's keys.

    w = softmax(predictor(z)), s = (w @ basis) * global_scale + global_bias, thickness = exp(surface_head(s)) + 1e-6;
    BatchNorm uses its running statistics.
    """
    h = z @ state["predictor.0.weight"].t() + state["predictor.0.bias"]
    h = (h - state["predictor.1.running_mean"]) / torch.sqrt(state["predictor.1.running_var"] + 1e-5)
    h = torch.relu(h * state["predictor.1.weight"] + state["predictor.1.bias"])
    h = torch.relu(h @ state["predictor.3.weight"].t() + state["predictor.3.bias"])
    w = torch.softmax(h @ state["predictor.5.weight"].t() + state["predictor.5.bias"], dim=1)
    s = (w @ state["basis"]) * state["global_scale"] + state["global_bias"]
    h = torch.relu(s @ state["surface_head.0.weight"].t() + state["surface_head.0.bias"])
    log_thickness = h @ state["surface_head.2.weight"].t() + state["surface_head.2.bias"]
    return s, log_thickness.exp() + EPSILON


def local_coordinates(z: Tensor, neighbours: Tensor, locality: float, floor: float) -> Tensor:
    """Local coordinates w [N, k] of z [N, C] with respect to neighbours [N, k, C]; each row sums to one.

    argmin_w ||z - sum_j w_j b_j||^2 + locality * sum_j w_j^2 ||z - b_j||^2  subject to  sum_j w_j = 1: local
    coordinate coding (Yu, Zhang and Gong 2009) with a squared locality term, which has a closed-form solution (Wang et
    al. 2010): w proportional to (G + locality * diag(G) + floor * I)^-1 1, with G the Gram matrix of b_j - z.
    """
    offsets = neighbours - z[:, None]
    gram = offsets @ offsets.transpose(1, 2)
    ridge = locality * torch.diag_embed(gram.diagonal(dim1=1, dim2=2)) + floor * torch.eye(gram.shape[1]).to(gram)
    w = torch.linalg.solve(gram + ridge, torch.ones_like(gram[:, :, 0]))
    return w / w.sum(dim=1, keepdim=True)


def anchors_code(
    z: Tensor, anchors: Tensor, region_thickness: Tensor, k: int, locality: float, floor: float
) -> tuple[Tensor, Tensor]:
    """Skeleton points and shell thickness [N, C] of the nearest-anchor coder.

    anchors, region_thickness: [K, C]; a token gets the thickness of its nearest anchor's region.
    """
    nearest = knn_naive(z, anchors, k)
    neighbours = anchors[nearest]
    w = local_coordinates(z, neighbours, locality, floor)
    return (w[:, :, None] * neighbours).sum(dim=1), region_thickness[nearest[:, 0]]


def distance(z: Tensor, skeleton: Tensor, thickness: Tensor) -> Tensor:
    """Normalised distance to the manifold, d [N] = || (z - s) / thickness ||_2 (unitless)."""
    return ((z - skeleton) / thickness).norm(dim=1)


def distance_and_gradient(z: Tensor, code) -> tuple[Tensor, Tensor]:
    """d [N] and its gradient [N, C] by autograd; code: z -> (skeleton, thickness)."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = z.detach().clone().requires_grad_(True)
        d = distance(leaf, *code(leaf))
        (gradient,) = torch.autograd.grad(d.sum(), leaf)
    return d.detach(), gradient


def limit_change(z: Tensor, moved: Tensor, trust: float) -> Tensor:
    """Trust region: moved [N, C] with each token's change scaled down so that ||moved - z|| <= trust * ||z||."""
    change = moved - z
    limit = trust * z.norm(dim=1, keepdim=True)
    length = change.norm(dim=1, keepdim=True)
    return z + change * torch.where(length > limit, limit / length.clamp_min(1e-12), torch.ones_like(length))


def project(z: Tensor, code, low: float, high: float, strength: float, trust: float) -> Tensor:
    """Radial projection z' = s + (z - s) (1 + strength (target / d - 1)) with target = d clamped to [low, high].

    low = high = r is the projection onto the shell of radius r; low < high is the projection into a band.
    """
    s, thickness = code(z)
    d = distance(z, s, thickness)
    ratio = torch.where(d > 1e-6, d.clamp(low, high) / d.clamp_min(1e-6), torch.ones_like(d))
    return limit_change(z, s + (z - s) * (1 + strength * (ratio - 1))[:, None], trust)


def descend(z: Tensor, code, low: float, high: float, strength: float, trust: float, steps: int) -> Tensor:
    """Gauss-Newton steps on 0.5 (d - clamp(d, low, high))^2 by autograd, inside one trust region around the start."""
    moved = z
    for _ in range(steps):
        d, g = distance_and_gradient(moved, code)
        error = d - d.clamp(low, high)
        step = (strength * error / g.square().sum(dim=1).clamp_min(1e-12))[:, None] * g
        moved = limit_change(z, moved - step, trust)
    return moved
