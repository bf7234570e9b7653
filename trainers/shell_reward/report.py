"""The page of a run, index.html: what came out, what was stopped and why, curves of every step, clips side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..reporting.curves import Series, number
from ..reporting.page import Page
from ..running import results_log
from ..tuning import clips_page

PAGE = "index.html"
# (title, names in the log, y label, horizontal lines)
PLOTS = (
    ("Loss", ("loss",), "loss", ()),
    ("Mean distance of predictions", ("distance",), "distance", ()),
    ("Tokens of predictions outside the band", ("above", "below"), "share of tokens", ()),
    ("Norm of the change", ("change_norm",), "Frobenius norm", ()),
    ("Gradient norm before clipping", ("gradient_norm",), "norm", ()),
)
HELD_OUT = (
    ("Held-out violation of the band (decides)", ("violation",), "mean distance outside the band"),
    ("Held-out tokens outside the band", ("outside", "below"), "share of tokens"),
    ("Held-out mean distance", ("distance", "rms"), "distance"),
    ("Held-out detail, of the base's", ("laplacian_ratio", "high_frequency_ratio", "motion_ratio"), "ratio"),
)


@dataclass(frozen=True)
class Result:
    """outcome: of the loop; rows: of all measurements, the first of the base; alarms: {step, alarm}; written: the step whose
    parameters were written, 0: none; measured: whether there were measurements.
    """

    outcome: object
    rows: Sequence[dict]
    alarms: Sequence[dict]
    written: int
    measured: bool

    def of(self, step: int) -> dict | None:
        return next((r for r in self.rows if r["step"] == step), None)

    def to_json(self) -> dict:
        return {
            "outcome": vars(self.outcome), "held_out_over_steps": list(self.rows), "alarms": list(self.alarms),
            "written_step": self.written,
        }  # fmt: skip


def summary(result: Result) -> str:
    """One sentence that says the result."""
    done = f"{result.outcome.steps} steps" if not result.outcome.stopped else f"Stopped after {result.outcome.steps} steps"
    if not result.measured:
        return f"{done}; no clips were measured, so nothing is known of what they gained."
    base = result.of(0)
    if not result.written:
        return f"{done}: no measured step was better than the base, so nothing was written."
    best = result.of(result.written)
    return (
        f"{done}: step {result.written} is the best and was written; the held-out violation of the band fell from "
        f"{number(base['violation'], 3)} to {number(best['violation'], 3)}, with {number(best['laplacian_ratio'], 3)} times "
        f"the base's Laplacian variance and {number(best['high_frequency_ratio'], 3)} times its high-frequency share."
    )


def lines(result: Result) -> list[str]:
    """The measurements as text."""
    if not result.measured:
        return []
    found = ["held-out clips (Laplacian variance and high-frequency share: of the base's):"]
    found.append("  step  violation  outside  below  distance  Laplacian  high freq.")
    for r in result.rows:
        ratios = "".join(f"  {number(r[k], 3):>9}" for k in ("laplacian_ratio", "high_frequency_ratio"))
        mark = "  written" if r["step"] == result.written and result.written else ""
        values = f"{r['violation']:9.4f}  {r['outside']:7.3f}  {r['below']:5.3f}  {r['distance']:8.3f}"
        found.append(f"  {r['step']:>4}  {values}{ratios}{mark}")
    return found


def write_page(work: Path, name: str, result: Result, clips: Sequence[dict], record: dict) -> None:
    """Writes the page into the run's folder, from its log and validation clips. Raises OSError."""
    page = Page(f"Shell reward: {name}", summary(result))
    if result.outcome.stopped:
        page.note(result.outcome.stopped, warning=bool(result.alarms))
    elif result.alarms:
        page.note(f"step {result.alarms[-1]['step']}: {result.alarms[-1]['alarm']}", warning=True)
    if result.outcome.skipped:
        page.note(f"{result.outcome.skipped} steps were skipped: their loss or gradient was not finite", warning=True)
    if result.measured:
        page.heading("Held-out clips")
        columns = ("step", "violation", "outside", "below", "distance", "laplacian_ratio", "high_frequency_ratio")
        titles = ("step", "violation", "outside the band", "below it", "distance", "Laplacian", "high frequencies")
        shown = [r for r in (result.of(0), result.of(result.written), result.rows[-1]) if r is not None]
        unique = list({r["step"]: r for r in shown}.values())
        page.table(titles, [[r[c] for c in columns] for r in unique], "Base, written step and last measurement")
        steps = [r["step"] for r in result.rows]
        for title, names, label in HELD_OUT:
            series = [Series(n, steps, [_number(r[n]) for r in result.rows], points=True) for n in names]
            lines = (("base", 1.0),) if "ratio" in names[0] else ()
            page.curves(title, series, "step", label, lines=lines)
    _clips(page, work, result, clips)
    page.heading("Training")
    log = results_log.read(work / "log.jsonl")
    for title, names, label, lines in PLOTS:
        series = [Series(n, [r["step"] for r in log], [_number(r.get(n)) for r in log]) for n in names]
        page.curves(title, series, "step", label, lines=lines)
    page.details("Training record", results_log.plain(record))
    page.write(work / PAGE)


def _clips(page: Page, work: Path, result: Result, clips: Sequence[dict]) -> None:
    """The base's next to the written step's, and the last step's where it was over-optimised."""
    if clips:
        last = max(c["step"] for c in clips)
        steps = {0, result.written} | ({last} if result.alarms else set())
        page.heading("Validation clips")
        clips_page.add(page, work / "validation", clips, steps, lambda c: f"step {c['step']}, {c['strength']:g}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
