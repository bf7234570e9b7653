"""95 % intervals: Student's t for means, paired differences and ratios; Wilson's for shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of the normal distribution, and of Student's t with 1, 2, ... degrees of freedom.
NORMAL = 1.959964
STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval [low, high], NaN where n is too small for one, over n clips or pairs."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0

    def to_json(self) -> dict:
        """NaN becomes None."""
        return {"mean": _or_none(self.mean), "low": _or_none(self.low), "high": _or_none(self.high), "n": self.n}


def mean(values: Sequence[float]) -> Interval:
    """Mean of finite values with Student's interval: mean +- t s / sqrt(n), s the sample's standard deviation.

    The interval is NaN for one value, and all is NaN for none.
    """
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    centre = math.fsum(values) / n
    if n == 1:
        return Interval(centre, math.nan, math.nan, 1)
    spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1))
    half = student(n - 1) * spread / math.sqrt(n)
    return Interval(centre, centre - half, centre + half, n)


def paired_difference(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Mean of values[i] - base[i] with Student's interval of the differences, so that what prompts and seeds share cancels."""
    return mean([a - b for a, b in zip(values, base, strict=True)])


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Geometric mean of values[i] / base[i]: Student's interval of the mean logarithm, exponentiated. All must be above 0."""
    logs = mean([math.log(a / b) for a, b in zip(values, base, strict=True)])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.n)


def share(count: float, n: int) -> Interval:
    """Wilson's interval of a share: centre (p + z^2 / 2n) / (1 + z^2 / n), half width
    z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n). count: of n, 0.5 for a tie; n = 0 gives NaN."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    p, z2 = count / n, NORMAL * NORMAL
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(p * (1 - p) * z2 / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)


def student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t; above the table by the expansion of Abramowitz and Stegun 26.7.5, which is
    right to 1e-4 there."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, n = NORMAL, freedom
    second, third = 5 * z**5 + 16 * z**3 + 3 * z, 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    return z + (z**3 + z) / (4 * n) + second / (96 * n**2) + third / (384 * n**3)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
