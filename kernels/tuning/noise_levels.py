"""Noise levels (sigma) to train at: uniform, logit-normal (arXiv 2403.03206), shifted, or from a list; within a range.

A range, such as that of one of two experts, is sampled by the inverse of the distribution function, so that the density inside
it is that of the whole distribution and one uniform number gives one level. sigma is the level after the shift: the model is
called with time 1000 sigma.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIFORM, LOGIT_NORMAL, SHIFTED, LIST = "uniform", "logit_normal", "shifted", "list"
KINDS = (UNIFORM, LOGIT_NORMAL, SHIFTED, LIST)


@dataclass(frozen=True)
class NoiseLevels:
    """kind: UNIFORM; LOGIT_NORMAL: sigmoid of a standard normal number, then shifted; SHIFTED: uniform, then shifted; LIST.

    shift: s of sigma = s t / (1 + (s - 1) t), 1 for none, as in the sampler's schedule; UNIFORM and LIST ignore it. low, high:
    the range. levels: of LIST. Raises ValueError for values out of range, and for a list with no level in the range.
    """

    kind: str = SHIFTED
    shift: float = 5.0
    low: float = 0.0
    high: float = 1.0
    levels: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"noise levels '{self.kind}': is unknown; expected {', '.join(KINDS)}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"the range {self.low:g} to {self.high:g}: expected noise levels from 0 to 1, the lower first")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"the shift must be above 0 and finite, got {self.shift:g}")
        if self.kind == LIST and not self.usable:
            raise ValueError(f"no noise level of the list lies from {self.low:g} to {self.high:g}")

    @property
    def usable(self) -> tuple[float, ...]:
        """The list's levels within the range."""
        return tuple(s for s in self.levels if self.low <= s <= self.high)

    def at(self, share: Tensor) -> Tensor:
        """The levels [N], fp32, at the quantiles `share` [N] in [0, 1) of the distribution within the range."""
        u = share.double()
        if self.kind == LIST:
            table = torch.tensor(self.usable, dtype=torch.float64)
            return table[(u * len(table)).long().clamp(max=len(table) - 1)].float()
        if self.kind == UNIFORM:
            return (self.low + (self.high - self.low) * u).float()
        first, last = unshift(self.low, self.shift), unshift(self.high, self.shift)
        if self.kind == SHIFTED:
            return shifted(first + (last - first) * u, self.shift).clamp(self.low, self.high).float()
        first, last = (_normal_share(torch.tensor(t, dtype=torch.float64)) for t in (first, last))
        # Away from the ends, where the quantile is infinite.
        place = (first + (last - first) * u).clamp(1e-12, 1 - 1e-12)
        t = torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * place - 1))
        return shifted(t, self.shift).clamp(self.low, self.high).float()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` random levels [count], fp32, on the CPU."""
        return self.at(torch.rand(count, generator=generator, dtype=torch.float64))

    def fixed(self, count: int) -> Tensor:
        """`count` levels at the middles of equal shares of the distribution, ascending: a table to measure at."""
        return self.at((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def shifted(t: Tensor, shift: float) -> Tensor:
    """sigma = s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def unshift(sigma: float, shift: float) -> float:
    """The t of a sigma, the inverse of `shifted`."""
    return sigma / (shift - (shift - 1) * sigma)


def _normal_share(t: Tensor) -> Tensor:
    """The probability that sigmoid of a standard normal number is below t in [0, 1]."""
    return 0.5 * (1 + torch.erf(torch.logit(t) / math.sqrt(2)))
