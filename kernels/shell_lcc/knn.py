"""Exact k nearest anchors of every token, in L2."""

import torch
from torch import Tensor

GROUP = 16


def knn_naive(z: Tensor, anchors: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k nearest of anchors [K, C] to z [N, C], nearest first: a full sort of [N, K]."""
    return torch.cdist(z, anchors).topk(k, dim=1, largest=False).indices


def knn(z: Tensor, anchors: Tensor, half_norms: Tensor, k: int) -> Tensor:
    """As knn_naive, with half_norms [K] = 0.5 * ||anchor||^2 given, for one chunk of tokens.

    A token's k nearest anchors lie in the k groups of anchors with the smallest minima, so a selection over K anchors
    becomes one vectorised minimum and two selections over K / GROUP and k * GROUP: exact, and several times faster than
    selecting from K on a CPU.
    """
    n, count = z.shape[0], anchors.shape[0]
    # Half the squared distance less the token's own half norm: the order is the same and the token's norm is not needed.
    score = torch.addmm(half_norms, z, anchors.t(), alpha=-1.0)
    if count % GROUP or count // GROUP <= k:
        return score.topk(k, dim=1, largest=False).indices
    grouped = score.view(n, count // GROUP, GROUP)
    groups = grouped.amin(dim=2).topk(k, dim=1, largest=False, sorted=False).indices
    members = grouped.gather(1, groups[:, :, None].expand(n, k, GROUP)).view(n, k * GROUP)
    inside = members.topk(k, dim=1, largest=False).indices
    return groups.gather(1, inside // GROUP) * GROUP + inside % GROUP
