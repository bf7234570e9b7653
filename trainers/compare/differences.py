"""Paired differences of rewards and of detail figures, with 95 % intervals, and what they say in words.

Rewards: mean of tuned - base with Student's interval of the differences, and the share of pairs that tuned wins (a tie counts
half) with Wilson's interval. Detail figures: geometric mean of tuned / base with Student's interval of the logarithm.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..kernels.geometry.record import UNDETERMINED
from ..preferences.groups import Group
from ..reporting import intervals
from ..reporting.curves import number
from ..reporting.intervals import Interval
from ..scorers.geometry import GEOMETRY
from ..scorers.scores import Scores
from ..video.detail import FIGURES
from .pictures import Pictures

HIGHER, LOWER, NO_DIFFERENCE = "higher", "lower", "no difference shown"
UNKNOWN, NONE = "too few pairs", "no pair with scores"


@dataclass(frozen=True)
class Difference:
    """One reward of two sides over the n pairs that both have. base, tuned: means; change: of tuned - base; wins: share of
    pairs in which tuned is higher; each: {pair: tuned - base}; left_out: {reason: pairs}; undetermined: clips of (base, tuned)
    that have no value for that reason."""

    reward: str
    base: Interval
    tuned: Interval
    change: Interval
    wins: Interval
    each: dict[str, float]
    left_out: dict[str, int] = field(default_factory=dict)
    undetermined: tuple[int, int] = (0, 0)

    @property
    def verdict(self) -> str:
        """HIGHER or LOWER where the interval excludes 0, else NO_DIFFERENCE; UNKNOWN for one pair, NONE for none."""
        if self.change.n < 2:
            return UNKNOWN if self.change.n else NONE
        return HIGHER if self.change.above_zero else LOWER if self.change.below_zero else NO_DIFFERENCE

    def line(self, tuned: str) -> str:
        """Such as "tuned is higher (+0.31 [0.12, 0.50], n=24)"."""
        if self.verdict == NONE:
            return "no pair has a score on both sides"
        said = {HIGHER: f"{tuned} is higher", LOWER: f"{tuned} is lower", UNKNOWN: "too few pairs for an interval"}
        c = self.change
        found = f"{'+' if c.mean > 0 else ''}{number(c.mean, 3)}"
        if self.verdict != UNKNOWN:
            found += f" [{number(c.low, 3)}, {number(c.high, 3)}]"
        return f"{said.get(self.verdict, NO_DIFFERENCE)} ({found}, n={c.n})"

    def to_json(self, tuned: str) -> dict:
        return {
            "verdict": self.verdict, "line": self.line(tuned), "base": self.base.to_json(), "tuned": self.tuned.to_json(),
            "difference": self.change.to_json(), "wins": self.wins.to_json(), "left_out": self.left_out,
            "undetermined": list(self.undetermined),
        }  # fmt: skip


def of_reward(reward: str, groups: Sequence[Group], place: int, scores: Scores) -> Difference:
    """The difference of side number `place` against side 0 over groups."""
    values, why = scores.values.get(reward, {}), scores.skipped.get(reward, {})
    each, base, tuned = {}, [], []
    reasons: Counter[str] = Counter()
    undetermined = [0, 0]
    for group in groups:
        names = [group.candidates[i].name for i in (0, place)]
        if all(math.isfinite(values.get(n, math.nan)) for n in names):
            base.append(values[names[0]])
            tuned.append(values[names[1]])
            each[group.name] = tuned[-1] - base[-1]
            continue
        kinds = [_kind(why.get(n)) for n in names]
        for i, kind in enumerate(kinds):
            undetermined[i] += kind == "undetermined"
        reasons[next((k for k in kinds if k), "not finite")] += 1
    wins = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in each.values())
    return Difference(
        reward, intervals.mean(base), intervals.mean(tuned), intervals.paired_difference(tuned, base),
        intervals.share(wins, len(each)), each, dict(reasons.most_common()), tuple(undetermined),
    )  # fmt: skip


def without_undetermined(scores: Scores) -> Scores:
    """The scores without the geometry of clips that it cannot judge. They may have an error all the same: that of a still clip
    is almost 0, which would make it the best of all."""
    if GEOMETRY not in scores.values:
        return scores
    unknown = {n: f"undetermined: {r.reason}" for n, r in scores.records.items() if r.verdict == UNDETERMINED}
    values = {n: v for n, v in scores.values[GEOMETRY].items() if n not in unknown}
    skipped = scores.skipped[GEOMETRY] | unknown
    return Scores(scores.values | {GEOMETRY: values}, scores.skipped | {GEOMETRY: skipped}, scores.records)


def _kind(reason: str | None) -> str | None:
    """The part of a reason that several clips share, None for no reason."""
    if reason is None:
        return None
    return "undetermined" if reason.startswith("undetermined") else "could not be scored"


@dataclass(frozen=True)
class Details:
    """Detail figures of two sides over their pairs with pictures. base: means; ratios: tuned / base; shares: tuned - base;
    high_over_laplacian: ratio of high-frequency share over ratio of Laplacian variance; change: relative change."""

    base: dict[str, Interval]
    ratios: dict[str, Interval]
    shares: dict[str, Interval]
    high_over_laplacian: Interval
    change: Interval

    def to_json(self) -> dict:
        return {
            "base": {k: v.to_json() for k, v in self.base.items()}, "ratios": {k: v.to_json() for k, v in self.ratios.items()},
            "differences": {k: v.to_json() for k, v in self.shares.items()},
            "high_frequency_ratio_over_laplacian_ratio": self.high_over_laplacian.to_json(), "change": self.change.to_json(),
        }  # fmt: skip


def of_details(groups: Sequence[Group], place: int, pictures: Pictures) -> Details | None:
    """The details of side number `place` against side 0; None without pictures."""
    pairs = [(g.candidates[0].name, g.candidates[place].name) for g in groups]
    pairs = [(a, b) for a, b in pairs if a in pictures.figures and b in pictures.figures]
    if not pairs:
        return None
    columns: Mapping[str, tuple[list[float], list[float]]] = {
        name: tuple([pictures.figures[pair[i]][name] + floor for pair in pairs] for i in (0, 1))
        for name, (_, floor) in FIGURES.items()
    }
    ratios = {name: intervals.paired_ratio(b, a) for name, (a, b) in columns.items()}
    (low_a, low_b), (high_a, high_b) = columns["laplacian"], columns["high_frequency"]
    both = intervals.paired_ratio([h / v for h, v in zip(high_b, low_b, strict=True)],
                                  [h / v for h, v in zip(high_a, low_a, strict=True)])  # fmt: skip
    change = intervals.mean([pictures.change[b] for _, b in pairs if b in pictures.change])
    return Details(
        {name: intervals.mean([v - FIGURES[name][1] for v in a]) for name, (a, _) in columns.items()}, ratios,
        {name: intervals.paired_difference(b, a) for name, (a, b) in columns.items()}, both, change,
    )  # fmt: skip


def of_motion(groups: Sequence[Group], place: int, scores: Scores) -> Interval:
    """Ratio of the motion that the geometry records state (tracks, % of the diagonal between key frames), where both do."""
    base, tuned = [], []
    for group in groups:
        records = [scores.records.get(group.candidates[i].name) for i in (0, place)]
        moved = [r.measurements.get("motion", math.nan) if r else math.nan for r in records]
        if all(m > 0 and math.isfinite(m) for m in moved):
            base.append(moved[0])
            tuned.append(moved[1])
    return intervals.paired_ratio(tuned, base)
