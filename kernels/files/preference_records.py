"""Preference records: candidates of one prompt with scores, seeds and latents, from which preference pairs are built.

A folder of records holds

  latents/<record id>-<n>.safetensors   one candidate each, of kind "latents" (see latents.py), normalised, with the
                                        candidate's data in the header's provenance
  records.jsonl                         one group of candidates a line:

    {"version": 1, "record": id, "created": ISO time, "prompt": str, "negative": str, "model": str,
     "candidates": [{"latent": "latents/..", "seed": int or null, "scores": {name: float}, "geometry": object or null}],
     "preference": null or {"winner": i, "loser": j}}

A writer writes the latents first and appends the line last, so that every complete line finds its latents. A process that is
killed in between leaves latents without a line, or a last line that is incomplete.
"""

import json
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from ..geometry.record import GeometryRecord
from ..latent_space import LatentSpace
from ..version import CREATED_BY
from .header import DAMAGED
from .latents import write_latents

VERSION = 1
RECORDS, LATENTS = "records.jsonl", "latents"


class RecordError(ValueError):
    """Records cannot be written or read as asked; the message names the file or the argument and what was expected."""


@dataclass(frozen=True)
class RecordedCandidate:
    """One clip of a group. latent: path of its file; seed: None where unknown; scores: {name: value}, higher is better."""

    latent: Path
    seed: int | None
    scores: dict[str, float]
    geometry: GeometryRecord | None


@dataclass(frozen=True)
class Record:
    """One group of candidates for one prompt. preference: (winner, loser) as indices into candidates, or None."""

    id: str
    created: str
    prompt: str
    negative: str
    model: str
    candidates: list[RecordedCandidate]
    preference: tuple[int, int] | None


def new_record(
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
) -> Record:
    """A record, with a new id, of candidates whose latents are to be written in `folder`; nothing is written.

    latents: normalised [N, C, T, h, w]; seeds, geometry and each of scores: N values. Raises RecordError for arguments that
    do not fit, and LatentSpaceError for another number of channels than the space's.
    """
    count = _require_latents(latents, space)
    for name, text in {"prompt": prompt, "negative": negative, "model": model}.items():
        _require_text(text, name)
    seeds, geometry, scores = seeds or [None] * count, geometry or [None] * count, dict(scores or {})
    for name, values in {"seeds": seeds, "geometry": geometry, **{f"scores '{k}'": v for k, v in scores.items()}}.items():
        if len(values) != count:
            raise RecordError(f"{name}: found {len(values)} for {count} candidates, expected one for each")
    for name, values in scores.items():
        _require_text(name, "name of a score")
        if not all(map(math.isfinite, values)):
            raise RecordError(f"scores '{name}': found {list(values)}, expected finite numbers")
    if preference is not None and not _is_pair(preference, count):
        raise RecordError(f"preference: found {tuple(preference)}, expected two different candidates of 0 to {count - 1}")
    record = new_id()
    candidates = [
        RecordedCandidate(
            Path(folder) / LATENTS / f"{record}-{i}.safetensors",
            None if seeds[i] is None else int(seeds[i]),
            {name: float(values[i]) for name, values in scores.items()},
            geometry[i],
        )
        for i in range(count)
    ]
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    chosen = None if preference is None else (int(preference[0]), int(preference[1]))
    return Record(record, created, prompt, negative, model, candidates, chosen)


def new_id() -> str:
    """A unique id that sorts by time, with microseconds."""
    now = datetime.now(timezone.utc)
    return f"{now:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(4)}"


def write_candidate(record: Record, index: int, latent: Tensor, space: LatentSpace) -> None:
    """Writes the normalised latent [C, T, h, w] of candidate `index` to its path. Raises OSError naming the file."""
    candidate = record.candidates[index]
    path = candidate.latent
    # Trainers keep the clips of one `video` on one side of a split: here the candidates of a prompt.
    entry = {"source": path.name, "video": record.id, "frames": (latent.shape[1] - 1) * space.temporal_stride + 1}
    provenance = {"created_by": CREATED_BY, **_common(record), "seed": candidate.seed, "scores": candidate.scores}
    write_latents(path, {path.stem: latent}, space, {path.stem: entry}, provenance=provenance)


def to_line(record: Record, folder: str | Path) -> bytes:
    """The record's line in the records.jsonl of `folder`, with its newline; paths of latents become relative to the folder."""
    candidates = [
        {
            "latent": c.latent.relative_to(folder).as_posix(),
            "seed": c.seed,
            "scores": c.scores,
            "geometry": None if c.geometry is None else c.geometry.to_json(),
        }
        for c in record.candidates
    ]
    chosen = None if record.preference is None else {"winner": record.preference[0], "loser": record.preference[1]}
    values = {"version": VERSION, **_common(record), "candidates": candidates, "preference": chosen}
    return json.dumps(values, sort_keys=True, allow_nan=False).encode() + b"\n"


