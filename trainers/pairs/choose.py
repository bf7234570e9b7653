"""Choice of a group's pairs: candidates filtered, scores combined, and pairs tried from the largest difference down."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..preferences.groups import Group
from ..scorers.scores import Scores
from . import filters, ranking
from .filters import Limits, Rejection
from .ranking import Ranked


@dataclass
class GroupResult:
    """The result for one group.

    rejected: {candidate: reason}; combined: {candidate: score} of the others; tried: rejected pairs in the order in which they
    were tried, with reasons; taken: the pairs; reason: why there is none, or None.
    """

    group: Group
    rejected: dict[str, Rejection] = field(default_factory=dict)
    combined: dict[str, float] = field(default_factory=dict)
    tried: list[tuple[Ranked, Rejection]] = field(default_factory=list)
    taken: list[Ranked] = field(default_factory=list)
    reason: Rejection | None = None


def choose(group: Group, scores: Scores, weights: Mapping[str, float], limits: Limits, most: int = 1) -> GroupResult:
    """The pairs of a group, at most `most`, tried in order of decreasing difference of the combined scores."""
    result = GroupResult(group)
    for c in group.candidates:
        if why := _candidate_rejection(c.name, scores, weights, limits):
            result.rejected[c.name] = why
    usable = [c.name for c in group.candidates if c.name not in result.rejected]
    if len(usable) < 2:
        result.reason = Rejection("too few candidates", f"{len(usable)} of {len(group.candidates)} candidates are usable")
        return result
    result.combined = ranking.combine({s: {n: scores.values[s][n] for n in usable} for s in weights}, weights)
    ranked = ranking.pairs(result.combined)
    for pair in ranked:
        if len(result.taken) == most:
            break
        if why := _pair_rejection(pair, scores, limits):
            result.tried.append((pair, why))
        else:
            result.taken.append(pair)
    if not ranked:
        result.reason = Rejection("ties", f"all {len(usable)} usable candidates score the same")
    elif not result.taken:
        # The reason against the best and the worst candidate stands for the group.
        result.reason = result.tried[0][1]
    return result


def _candidate_rejection(name: str, scores: Scores, weights: Mapping[str, float], limits: Limits) -> Rejection | None:
    record = scores.records.get(name)
    if record and (why := filters.of_candidate(record, limits)):
        return why
    for scorer in weights:
        if name not in scores.values[scorer]:
            return Rejection(f"no {scorer} score", scores.skipped[scorer].get(name, "not scored"))
    return None


def _pair_rejection(pair: Ranked, scores: Scores, limits: Limits) -> Rejection | None:
    if pair.margin < limits.margin:
        return Rejection("margin", f"combined scores differ by {pair.margin:.3g} deviations, at least {limits.margin:g}")
    winner, loser = (scores.records.get(n) for n in (pair.winner, pair.loser))
    if winner is None or loser is None:
        return None
    return filters.of_pair(winner, loser, limits)
