"""The two losses of the amortised coder (arXiv 2606.30248, sections on LCC and on the shell), as pure functions.

They are minimised one after the other: fitted together, the skeleton drifts under the shell head and the distance is
no longer calibrated. Stage 1 fits everything but the surface head, stage 2 the surface head alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .naive import EPSILON
from .predictor import Predictor

USAGE_WEIGHT = 0.1
BASIS_WEIGHT = 0.1
THICKNESS_WEIGHT = 0.01
# Bases x tokens of one piece of the search for each basis' nearest token.
SEARCH_BYTES = 32 << 20


class LccLoss(NamedTuple):
    """total = reconstruction + locality + usage_weight * usage + basis_weight * basis; all scalars."""

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
    coder: Predictor, z: Tensor, w: Tensor, usage_weight: float = USAGE_WEIGHT, basis_weight: float = BASIS_WEIGHT
) -> LccLoss:
    """Stage 1 on tokens z [N, C] with their weights w = coder.weights(z) [N, K].

    mse(s, z) + mean_n sum_k w_nk ||z_n - b_k||^2 + usage_weight * KL(mean usage || uniform)
    + basis_weight * mean_k ||b_k - nearest token of the batch||^2. A weight of 0 leaves its term out.
    """
    zero = z.new_zeros(())
    reconstruction = (coder.skeleton(w) - z).square().mean()
    local = locality(z, w, coder.basis)
    usage = usage_divergence(w) if usage_weight else zero
    basis = basis_distance(z, coder.basis) if basis_weight else zero
    return LccLoss(reconstruction + local + usage_weight * usage + basis_weight * basis, reconstruction, local, usage, basis)


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
