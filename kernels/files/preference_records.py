"""Candidates of one prompt on disk, with their scores, seeds and latents: what preference pairs are later built from.

A folder:

  latents/<record id>-<n>.safetensors   one candidate each, of kind "latents" (see trainers.latents.shards), normalised, with
                                        its own provenance in the header
  records.jsonl                         one group of candidates a line:

    {"version": 1, "record": id, "created": ISO time, "prompt": str, "negative": str, "model": str,
     "candidates": [{"latent": "latents/..", "seed": int or null, "scores": {name: float}, "geometry": object or null}],
     "preference": null or {"winner": i, "loser": j}}

Latents are written first and the line last, in one piece and under a lock, so that a line always finds its latents. What a
process killed in between leaves behind is latents without a line, or a line without its end, which the next append removes.
"""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from ..geometry.record import GeometryRecord
from ..latent_space import NORMALISED, LatentSpace
from ..version import CREATED_BY
from . import header as formats

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

VERSION = 1
RECORDS, LATENTS = "records.jsonl", "latents"
# msvcrt locks a range of bytes; this one is far behind any line.
LOCKED_BYTE = 1 << 40


class RecordError(ValueError):
    """Records cannot be written or read as asked; the message names the file or the argument and what was expected."""


@dataclass(frozen=True)
class Candidate:
    """One clip of a group. latent: its file; seed: None where unknown; scores: higher is better."""

    latent: Path
    seed: int | None
    scores: dict[str, float]
    geometry: GeometryRecord | None


@dataclass(frozen=True)
class Record:
    """One group of candidates for one prompt. preference: (winner, loser) by place among the candidates, or None."""

    id: str
    created: str
    prompt: str
    negative: str
    model: str
    candidates: list[Candidate]
    preference: tuple[int, int] | None


def append(
    folder: str | Path,
    prompt: str,
    latents: Tensor,
    space: LatentSpace,
    *,
    negative: str = "",
    model: str = "",
    seeds: Sequence[int | None] | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    geometry: Sequence[GeometryRecord | None] | None = None,
    preference: tuple[int, int] | None = None,
) -> str:
    """Adds one group of candidates to a folder, which is made where there is none; returns the record's id.

    latents: normalised [N, C, T, h, w]; seeds, geometry and each of scores: N values. Ids sort by time. Raises RecordError
    for arguments that do not fit, and OSError, naming the file, where the disk does not take them: then nothing is left.
    """
    folder, count = Path(folder), _require_latents(latents, space)
    seeds, geometry, scores = seeds or [None] * count, geometry or [None] * count, dict(scores or {})
    for name, values in {"seeds": seeds, "geometry": geometry, **{f"scores '{k}'": v for k, v in scores.items()}}.items():
        if len(values) != count:
            raise RecordError(f"{name}: found {len(values)} for {count} candidates, expected one for each")
    for name, values in scores.items():
        if not all(map(math.isfinite, values)):
            raise RecordError(f"scores '{name}': found {list(values)}, expected finite numbers")
    if preference is not None and not (_is_pair(preference, count)):
        raise RecordError(f"preference: found {tuple(preference)}, expected two different candidates of 0 to {count - 1}")

    record = new_id()
    common = {
        "record": record,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prompt": prompt,
        "negative": negative,
        "model": model,
    }
    candidates = [
        {
            "latent": f"{LATENTS}/{record}-{i}.safetensors",
            "seed": None if seeds[i] is None else int(seeds[i]),
            "scores": {name: float(values[i]) for name, values in scores.items()},
            "geometry": None if geometry[i] is None else geometry[i].to_json(),
        }
        for i in range(count)
    ]
    chosen = None if preference is None else {"winner": int(preference[0]), "loser": int(preference[1])}
    written = []
    try:
        for i, candidate in enumerate(candidates):
            written.append(folder / candidate["latent"])
            _write_latent(written[-1], latents[i], space, common, candidate)
        _append_line(folder / RECORDS, {"version": VERSION, **common, "candidates": candidates, "preference": chosen})
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return record


