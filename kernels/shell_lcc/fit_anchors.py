"""Fitting the nearest-anchor coder in closed form: k-means, then sums of squared residuals per anchor region."""

from collections.abc import Callable

import torch
from torch import Tensor

from .anchors import Anchors
from .coder import chunks
from .kmeans import kmeans

# Tokens of prior evidence, at the global thickness, that a region starts with: thin regions lean on the whole.
PRIOR_TOKENS = 32.0


def fit_anchors(
    tokens: Tensor,
    count: int,
    neighbours: int = 16,
    locality: float = 0.2,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> Anchors:
    """A coder fitted on tokens [N, C] (fp32, normalised): `count` anchors, `neighbours` of them coding a token.

    on_progress(share done, 0 to 1) is called between k-means' iterations and after every chunk of the pass that
    measures thickness; it may raise to interrupt.
    Raises ValueError when there are fewer tokens than anchors or neighbours.
    """
    report = on_progress or (lambda share: None)
    centroids = kmeans(tokens, count, seed=seed, on_iteration=lambda done, of: report(0.5 * done / of))
    coder = Anchors(centroids, torch.ones(count, tokens.shape[1]), neighbours, locality)
    coder.region_thickness.copy_(region_thickness(coder, tokens, lambda share: report(0.5 + 0.5 * share)))
    return coder


def region_thickness(coder: Anchors, tokens: Tensor, on_progress: Callable[[float], None] = lambda share: None) -> Tensor:
    """Thickness [K, C] that puts the root mean square distance at 1 in every region, shrunk to the global one.

    thickness^2 = C * mean squared residual of the region's tokens, per dimension.
    """
    count, channels = coder.anchors.shape
    squares, members = torch.zeros(count, channels, device=coder.device), torch.zeros(count, 1, device=coder.device)
    for rows in chunks(coder, tokens):
        token = tokens[rows].to(coder.device)
        region = coder.nearest(token)[:, 0]
        squares.index_add_(0, region, (token - coder.code(token).skeleton).square())
        members.index_add_(0, region, torch.ones_like(token[:, :1]))
        on_progress(min(rows.stop / len(tokens), 1.0))
    overall = squares.sum(dim=0) / members.sum()
    # A dimension that every token is coded exactly in would divide by zero later.
    overall = overall.clamp_min(1e-8)
    return (channels * (squares + PRIOR_TOKENS * overall) / (members + PRIOR_TOKENS)).sqrt()
