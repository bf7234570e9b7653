"""Appends to folders of preference records; their format is described in kernels.files.preference_records.

Several processes may append to one folder. Latents are written first. The line is then appended by a single write under an
exclusive file lock, and removed again if it was not written whole. An incomplete last line that a killed process left is
removed by the next append.
"""

import logging
import os
import time
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..kernels.files import preference_records
from ..kernels.files.preference_records import RECORDS
from ..kernels.latent_space import LatentSpace

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

# msvcrt locks a range of bytes; this one is far behind any line.
LOCKED_BYTE = 1 << 40


def append(folder: str | Path, prompt: str, latents: Tensor, space: LatentSpace, **details) -> str:
    """Adds one group of candidates to a folder, which is created if needed; returns the record's id.

    latents: normalised [N, C, T, h, w]; details: keyword arguments of preference_records.new_record. Raises RecordError or
    LatentSpaceError for arguments that do not fit, and OSError, naming the file, when it cannot be written; then no file is
    left behind.
    """
    folder = Path(folder)
    record = preference_records.new_record(folder, prompt, latents, space, **details)
    written = []
    try:
        for i, candidate in enumerate(record.candidates):
            written.append(candidate.latent)
            preference_records.write_candidate(record, i, latents[i], space)
        _append_line(folder / RECORDS, preference_records.to_line(record, folder))
    except Exception:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return record.id


def _append_line(path: Path, line: bytes) -> None:
    """Appends a line by one write, after what other processes have written. Raises OSError naming the file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        try:
            with _locked(descriptor):
                _append_whole(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as e:
        raise OSError(f"{path}: the record could not be written ({e}); nothing was added") from e


def _append_whole(descriptor: int, line: bytes) -> None:
    end, tail = _last_line(descriptor)
    if tail and not preference_records.is_complete(tail):
        os.ftruncate(descriptor, end)
    elif tail:
        # An editor may have removed the newline of the last line.
        end, line = end + len(tail), b"\n" + line
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError("only a part of the line was written")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _last_line(descriptor: int) -> tuple[int, bytes]:
    """(position after the last newline, the bytes from there to the end of the file)."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start = os.lseek(descriptor, start - step, os.SEEK_SET)
        tail = os.read(descriptor, step) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    return size - len(tail), tail


@contextmanager
def _locked(descriptor: int):
    """An exclusive lock between processes; none where the platform or the file system does not support locks."""
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
            # LK_LOCK fails after ten seconds.
            time.sleep(0.05)
