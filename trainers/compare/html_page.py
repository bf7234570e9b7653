"""The report of a comparison as one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..preferences.groups import Group
from ..reporting.curves import Series, number
from ..reporting.intervals import Interval
from ..reporting.page import Clip, Page
from ..scorers.scores import Scores
from ..video.detail import FIGURES
from .differences import HIGHER, LOWER, NO_DIFFERENCE, NONE, UNKNOWN, Details, Difference

MEANING = {
    "geometry": "minus the logarithm of the geometric error of point tracks; +0.1 is an error about 10 % smaller",
    "flow_residual": "minus the mean squared error of the model's own velocity for the clip with noise added",
    "prompt_gap": "how much smaller that error is with the prompt than without it, at high noise",
    "prism": "mean of the PRISM head's scores",
    "shell_lcc": "minus the distance of the clip's tokens from the shell's radius; at most 0",
}
MOST_ROWS = 300
FEWEST_PLOTTED = 4


@dataclass
class Result:
    """One side against the first. motion: ratio of the geometry records' motion; alarms: sentences."""

    side: str
    differences: list[Difference]
    details: Details | None
    motion: Interval
    alarms: list[str] = field(default_factory=list)


def summary(base: str, results: Sequence[Result], pairs: int) -> str:
    """One plain sentence a side."""
    return " ".join(_sentence(base, r, pairs) for r in results)


def _sentence(base: str, result: Result, pairs: int) -> str:
    by = {v: [d.reward for d in result.differences if d.verdict == v] for v in (HIGHER, LOWER, NO_DIFFERENCE, UNKNOWN, NONE)}
    parts = [f"{said} by {', '.join(by[v])}" for v, said in ((HIGHER, "higher"), (LOWER, "lower")) if by[v]]
    if by[NO_DIFFERENCE]:
        parts.append(f"no difference shown by {', '.join(by[NO_DIFFERENCE])}")
    if by[UNKNOWN]:
        parts.append(f"too few pairs for {', '.join(by[UNKNOWN])}")
    if by[NONE]:
        parts.append(f"no pair with scores of {', '.join(by[NONE])}")
    count = len(result.alarms)
    alarms = f"; {count} alarm{'s' * (count > 1)}" if count else "; no alarm"
    said = "; ".join(parts) or "no reward could be measured"
    return f"{result.side} against {base}, {pairs} pair{'s' * (pairs != 1)}: {said}{alarms}."


def page(base: str, results: Sequence[Result], pairs: int, notes: Sequence[str] = ()) -> Page:
    """The page up to its clips, which the caller adds. notes: warnings below the summary."""
    made = Page(f"{' and '.join(r.side for r in results)} against {base}", summary(base, results, pairs))
    for note in notes:
        made.note(note, warning=True)
    for result in results:
        _add_result(made, base, result)
    return made


def _add_result(made: Page, base: str, result: Result) -> None:
    side = result.side
    made.heading(f"{side} against {base}")
    for alarm in result.alarms:
        made.note(alarm, warning=True)
    columns = ("reward", "verdict", f"{side} - {base} [95 %]", f"{side} wins [95 %]", "pairs", base, side, "left out")
    rows = [
        (d.reward, _verdict(d, side), d.change, _percent(d.wins), d.change.n, d.base.mean, d.tuned.mean, _reasons(d.left_out))
        for d in result.differences
    ]
    if rows:
        made.table(columns, rows, "Rewards of the same prompts and seeds, higher is better.")
        made.text(multiple(len(rows)))
        for d in result.differences:
            if d.change.n >= FEWEST_PLOTTED:
                _add_curve(made, d, base, side)
    if result.details is not None:
        _add_details(made, base, result)


def _add_curve(made: Page, d: Difference, base: str, side: str) -> None:
    values = sorted(d.each.values())
    ranks = list(range(1, len(values) + 1))
    made.curves(
        f"{d.reward}: every pair", [Series(f"{side} - {base}", ranks, values, points=len(values) < 60)],
        "pair, in order of its difference", f"{d.reward}, {side} - {base}", lines=(("no difference", 0.0),),
        caption=MEANING[d.reward] + ".",
    )  # fmt: skip


