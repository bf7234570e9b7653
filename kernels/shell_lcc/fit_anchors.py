"""Fit of the nearest-anchor coder (LCC of Yu, Zhang and Gong 2009): k-means anchors, then thickness in closed form."""

from collections.abc import Callable

import torch
from torch import Tensor

from .anchors import Anchors
from .coder import chunks
from .kmeans import kmeans

# Pseudo-tokens with the global thickness added to each region: shrinks regions with few tokens to the global thickness.
PRIOR_TOKENS = 32.0


def fit_anchors(
    tokens: Tensor,
    count: int,
    neighbours: int = 16,
    locality: float = 0.2,
    seed: int = 0,
    on_progress: Callable[[float], None] | None = None,
) -> Anchors:
    """Fit an Anchors coder on tokens [N, C] (fp32, normalised latent space).

    count: number of anchors K; neighbours: k, anchors that code a token, 1 to K; locality: weight of the distance
    penalty; seed: of k-means. on_progress(share), with the share done from 0 to 1, is called after each k-means iteration
    and after each chunk of the thickness pass; it may raise to interrupt.
    Raises ValueError if there are fewer tokens than anchors or `neighbours` is out of range, ImportError without FAISS.
    """
    report = on_progress or (lambda share: None)
    centroids = kmeans(tokens, count, seed=seed, on_iteration=lambda done, of: report(0.5 * done / of))
    coder = Anchors(centroids, torch.ones(count, tokens.shape[1]), neighbours, locality)
    coder.region_thickness.copy_(region_thickness(coder, tokens, lambda share: report(0.5 + 0.5 * share)))
    return coder


def region_thickness(coder: Anchors, tokens: Tensor, on_progress: Callable[[float], None] = lambda share: None) -> Tensor:
    """Thickness [K, C] with which the RMS distance of tokens [N, C] is 1 in every region, shrunk to the global thickness.

    thickness^2 = C * mean squared residual of the region's tokens, per dimension. on_progress: as in `fit_anchors`.
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
    # Avoids division by zero in a dimension that is reconstructed exactly for all tokens.
    overall = overall.clamp_min(1e-8)
    return (channels * (squares + PRIOR_TOKENS * overall) / (members + PRIOR_TOKENS)).sqrt()
