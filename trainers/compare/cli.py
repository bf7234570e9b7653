"""Command line of `python -m trainers.compare`: arguments, order of work and output files."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..kernels.files.atomic import write_atomic
from ..preferences.clips import ClipReader
from ..preferences.groups import Group
from ..reporting import embed
from ..running import command_line, results_log
from ..running.output import provenance, require_output_folder
from ..running.progress import Bar
from ..scorers.arguments import add_clips, add_computing, add_scorers, check, clip_options, scoring_options
from ..scorers.cache import ScoreCache, known_of
from ..scorers.scores import OF_PROMPTS, SCORERS, CandidateScoringError, Scores, ScoringOptions, lacking, score
from ..video.read import VIDEO_SUFFIXES
from . import __doc__ as description
from . import alarms, differences, html_page, pictures, shown
from .pictures import Pictures
from .sides import Matched, SideError, known_prompts, read

CLIPS, COMPARISON, MONTAGE, SIDE_BY_SIDE, INDEX = "clips.jsonl", "comparison.json", "montage.png", "side_by_side", "index.html"
NO_PROMPTS = "no prompt is known: put NAME.txt or prompt.txt next to the clips, or give .jsonl files with prompts"


def parser() -> argparse.ArgumentParser:
    summary, _, rest = description.partition("\n\n")
    made = argparse.ArgumentParser(
        "python -m trainers.compare", description=summary, epilog=rest, formatter_class=command_line.RAW
    )
    files = made.add_argument_group("files")
    files.add_argument("--a", required=True, type=Path, metavar="DIR_OR_JSONL", help="the clips to compare with (base)")
    files.add_argument("--b", required=True, type=Path, metavar="DIR_OR_JSONL", help="the clips to be judged (tuned)")
    files.add_argument("--more", nargs="+", default=[], metavar="NAME=DIR", help="further sides, each compared with --a")
    files.add_argument("--names", nargs=2, default=["base", "tuned"], metavar=("A", "B"), help="of --a and --b (base tuned)")
    files.add_argument("--output", required=True, type=Path, metavar="DIR")
    files.add_argument("--overwrite", action="store_true", help="delete the scores of an earlier run in --output")
    by = made.add_argument_group("rewards")
    by.add_argument(
        "--by", nargs="+", choices=SCORERS, metavar="NAME",
        help=f"{', '.join(SCORERS)} (default: all whose files are given)",
    )  # fmt: skip
    add_scorers(by)
    add_clips(made.add_argument_group("clips"))
    compute = made.add_argument_group("computing")
    add_computing(compute)
    compute.add_argument("--shown", type=int, default=8, help="pairs to show as videos, evenly spaced by name (default 8)")
    compute.add_argument("--montage_pairs", type=int, default=24, help="on the montage, at most (default 24; 0: none)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; see the package's docstring."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    args.argv = argv
    try:
        return run(args)
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {command_line.sentence(e)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"error: out of memory ({command_line.sentence(e)[:200]}); give fewer --jobs or --frames", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted: {str(e) or 'run the same command again to go on'}", file=sys.stderr)
        return 130


def run(args) -> int:
    check(args)
    if args.shown < 0 or args.montage_pairs < 0:
        raise ValueError("--shown and --montage_pairs must be 0 or more")
    sources = sources_of(args)
    matched = read(sources)
    require_outside(args.output, sources)
    require_output_folder(args.output)
    options, reader = scoring_options(args), ClipReader(clip_options(args))
    rewards, unmeasured = rewards_of(args.by, matched.groups, options, reader)
    if not rewards and not all(pictures.has_pictures(c, reader) for g in matched.groups for c in g.candidates):
        reasons = "; ".join(f"{name}: {why}" for name, why in unmeasured.items())
        raise SideError(f"nothing can be compared: {reasons}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / CLIPS
    if args.overwrite:
        path.unlink(missing_ok=True)
    with results_log.Log(path) as log:
        cache = ScoreCache(known_of(results_log.read(path)), log, matched.groups)
        found = pictures.measure(matched.groups, reader, cache)
    if not found.usable:
        print(f"none of the {len(matched.groups)} pairs can be compared; the first: {next(iter(found.left_out.values()))}")
        return 1
    scores = _scores(rewards, found.usable, options, reader, path, bool(args.by), unmeasured)
    sides = list(sources)
    results = [_result(sides, place, found, scores) for place in range(1, len(sides))]
    _write(args, sides, matched, found, scores, results, unmeasured, reader)
    for result in results:
        print(f"{result.side} against {sides[0]}, {len(found.usable)} pairs")
        for d in result.differences:
            print(f"  {d.reward:<14} {d.line(result.side)}")
        for alarm in result.alarms:
            print(f"  alarm: {alarm}")
    for name, why in unmeasured.items():
        print(f"not measured: {name}: {why}")
    for why in found.left_out.values():
        print(f"left out: {why}")
    for side, names in matched.unmatched.items():
        print(f"{len(names)} clips are only in {side}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
    print(f"{args.output / INDEX}: {len(found.usable)} pairs compared, {len(found.left_out)} left out")
    return 0


def sources_of(args) -> dict[str, Path]:
    """{side's name: folder or .jsonl}, the first being what the others are compared with. Raises ValueError."""
    found = dict(zip(args.names, (args.a, args.b), strict=True))
    if len(found) < 2:
        raise ValueError(f"--names {' '.join(args.names)}: expected two different names")
    for argument in args.more:
        name, equals, path = argument.partition("=")
        if not (equals and name and path) or name in found:
            raise ValueError(f"--more {argument}: expected NAME=DIR with a name that no other side has")
        found[name] = Path(path)
    for name in found:
        if "/" in name:
            raise ValueError(f"the side's name '{name}' must not contain '/'")
    resolved = [path.resolve() for path in found.values()]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{next(p for p in found.values() if resolved.count(p.resolve()) > 1)}: is given twice as a side")
    return found


def require_outside(output: Path, sources: dict[str, Path]) -> None:
    """Raises ValueError for an output folder inside a side: its videos would be taken for clips the next time."""
    for path in sources.values():
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--output {output}: lies in {path}, whose clips are compared; give a folder outside it")


def rewards_of(
    wanted: Sequence[str] | None, groups: Sequence[Group], options: ScoringOptions, reader: ClipReader
) -> tuple[list[str], dict[str, str]]:
    """(rewards to measure, {reward: why it cannot be measured}). Raises CandidateScoringError for one that --by names."""
    possible, unmeasured = [], {}
    for name in dict.fromkeys(wanted or SCORERS):
        asked = known_prompts(groups) if name in OF_PROMPTS else groups
        why = lacking(asked or groups, name, options, reader) or ("" if asked else NO_PROMPTS)
        if why and wanted:
            raise CandidateScoringError(why)
        if why:
            unmeasured[name] = why.removeprefix(f"--by {name} ")
        else:
            possible.append(name)
    return possible, unmeasured


def _scores(
    rewards: Sequence[str], groups: Sequence[Group], options: ScoringOptions, reader: ClipReader, path: Path, strict: bool,
    unmeasured: dict[str, str],
) -> Scores:  # fmt: skip
    """Scores by every reward; one that fails on all clips joins `unmeasured` unless `strict`."""
    found = Scores()
    for name in rewards:
        asked = known_prompts(groups) if name in OF_PROMPTS else groups
        try:
            one = score(asked, [name], options, reader, path)
        except CandidateScoringError as e:
            if strict:
                raise
            unmeasured[name] = str(e).removeprefix(f"--by {name}: ")
            continue
        found.values |= one.values
        found.skipped |= one.skipped
        found.records |= one.records
    return differences.without_undetermined(found)


def _result(sides: Sequence[str], place: int, found: Pictures, scores: Scores) -> html_page.Result:
    base, side, groups = sides[0], sides[place], found.usable
    measured = []
    for reward in scores.values:
        asked = known_prompts(groups) if reward in OF_PROMPTS else groups
        measured.append(differences.of_reward(reward, asked, place, scores))
    details = differences.of_details(groups, place, found)
    motion = differences.of_motion(groups, place, scores)
    raised = alarms.of_details(details, motion, side, base) + alarms.of_rewards(measured, side, base, len(groups))
    return html_page.Result(side, measured, details, motion, raised)


def _write(
    args, sides: Sequence[str], matched: Matched, found: Pictures, scores: Scores, results: Sequence[html_page.Result],
    unmeasured: dict[str, str], reader: ClipReader,
) -> None:  # fmt: skip
    base = sides[0]
    made = html_page.page(base, results, len(found.usable), found.notes)
    report = {
        "summary": html_page.summary(base, results, len(found.usable)),
        "sides": {s: {"folder": p.name} for s, p in sources_of(args).items()}, "matched_by": matched.by,
        "pairs": len(found.usable),
        "comparisons": {r.side: _to_json(r) for r in results},
        "note": html_page.multiple(max(1, len(scores.values))), "notes": found.notes,
        "left_out": {
            "rewards": unmeasured, "pairs": found.left_out, "unmatched": matched.unmatched,
            "clips": {r: w for r, w in scores.skipped.items() if w},
        },
        "clips": {g.name: _clip_rows(g, sides, found, scores) for g in found.usable},
        "provenance": provenance(args.argv, "trainers.compare"),
    }  # fmt: skip
    _show(args, made, sides, found, scores, reader)
    html_page.pairs_table(made, found.usable, sides, scores)
    html_page.left_out_table(made, unmeasured, found.left_out, matched.unmatched)
    made.details("Settings and provenance", report["provenance"] | {"matched by": matched.by})
    text = json.dumps(report, indent=1) + "\n"
    write_atomic(args.output / COMPARISON, lambda partial: Path(partial).write_text(text, encoding="utf-8"))
    made.write(args.output / INDEX)


def _to_json(result: html_page.Result) -> dict:
    return {
        "rewards": {d.reward: d.to_json(result.side) for d in result.differences},
        "details": result.details.to_json() if result.details else None, "motion_ratio": result.motion.to_json(),
        "alarms": result.alarms,
    }  # fmt: skip


def _clip_rows(group: Group, sides: Sequence[str], found: Pictures, scores: Scores) -> dict:
    rows = {}
    for side, c in zip(sides, group.candidates, strict=True):
        rows[side] = {
            "seed": c.seed, "scores": {r: v[c.name] for r, v in scores.values.items() if c.name in v},
            "figures": found.figures.get(c.name), "change": found.change.get(c.name),
        }  # fmt: skip
    return {"prompt": group.prompt or None, "sides": rows}


def _show(args, made, sides: Sequence[str], found: Pictures, scores: Scores, reader: ClipReader) -> None:
    """Writes the montage and the videos side by side, and adds the clips to the page."""
    folder, montage = args.output / SIDE_BY_SIDE, args.output / MONTAGE
    # Videos and a montage of an earlier run would be taken for this run's.
    montage.unlink(missing_ok=True)
    for old in folder.glob("*") if folder.is_dir() else ():
        if old.suffix in (*VIDEO_SUFFIXES, ".webp"):
            old.unlink()
    visible = [g for g in found.usable if all(c.name in found.figures for c in g.candidates)]
    as_video = {g.name for g in shown.spread(visible, args.shown)}
    on_montage = {g.name for g in shown.spread(visible, args.montage_pairs)}
    todo = [g for g in visible if g.name in as_video | on_montage]
    if not todo:
        return
    if as_video:
        made.heading("Side by side")
        made.text(f"{len(as_video)} of {len(found.usable)} pairs, evenly spaced by name: no score has chosen them.")
    rows = []
    with Bar("clips to show", len(todo), "pair") as bar:
        for group in todo:
            clips = shown.frames(group, reader)
            if clips is not None:
                taken, fps = [frames for frames, _ in clips], clips[0][1]
                if group.name in on_montage:
                    rows.append(shown.montage_row(group, sides, taken))
                if group.name in as_video:
                    shown.write_side_by_side(folder, group, sides, taken, fps)
                    media = [embed.video(frames, fps) for frames in taken]
                    title = f"{group.name}: {group.prompt}" if group.prompt else group.name
                    made.clips(title, html_page.clips(group, sides, media, scores))
            bar.add()
    if rows:
        shown.write_montage(montage, rows)
