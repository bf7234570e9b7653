"""Shell-LCC losses of the amortised coder (arXiv 2606.30248), LCC and shell stage, and its initialisation.

Stage 1 fits all parameters except the surface head, stage 2 only the surface head. Fitted together, the skeleton would
drift under the surface head and the distance would no longer be calibrated.
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
# Memory of one block [bases, tokens] of fp32 scores in the search for each basis' nearest token.
SEARCH_BYTES = 32 << 20


class LccLoss(NamedTuple):
    """Loss of stage 1; all scalars.

    total = reconstruction + locality_weight * locality + usage_weight * usage + basis_weight * basis
    """

    total: Tensor
    reconstruction: Tensor
    locality: Tensor
    usage: Tensor
    basis: Tensor


class ShellLoss(NamedTuple):
    """Loss of stage 2; all scalars: total = radial + weight * size. distance: mean d of the batch, detached, for logs."""

    total: Tensor
    radial: Tensor
    size: Tensor
    distance: Tensor


def locality(z: Tensor, w: Tensor, basis: Tensor) -> Tensor:
    """mean_n sum_k w_nk ||z_n - b_k||^2 for z [N, C], w [N, K] with rows that sum to one, basis [K, C].

    Expanded to mean_n ||z_n||^2 - 2 z_n . (w b)_n + w_n . ||b||^2, so that no tensor [N, K, C] is stored.
    """
    mixed = (z * (w @ basis)).sum(dim=1)
    return (z.square().sum(dim=1) - 2 * mixed + w @ basis.square().sum(dim=1)).mean()


def usage_divergence(w: Tensor) -> Tensor:
    """KL(mean usage || uniform) in nats, 0 to log K, of weights w [N, K]: large if few bases have most of the weight."""
    usage = w.mean(dim=0)
    return torch.special.xlogy(usage, usage * w.shape[1]).sum()


def basis_distance(z: Tensor, basis: Tensor) -> Tensor:
    """mean_k ||b_k - nearest token of z||^2 for z [N, C] and basis [K, C]: keeps every basis close to the data."""
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
    """Loss of stage 1 for tokens z [N, C] and their weights w = coder.weights(z) [N, K].

    mse(s, z) + locality_weight * mean_n sum_k w_nk ||z_n - b_k||^2 + usage_weight * KL(mean usage || uniform)
    + basis_weight * mean_k ||b_k - nearest token of the batch||^2. The usage and basis terms are 0,
    and not computed, if their weight is 0.
    """
    zero = z.new_zeros(())
    reconstruction = (coder.skeleton(w) - z).square().mean()
    local = locality(z, w, coder.basis)
    usage = usage_divergence(w) if usage_weight else zero
    basis = basis_distance(z, coder.basis) if basis_weight else zero
    total = reconstruction + locality_weight * local + usage_weight * usage + basis_weight * basis
    return LccLoss(total, reconstruction, local, usage, basis)


def shell_loss(z: Tensor, skeleton: Tensor, log_thickness: Tensor, weight: float = THICKNESS_WEIGHT) -> ShellLoss:
    """Loss of stage 2: mean (d - 1)^2 + weight * mean v^2 with d = ||(z - s) / (exp(v) + 1e-6)||_2.

    z, skeleton s and log_thickness v = coder.surface_head(s): [N, C]. Pass s without gradient.
    """
    d = torch.linalg.vector_norm((z - skeleton) / (log_thickness.exp() + EPSILON), dim=1)
    radial, size = (d - 1).square().mean(), log_thickness.square().mean()
    return ShellLoss(radial + weight * size, radial, size, d.detach().mean())


def prepare_lcc(coder: Predictor) -> None:
    """Prepare stage 1: gradients for all parameters except the surface head, BatchNorm on batch statistics."""
    coder.train(True).requires_grad_(True)
    coder.surface_head.requires_grad_(False)


def prepare_shell(coder: Predictor) -> None:
    """Prepare stage 2: gradients only for the surface head, BatchNorm in evaluation mode (running statistics)."""
    coder.train(False).requires_grad_(False)
    coder.surface_head.requires_grad_(True)


@torch.no_grad()
def start_by_regression(coder: Predictor, z: Tensor) -> None:
    """Initialise BatchNorm's statistics and the last layer: weights of tokens z [N, C] start near softmax(-||z - b_k||^2 / t).

    t is the mean squared distance to the nearest basis. Up to a constant per token, these logits are
    (2 z . b_k - ||b_k||^2) / t, which is linear in z, and z is approximated linearly from the random hidden features by
    ridge regression (fp64, CPU). With the usual random initialisation, most bases never get any weight. Uses the first
    32768 tokens: pass them shuffled. Modifies the coder in place and leaves it on the CPU in training mode.
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