def parse_line(line: bytes, folder: str | Path, source: str) -> Record:
    """The inverse of `to_line`. source: file and line number, for messages.

    Raises RecordError, naming `source`, for a line that is not a record or is of a newer version.
    """
    try:
        plain = json.loads(line)
        version = plain["version"]
        record = _parsed(plain, Path(folder)) if version <= VERSION else None
    except (*DAMAGED, AttributeError) as e:
        what = f"{type(e).__name__}: {e}"
        raise RecordError(f"{source}: damaged, or not a preference record ({what}); remove the line") from e
    if record is None:
        raise RecordError(f"{source}: version {version}, this pack reads up to {VERSION}; update it")
    return record


def is_complete(line: bytes) -> bool:
    """Whether a line is valid JSON: the last line of a file may have been cut off."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read(folder_or_file: str | Path) -> list[Record]:
    """Every record of a folder, or of its records.jsonl, oldest first.

    An incomplete last line is skipped with a warning: a process is writing it, or was killed while it did. Raises
    FileNotFoundError, and RecordError, naming file and line, for any other line that is not a record and for missing latents.
    """
    path = Path(folder_or_file)
    path = path / RECORDS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the Record Preference node writes one")
    lines = path.read_bytes().split(b"\n")
    if lines[-1] and not is_complete(lines[-1]):
        logging.warning("%s: the last line is incomplete and is skipped", path)
        lines.pop()
    return [_read_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _require_latents(latents: Tensor, space: LatentSpace) -> int:
    if latents.ndim != 5 or 0 in latents.shape:
        raise RecordError(
            f"latents: found shape {list(latents.shape)}, expected [candidates, channels, frames, height, width]"
        )
    space.require_channels(latents, 1, "latents")
    if not bool(torch.isfinite(latents).all()):
        raise RecordError("latents: found NaN or infinite values; check the model that made them (often fp16 overflow)")
    return latents.shape[0]


def _is_pair(preference, count: int) -> bool:
    winner, loser = preference
    return winner != loser and 0 <= winner < count and 0 <= loser < count


def _common(record: Record) -> dict[str, str]:
    """The entries that the line and the headers of the latents share."""
    return {
        "record": record.id,
        "created": record.created,
        "prompt": record.prompt,
        "negative": record.negative,
        "model": record.model,
    }


def _parsed(plain: dict, folder: Path) -> Record:
    """Raises one of DAMAGED or AttributeError where it is none."""
    record = Record(
        **{k: str(plain[k]) for k in ("created", "prompt", "negative", "model")},
        id=str(plain["record"]),
        candidates=[_candidate(c, folder) for c in plain["candidates"]],
        preference=None if plain["preference"] is None else _chosen(plain["preference"]),
    )
    if record.preference and not _is_pair(record.preference, len(record.candidates)):
        raise ValueError(f"a preference {record.preference} among {len(record.candidates)} candidates")
    for name, text in _common(record).items():
        _require_text(text, name)
    for name in {name for c in record.candidates for name in c.scores}:
        _require_text(name, "name of a score")
    return record


def _chosen(plain: dict) -> tuple[int, int]:
    return int(plain["winner"]), int(plain["loser"])


def _require_text(text: str, name: str) -> None:
    """Raises RecordError for text with half a character, as a browser that cuts an emoji in two sends it: no file and no text
    encoder takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RecordError(f"{name}: found {text[:40]!r}, with half a character at {e.start}; write the text again") from None


def _inside(folder: Path, text: str) -> Path:
    """The path of a file in the folder. Raises ValueError for one elsewhere: records of others must not name any file."""
    path = PureWindowsPath(text)
    if path.drive or path.root or ".." in path.parts:
        raise ValueError(f"latents {text[:80]!r} are not in its folder")
    return folder / text


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a score {value}")
    return float(value)


def _candidate(plain: dict, folder: Path) -> RecordedCandidate:
    geometry = plain["geometry"]
    return RecordedCandidate(
        _inside(folder, plain["latent"]),
        None if plain["seed"] is None else int(plain["seed"]),
        {str(k): _finite(v) for k, v in plain["scores"].items()},
        None if geometry is None else GeometryRecord.from_json(geometry),
    )


def _read_line(line: bytes, path: Path, number: int) -> Record:
    record = parse_line(line, path.parent, f"{path}, line {number}")
    missing = [c.latent for c in record.candidates if not c.latent.is_file()]
    if missing:
        raise RecordError(f"{path}, line {number}: its latents {missing[0]} are missing; restore them or remove the line")
    return record
