"""Geometric consistency of clips in files: from point tracks, or from depth and poses; in several processes."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch

from ..kernels.geometry import dense, lpips, tracks
from ..kernels.geometry.record import VERSIONS, GeometryRecord
from ..kernels.video.clips import SourceReport, VideoError
from ..running.identity import file_digest, identity
from ..video.frames import read_frames
from . import depth_files

BACKENDS = ("auto", "torch", "opencv")
MAX_JOBS = 4


class ScoringError(ValueError):
    """The scoring cannot continue; the message states the reason."""


@dataclass(frozen=True)
class GeometrySettings:
    """Settings that determine a clip's record. size: of kernels.video.sizes, None: its own; lpips: one or two files."""

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
    settings: GeometrySettings
    geometry: Path | None = None


def is_current(row: dict | None, task: Task, digest: str) -> bool:
    """Whether a row was made from this task's files with these settings."""
    if row is None or row.get("settings") != digest:
        return False
    return row.get("file") == identity(task.path) and row.get("geometry") == _geometry_identity(task)


def results(tasks: Sequence[Task], jobs: int, work: Callable[[Task], dict] | None = None) -> Iterator[dict]:
    """Rows of tasks in order of completion; jobs: processes, 0 for as many as cores, MAX_JOBS at most. Raises ScoringError."""
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
            # Clips that have begun are finished and kept; a second Ctrl-C does not wait for them.
            yield from (future.result() for future in started)
            raise
        except BrokenProcessPool as e:
            raise ScoringError("a worker process was killed, possibly out of memory; give fewer --jobs") from e


def score_file(task: Task) -> dict:
    """The row of a clip, with "skipped" and the reason if it cannot be scored. Raises ImportError for a missing backend."""
    started, source = time.perf_counter(), SourceReport(task.name)
    row = {"video": task.name, "file": None, "geometry": None}
    try:
        row |= {"file": identity(task.path), "geometry": _geometry_identity(task)}
        record = score(task, source)
        row["record"] = record.to_json()
    except (VideoError, ValueError, OSError) as e:
        text = " ".join(str(e).split())
        row["skipped"] = text if text.startswith(task.name) else f"{task.name}: {text}"
    return row | {"notes": source.notes, "seconds": round(time.perf_counter() - started, 3)}


def score(task: Task, source: SourceReport) -> GeometryRecord:
    """Raises VideoError, GeometryError, FormatError or OSError for a clip that cannot be scored."""
    settings = task.settings
    if task.geometry is None:
        frames = read_frames(task.path, source, settings.frames, settings.size)
        return tracks.score_clip(frames, settings.backend, pictures=False).record
    saved = depth_files.read(task.geometry)
    frames = read_frames(task.path, source, max(saved.frames, 1), settings.size)
    views = depth_files.views_of(saved, frames)
    return dense.score_views(views, load_lpips(settings.lpips) if settings.lpips else None).record


def _geometry_identity(task: Task) -> list | None:
    return None if task.geometry is None else [task.geometry.name, *identity(task.geometry)]


@lru_cache(maxsize=1)
def load_lpips(paths: tuple[str, ...]) -> lpips.Lpips:
    return lpips.load_lpips(*paths)


def _begin_worker() -> None:
    # The parent process handles Ctrl-C: it lets clips that are being scored finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(1)
