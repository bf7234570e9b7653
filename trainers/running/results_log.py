"""JSON Lines log of a long run's results: every line is synced to disk before the next result is computed.

A run that is killed loses at most the line that it was writing: an incomplete last line is dropped when the file is read.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from ..kernels.files.atomic import write_atomic


class LogError(ValueError):
    """A results file is damaged; the message names the file and the line."""


def read(path: str | Path) -> list[dict]:
    """The objects of a file in order, without an incomplete last line; [] where there is no file. Raises LogError."""
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(_whole_lines(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, expected an object")
        except ValueError as e:
            raise LogError(f"{path}, line {number}: damaged ({e}); remove the line, or start again with --overwrite") from e
        rows.append(row)
    return rows


def write(path: str | Path, rows: Iterable[dict]) -> None:
    """Replaces the file by these rows, atomically. Raises OSError."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def plain(value):
    """The value with NaN and infinite numbers, in dicts and lists too, as None: JSON has no such numbers."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """A file that rows are appended to. Opening it removes an incomplete last line. Raises OSError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_file():
            whole = len(_whole_lines(self.path))
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def add(self, row: dict) -> None:
        """Returns once the row is on disk. Raises OSError naming the file, which then holds no part of the row."""
        data, before = (json.dumps(row) + "\n").encode(), os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(data) != len(data):
                raise OSError("only part of the line was written: is the disk full?")
            os.fsync(self.file.fileno())
        except OSError as e:
            self.file.truncate(before)
            raise OSError(f"{self.path}: could not be written ({e.strerror or e})") from e


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
