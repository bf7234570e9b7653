"""Scores clips by geometric consistency: from point tracks, or from depth and poses for clips that --geometry has files of.

OUTPUT/scores.jsonl has a line for each clip, written as soon as it is scored:

  {"video": relative name, "file": [bytes, time of change], "geometry": null or [name, bytes, time of change],
   "settings": digest, "seconds": s, "notes": [...], "record": {...}}       or "skipped": reason instead of "record"

"record" is a GeometryRecord (kernels.geometry.record): score (0 to 1, higher is better), verdict, measurements with an
"error" (lower is better), per-frame errors. A clip is read at its own frame rate. A second run scores skipped clips, and
clips whose video or geometry file changed. report.json has the counts.

Processes of `accelerate launch` or torchrun share the clips; so do those of a job array with --shard_index and --shard_count,
which write scores-IIIII-of-NNNNN.jsonl. When all have, the same command with --merge writes scores.jsonl and report.json.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from ..kernels.geometry.record import UNDETERMINED
from ..kernels.video.sizes import BUCKETS
from ..running import results_log, shares
from ..running.identity import digest_of
from ..running.inputs import describe, expand
from ..running.output import provenance, require_output_folder
from ..running.progress import Bar
from ..scorers import depth_files
from ..scorers.geometry_files import BACKENDS, MAX_JOBS, GeometrySettings, ScoringError, Task, is_current, load_lpips, results
from ..video.read import VIDEO_SUFFIXES

SCORES, REPORT = "scores.jsonl", "report.json"
COLUMNS = ("error", "residual", "noise", "parallax", "moving", "motion", "lost", "mse", "depth_error")


def add_arguments(parser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--videos", nargs="+", required=True, metavar="DIR_OR_GLOB", help="files, folders, patterns")
    files.add_argument("--output", required=True, type=Path, metavar="DIR", help="for scores.jsonl and report.json")
    files.add_argument(
        "--geometry", type=Path, metavar="DIR", help="depth and poses: NAME.npz or NAME.safetensors for a clip NAME.mp4"
    )
    files.add_argument(
        "--lpips", nargs="+", default=(), metavar="FILE", help="LPIPS (VGG) weights, one file or two, used with --geometry"
    )
    files.add_argument("--overwrite", action="store_true", help="delete the results of an earlier run in --output")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--frames", type=int, default=81, help="at most, from the start of each clip (default 81)")
    clips.add_argument("--size", choices=list(BUCKETS), help="scale and crop to this size first (default: as it is)")
    compute = parser.add_argument_group("computing")
    compute.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: OpenCV where it is installed")
    compute.add_argument("--jobs", type=int, default=0, help=f"processes (default: as many as cores, {MAX_JOBS} at most)")
    shares.add_arguments(compute)


def run(args) -> int:
    settings = settings_of(args)
    require_output_folder(args.output)
    left_out: Counter = Counter()
    clips = expand(args.videos, VIDEO_SUFFIXES, "videos", left_out)
    tasks = {name: Task(name, path, settings, _geometry(args.geometry, name)) for name, path in clips.items()}
    if args.geometry is not None and not any(t.geometry for t in tasks.values()):
        raise ScoringError(
            f"{args.geometry}: no file for any of the {len(tasks)} clips; expected such as "
            f"{Path(next(iter(tasks))).with_suffix('.npz')}"
        )
    # The scorers compute on the CPU, on whatever machine.
    share, _ = shares.begin(args, "cpu")
    if share.is_main and left_out:
        print(describe(left_out, "videos"), file=sys.stderr)
    with share:
        return _run(args, tasks, settings.described(), share)


def _run(args, tasks: dict[str, Task], described: dict, share: shares.Share) -> int:
    args.output.mkdir(parents=True, exist_ok=True)
    scores, report = args.output / SCORES, args.output / REPORT
    if args.overwrite:
        shares.remove(scores, share)
        if share.index == 0:
            report.unlink(missing_ok=True)
    digest = digest_of(described)
    known = {} if args.overwrite else _known(scores)
    _require_same(known, digest, described, args.output)
    if not args.merge:
        _score(args, tasks, known, described, share)
    if args.merge or not share.whole:
        share.wait()
        if not share.finishes:
            if share.context is None:
                print(shares.done_text(share, share.path(scores), f"{len(share.of(list(tasks)))} of {len(tasks)} clips"))
            return 0
    known = _known(scores)
    done = _reached(known, tasks, digest)
    if args.merge or not share.whole:
        missing = [k for k, name in enumerate(tasks) if name not in done]
        shares.require_none(missing, len(tasks), "clips", scores, args.shard_count)
    # A clip that vanished while it was being scored has a line that is not current.
    done = {name: done.get(name) or known[name][-1] for name in tasks}
    _write_report(report, tasks, done, described, args)
    # A clip that was scored again has several lines, of which one counts.
    shares.settle(scores, [done.get(name) or known[name][-1] for name in sorted(known)])
    rows = [done[name] for name in tasks]
    print(table(rows))
    counts = Counter(status(row) for row in rows)
    print(f"{scores}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return 1 if counts["skipped"] == len(rows) else 0


def _score(args, tasks: dict[str, Task], known: dict[str, list[dict]], described: dict, share: shares.Share) -> None:
    """Scores this share's clips that have no record yet, into its file."""
    scores, report, digest = args.output / SCORES, args.output / REPORT, digest_of(described)
    mine = {task.name: task for task in share.of(list(tasks.values()))}
    done = {name: row for name, row in _reached(known, mine, digest).items() if "record" in row}
    todo = [task for name, task in mine.items() if name not in done]
    if share.whole:
        _write_report(report, tasks, done, described, args)
    try:
        with results_log.Log(share.path(scores)) as log, Bar("scoring", len(todo), "clip", share.is_main) as bar:
            with closing(results(todo, args.jobs)) as rows:
                for row in rows:
                    log.add(row | {"settings": digest})
                    bar.add()
    except (KeyboardInterrupt, ScoringError) as e:
        reached = _reached(_known(scores), mine, digest)
        if share.whole:
            _write_report(report, tasks, reached, described, args)
        said = f"{len(reached)} of {len(mine)} clips done; run the same command again to go on"
        raise type(e)(f"{e}; {said}" if str(e) else said) from e


def settings_of(args) -> GeometrySettings:
    """Raises ValueError or FileNotFoundError for arguments or LPIPS files that cannot be used."""
    if args.frames < 3:
        raise ValueError(f"--frames must be 3 or more, got {args.frames}")
    if args.jobs < 0:
        raise ValueError(f"--jobs must be 0 (as many as cores) or more, got {args.jobs}")
    if args.geometry is not None and not args.geometry.is_dir():
        raise FileNotFoundError(f"{args.geometry}: no such folder of geometry")
    if args.size and args.geometry is not None:
        raise ValueError("--size does not go with --geometry: a cropped picture needs geometry of its own")
    if args.lpips and args.geometry is None:
        raise ValueError("--lpips is used with --geometry only: reprojection needs depth and poses")
    if args.lpips:
        # Weights that cannot be loaded concern every clip.
        load_lpips(tuple(args.lpips))
    return GeometrySettings(args.frames, args.size, args.backend, tuple(args.lpips))


def _known(scores: Path) -> dict[str, list[dict]]:
    """{clip: its rows in all files}, the newest of one file last."""
    known: dict[str, list[dict]] = defaultdict(list)
    for row in shares.rows(scores):
        if "video" in row:
            known[row["video"]].append(row)
    return known


def _reached(known: dict[str, list[dict]], tasks: dict[str, Task], digest: str) -> dict[str, dict]:
    """{clip: its current row, with a record if there is one}, of the clips that have a current one."""
    found = {}
    for name, task in tasks.items():
        current = [row for row in known.get(name, ()) if is_current(row, task, digest)]
        if current:
            found[name] = next((row for row in reversed(current) if "record" in row), current[-1])
    return found


def status(row: dict) -> str:
    """A row's verdict, or "skipped"."""
    return row["record"]["verdict"] if "record" in row else "skipped"


def table(rows: Sequence[dict]) -> str:
    """One line per clip: verdict, score and the measurements that any clip has; then the reasons of skipped clips."""
    scored = [r for r in rows if "record" in r]
    shown = [c for c in COLUMNS if any(r["record"]["measurements"].get(c) is not None for r in scored)]
    lines = [("clip", "scorer", "verdict", "score", *shown)]
    for row in scored:
        record = row["record"]
        figures = [record["measurements"].get(c) for c in shown]
        score = "-" if record["verdict"] == UNDETERMINED else f"{record['score']:.3f}"
        cells = ["-" if v is None else f"{v:.4g}" for v in figures]
        lines.append((row["video"], record["scorer"], record["verdict"], score, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([*(text if scored else []), *(f"skipped: {r['skipped']}" for r in rows if "skipped" in r)])


def _geometry(folder: Path | None, name: str) -> Path | None:
    return depth_files.find(folder, name) if folder is not None else None


def _require_same(known: dict[str, list[dict]], digest: str, described: dict, output: Path) -> None:
    if all(row.get("settings") == digest for rows in known.values() for row in rows):
        return
    try:
        before = json.loads((output / REPORT).read_text(encoding="utf-8"))["settings"]
        differing = ", ".join(f"{k} {before.get(k)} against {v}" for k, v in described.items() if before.get(k) != v)
    except (OSError, ValueError, KeyError):
        differing = ""
    raise ScoringError(
        f"{output / SCORES}: scored with other settings{f' ({differing})' if differing else ''}; give another --output, or "
        "--overwrite to start afresh"
    )


def _write_report(path: Path, tasks: dict[str, Task], done: dict[str, dict], described: dict, args) -> None:
    counts = Counter(status(row) for row in done.values())
    report = {
        "settings": described,
        "provenance": provenance(args.argv, "trainers.geometry"),
        "totals": {"clips": len(tasks), **dict(sorted(counts.items())), "not reached": len(tasks) - len(done)},
        "skipped": {name: row["skipped"] for name, row in done.items() if "skipped" in row},
        "notes": {name: row["notes"] for name, row in done.items() if row.get("notes")},
        "seconds": round(sum(row["seconds"] for row in done.values()), 3),
    }
    write_atomic(path, lambda partial: Path(partial).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
