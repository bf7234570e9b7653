"""k-means, by FAISS, and Lloyd's algorithm in plain torch as its reference."""

import torch
from torch import Tensor


def kmeans_naive(tokens: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Centroids [K, C] after Lloyd's iterations on tokens [N, C] from start [K, C]; an empty cluster keeps its place."""
    centroids = start.clone()
    for _ in range(iterations):
        nearest = torch.cdist(tokens, centroids).argmin(dim=1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, tokens)
        counts = torch.bincount(nearest, minlength=len(centroids)).to(tokens)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids


def kmeans(tokens: Tensor, count: int, iterations: int = 20, seed: int = 0) -> Tensor:
    """`count` centroids [K, C] of tokens [N, C] (fp32, on the CPU), the same from the same seed.

    Raises ValueError when there are fewer tokens than centroids, ImportError when FAISS is not installed.
    """
    if tokens.shape[0] < count:
        raise ValueError(f"{count} centroids need as many tokens, found {tokens.shape[0]}: give more clips or fewer anchors")
    try:
        import faiss
    except ImportError as e:
        raise ImportError("k-means needs FAISS: pip install faiss-cpu") from e
    # FAISS subsamples to 256 points a centroid by itself; asking for all of them costs time and gains nothing.
    search = faiss.Kmeans(tokens.shape[1], count, niter=iterations, seed=seed, min_points_per_centroid=1, verbose=False)
    search.train(tokens.detach().float().cpu().contiguous().numpy())
    return torch.from_numpy(search.centroids.copy())
