"""Filters of candidates and of pairs by geometry; each returns a Rejection with its reason, or None.

Filters read geometry records, of tracks (kernels.geometry.tracks) or of depth and poses (kernels.geometry.dense). A
filter passes records that lack its measurement: a dense record has no parallax and no tracks, and its motion is its
translation.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..kernels.geometry.record import INCONSISTENT, UNDETERMINED, GeometryRecord

# Share of the tracks that move by themselves above which a clip has no scene to measure parallax on.
MOSTLY = 0.5


class Rejection(NamedTuple):
    """filter: its name, for counting; reason: one sentence with the figures."""

    filter: str
    reason: str


@dataclass(frozen=True)
class Limits:
    """gate: undetermined clips neither win nor lose; motion: winner's over loser's; parallax: winner's over loser's, at least;
    gap: (loser's error - winner's) / loser's, at least; max_error: of a winner, None: its verdict must not be inconsistent;
    lost: share of lost tracks, at most; moving: share of tracks that move by themselves, at most; margin: combined scores must
    differ by more, in standard deviations of the group."""

    gate: bool = True
    motion: tuple[float, float] = (0.5, 2.0)
    parallax: float = 0.7
    gap: float = 0.2
    max_error: float | None = None
    lost: float = 0.2
    margin: float = 0.0
    moving: float = 1.0


def of_candidate(record: GeometryRecord, limits: Limits) -> Rejection | None:
    """The rejection of a clip that may be neither winner nor loser, or None."""
    return (gate(record) if limits.gate else None) or lost_tracks(record, limits.lost) or moving_tracks(record, limits.moving)


def of_pair(winner: GeometryRecord, loser: GeometryRecord, limits: Limits) -> Rejection | None:
    """The rejection of a pair, or None."""
    return (
        matched_motion(winner, loser, *limits.motion)
        or enough_parallax(winner, loser, limits.parallax)
        or relative_gap(winner, loser, limits.gap)
        or good_enough(winner, limits.max_error)
    )


def gate(record: GeometryRecord) -> Rejection | None:
    """Clips with an undetermined verdict."""
    if record.verdict != UNDETERMINED:
        return None
    return Rejection("gate", f"undetermined: {record.reason}")


def lost_tracks(record: GeometryRecord, most: float) -> Rejection | None:
    """Hard cuts and disintegrating clips lose tracks, and the remaining tracks may fit well."""
    lost = record.measurements.get("lost", math.nan)
    if not lost > most:
        return None
    return Rejection("lost tracks", f"{lost:.0%} of tracks lost, at most {most:.0%}")


def moving_tracks(record: GeometryRecord, most: float) -> Rejection | None:
    """A person who walks is told from the scene, but so is a wall that swings: whether it should move is not judged."""
    moving = record.measurements.get("moving", math.nan)
    if not moving > most:
        return None
    return Rejection("moving", f"{moving:.0%} of the tracks move by themselves, at most {most:.0%}")


def matched_motion(winner: GeometryRecord, loser: GeometryRecord, low: float, high: float) -> Rejection | None:
    """A clip with less motion has less error, so both clips of a pair must have similar motion."""
    ratio = _ratio(motion(winner), motion(loser))
    if math.isnan(ratio) or low <= ratio <= high:
        return None
    return Rejection(
        "matched motion", f"the winner moves {ratio:.2f} times as much as the loser, expected {low:g} to {high:g}"
    )


def enough_parallax(winner: GeometryRecord, loser: GeometryRecord, least: float) -> Rejection | None:
    """A winner with less parallax than its loser may only have been less testable.

    A loser of which more than MOSTLY moves by itself, as in a strong warp, has no scene whose parallax could be compared.
    """
    if loser.measurements.get("moving", 0.0) > MOSTLY:
        return None
    ratio = _ratio(*(r.measurements.get("parallax", math.nan) for r in (winner, loser)))
    if math.isnan(ratio) or ratio >= least:
        return None
    return Rejection("parallax", f"the winner has {ratio:.2f} times the loser's parallax, at least {least:g}")


def relative_gap(winner: GeometryRecord, loser: GeometryRecord, least: float) -> Rejection | None:
    """least = 0 switches this filter off; then the winner by other scores may have the larger error."""
    found = gap(winner, loser)
    if least <= 0 or found >= least:
        return None
    return Rejection("relative gap", f"the winner's error is {found:.0%} below the loser's, at least {least:.0%}")


def good_enough(winner: GeometryRecord, max_error: float | None) -> Rejection | None:
    """The better of two bad clips must not become a training example."""
    if max_error is None:
        if winner.verdict != INCONSISTENT:
            return None
        return Rejection("winner's error", f"the winner is inconsistent itself (error {winner.error:.4g})")
    if winner.error <= max_error:
        return None
    return Rejection("winner's error", f"the winner's error is {winner.error:.4g}, at most {max_error:g}")


def gap(winner: GeometryRecord, loser: GeometryRecord) -> float:
    """(loser's error - winner's error) / loser's error: 1 for an error-free winner, 0 for equal errors, negative where the
    loser has the smaller error."""
    if math.isinf(loser.error):
        return 0.0 if math.isinf(winner.error) else 1.0
    if loser.error == 0:
        return 0.0 if winner.error == 0 else -math.inf
    return (loser.error - winner.error) / loser.error


def motion(record: GeometryRecord) -> float:
    """The record's motion, NaN where it has none."""
    found = record.measurements
    return found.get("motion", found.get("translation", math.nan))


def _ratio(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.nan
    return a / b if b > 0 else (1.0 if a == 0 else math.inf)
