"""Correction of tokens with the Shell-LCC distance d (arXiv 2606.30248): radial projection and gradient steps.

Guidance applies it to x0 at a sampling step, refinement to a finished latent.
"""

import torch
from torch import Tensor

from . import coder as streamed
from .coder import Coder, Workspace
from .naive import limit_change

# Below this distance a token counts as a skeleton point: it has no radial direction and is not moved.
ON_SKELETON = 1e-6


@torch.no_grad()
def project(coder: Coder, z: Tensor, low: float, high: float, strength: float, trust: float) -> Tensor:
    """Radial projection of tokens z [N, C] (fp32) to distances in [low, high]; one forward pass, no gradient.

    z' = s + (z - s) (1 + strength (clamp(d, low, high) / d - 1)). low = high = r projects onto the shell of radius r,
    low < high into a band. strength: 0 (unchanged) to 1 (full projection); trust: largest ||z' - z|| / ||z|| of a token,
    > 0. Returns a new tensor [N, C].
    """
    moved, workspace = torch.empty_like(z, memory_format=torch.contiguous_format), Workspace()
    for rows in streamed.chunks(coder, z):
        token = z[rows]
        s, thickness, _ = coder.code(token, workspace)
        offset = token - s
        d = torch.linalg.vector_norm(offset / thickness, dim=1)
        ratio = torch.where(d > ON_SKELETON, d.clamp(low, high) / d.clamp_min(ON_SKELETON), torch.ones_like(d))
        moved[rows] = limit_change(token, token + offset * (strength * (ratio - 1))[:, None], trust)
    return moved


@torch.no_grad()
def descend(coder: Coder, z: Tensor, low: float, high: float, strength: float, trust: float, steps: int = 4) -> Tensor:
    """Gauss-Newton steps of tokens z [N, C] (fp32) on 0.5 (d - clamp(d, low, high))^2, within a trust region around z.

    Each step is -strength * error * grad d / ||grad d||^2 with error = d - clamp(d, low, high): it needs no learning rate
    for a manifold. low = high = 0 is the released objective, minimisation of d, which moves past the shell to the skeleton.
    strength, trust: as in `project`.
    """
    moved = z
    for _ in range(steps):
        d, gradient = streamed.distance_and_gradient(coder, moved)
        error = d - d.clamp(low, high)
        step = (strength * error / gradient.square().sum(dim=1).clamp_min(1e-12))[:, None] * gradient
        moved = limit_change(z, moved - step, trust)
    return moved
