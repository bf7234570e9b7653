"""Scores groups of candidates, filters them, and writes winners and losers for the trainers.

Groups are described in trainers.preferences.groups: subfolders of clips, or our preference records. --by names the scorers and
their weights: geometry, prism, shell_lcc, or stored:NAME for a score that came with a record (a negative weight where lower
is better). Each score is standardised within its group before the weighted mean is taken.

The best clip of a group is paired with its worst; where a filter forbids that, the pair that differs next most is tried, and
so on. OUTPUT gets

  pairs.jsonl         the manifest that the trainers read (trainers.preferences.manifest)
  groups.jsonl        every group with its candidates, their scores, motion and verdict, and why each was left out
  report.json         settings, counts of groups, pairs and reasons, quantiles of the gaps, how often each scorer agrees
  contact_sheet.png   the pairs side by side
  candidates.jsonl    scores, each written as soon as it is known: a run that was killed goes on from there, and other
                      weights or filters cost nothing
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from ..preferences import groups as pair_groups
from ..preferences import manifest as pairs_manifest
from ..preferences.groups import Group
from ..running import results_log as geometry_log
from ..running.device import DTYPES
from ..running.output import provenance
from ..scorers import geometry as geometry_score
from ..video.sizes import BUCKETS
from ..wan import prompts as prism_texts
from . import contact_sheet as pairs_sheet
from . import filters as pair_filters
from . import ranking as pair_ranking
from . import scores as pair_scores
from .filters import Limits, Rejection
from .ranking import Ranked
from .scores import GEOMETRY, PRISM, SHELL_LCC, STORED, Scores

PAIRS, GROUPS, REPORT, SHEET = "pairs.jsonl", "groups.jsonl", "report.json", "contact_sheet.png"
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Outcome:
    """What became of a group. rejected: {candidate: why it takes no part}; tried: pairs in their order, and why each was not
    taken; combined: {candidate: score}; reason: why there is no pair."""

    group: Group
    rejected: dict[str, Rejection] = field(default_factory=dict)
    combined: dict[str, float] = field(default_factory=dict)
    tried: list[tuple[Ranked, Rejection]] = field(default_factory=list)
    taken: list[Ranked] = field(default_factory=list)
    reason: Rejection | None = None


def add_arguments(parser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "--groups", nargs="+", required=True, metavar="DIR_OR_RECORDS", help="folders of subfolders, or records"
    )
    files.add_argument("--output", required=True, type=Path, metavar="DIR")
    files.add_argument("--overwrite", action="store_true", help="forget the scores that an earlier run left in --output")
    by = parser.add_argument_group("scores")
    by.add_argument(
        "--by", nargs="+", default=["geometry=1"], metavar="NAME=WEIGHT",
        help="geometry, prism, shell_lcc, stored:NAME, each with a weight (default geometry=1)",
    )  # fmt: skip
    by.add_argument("--head", metavar="FILE", help="prism: the head")
    by.add_argument("--backbone", metavar="FILE_OR_DIR", help="prism: Wan .safetensors or diffusers folder")
    by.add_argument("--prism_dimensions", nargs="+", metavar="NAME", help="prism: of these dimensions (default: all)")
    by.add_argument("--levels", type=float, nargs="+", help="prism: noise levels (default: the 3 lowest of the head's)")
    by.add_argument("--other_weights", action="store_true", help="prism: score on other weights than it was trained on")
    by.add_argument("--texts", metavar="FILE", help="prism: prompts made by `trainers.prism embed`")
    prism_texts.add_encoder(by, required=False)
    by.add_argument("--manifold", metavar="FILE", help="shell_lcc: the manifold")
    take = parser.add_argument_group("filters (of geometry: where it is among the scores, or came with the records)")
    take.add_argument(
        "--keep_undetermined", action="store_true", help="let clips win and lose whose geometry cannot be judged"
    )
    take.add_argument(
        "--motion_ratio", type=float, nargs=2, default=Limits.motion, metavar=("LOW", "HIGH"),
        help="winner's motion over the loser's (default 0.5 2; 0 inf: any)",
    )  # fmt: skip
    take.add_argument("--min_parallax_ratio", type=float, default=Limits.parallax, help="winner's over loser's (0.7; 0: any)")
    take.add_argument("--min_gap", type=float, default=Limits.gap, help="(loser's - winner's error) / loser's (0.2; 0: any)")
    take.add_argument("--max_error", type=float, help="of a winner (default: its verdict is not inconsistent; inf: any)")
    take.add_argument("--max_lost", type=float, default=Limits.lost, help="share of a clip's tracks (default 0.2; 1: any)")
    take.add_argument("--min_margin", type=float, default=Limits.margin, help="of combined scores, in deviations (default 0)")
    take.add_argument("--pairs_per_group", type=int, default=1, help="at most (default 1)")
    take.add_argument("--per_scorer", action="store_true", help="also label each scorer's own preference, as a dimension")
    clips = parser.add_argument_group("clips")
    clips.add_argument(
        "--vae", metavar="FILE_OR_DIR", help="encodes videos for prism and shell_lcc, decodes latents for geometry"
    )
    clips.add_argument("--vae_dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on a CPU, else bfloat16")
    clips.add_argument("--tiling", action="store_true", help="encode in tiles: less memory, not quite the same latents")
    clips.add_argument("--size", choices=list(BUCKETS), default="480p", help="that videos are encoded at (default 480p)")
    clips.add_argument("--fps", type=float, default=16.0, help="that videos are encoded at (default 16)")
    clips.add_argument("--frames", type=int, default=81, help="at most, 4n+1 (default 81)")
    compute = parser.add_argument_group("computing")
    compute.add_argument("--backend", choices=geometry_score.BACKENDS, default="auto", help="of geometry")
    compute.add_argument("--jobs", type=int, default=0, help="processes for the geometry of videos (default: up to 4)")
    compute.add_argument("--backbone_dtype", choices=tuple(DTYPES), default="float32")
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compute.add_argument("--seed", type=int, default=0, help="prism: of the noise")
    compute.add_argument("--sheet_pairs", type=int, default=24, help="on the contact sheet, at most (default 24; 0: no sheet)")


def run(args) -> int:
    weights, limits = weights_of(args.by), _limits(args)
    groups = pair_groups.read(args.groups)
    pair_scores.require_possible(groups, weights, args)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        (args.output / pair_scores.CANDIDATES).unlink(missing_ok=True)
    scores = pair_scores.score(groups, weights, args)
    outcomes = [choose(group, scores, weights, limits, args.pairs_per_group) for group in groups]
    rows = [_pair_row(o, ranked, scores, weights if args.per_scorer else {}) for o in outcomes for ranked in o.taken]
    geometry_log.write(args.output / GROUPS, [_group_row(o, scores, args.output) for o in outcomes])
    sheet_note = _write_sheet(args, outcomes, scores)
    report = _report(outcomes, rows, scores, weights, limits) | {
        "contact_sheet": sheet_note, "provenance": provenance(args.argv, "trainers.pairs"),
    }  # fmt: skip
    pairs_manifest.write_report(args.output / REPORT, report)
    print(text(report))
    if not rows:
        # An earlier manifest would be taken for this run's.
        (args.output / PAIRS).unlink(missing_ok=True)
        print(f"{args.output / GROUPS}: says why none of the {len(groups)} groups gave a pair")
        return 1
    pairs_manifest.write(args.output / PAIRS, rows)
    print(f"{args.output / PAIRS}: {len(rows)} pairs of {len(groups)} groups")
    return 0


def weights_of(arguments: Sequence[str]) -> dict[str, float]:
    """{scorer: weight} of arguments such as geometry=1. Raises ValueError."""
    weights: dict[str, float] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=") if "=" in argument else (argument, "=", "1")
        if name not in (GEOMETRY, PRISM, SHELL_LCC) and not (name.startswith(STORED) and len(name) > len(STORED)):
            raise ValueError(f"--by {argument}: unknown scorer; give geometry, prism, shell_lcc or stored:NAME")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        negative = weight < 0 and not name.startswith(STORED)
        if not math.isfinite(weight) or weight == 0 or negative or name in weights:
            raise ValueError(f"--by {argument}: expected each scorer once, with a weight above 0 (stored: ones also below)")
        weights[name] = weight
    return weights


def choose(group: Group, scores: Scores, weights: Mapping[str, float], limits: Limits, most: int = 1) -> Outcome:
    """The pairs of a group, most different first, and why each candidate or pair before them was not taken."""
    outcome = Outcome(group)
    for c in group.candidates:
        if why := _candidate_rejection(c.name, scores, weights, limits):
            outcome.rejected[c.name] = why
    usable = [c.name for c in group.candidates if c.name not in outcome.rejected]
    if len(usable) < 2:
        outcome.reason = Rejection("too few candidates", f"{len(usable)} of {len(group.candidates)} candidates are usable")
        return outcome
    outcome.combined = pair_ranking.combine({s: {n: scores.values[s][n] for n in usable} for s in weights}, weights)
    ranked = pair_ranking.pairs(outcome.combined)
    for pair in ranked:
        if len(outcome.taken) == most:
            break
        if why := _pair_rejection(pair, scores, limits):
            outcome.tried.append((pair, why))
        else:
            outcome.taken.append(pair)
    if not ranked:
        outcome.reason = Rejection("ties", f"all {len(usable)} usable candidates score the same")
    elif not outcome.taken:
        # What stood against the best and the worst is the group's reason.
        outcome.reason = outcome.tried[0][1]
    return outcome


def text(report: dict) -> str:
    """The closing summary."""
    lines = [f"{report['groups']['with a pair']} of {report['groups']['all']} groups gave {report['pairs']} pairs"]
    for title, counts in (
        ("groups left out", report["groups"]["reasons"]),
        ("clips left out", report["candidates"]["reasons"]),
    ):
        lines += [f"  {title}: {n:4d}  {reason}" for reason, n in counts.items()]
    for name, values in report["quantiles"].items():
        if values:
            lines.append(f"  {name}: " + "  ".join(f"{v:.3g}" for v in values) + "  (least, quartiles, most)")
    lines += [f"  {name} prefers the winner in {share:.0%} of the pairs" for name, share in report["agreement"].items()]
    return "\n".join([*lines, f"  contact sheet: {report['contact_sheet']}"])


def _candidate_rejection(name: str, scores: Scores, weights: Mapping[str, float], limits: Limits) -> Rejection | None:
    record = scores.records.get(name)
    if record and (why := pair_filters.of_candidate(record, limits)):
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
    return pair_filters.of_pair(winner, loser, limits)


def _limits(args) -> Limits:
    low, high = args.motion_ratio
    shares = {"--max_lost": args.max_lost, "--min_parallax_ratio": args.min_parallax_ratio, "--min_margin": args.min_margin}
    for flag, value in shares.items():
        if not value >= 0:
            raise ValueError(f"{flag} must be 0 or more, got {value}")
    if not 0 <= low <= high:
        raise ValueError(f"--motion_ratio {low:g} {high:g}: expected 0 <= LOW <= HIGH")
    if not 0 <= args.min_gap < 1:
        raise ValueError(f"--min_gap must be 0 or more and below 1, got {args.min_gap}")
    if args.max_error is not None and not args.max_error > 0:
        raise ValueError(f"--max_error must be above 0, got {args.max_error}")
    if args.pairs_per_group < 1 or args.sheet_pairs < 0 or args.jobs < 0:
        raise ValueError("--pairs_per_group must be 1 or more, --sheet_pairs and --jobs 0 or more")
    if args.frames < 5 or args.frames % 4 != 1:
        raise ValueError(f"--frames {args.frames} is not 4n+1, at least 5, as a Wan VAE needs")
    if not 0 < args.fps <= 1000:
        raise ValueError(f"--fps {args.fps} must be above 0 and at most 1000")
    return Limits(
        not args.keep_undetermined, (low, high), args.min_parallax_ratio, args.min_gap, args.max_error, args.max_lost,
        args.min_margin,
    )  # fmt: skip


def _pair_row(outcome: Outcome, pair: Ranked, scores: Scores, labelled: Mapping[str, float]) -> dict:
    """A line of the manifest. labelled: weights of the scorers whose own preference is a dimension of its own."""
    by_name = {c.name: c for c in outcome.group.candidates}
    a, b = by_name[pair.winner], by_name[pair.loser]
    values = {side: {s: v[c.name] for s, v in scores.values.items()} for side, c in (("a", a), ("b", b))}
    preference = "a"
    if labelled:
        own = {s: _label((values["a"][s] - values["b"][s]) * weight) for s, weight in labelled.items()}
        preference = {pairs_manifest.OVERALL: "a"} | own
    row = {"prompt": outcome.group.prompt, "a": a.path, "b": b.path, "preference": preference, "group": outcome.group.name}
    row |= {"seed_a": a.seed, "seed_b": b.seed, "scores_a": values["a"], "scores_b": values["b"], "margin": pair.margin}
    records = [scores.records.get(c.name) for c in (a, b)]
    return row | {"gap": _finite(pair_filters.gap(*records)) if None not in records else None}


def _label(lead: float) -> str:
    return "tie" if lead == 0 else "a" if lead > 0 else "b"


def _group_row(outcome: Outcome, scores: Scores, folder: Path) -> dict:
    candidates = []
    for c in outcome.group.candidates:
        record, why = scores.records.get(c.name), outcome.rejected.get(c.name)
        candidates.append({
            "candidate": c.name, "file": pairs_manifest.relative(c.path, folder), "seed": c.seed,
            "scores": {s: v[c.name] for s, v in scores.values.items() if c.name in v},
            "combined": outcome.combined.get(c.name),
            "motion": _finite(pair_filters.motion(record)) if record else None,
            "geometry": record.to_json() if record else None,
            "rejected": why._asdict() if why else None,
        })  # fmt: skip
    return {
        "group": outcome.group.name, "prompt": outcome.group.prompt,
        "pairs": [pair._asdict() for pair in outcome.taken],
        "rejected": outcome.reason._asdict() if outcome.reason else None,
        "tried": [pair._asdict() | why._asdict() for pair, why in outcome.tried], "candidates": candidates,
    }  # fmt: skip


def _report(outcomes: Sequence[Outcome], rows: Sequence[dict], scores: Scores, weights, limits: Limits) -> dict:
    candidates = [why.filter for o in outcomes for why in o.rejected.values()]
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
            "all": len(outcomes), "with a pair": sum(bool(o.taken) for o in outcomes),
            "reasons": dict(Counter(o.reason.filter for o in outcomes if o.reason).most_common()),
        },
        "candidates": {
            "all": sum(len(o.group.candidates) for o in outcomes), "reasons": dict(Counter(candidates).most_common()),
        },
        "pairs": len(rows),
        "pairs passed over": dict(Counter(why.filter for o in outcomes for _, why in o.tried).most_common()),
        "quantiles": {
            "gap": quantiles([r["gap"] for r in rows if r["gap"] is not None]),
            "margin": quantiles([r["margin"] for r in rows]),
        },
        "agreement": {k: v for k, v in agreement.items() if v is not None},
        "skipped": {s: found for s, found in scores.skipped.items() if found},
    }  # fmt: skip


def quantiles(values: Sequence[float]) -> list[float]:
    """Least, quartiles and most of values, interpolated; none of none."""
    if not values:
        return []
    ordered = sorted(values)
    at = [q * (len(ordered) - 1) for q in QUANTILES]
    return [ordered[int(p)] + (p - int(p)) * (ordered[math.ceil(p)] - ordered[int(p)]) for p in at]


def _write_sheet(args, outcomes: Sequence[Outcome], scores: Scores) -> str:
    """What became of the contact sheet, in a few words."""
    path = args.output / SHEET
    path.unlink(missing_ok=True)
    shown = [(o.group, pair) for o in outcomes for pair in o.taken][: args.sheet_pairs]
    if not shown:
        return "left out: no pairs to show"
    unseen = [c.path for g, pair in shown for c in g.candidates if c.video is None and c.name in (pair.winner, pair.loser)]
    if unseen and args.vae is None:
        return f"left out: {unseen[0].name} is latents, and without --vae there is no picture of them"
    sheet = pairs_sheet.draw(shown, scores, pair_scores.vae_of(args) if unseen else None)
    write_atomic(path, lambda partial: sheet.save(partial, format="PNG"))
    return SHEET


def _share(answers: Sequence[bool]) -> float | None:
    return sum(answers) / len(answers) if answers else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value
