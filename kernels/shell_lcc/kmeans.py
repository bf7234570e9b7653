"""k-means clustering with FAISS, and Lloyd's algorithm in plain torch as reference."""

from collections.abc import Callable

import torch
from torch import Tensor

# FAISS's own default sample size; more tokens take longer and do not improve the centroids.
TOKENS_PER_CENTROID = 256


def kmeans_naive(tokens: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Centroids [K, C] after Lloyd's iterations on tokens [N, C] from start [K, C]; an empty cluster keeps its centroid."""
    centroids = start.clone()
    for _ in range(iterations):
        nearest = torch.cdist(tokens, centroids).argmin(dim=1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, tokens)
        counts = torch.bincount(nearest, minlength=len(centroids)).to(tokens)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids


def kmeans(
    tokens: Tensor,
    count: int,
    iterations: int = 20,
    seed: int = 0,
    on_iteration: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Centroids [count, C] of tokens [N, C], fp32 on the CPU; deterministic given `seed`.

    Uses at most TOKENS_PER_CENTROID tokens per centroid, drawn at random with `seed`. on_iteration(done, iterations) is
    called after each iteration and may raise to interrupt.
    Raises ValueError if there are fewer tokens than centroids, ImportError if FAISS is not installed.
    """
    if tokens.shape[0] < count:
        raise ValueError(f"{count} centroids need as many tokens, found {tokens.shape[0]}: give more clips or fewer anchors")
    try:
        import faiss
    except ImportError as e:
        raise ImportError("k-means needs FAISS: pip install faiss-cpu") from e
    order = torch.randperm(tokens.shape[0], generator=torch.Generator().manual_seed(seed))
    data = tokens.detach()[order[: TOKENS_PER_CENTROID * count].to(tokens.device)].float().cpu().contiguous().numpy()
    centroids = None
    # One iteration per call, because FAISS neither reports progress nor can be interrupted.
    for done in range(1, iterations + 1):
        step = faiss.Kmeans(
            data.shape[1], count, niter=1, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(data)
        )
        step.train(data, init_centroids=centroids)
        centroids = step.centroids
        if on_iteration is not None:
            on_iteration(done, iterations)
    return torch.from_numpy(centroids.copy())
