"""Pairwise accuracy against human preferences, with and without ties, and calibration of the confidence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .preference_loss import TIE

BINS = 10


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on one set of pairs. without_ties: share of the decided pairs ordered right, an equal score counts half;
    with_ties: share of all pairs right where |difference| <= threshold is called a tie; None without such pairs."""

    pairs: int
    decided: int
    without_ties: float | None
    with_ties: float | None
    threshold: float


def accuracy(difference: Tensor, outcome: Tensor, threshold: float) -> Accuracy:
    """difference: r_A - r_B [N]; outcome: [N] of 1, 0, -1; threshold: >= 0, from `tie_threshold` on other pairs.

    Raises ValueError where a difference is NaN.
    """
    difference = _checked(difference)
    decided = outcome != TIE
    right = (difference.sign() == outcome).double() + 0.5 * (difference == 0).double()
    called = torch.where(difference.abs() <= threshold, torch.zeros_like(difference), difference).sign()
    n, m = len(outcome), int(decided.sum())
    return Accuracy(
        n,
        m,
        float(right[decided].mean()) if m else None,
        float((called == outcome).double().mean()) if n else None,
        threshold,
    )


def tie_threshold(difference: Tensor, outcome: Tensor) -> float:
    """The |difference| up to which predicting a tie is most accurate on these pairs, for use on other pairs.

    The usual practice sweeps it on the test set itself and so flatters. 0 where nothing is won by calling ties; between
    two pairs the middle is taken. Raises ValueError for NaN or no pair.
    """
    difference = _checked(difference)
    if not len(outcome):
        raise ValueError("a tie threshold needs at least one pair, found none")
    size, order = difference.abs().sort()
    tie = (outcome == TIE)[order].long()
    right = ((difference.sign() == outcome) & (outcome != TIE))[order].long()
    # Predicting a tie for the first j pairs is right for ties among them and for decided pairs after them.
    gained = torch.cat([tie.new_zeros(1), tie.cumsum(0)]) + right.sum() - torch.cat([tie.new_zeros(1), right.cumsum(0)])
    # A threshold cannot lie between equal differences.
    end = torch.ones(1, dtype=torch.bool, device=size.device)
    possible = torch.cat([end, size[1:] > size[:-1], end])
    j = int(torch.where(possible, gained, -1).argmax())
    if j == 0:
        return 0.0
    return float(size[-1]) if j == len(size) else float((size[j - 1] + size[j]) / 2)


def calibration_error(difference: Tensor, outcome: Tensor, bins: int = BINS) -> float | None:
    """Expected calibration error over decided pairs, 0 to 1, of confidence sigmoid(|difference|); None without such pairs."""
    difference = _checked(difference)
    decided = outcome != TIE
    if not bool(decided.any()):
        return None
    d, o = difference[decided].double(), outcome[decided]
    confidence = d.abs().sigmoid()
    right = (d.sign() == o).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[place == i].sum() - right[place == i].sum()).abs() for i in range(bins)]
    return float(torch.stack(gaps).sum() / len(d))


def _checked(difference: Tensor) -> Tensor:
    if bool(difference.isnan().any()):
        raise ValueError(f"{int(difference.isnan().sum())} of {len(difference)} score differences are NaN")
    return difference