def read(folder_or_file: str | Path) -> list[Record]:
    """Every record of a folder, or of its records.jsonl, oldest first.

    A last line without an end is being written, or was when its process was killed: it is passed over with a warning. Raises
    FileNotFoundError, and RecordError, naming file and line, for whatever else is no record or names latents that are gone.
    """
    path = Path(folder_or_file)
    path = path / RECORDS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; Record Preference writes one")
    lines = path.read_bytes().split(b"\n")
    if lines[-1] and not _is_json(lines[-1]):
        logging.warning("%s: its last line has no end and is passed over", path)
        lines.pop()
    return [_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def new_id() -> str:
    """An id that sorts by time, to the microsecond, and that no other process makes."""
    now = datetime.now(timezone.utc)
    return f"{now:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(4)}"


def _require_latents(latents: Tensor, space: LatentSpace) -> int:
    if latents.ndim != 5 or 0 in latents.shape:
        raise RecordError(
            f"latents: found shape {list(latents.shape)}, expected [candidates, channels, frames, height, width]"
        )
    space.require_channels(latents, 1, "latents")
    if not bool(torch.isfinite(latents).all()):
        raise RecordError("latents: found NaN or infinite values; look at what made them (often fp16 overflow)")
    return latents.shape[0]


def _is_pair(preference, count: int) -> bool:
    winner, loser = preference
    return winner != loser and 0 <= winner < count and 0 <= loser < count


def _write_latent(path: Path, latent: Tensor, space: LatentSpace, common: dict, candidate: dict) -> None:
    own = {k: candidate[k] for k in ("seed", "scores")}
    # `video` is what trainers keep on one side of a split: the candidates of a prompt.
    entry = {"source": path.name, "video": common["record"], "frames": (latent.shape[1] - 1) * space.temporal_stride + 1}
    config = {"state": NORMALISED, "settings": {}, "clips": {path.stem: entry}, "videos": {}}
    header = formats.Header("latents", space, config, {}, {"created_by": CREATED_BY, **common, **own})
    formats.write(path, {path.stem: latent}, header)


def _append_line(path: Path, record: dict) -> None:
    """One line, in one piece, behind whatever other processes have written. Raises OSError naming the file."""
    data = json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        try:
            with _locked(descriptor):
                _append_whole(descriptor, data)
        finally:
            os.close(descriptor)
    except OSError as e:
        raise OSError(f"{path}: the record could not be written ({e}); nothing was added") from e


def _append_whole(descriptor: int, data: bytes) -> None:
    end, tail = _last_line(descriptor)
    if tail and not _is_json(tail):
        os.ftruncate(descriptor, end)
    elif tail:
        # An editor may have taken the last line's end.
        end, data = end + len(tail), b"\n" + data
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError("the disk took only a part of the line")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _last_line(descriptor: int) -> tuple[int, bytes]:
    """(where the last line that has an end ends, what follows it)."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start = os.lseek(descriptor, start - step, os.SEEK_SET)
        tail = os.read(descriptor, step) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    return size - len(tail), tail


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@contextmanager
def _locked(descriptor: int):
    """Holds other processes off while one appends; without a lock where the platform or the file system has none."""
    if fcntl is not None:
        held = _try_flock(descriptor)
        try:
            yield
        finally:
            if held:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    elif msvcrt is not None:
        _lock_byte(descriptor)
        try:
            yield
        finally:
            os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    else:
        yield


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as e:
        logging.warning("preference records: this file system has no locks (%s); let one process write at a time", e.strerror)
        return False
    return True


def _lock_byte(descriptor: int) -> None:
    while True:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            return msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
        except OSError:
            # LK_LOCK gives up after ten seconds.
            time.sleep(0.05)


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        plain = json.loads(line)
        if plain["version"] > VERSION:
            raise RecordError(f"{path}, line {number}: version {plain['version']}, this pack reads up to {VERSION}; update it")
        record = Record(
            **{k: str(plain[k]) for k in ("created", "prompt", "negative", "model")},
            id=str(plain["record"]),
            candidates=[_candidate(c, path.parent) for c in plain["candidates"]],
            preference=plain["preference"] and (int(plain["preference"]["winner"]), int(plain["preference"]["loser"])),
        )
        if record.preference and not _is_pair(record.preference, len(record.candidates)):
            raise ValueError(f"a preference {record.preference} among {len(record.candidates)} candidates")
    except RecordError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        what = f"{type(e).__name__}: {e}"
        raise RecordError(f"{path}, line {number}: damaged, or no preference record ({what}); remove the line") from e
    gone = [c.latent for c in record.candidates if not c.latent.is_file()]
    if gone:
        raise RecordError(f"{path}, line {number}: its latents {gone[0]} are gone; put them back or remove the line")
    return record


def _candidate(plain: dict, folder: Path) -> Candidate:
    geometry = plain["geometry"]
    return Candidate(
        folder / plain["latent"],
        plain["seed"],
        {str(k): float(v) for k, v in plain["scores"].items()},
        None if geometry is None else GeometryRecord.from_json(geometry),
    )
