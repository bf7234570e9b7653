"""Pulling tokens onto the shell: what guidance does to x0 at a step, and refinement to a finished latent."""

import torch
from torch import Tensor

from . import coder as streamed
from .coder import Coder, Workspace
from .naive import limit_change

# Below this distance a token stands on the skeleton and has no direction to be pushed out in.
ON_SKELETON = 1e-6


@torch.no_grad()
def project(coder: Coder, z: Tensor, low: float, high: float, strength: float, trust: float) -> Tensor:
    """Radial pull of tokens z [N, C] (fp32) into distances [low, high], one forward pass, no gradient.

    z' = s + (z - s) (1 + strength (clamp(d) / d - 1)). low = high = r: onto the shell of radius r; low < high: into a
    band. strength: 0 none, 1 all the way; trust: largest ||z' - z|| / ||z|| of a token, > 0.
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
    """Gradient steps of tokens z [N, C] (fp32) on 0.5 (d - clamp(d, low, high))^2, inside one trust region.

    Each step is the Gauss-Newton one, error * grad d / ||grad d||^2, so that it has no learning rate and fits any
    manifold. low = high = 0 is the released objective, plain minimisation of d, which runs through the shell.
    """
    moved = z
    for _ in range(steps):
        d, gradient = streamed.distance_and_gradient(coder, moved)
        error = d - d.clamp(low, high)
        step = (strength * error / gradient.square().sum(dim=1).clamp_min(1e-12))[:, None] * gradient
        moved = limit_change(z, moved - step, trust)
    return moved
