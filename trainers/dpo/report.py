"""The page of a run, index.html: what came out, what was stopped and why, curves of every step, clips side by side."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..reporting.curves import Series, number
from ..reporting.page import Page
from ..running import results_log
from ..tuning import clips_page

PAGE = "index.html"
# (title, names in the log, y label, horizontal lines)
PLOTS = (
    ("Errors against the reference, apart", ("winner_error", "loser_error"), "change of mean error", (("reference", 0.0),)),
    ("Implicit accuracy", ("rewards/accuracies",), "share of pairs", (("chance", 0.5),)),
    ("Loss", ("loss",), "loss (nats)", ()),
    ("Gradient factor", ("gradient_factor",), "sigmoid(-beta d)", (("nothing learnt", 0.5),)),
    ("Beta", ("beta",), "beta", ()),
    ("Motion of the predictions", ("dynamics",), "of the reference's", (("reference", 1.0),)),
    ("Norm of the change", ("change_norm",), "Frobenius norm", ()),
    ("Gradient norm before clipping", ("gradient_norm",), "norm", ()),
)  # fmt: skip


def write_page(
    work: Path, name: str, outcome, found: dict | None, held_rows: Sequence[dict], clips: Sequence[dict], record: dict
) -> None:
    """Writes the page into the run's folder, from its log and validation clips. Raises OSError."""
    page = Page(f"Preference tuning: {name}", summary(outcome, found))
    if outcome.stopped:
        page.note(outcome.stopped, warning=True)
    if outcome.skipped:
        page.note(f"{outcome.skipped} steps were skipped: their loss or gradient was not finite", warning=True)
    if found:
        page.heading("Held-out pairs")
        rows = [
            ("implicit accuracy (interval over prompts)", found["accuracy"]),
            ("change of the winners' error", found["winner"]), ("change of the losers' error", found["loser"]),
            ("motion of predictions, of the reference's", found["dynamics"]), ("pairs", found["pairs"]),
            ("prompts", found["prompts"]),
        ]  # fmt: skip
        page.table(("figure", "value"), rows)
        page.table(
            ("sigma", "accuracy", "winners' error", "losers' error"),
            [(r["sigma"], r["accuracy"], r["winner"], r["loser"]) for r in found["by_sigma"]],
            "By noise level: change of the mean error against the reference",
        )
    if held_rows:
        steps = [r["step"] for r in held_rows]
        accuracy = [r["accuracy"] for r in held_rows]
        line = Series(
            "held-out accuracy", steps, [a["mean"] for a in accuracy], [a["low"] for a in accuracy],
            [a["high"] for a in accuracy], points=True,
        )  # fmt: skip
        page.curves("Held-out implicit accuracy", [line], "step", "share of prompts", lines=(("chance", 0.5),))
    _clips(page, work, clips)
    page.heading("Training")
    log = results_log.read(work / "log.jsonl")
    for title, names, label, lines in PLOTS:
        series = [Series(n, [r["step"] for r in log], [_number(r.get(n)) for r in log]) for n in names]
        page.curves(title, series, "step", label, lines=lines)
    page.details("Training record", results_log.plain(record))
    page.write(work / PAGE)


def summary(outcome, found: dict | None) -> str:
    """One sentence that says the result."""
    what = f"{outcome.steps} steps" if not outcome.stopped else f"Stopped after {outcome.steps} steps"
    if not found:
        return f"{what}; no pairs were held out, so nothing is known of other prompts."
    a, w = found["accuracy"], found["winner"]
    side = "above chance" if a.low > 0.5 else "below chance" if a.high < 0.5 else "not distinguishable from chance"
    error = "rose" if w.above_zero else "fell" if w.below_zero else "did not change measurably"
    return (
        f"{what}: on held-out prompts the model prefers the winner in {100 * a.mean:.0f} % of pairs ({number(100 * a.low)} to "
        f"{number(100 * a.high)} %), {side}; the winners' error {error}."
    )


def _clips(page: Page, work: Path, clips: Sequence[dict]) -> None:
    """The first step's base next to the last step's clips."""
    if clips:
        last = max(c["step"] for c in clips)
        page.heading(f"Validation clips of step {last}")
        clips_page.add(page, work / "validation", clips, {0, last}, lambda c: f"strength {c['strength']:g}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


