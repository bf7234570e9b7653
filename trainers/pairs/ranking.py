"""Weighted mean of standardised scores within a group, and all pairs in order of decreasing difference."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

# Scores that differ by less, relative to their size, are equal up to rounding.
SAME = 1e-9


class Ranked(NamedTuple):
    """A pair. margin: combined score of the winner minus the loser's, above 0, in standard deviations of the group."""

    winner: str
    loser: str
    margin: float


def standardise(values: Sequence[float]) -> list[float]:
    """(value - mean) / standard deviation (of all, not of a sample); all 0 where all values are equal."""
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    if spread <= SAME * max(map(abs, values)):
        return [0.0] * len(values)
    return [(v - mean) / spread for v in values]


def combine(scores: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> dict[str, float]:
    """{candidate: score} from {scorer: {candidate: value, higher is better}}: the weighted mean of the scorers' values,
    standardised within the group. All scorers have the same candidates."""
    total = sum(map(abs, weights.values()))
    names = list(next(iter(scores.values())))
    combined = dict.fromkeys(names, 0.0)
    for scorer, weight in weights.items():
        for name, value in zip(names, standardise([scores[scorer][n] for n in names]), strict=True):
            combined[name] += weight * value / total
    return combined


def pairs(combined: Mapping[str, float]) -> list[Ranked]:
    """All pairs that are not ties, in order of decreasing margin; equal margins by name."""
    found = []
    for a, b in combinations(sorted(combined), 2):
        margin = combined[a] - combined[b]
        if abs(margin) > SAME:
            found.append(Ranked(a, b, margin) if margin > 0 else Ranked(b, a, -margin))
    return sorted(found, key=lambda r: (-round(r.margin, 9), r.winner, r.loser))
