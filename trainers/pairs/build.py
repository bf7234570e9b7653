"""Scores groups of candidates, filters them, and writes winners and losers for the trainers.

Groups are subfolders of clips, or preference records (see trainers.preferences.groups). --by names the scorers and their
weights: geometry, flow_residual, prompt_gap, prism, shell_lcc, or stored:NAME for a score that came with a record (a negative
weight where lower is better). Each score is standardised within its group before the weighted mean is taken.

The best clip of a group is paired with its worst; where a filter rejects that pair, the pair with the next largest difference
is tried, until one passes. OUTPUT gets

  pairs.jsonl         the manifest that the trainers read (trainers.preferences.manifest)
  groups.jsonl        every group with its candidates, their scores, motion and verdict, and why each was left out
  report.json         settings, counts of groups, pairs and reasons, quantiles of the gaps, how often each scorer agrees
  contact_sheet.png   the pairs side by side
  candidates.jsonl    scores, each written as soon as it is known: a killed run continues from there, and other weights or
                      filters need no new scores

Processes of `accelerate launch` or torchrun share the groups; so do those of a job array with --shard_index and
--shard_count, which only score, into candidates-IIIII-of-NNNNN.jsonl. When all have, the same command with --merge chooses.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from ..preferences import groups as candidate_groups
from ..preferences import manifest
from ..preferences.clips import ClipReader
from ..running import results_log, shares
from ..running.output import provenance, require_output_folder
from ..scorers.arguments import add_clips, add_computing, add_scorers, check, clip_options, scoring_options
from ..scorers.scores import SCORERS, STORED, Scores, gather, require_possible, score
from . import contact_sheet
from .choose import GroupResult, choose
from .filters import Limits
from .report import group_row, pair_row, report_of, summary

CANDIDATES, GROUPS, REPORT, SHEET = "candidates.jsonl", "groups.jsonl", "report.json", "contact_sheet.png"


def add_arguments(parser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "--groups", nargs="+", required=True, metavar="DIR_OR_RECORDS", help="folders of subfolders, or records"
    )
    files.add_argument("--output", required=True, type=Path, metavar="DIR")
    files.add_argument("--overwrite", action="store_true", help="delete the scores of an earlier run in --output")
    by = parser.add_argument_group("scores")
    by.add_argument(
        "--by", nargs="+", default=["geometry=1"], metavar="NAME=WEIGHT",
        help="geometry, flow_residual, prompt_gap, prism, shell_lcc, stored:NAME, each with a weight (default geometry=1)",
    )  # fmt: skip
    add_scorers(by)
    take = parser.add_argument_group("filters (by geometry, where it is among the scores or came with the records)")
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
    take.add_argument(
        "--max_moving", type=float, default=Limits.moving, help="share of a clip that moves by itself (default 1: any)"
    )
    take.add_argument("--min_margin", type=float, default=Limits.margin, help="of combined scores, in deviations (default 0)")
    take.add_argument("--pairs_per_group", type=int, default=1, help="at most (default 1)")
    take.add_argument("--per_scorer", action="store_true", help="also label each scorer's own preference, as a dimension")
    add_clips(parser.add_argument_group("clips"))
    compute = parser.add_argument_group("computing")
    add_computing(compute)
    shares.add_arguments(compute)
    compute.add_argument("--sheet_pairs", type=int, default=24, help="on the contact sheet, at most (default 24; 0: no sheet)")


def run(args) -> int:
    weights, limits = weights_of(args.by), limits_of(args)
    require_output_folder(args.output)
    share, device = shares.begin(args, args.device)
    args.device = str(device)
    with share:
        return _run(args, weights, limits, share)


def _run(args, weights: dict[str, float], limits: Limits, share: shares.Share) -> int:
    options, reader = scoring_options(args), ClipReader(clip_options(args))
    groups = candidate_groups.read(args.groups)
    require_possible(groups, weights, options, reader)
    manifest.require_no_foreign(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    candidates = args.output / CANDIDATES
    if args.overwrite:
        shares.remove(candidates, share)
    if not args.merge:
        scores = score(groups, weights, options, reader, candidates, share, args.overwrite)
    if args.merge or not share.whole:
        share.wait()
        if not share.finishes:
            if share.context is None:
                what = f"{len(share.of(groups))} of {len(groups)} groups scored"
                print(shares.done_text(share, share.path(candidates), what))
            return 0
        scores = gather(groups, weights, options, reader, candidates, args.shard_count)
    chosen = [choose(group, scores, weights, limits, args.pairs_per_group) for group in groups]
    rows = [pair_row(g, pair, scores, weights if args.per_scorer else {}) for g in chosen for pair in g.taken]
    results_log.write(args.output / GROUPS, [group_row(g, scores, args.output) for g in chosen])
    sheet_note = _write_sheet(args.output / SHEET, chosen, scores, reader, args.sheet_pairs)
    report = report_of(chosen, rows, scores, weights, limits) | {
        "contact_sheet": sheet_note, "provenance": provenance(args.argv, "trainers.pairs"),
    }  # fmt: skip
    manifest.write_report(args.output / REPORT, report)
    print(summary(report))
    path = args.output / manifest.PAIRS
    if not rows:
        # The manifest of an earlier run would be taken for this run's.
        path.unlink(missing_ok=True)
        print(f"none of the {len(groups)} groups gave a pair; {args.output / GROUPS} has the reasons")
        return 1
    manifest.write(path, rows)
    print(f"{path}: {len(rows)} pairs of {len(groups)} groups")
    return 0


def weights_of(arguments: Sequence[str]) -> dict[str, float]:
    """{scorer: weight} of arguments such as geometry=1. Raises ValueError."""
    weights: dict[str, float] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=") if "=" in argument else (argument, "=", "1")
        if name not in SCORERS and not (name.startswith(STORED) and len(name) > len(STORED)):
            raise ValueError(f"--by {argument}: unknown scorer; give {', '.join(SCORERS)} or stored:NAME")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        negative = weight < 0 and not name.startswith(STORED)
        if not math.isfinite(weight) or weight == 0 or negative or name in weights:
            raise ValueError(f"--by {argument}: expected each scorer once, with a weight above 0 (stored: ones also below)")
        weights[name] = weight
    return weights


def limits_of(args) -> Limits:
    """The filters' limits. Raises ValueError for any argument out of its range."""
    low, high = args.motion_ratio
    shares = {
        "--max_lost": args.max_lost, "--max_moving": args.max_moving, "--min_parallax_ratio": args.min_parallax_ratio,
        "--min_margin": args.min_margin,
    }  # fmt: skip
    for flag, value in shares.items():
        if not value >= 0:
            raise ValueError(f"{flag} must be 0 or more, got {value}")
    if not 0 <= low <= high:
        raise ValueError(f"--motion_ratio {low:g} {high:g}: expected 0 <= LOW <= HIGH")
    if not 0 <= args.min_gap < 1:
        raise ValueError(f"--min_gap must be 0 or more and below 1, got {args.min_gap}")
    if args.max_error is not None and not args.max_error > 0:
        raise ValueError(f"--max_error must be above 0, got {args.max_error}")
    if args.pairs_per_group < 1 or args.sheet_pairs < 0:
        raise ValueError("--pairs_per_group must be 1 or more, --sheet_pairs 0 or more")
    check(args)
    return Limits(
        not args.keep_undetermined, (low, high), args.min_parallax_ratio, args.min_gap, args.max_error, args.max_lost,
        args.min_margin, args.max_moving,
    )  # fmt: skip


def _write_sheet(path: Path, chosen: Sequence[GroupResult], scores: Scores, reader: ClipReader, most: int) -> str:
    """Writes the contact sheet; returns its name, or the reason why there is none."""
    path.unlink(missing_ok=True)
    shown = [(g.group, pair) for g in chosen for pair in g.taken][:most]
    if not shown:
        return "left out: no pairs to show"
    only_latents = [
        c.path for g, pair in shown for c in g.candidates if c.video is None and c.name in (pair.winner, pair.loser)
    ]
    if only_latents and reader.options.vae is None:
        return f"left out: {only_latents[0].name} is a file of latents, which only --vae can decode"
    sheet = contact_sheet.draw(shown, scores, reader)
    write_atomic(path, lambda partial: sheet.save(partial, format="PNG"))
    return SHEET
