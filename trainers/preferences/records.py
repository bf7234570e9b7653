"""Reads folders of preference records; their format is described in kernels.files.preference_records."""

import logging
from pathlib import Path

from ..kernels.files.preference_records import RECORDS, Record, RecordError, is_complete, parse_line


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


def _read_line(line: bytes, path: Path, number: int) -> Record:
    record = parse_line(line, path.parent, f"{path}, line {number}")
    missing = [c.latent for c in record.candidates if not c.latent.is_file()]
    if missing:
        raise RecordError(f"{path}, line {number}: its latents {missing[0]} are missing; restore them or remove the line")
    return record
