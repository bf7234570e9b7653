"""Exact k-nearest-neighbour search of tokens among anchors (L2 distance)."""

import torch
from torch import Tensor

GROUP = 16


def knn_naive(z: Tensor, anchors: Tensor, k: int) -> Tensor:
    """Reference: indices [N, k] of the k nearest anchors [K, C] of z [N, C], nearest first; stores distances [N, K]."""
    return torch.cdist(z, anchors).topk(k, dim=1, largest=False).indices


def knn(z: Tensor, anchors: Tensor, half_norms: Tensor, k: int) -> Tensor:
    """Same as `knn_naive` for one chunk of tokens, with precomputed half_norms [K] = 0.5 * ||anchor||^2.

    A token's k nearest anchors lie in the k groups of anchors with the smallest minima. So topk over K anchors is replaced
    by one vectorised minimum and two topk over K / GROUP and k * GROUP values: exact, and several times faster on a CPU.
    Uses topk over K directly if K is not a multiple of GROUP or there are at most k groups.
    """
    n, count = z.shape[0], anchors.shape[0]
    # Half the squared distance minus 0.5 * ||z||^2: that term is the same for all anchors, so the order is the same.
    score = torch.addmm(half_norms, z, anchors.t(), alpha=-1.0)
    if count % GROUP or count // GROUP <= k:
        return score.topk(k, dim=1, largest=False).indices
    grouped = score.view(n, count // GROUP, GROUP)
    groups = grouped.amin(dim=2).topk(k, dim=1, largest=False, sorted=False).indices
    members = grouped.gather(1, groups[:, :, None].expand(n, k, GROUP)).view(n, k * GROUP)
    inside = members.topk(k, dim=1, largest=False).indices
    return groups.gather(1, inside // GROUP) * GROUP + inside % GROUP
