"""Preference records (kernels.files.preference_records) of collected runs, which `pairs build` and `dpo cache` read.

A record's id follows from the prompt and the settings, so that candidates can be written prompt by prompt, by any process; the
lines are written last, all at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from ..kernels.files import header as file_header
from ..kernels.files import preference_records as records
from ..kernels.files.atomic import write_atomic
from ..kernels.files.preference_records import Record, RecordedCandidate
from ..running.identity import digest_of


def record_of(folder: Path, runs: Path, prompts: Mapping[str, str], negative: str, model: str) -> Record:
    """The record, for `folder`, of the finished runs in a file of `collect`, by its header. prompts: {key: text}."""
    header = file_header.read_header(runs, "latents")
    finished = sorted((c for c in header.config["clips"].values() if c["sigma"] is None), key=lambda c: c["seed"])
    key = finished[0]["prompt"]
    name = digest_of({"prompt": key, "settings": header.config["settings"]})
    candidates = [
        RecordedCandidate(folder / records.LATENTS / f"{name}-{i}.safetensors", c["seed"], c.get("scores", {}), None)
        for i, c in enumerate(finished)
    ]
    return Record(name, header.provenance["created"], prompts.get(key, key), negative, model, candidates, None)


def write_candidates(record: Record, runs: Path) -> None:
    """Writes the latents of a record's candidates that are not there yet. Raises OSError."""
    missing = [i for i, c in enumerate(record.candidates) if not c.latent.is_file()]
    if not missing:
        return
    header = file_header.read_header(runs, "latents")
    names = {c["seed"]: key for key, c in header.config["clips"].items() if c["sigma"] is None}
    with safe_open(runs, framework="pt") as f:
        for i in missing:
            records.write_candidate(record, i, f.get_tensor(names[record.candidates[i].seed]), header.latent_space)


def write_lines(folder: Path, found: Sequence[Record]) -> None:
    """Writes the records' lines, after those of other records in the folder, atomically. Raises OSError or RecordError."""
    own = {record.id for record in found}
    lines = [line for name, line in _lines(folder) if name not in own]
    lines += [records.to_line(record, folder) for record in found]
    write_atomic(folder / records.RECORDS, lambda partial: Path(partial).write_bytes(b"".join(lines)))


def require_usable(folder: Path) -> None:
    """Raises RecordError before any long work for a folder whose records.jsonl is damaged."""
    if folder.is_file():
        raise records.RecordError(f"{folder}: is a file; --records needs a folder")
    _lines(folder)


def _lines(folder: Path) -> list[tuple[str, bytes]]:
    """(id, line) of each record. Raises RecordError for a line that is none."""
    path, found = folder / records.RECORDS, []
    if path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if line.strip():
                found.append((records.parse_line(line, folder, f"{path}, line {number}").id, line.rstrip(b"\n") + b"\n"))
    return found