def _add_details(made: Page, base: str, result: Result) -> None:
    details, side = result.details, result.side
    rows = [(name, details.ratios[name], details.shares[name], details.base[name].mean, FIGURES[name][0]) for name in FIGURES]
    if result.motion.n:
        unit = "median displacement of point tracks, ratio only"
        rows.append(("motion", result.motion, None, None, unit))
    columns = ("figure", f"{side} / {base} [95 %]", f"{side} - {base} [95 %]", base, "what it is")
    made.table(columns, rows, "Detail, motion and light. Ratios are geometric means over pairs.")
    change = details.change
    if change.n:
        equal = " The clips are the same." if change.mean == 0 else ""
        made.text(
            f"Change: {side}'s clips differ from {base}'s by {number(change.mean, 3)} times the contrast of {base}'s frames "
            f"(root mean square, {change.n} pairs; 0: equal, 1.4: nothing in common).{equal} High-frequency ratio over "
            f"Laplacian ratio: {number(details.high_over_laplacian.mean, 3)}."
        )


def pairs_table(made: Page, groups: Sequence[Group], sides: Sequence[str], scores: Scores) -> None:
    """Adds every pair's scores."""
    rewards = [r for r in scores.values if scores.values[r]]
    if not rewards:
        return
    made.heading("Every pair")
    if len(groups) > MOST_ROWS:
        made.text(f"The first {MOST_ROWS} of {len(groups)} pairs; comparison.json has all.")
    columns = ("pair", *(f"{r}: {side}" for r in rewards for side in sides))
    rows = [
        (g.name, *(scores.values[r].get(c.name) for r in rewards for c in g.candidates)) for g in groups[:MOST_ROWS]
    ]
    made.table(columns, rows)


def clip_captions(group: Group, scores: Scores) -> list[str]:
    """Each side's scores."""
    return [
        ", ".join(f"{r} {number(v[c.name])}" for r, v in scores.values.items() if c.name in v) for c in group.candidates
    ]


def clips(group: Group, sides: Sequence[str], media: Sequence, scores: Scores) -> list[Clip]:
    """A group's clips for Page.clips."""
    return [Clip(s, m, c) for s, m, c in zip(sides, media, clip_captions(group, scores), strict=True)]


def left_out_table(
    made: Page, rewards: Mapping[str, str], pairs: Mapping[str, str], unmatched: Mapping[str, Sequence[str]]
) -> None:
    """Adds what was not compared, and why."""
    rows = [("reward", name, why) for name, why in rewards.items()]
    rows += [("pair", name, why) for name, why in list(pairs.items())[:MOST_ROWS]]
    rows += [(f"{len(names)} clips", ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""), f"only in {side}")
             for side, names in unmatched.items()]  # fmt: skip
    if rows:
        made.heading("Left out")
        made.table(("what", "name", "why"), rows)


def multiple(count: int) -> str:
    """What the intervals do not cover."""
    text = (
        "Intervals: Student's t of the paired differences; Wilson's for the share of wins, where a tie counts half. Each "
        "stands for its own reward and is not corrected for their number."
    )
    if count > 1:
        chance = 100 * (1 - 0.95**count)
        text += f" With {count} rewards and no real difference, one or more shows one in about {chance:.0f} % of comparisons."
    return text


def _verdict(d: Difference, side: str) -> str:
    return {HIGHER: f"{side} is higher", LOWER: f"{side} is lower"}.get(d.verdict, d.verdict)


def _percent(share: Interval) -> str:
    mean, low, high = (number(100 * v, 2) for v in (share.mean, share.low, share.high))
    return f"{mean} % [{low}, {high}]" if share.n else "-"


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {why}" for why, n in counts.items())
