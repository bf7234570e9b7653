"""Beta that follows the errors, so that the gradient factor sigmoid(-beta d) of a typical pair stays at one value.

beta = ln(1/f - 1) / mean |d|, the mean being exponential over steps; f = .25 by default. d changes with the model, the clip's
size and length, the noise levels and the learning rate, so no fixed beta fits all. The mean follows a runaway d as well:
without a lower limit beta falls as fast as d rises, and nothing holds the model near its reference. At the limit the factor
falls to 0 instead, and the pair no longer pushes.
"""

import math

FACTOR, DECAY = 0.25, 0.95
LOW, HIGH = 100.0, 5000.0


class AutoBeta:
    """factor: f, in (0, 0.5); decay: of the mean, in [0, 1); low, high: limits of beta, 0 < low <= high.

    Raises ValueError for values outside those.
    """

    def __init__(self, factor: float = FACTOR, decay: float = DECAY, low: float = LOW, high: float = HIGH):
        if not 0 < factor < 0.5:
            raise ValueError(f"the gradient factor to hold must lie between 0 and 0.5, got {factor:g}")
        if not 0 <= decay < 1:
            raise ValueError(f"the mean's decay must be 0 or more and below 1, got {decay:g}")
        if not 0 < low <= high:
            raise ValueError(f"the limits of beta must be above 0, the lower first, got {low:g} and {high:g}")
        self.factor, self.decay, self.low, self.high = factor, decay, low, high
        self._sum, self._weight = 0.0, 0.0

    @property
    def mean(self) -> float:
        """The exponential mean of |d|, 0 before the first update."""
        return self._sum / self._weight if self._weight else 0.0

    @property
    def beta(self) -> float:
        """Within the limits; the upper one while all d are 0, as before the first step."""
        if self.mean == 0:
            return self.high
        return min(self.high, max(self.low, math.log(1 / self.factor - 1) / self.mean))

    def update(self, mean_size: float) -> None:
        """Takes in the mean |d| of a step's pairs; a value that is not finite is left out."""
        if math.isfinite(mean_size):
            self._sum = self.decay * self._sum + (1 - self.decay) * mean_size
            self._weight = self.decay * self._weight + (1 - self.decay)

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint: JSON values."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._sum, self._weight = float(state["sum"]), float(state["weight"])


class FixedBeta:
    """A beta that does not follow anything, with the methods of AutoBeta. Raises ValueError unless beta > 0."""

    def __init__(self, beta: float):
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be above 0 and finite, got {beta:g}")
        self.beta = beta

    def update(self, mean_size: float) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass
