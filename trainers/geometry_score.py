"""Scores clips by the consistency of their geometry: without any weights, or from depth and poses where --geometry has them.

OUTPUT/scores.jsonl has a line for each clip, written as soon as it is scored:

  {"video": relative name, "file": [bytes, time of change], "geometry": null or [name, bytes, time of change],
   "settings": digest, "seconds": s, "notes": [...], "record": {...}}       or "skipped": reason instead of "record"

"record" is kernels.geometry.record's: score (0 to 1, higher is better), verdict, measurements with an "error" (lower is
better), per-frame errors. A clip is read frame by frame at its own rate. Run again, clips that are scored are not scored
anew unless their file or their geometry changed; skipped ones are tried again. report.json has the counts.
"""

import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from . import geometry_files, geometry_log
from .buckets import BUCKETS, nearest_bucket
from .inputs import expand
from .kernels.atomic import write_atomic
from .kernels.geometry import dense, lpips, tracks
from .kernels.geometry.record import UNDETERMINED, VERSIONS, GeometryRecord
from .progress import Bar
from .shell_lcc_files import provenance
from .video import SUFFIXES, Reading, Source, VideoError, read_windows
from .wan_vae import file_digest

SCORES, REPORT = "scores.jsonl", "report.json"
BACKENDS = ("auto", "torch", "opencv")
MAX_JOBS = 4
# More than any video has, so that each is taken at its own rate.
OWN_RATE = 1000.0
COLUMNS = ("error", "residual", "parallax", "motion", "lost", "mse", "depth_error")


class ScoringError(ValueError):
    """The scoring cannot go on; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What decides a clip's figures. size: of trainers.buckets, None: as it is; lpips: paths of its one or two files."""

    frames: int = 81
    size: str | None = None
    backend: str = "auto"
    lpips: tuple[str, ...] = ()

    def described(self) -> dict:
        return asdict(self) | {"lpips": [file_digest(Path(p)) for p in self.lpips], "versions": VERSIONS}


@dataclass(frozen=True)
class Task:
    """One clip to be scored."""

    name: str
    path: Path
    settings: Settings
    geometry: Path | None = None


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
    files.add_argument("--overwrite", action="store_true", help="forget what an earlier run left in --output")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--frames", type=int, default=81, help="at most, from the start of each clip (default 81)")
    clips.add_argument("--size", choices=list(BUCKETS), help="scale and crop to this size first (default: as it is)")
    compute = parser.add_argument_group("computing")
    compute.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: OpenCV where it is installed")
    compute.add_argument("--jobs", type=int, default=0, help=f"processes (default: as many as cores, {MAX_JOBS} at most)")


def run(args) -> int:
    settings = settings_of(args)
    clips = expand(args.videos, SUFFIXES, "videos")
    tasks = {name: Task(name, path, settings, _geometry(args.geometry, name)) for name, path in clips.items()}
    if args.geometry is not None and not any(t.geometry for t in tasks.values()):
        raise ScoringError(
            f"{args.geometry}: no file for any of the {len(tasks)} clips; expected such as "
            f"{Path(next(iter(tasks))).with_suffix('.npz')}"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    scores, report = args.output / SCORES, args.output / REPORT
    if args.overwrite:
        scores.unlink(missing_ok=True)
        report.unlink(missing_ok=True)
    described = settings.described()
    digest = digest_of(described)
    known = _known(scores)
    _require_same(known.values(), digest, described, args.output)
    done = {name: row for name, row in _reached(known, tasks, digest).items() if "record" in row}
    todo = [task for name, task in tasks.items() if name not in done]
    _write_report(report, tasks, done, described, args)
    try:
        with geometry_log.Log(scores) as log, Bar("scoring", len(todo), "clip") as bar:
            with closing(results(todo, args.jobs)) as rows:
                for row in rows:
                    log.add(row | {"settings": digest})
                    bar.add()
    except (KeyboardInterrupt, ScoringError) as e:
        reached = _reached(_known(scores), tasks, digest)
        _write_report(report, tasks, reached, described, args)
        said = f"{len(reached)} of {len(tasks)} clips done; run the same command again to go on"
        raise type(e)(f"{e}; {said}" if str(e) else said) from e
    known = _known(scores)
    done = {name: known[name] for name in tasks}
    _write_report(report, tasks, done, described, args)
    # A clip scored anew has two lines by now, of which the last counts.
    geometry_log.write(scores, [known[name] for name in sorted(known)])
    rows = [done[name] for name in tasks]
    print(table(rows))
    counts = Counter(status(row) for row in rows)
    print(f"{scores}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return 1 if counts["skipped"] == len(rows) else 0


def settings_of(args) -> Settings:
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
        # What is wrong with it is wrong with every clip.
        _lpips(tuple(args.lpips))
    return Settings(args.frames, args.size, args.backend, tuple(args.lpips))


def digest_of(described: dict) -> str:
    """16 hexadecimal digits of settings."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def identity(path: Path) -> list[int]:
    """What changes when a file does: bytes and time of change in ns."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def is_current(row: dict | None, task: Task, digest: str) -> bool:
    """Whether a row is of this task: with these settings, of these files."""
    if row is None or row.get("settings") != digest:
        return False
    return row.get("file") == identity(task.path) and row.get("geometry") == _geometry_identity(task)


def results(tasks: Sequence[Task], jobs: int, work: Callable[[Task], dict] | None = None) -> Iterator[dict]:
    """Rows of tasks as they are done, in no order; jobs: processes, 0 for as many as cores. Raises ScoringError."""
    work = work or score_file
    jobs = min(jobs or min(os.cpu_count() or 1, MAX_JOBS), max(len(tasks), 1))
    if jobs == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin_worker) as pool:
        waiting, running, started = iter(tasks), set(), set()
        try:
            while started := {pool.submit(work, task) for task in islice(waiting, jobs - len(running))} | running:
                finished, running = wait(started, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        except KeyboardInterrupt:
            # What is at hand is finished and kept; a second Ctrl-C does not wait for it.
            yield from (future.result() for future in started)
            raise
        except BrokenProcessPool as e:
            raise ScoringError("a process was ended from outside, perhaps for want of memory; give fewer --jobs") from e


def score_file(task: Task) -> dict:
    """One clip's row; a clip that cannot be scored gives a row with the reason. Raises ImportError for a missing backend."""
    started, source = time.perf_counter(), Source(task.name)
    row = {"video": task.name, "file": None, "geometry": None}
    try:
        row |= {"file": identity(task.path), "geometry": _geometry_identity(task)}
        record = score(task, source)
        row["record"] = record.to_json()
    except (VideoError, ValueError, OSError) as e:
        text = " ".join(str(e).split())
        row["skipped"] = text if text.startswith(task.name) else f"{task.name}: {text}"
    return row | {"notes": source.notes, "seconds": round(time.perf_counter() - started, 3)}


def score(task: Task, source: Source) -> GeometryRecord:
    """Raises VideoError, GeometryError, FormatError or OSError for a clip that cannot be scored."""
    settings = task.settings
    if task.geometry is None:
        return tracks.score_clip(read_frames(task.path, settings, source), settings.backend, pictures=False).record
    saved = geometry_files.read(task.geometry)
    frames = read_frames(task.path, settings, source, max(saved.frames, 1))
    views = geometry_files.views_of(saved, frames)
    return dense.score_views(views, _lpips(settings.lpips) if settings.lpips else None).record


def read_frames(path: Path, settings: Settings, source: Source, count: int | None = None) -> Tensor:
    """uint8 [T, H, W, 3], T at most `count` (default: the settings'). Raises VideoError. Fills source.notes."""
    size = settings.size
    wanted = (lambda w, h: nearest_bucket(size, w, h)) if size else (lambda w, h: (round(w), round(h)))
    # Windows of one frame: any number of frames, and none is left out to make 4n+1.
    reading = Reading(wanted, OWN_RATE, 1, 1, settings.frames if count is None else count)
    seen = Source(source.name)
    frames = torch.cat([window.frames for window in read_windows(path, reading, seen)])
    repeats = [note for note in seen.notes if "repeat their neighbour" in note]
    for note in seen.notes:
        if note not in repeats and not note.startswith("taken at its own"):
            source.note(note)
    if repeats:
        source.note(f"{len(repeats)} instants without a frame of their own were left out")
    return frames.movedim(1, -1).contiguous()


def _known(scores: Path) -> dict[str, dict]:
    return {row["video"]: row for row in geometry_log.read(scores) if "video" in row}


def _reached(known: dict[str, dict], tasks: dict[str, Task], digest: str) -> dict[str, dict]:
    return {name: known[name] for name, task in tasks.items() if is_current(known.get(name), task, digest)}


def status(row: dict) -> str:
    """A row's verdict, or "skipped"."""
    return row["record"]["verdict"] if "record" in row else "skipped"


def table(rows: Sequence[dict]) -> str:
    """A line a clip: verdict, score and the measurements that any of them has; then the reasons of skipped ones."""
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
    return geometry_files.find(folder, name) if folder is not None else None


def _geometry_identity(task: Task) -> list | None:
    return None if task.geometry is None else [task.geometry.name, *identity(task.geometry)]


def _require_same(rows, digest: str, described: dict, output: Path) -> None:
    if all(row.get("settings") == digest for row in rows):
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


@lru_cache(maxsize=1)
def _lpips(paths: tuple[str, ...]) -> lpips.Lpips:
    return lpips.load_lpips(*paths)


def _begin_worker() -> None:
    # Ctrl-C is the parent's to answer: it lets clips that are being scored finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(1)
