"""Rao-Kupper loss (1967): Bradley-Terry preferences with ties (arXiv 2606.20310, section 3, whose win term is misprinted)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ETA = 5.0
WIN, TIE, LOSS = 1, 0, -1


def rao_kupper(difference: Tensor, outcome: Tensor, eta: float = ETA) -> Tensor:
    """Negative log likelihood [N], fp32, of the outcomes of pairs (A, B); differentiable.

    difference: r_A - r_B [N], any float dtype; outcome: [N] of WIN (A is better), TIE and LOSS; eta: > 1, the width of the
    tie region. With d = difference and k = ln eta

        win   -logsigmoid(d - k)
        tie   -logsigmoid(d - k) - logsigmoid(-d - k) - ln(eta^2 - 1)
        loss  -logsigmoid(-d - k)

    Raises ValueError for eta <= 1, which gives ties no probability.
    """
    if eta <= 1:
        raise ValueError(f"eta {eta}: expected a value above 1")
    k = math.log(eta)
    d = difference.float()
    win, loss = -F.logsigmoid(d - k), -F.logsigmoid(-d - k)
    tie = win + loss - math.log(eta * eta - 1)
    return torch.where(outcome == WIN, win, torch.where(outcome == LOSS, loss, tie))


def probabilities(difference: Tensor, eta: float = ETA) -> Tensor:
    """Probabilities [N, 3], fp32, of A better, tie and B better for difference = r_A - r_B [N]; rows sum to 1. eta: > 1."""
    k = math.log(eta)
    d = difference.float()
    win, loss = torch.sigmoid(d - k), torch.sigmoid(-d - k)
    return torch.stack([win, (eta * eta - 1) * win * loss, loss], dim=-1)
