"""The two losses of the amortised coder (arXiv 2606.30248, sections on LCC and on the shell), and a start for it.

The losses are minimised one after the other: fitted together, the skeleton drifts under the shell head and the distance
is no longer calibrated. Stage 1 fits everything but the surface head, stage 2 the surface head alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .naive import EPSILON
from .predictor import Predictor

LOCALITY_WEIGHT = 1.0
USAGE_WEIGHT = 0.1
BASIS_WEIGHT = 0.1
THICKNESS_WEIGHT = 0.01
START_TOKENS = 1 << 15
RIDGE = 1e-4
# Bases x tokens of one piece of the search for each basis' nearest token.
SEARCH_BYTES = 32 << 20


class LccLoss(NamedTuple):
    """total = reconstruction + locality_weight * locality + usage_weight * usage + basis_weight * basis; all scalars."""

    total: Tensor
    reconstruction: Tensor
    locality: Tensor
    usage: Tensor
    basis: Tensor


class ShellLoss(NamedTuple):
    """total = radial + 0.01 * size; all scalars. distance: the batch's mean d, for the eye."""

    total: Tensor
    radial: Tensor
    size: Tensor
    distance: Tensor


def locality(z: Tensor, w: Tensor, basis: Tensor) -> Tensor:
    """mean_n sum_k w_nk ||z_n - b_k||^2 for z [N, C], w [N, K] with rows that sum to one, basis [K, C].

    Expanded to mean_n ||z_n||^2 - 2 z_n . (w b)_n + w_n . ||b||^2, so that nothing of size [N, K, C] is made.
    """
    mixed = (z * (w @ basis)).sum(dim=1)
    return (z.square().sum(dim=1) - 2 * mixed + w @ basis.square().sum(dim=1)).mean()


def usage_divergence(w: Tensor) -> Tensor:
    """KL(mean usage || uniform) in nats, 0 to log K, of weights w [N, K]: large when few bases carry the batch."""
    usage = w.mean(dim=0)
    return torch.special.xlogy(usage, usage * w.shape[1]).sum()


def basis_distance(z: Tensor, basis: Tensor) -> Tensor:
    """mean_k ||b_k - nearest of z||^2 for z [N, C] and basis [K, C]: keeps every basis among the data."""
    rows = max(1, SEARCH_BYTES // (4 * len(z)))
    with torch.no_grad():
        half_norms = 0.5 * z.square().sum(dim=1)
        nearest = torch.cat([torch.addmm(half_norms, b, z.t(), alpha=-1.0).argmin(dim=1) for b in basis.split(rows)])
    return (basis - z[nearest]).square().sum(dim=1).mean()


def lcc_loss(
    coder: Predictor,
    z: Tensor,
    w: Tensor,
    locality_weight: float = LOCALITY_WEIGHT,
    usage_weight: float = USAGE_WEIGHT,
    basis_weight: float = BASIS_WEIGHT,
) -> LccLoss:
    """Stage 1 on tokens z [N, C] with their weights w = coder.weights(z) [N, K].

    mse(s, z) + locality_weight * mean_n sum_k w_nk ||z_n - b_k||^2 + usage_weight * KL(mean usage || uniform)
    + basis_weight * mean_k ||b_k - nearest token of the batch||^2. A weight of 0 leaves usage or basis out.
    """
    zero = z.new_zeros(())
    reconstruction = (coder.skeleton(w) - z).square().mean()
    local = locality(z, w, coder.basis)
    usage = usage_divergence(w) if usage_weight else zero
    basis = basis_distance(z, coder.basis) if basis_weight else zero
    total = reconstruction + locality_weight * local + usage_weight * usage + basis_weight * basis
    return LccLoss(total, reconstruction, local, usage, basis)


def shell_loss(z: Tensor, skeleton: Tensor, log_thickness: Tensor, weight: float = THICKNESS_WEIGHT) -> ShellLoss:
    """Stage 2: mean (d - 1)^2 + weight * mean v^2 with d = ||(z - s) / (exp(v) + 1e-6)||.

    z, skeleton s and log_thickness v = coder.surface_head(s): [N, C]; s without gradient.
    """
    d = torch.linalg.vector_norm((z - skeleton) / (log_thickness.exp() + EPSILON), dim=1)
    radial, size = (d - 1).square().mean(), log_thickness.square().mean()
    return ShellLoss(radial + weight * size, radial, size, d.detach().mean())


def prepare_lcc(coder: Predictor) -> None:
    """Stage 1's state: gradients for all but the surface head, BatchNorm on batch statistics."""
    coder.train(True).requires_grad_(True)
    coder.surface_head.requires_grad_(False)


def prepare_shell(coder: Predictor) -> None:
    """Stage 2's state: gradients for the surface head alone, BatchNorm on its running statistics."""
    coder.train(False).requires_grad_(False)
    coder.surface_head.requires_grad_(True)


@torch.no_grad()
def start_by_regression(coder: Predictor, z: Tensor) -> None:
    """Sets BatchNorm's statistics and the last layer so that tokens z [N, C] begin near softmax(-||z - b_k||^2 / t).

    t is the mean squared distance to the nearest basis. The logits wanted, (2 z . b_k - ||b_k||^2) / t up to a constant
    per token, are linear in z, and z is linear in the random hidden features up to a small rest, found by ridge
    regression in fp64 on the CPU. From the usual random start most bases never get any weight. Uses at most 32768 tokens
    (the first: pass them shuffled); leaves the coder on the CPU, in training mode.
    """
    z = z[:START_TOKENS].float().cpu()
    coder.to("cpu").train(False)
    first, norm, last = coder.predictor[0], coder.predictor[1], coder.predictor[5]
    variance, mean = torch.var_mean(first(z), dim=0, correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    features = coder.predictor[:5](z).double()
    features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    gram = features.t() @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    to_token = torch.linalg.solve(gram, features.t() @ z.double())
    basis = coder.basis.double()
    nearest = torch.cat([torch.cdist(rows, coder.basis).amin(dim=1) for rows in z.split(1024)])
    temperature = nearest.double().square().mean().clamp_min(1e-6)
    last.weight.copy_(2 / temperature * (basis @ to_token[:-1].t()))
    last.bias.copy_((2 * basis @ to_token[-1] - basis.square().sum(dim=1)) / temperature)
    coder.train(True)
