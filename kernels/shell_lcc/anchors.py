"""Local coordinate coding on k nearest anchors (Yu, Zhang and Gong 2009), in closed form: Shell-LCC without a network.

A token is coded by its k nearest anchors with coordinates that sum to one. The shell's thickness is constant in each
anchor's region. No gradient training: k-means gives the anchors, mean squared residuals give the thickness.
"""

import torch
from torch import Tensor

from .coder import Code, Workspace, tokens_in_budget
from .knn import GROUP, knn

# Upper limits: larger chunks do not make the batched k x k solves faster.
CPU_CHUNK_TOKENS = 1024
CUDA_CHUNK_TOKENS = 16384
# Added to the Gram matrix's diagonal: keeps it invertible where a token coincides with an anchor. Far below any squared
# distance between latent tokens.
FLOOR = 1e-5
# Beyond it the penalty leaves nothing of the rest.
MOST_LOCALITY = 1e6


class Anchors(torch.nn.Module):
    """Nearest-anchor coder; a Coder without trainable parameters.

    anchors, region_thickness: [K, C], stored as fp32 buffers; neighbours: k, 1 to K; locality: weight of the distance
    penalty (unitless). Raises ValueError if k is out of range or the two shapes differ.
    """

    kind = "anchors"

    def __init__(self, anchors: Tensor, region_thickness: Tensor, neighbours: int = 16, locality: float = 0.2):
        super().__init__()
        if not 1 <= neighbours <= anchors.shape[0]:
            raise ValueError(f"neighbours must be between 1 and the {anchors.shape[0]} anchors, got {neighbours}")
        if anchors.shape != region_thickness.shape:
            raise ValueError(
                "anchors and region_thickness must have the same shape, "
                f"got {list(anchors.shape)} and {list(region_thickness.shape)}"
            )
        self.neighbours, self.locality = neighbours, locality
        self.register_buffer("anchors", anchors.detach().clone().float())
        self.register_buffer("region_thickness", region_thickness.detach().clone().float())
        self.register_buffer("half_norms", 0.5 * self.anchors.square().sum(dim=1), persistent=False)

    @classmethod
    def from_state(cls, state: dict[str, Tensor], config: dict) -> "Anchors":
        """Build a coder from its state dict and `config`. Raises KeyError if a tensor or config entry is missing, ValueError
        if one cannot be used."""
        anchors, thickness = state["anchors"], state["region_thickness"]
        neighbours, locality = config["neighbours"], config["locality"]
        if type(neighbours) is not int or type(locality) not in (int, float) or not 0 <= locality <= MOST_LOCALITY:
            raise ValueError(
                f"neighbours {neighbours!r} and locality {locality!r}, expected a whole number and a number of 0 to "
                f"{MOST_LOCALITY:g}"
            )
        if anchors.ndim != 2 or not bool((thickness.float() > 0).all()):
            raise ValueError(f"anchors of shape {list(anchors.shape)}, expected [K, C] and every region_thickness above 0")
        return cls(anchors, thickness, neighbours, locality)

    def config(self) -> dict:
        """Coder name, sizes and settings, as stored in a manifold file's header."""
        bases, dim = self.anchors.shape
        return {
            "coder": self.kind,
            "embedding_dim": dim,
            "num_bases": bases,
            "neighbours": self.neighbours,
            "locality": self.locality,
        }

    @property
    def device(self) -> torch.device:
        return self.anchors.device

    def chunk_tokens(self, device: torch.device) -> int:
        """Tokens per chunk: search scores take K values per token, the k x k systems k rows per token."""
        bases, dim = self.anchors.shape
        values = max(bases, self.neighbours * (2 * dim + 2 * self.neighbours + GROUP))
        return min(CPU_CHUNK_TOKENS if device.type == "cpu" else CUDA_CHUNK_TOKENS, tokens_in_budget(values, device))

    def nearest(self, z: Tensor) -> Tensor:
        """Indices [n, k] of the k nearest anchors of fp32 tokens z [n, C] (one chunk), nearest first."""
        return knn(z, self.anchors, self.half_norms, self.neighbours)

    @torch.no_grad()
    def code(self, z: Tensor, workspace: Workspace | None = None) -> Code:
        """Skeleton and thickness of fp32 tokens z [n, C] (one chunk), and their pullback. `workspace` is not used.

        With M = G + locality diag(G) + floor I, x = M^-1 1, w = x / sum(x) and p = M^-1 times the gradient to x,
        the gradient to z is sum(x) sum_i p_i D_i + sum(p) sum_j x_j D_j + 2 locality sum_i p_i x_i D_i, D_i = b_i - z:
        one more Cholesky solve than the forward pass. Neighbours and region are constant almost everywhere, so they
        add no gradient.
        """
        nearest = self.nearest(z)
        neighbours = self.anchors[nearest]
        offsets = neighbours - z[:, None]
        gram = torch.bmm(offsets, offsets.transpose(1, 2))
        gram.diagonal(dim1=1, dim2=2).mul_(1 + self.locality).add_(FLOOR)
        factor, _ = torch.linalg.cholesky_ex(gram)
        x = torch.cholesky_solve(torch.ones_like(offsets[:, :, :1]), factor)
        total = x.sum(dim=1, keepdim=True)
        w = x / total
        s = torch.bmm(w.transpose(1, 2), neighbours)[:, 0]

        def pullback(grad_skeleton: Tensor, grad_thickness: Tensor) -> Tensor:
            dw = torch.bmm(neighbours, grad_skeleton[:, :, None])
            p = torch.cholesky_solve((dw - (dw * w).sum(dim=1, keepdim=True)) / total, factor)
            mixed = total * p + p.sum(dim=1, keepdim=True) * x + 2 * self.locality * p * x
            return torch.bmm(mixed.transpose(1, 2), offsets)[:, 0]

        return Code(s, self.region_thickness[nearest[:, 0]], pullback)
