"""Different rewards at different noise levels: a cheap one while clips are noisy, a good one when they are finished."""

from torch import Tensor

from .reward import ClipView, Reward, RewardInfo


class Schedule:
    """`early` above the noise level `until`, `late` at and below it. until 0: `late` for finished clips only."""

    def __init__(self, early: Reward, late: Reward, until: float = 0.0):
        self.early, self.late, self.until = early, late, until
        a, b = early.info, late.info
        self.info = RewardInfo(
            name=f"{a.name}, from sigma {until:g} on {b.name}" if until > 0 else f"{a.name}, for finished clips {b.name}",
            reads=a.reads,
            meaning=f"{a.meaning} (before); {b.meaning} (after)",
            sigmas=(b.sigmas[0], a.sigmas[1]),
        )

    def at(self, sigma: float) -> Reward:
        """The reward that scores clips at this noise level."""
        return at(self.late if sigma <= self.until + 1e-6 else self.early, sigma)

    def measure(self, view: ClipView) -> Tensor:
        return self.at(view.sigma).measure(view)

    def scores(self, figures: Tensor) -> Tensor:
        raise TypeError("the figures of a schedule depend on the noise level: use `at` and score with that reward")


def at(reward: Reward, sigma: float) -> Reward:
    """The reward itself, or the one that a schedule uses at this noise level."""
    return reward.at(sigma) if isinstance(reward, Schedule) else reward
