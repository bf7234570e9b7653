"""Output of `pairs build`: rows of the manifest and of groups.jsonl, the counts of report.json, and the printed summary."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ..preferences import manifest
from ..scorers.geometry import GEOMETRY
from ..scorers.scores import Scores
from . import filters
from .choose import GroupResult
from .filters import Limits
from .ranking import Ranked

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def pair_row(result: GroupResult, pair: Ranked, scores: Scores, labelled: Mapping[str, float]) -> dict:
    """A row of the manifest. labelled: {scorer: weight} of scorers whose own preference is added as a dimension."""
    by_name = {c.name: c for c in result.group.candidates}
    a, b = by_name[pair.winner], by_name[pair.loser]
    values = {side: {s: v[c.name] for s, v in scores.values.items()} for side, c in (("a", a), ("b", b))}
    preference = "a"
    if labelled:
        own = {s: _label((values["a"][s] - values["b"][s]) * weight) for s, weight in labelled.items()}
        preference = {manifest.OVERALL: "a"} | own
    row = {"prompt": result.group.prompt, "a": a.path, "b": b.path, "preference": preference, "group": result.group.name}
    row |= {"seed_a": a.seed, "seed_b": b.seed, "scores_a": values["a"], "scores_b": values["b"], "margin": pair.margin}
    records = [scores.records.get(c.name) for c in (a, b)]
    return row | {"gap": _finite(filters.gap(*records)) if None not in records else None}


def group_row(result: GroupResult, scores: Scores, folder: Path) -> dict:
    """A row of groups.jsonl; files are relative to `folder`."""
    candidates = []
    for c in result.group.candidates:
        record, why = scores.records.get(c.name), result.rejected.get(c.name)
        candidates.append({
            "candidate": c.name, "file": manifest.relative(c.path, folder), "seed": c.seed,
            "scores": {s: v[c.name] for s, v in scores.values.items() if c.name in v},
            "combined": result.combined.get(c.name),
            "motion": _finite(filters.motion(record)) if record else None,
            "geometry": record.to_json() if record else None,
            "rejected": why._asdict() if why else None,
        })  # fmt: skip
    return {
        "group": result.group.name, "prompt": result.group.prompt,
        "pairs": [pair._asdict() for pair in result.taken],
        "rejected": result.reason._asdict() if result.reason else None,
        "tried": [pair._asdict() | why._asdict() for pair, why in result.tried], "candidates": candidates,
    }  # fmt: skip


def report_of(chosen: Sequence[GroupResult], rows: Sequence[dict], scores: Scores, weights, limits: Limits) -> dict:
    """The counts of report.json. rows: of the manifest."""
    candidates = [why.filter for g in chosen for why in g.rejected.values()]
    agreement = {}
    for scorer in scores.values:
        sign = -1 if weights[scorer] < 0 else 1
        agreement[scorer] = _share([sign * (r["scores_a"][scorer] - r["scores_b"][scorer]) > 0 for r in rows])
    if GEOMETRY not in scores.values:
        gaps = [r["gap"] > 0 for r in rows if r["gap"] is not None]
        agreement |= {GEOMETRY: _share(gaps)} if gaps else {}
    return {
        "settings": {"by": dict(weights), "filters": {k: _plain(v) for k, v in asdict(limits).items()}},
        "groups": {
            "all": len(chosen), "with a pair": sum(bool(g.taken) for g in chosen),
            "reasons": dict(Counter(g.reason.filter for g in chosen if g.reason).most_common()),
        },
        "candidates": {
            "all": sum(len(g.group.candidates) for g in chosen), "reasons": dict(Counter(candidates).most_common()),
        },
        "pairs": len(rows),
        "pairs passed over": dict(Counter(why.filter for g in chosen for _, why in g.tried).most_common()),
        "quantiles": {
            "gap": quantiles([r["gap"] for r in rows if r["gap"] is not None]),
            "margin": quantiles([r["margin"] for r in rows]),
        },
        "agreement": {k: v for k, v in agreement.items() if v is not None},
        "skipped": {s: found for s, found in scores.skipped.items() if found},
    }  # fmt: skip


def summary(report: dict) -> str:
    """The printed summary of a report."""
    lines = [f"{report['groups']['with a pair']} of {report['groups']['all']} groups gave {report['pairs']} pairs"]
    for title, counts in (
        ("groups left out", report["groups"]["reasons"]),
        ("clips left out", report["candidates"]["reasons"]),
    ):
        lines += [f"  {title}: {n:4d}  {reason}" for reason, n in counts.items()]
    for name, values in report["quantiles"].items():
        if values:
            lines.append(f"  {name}: " + "  ".join(f"{v:.3g}" for v in values) + "  (minimum, quartiles, maximum)")
    lines += [f"  {name} prefers the winner in {share:.0%} of the pairs" for name, share in report["agreement"].items()]
    return "\n".join([*lines, f"  contact sheet: {report['contact_sheet']}"])


def quantiles(values: Sequence[float]) -> list[float]:
    """Minimum, quartiles and maximum, linearly interpolated; [] for no values."""
    if not values:
        return []
    ordered = sorted(values)
    at = [q * (len(ordered) - 1) for q in QUANTILES]
    return [ordered[int(p)] + (p - int(p)) * (ordered[math.ceil(p)] - ordered[int(p)]) for p in at]


def _label(lead: float) -> str:
    return "tie" if lead == 0 else "a" if lead > 0 else "b"


def _share(answers: Sequence[bool]) -> float | None:
    return sum(answers) / len(answers) if answers else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value
