"""Means, paired differences, ratios and jackknife estimates with 95% intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Two-sided 95% quantiles of Student's t by degrees of freedom.
STUDENT = {7: 2.365, 15: 2.131, 31: 2.040, 63: 1.998}
NORMAL = 1.960
GROUPS = 16


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95% interval, over n clips."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def apart_from(self, other: "Estimate") -> bool:
        """Whether the two intervals do not overlap."""
        return self.low > other.high or other.low > self.high

    def text(self, digits: int = 3) -> str:
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def mean(values: Tensor) -> Estimate:
    """Mean of clips [N] with a normal interval, which is NaN for a single clip."""
    values = values.double()
    half = NORMAL * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), half, len(values))


def difference(values: Tensor, base: Tensor) -> Estimate:
    """Mean of the paired difference values - base [N]: variation shared through prompts and seeds cancels."""
    return mean(values.double() - base.double())


def ratio(values: Tensor, base: Tensor, draws: int = 4000, seed: int = 0) -> Estimate:
    """Sum of values over sum of base, both [N] of the same clips, with a bootstrap interval over clips.

    A ratio of means and not a mean of ratios, because single bases may be zero.
    """
    values, base = values.double(), base.double()
    index = torch.randint(0, len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    found = values[index].sum(dim=1) / base[index].sum(dim=1)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return Estimate(float(values.sum() / base.sum()), (high - low) / 2, len(values))


def pseudo_values(statistic: Callable[[Tensor], float], n: int, groups: int = GROUPS) -> Tensor:
    """Jackknife pseudo-values [groups] of a statistic that takes the indices of the clips to use.

    Their mean is the statistic without its bias of order 1 / n, which is large for Frechet distances of few clips; their
    spread gives the interval. A group is every groups-th clip. Raises ValueError for n < 2 * groups.
    """
    if n < 2 * groups:
        raise ValueError(f"a jackknife of {groups} groups needs at least {2 * groups} clips, found {n}")
    index = torch.arange(n)
    whole = statistic(index)
    left_out = [statistic(index[index % groups != g]) for g in range(groups)]
    return groups * whole - (groups - 1) * torch.tensor(left_out, dtype=torch.float64)


def of_pseudo_values(values: Tensor, n: int) -> Estimate:
    """Mean and Student interval of jackknife pseudo-values [G] of n clips, or of their differences."""
    half = STUDENT[len(values) - 1] * float(values.std()) / len(values) ** 0.5
    return Estimate(float(values.mean()), half, n)
