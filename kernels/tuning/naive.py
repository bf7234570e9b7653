"""The preference loss of a pair in one piece, with both graphs alive: what the split step is held to."""

import torch
from torch import Tensor

from .preference_loss import IPO, LINEAR, SIGMOID, PreferenceLoss


def joint_loss(
    velocities: tuple[Tensor, Tensor],
    references: tuple[Tensor, Tensor],
    latents: tuple[Tensor, Tensor],
    noise: Tensor,
    sigma: Tensor,
    beta: float,
    loss: PreferenceLoss,
    first: int = 0,
) -> Tensor:
    """The loss [B], written out; differentiable in velocities.

    velocities, references, latents: (winner, loser), each [B, C, T, H, W]; noise: the same for both; sigma: [B].
    """
    s = sigma.view(-1, 1, 1, 1, 1)
    e_th, e_ref, lost, distance = [], [], [], []
    for v, r, z in zip(velocities, references, latents, strict=True):
        x = s * noise + (1 - s) * z
        e_th.append(((v - (noise - z))[:, :, first:] ** 2).mean(dim=(1, 2, 3, 4)))
        e_ref.append(((r - (noise - z))[:, :, first:] ** 2).mean(dim=(1, 2, 3, 4)))
        m_th, m_ref = (_motion(x - s * u) for u in (v, r))
        lost.append((m_ref - m_th).clamp(min=0))
        distance.append(((v - r)[:, :, first:] ** 2).mean(dim=(1, 2, 3, 4)))
    d = (e_ref[0] - e_th[0]) - (e_ref[1] - e_th[1])
    if loss.kind == SIGMOID:
        e = loss.smoothing
        base = -(1 - e) * torch.log(torch.sigmoid(beta * d)) - e * torch.log(torch.sigmoid(-beta * d))
        unit = beta / 2
    elif loss.kind == IPO:
        base, unit = (d - 1 / (2 * beta)) ** 2, 1 / beta
    elif loss.kind == LINEAR:
        base, unit = -beta * d, beta
    else:
        base, unit = 0 * d, 1.0
    further = loss.sft_weight * e_th[0] + loss.anchor * (e_th[0] - e_ref[0]).clamp(min=0)
    further = further + loss.reference * (distance[0] + distance[1]) / 2 + loss.static * (lost[0] + lost[1]) / 2
    return base + unit * further


def _motion(x0: Tensor) -> Tensor:
    mean = x0.mean(dim=2, keepdim=True)
    variance = ((x0 - mean) ** 2).mean(dim=(1, 2, 3, 4))
    return 0.7 * variance + 0.3 * ((x0[:, :, 1:] - x0[:, :, :-1]) ** 2).mean(dim=(1, 2, 3, 4))
