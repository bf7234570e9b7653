"""Output files and folders of commands: checks before long work, provenance for file headers, and tables as text."""

import errno
import os
import shlex
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..kernels.version import CREATED_BY

# Bytes that must fit on the disk before a command begins.
LEAST_SPACE = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_output(path: Path, overwrite: bool, suffix: str | None = ".safetensors") -> None:
    """Checks, before any long work begins, that `path` can be written.

    suffix: None allows any. Makes the folder of `path`. Raises ValueError for a wrong suffix or a folder, FileExistsError
    without `overwrite`, and OSError as require_output_folder does.
    """
    if suffix is not None and path.suffix != suffix:
        raise ValueError(f"{path}: the output's name must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; give another name, or --overwrite")
    _require_writable(path.parent, path)
    path.parent.mkdir(parents=True, exist_ok=True)


def require_output_folder(path: Path) -> None:
    """Checks, before any long work begins, that files can be written into the folder `path`, which need not exist yet.

    Nothing is created. Raises OSError, naming `path` and what is wrong, for a file in the place of the folder or of one above
    it, for a folder that cannot be written, and for a full disk.
    """
    _require_writable(path, path)


def provenance(argv: list[str], module: str) -> dict:
    """The provenance entries of every output file. The command keeps file names, but no folder outside the working one."""
    return {
        "created_by": CREATED_BY,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m {module}", *map(shlex.quote, map(_without_folders, argv))]),
        "torch": torch.__version__,
    }


def format_table(rows: list[tuple[str, object]], title: str = "") -> str:
    """(label, value) rows as aligned text, one line each, below the title."""
    width = max((len(label) for label, _ in rows), default=0)
    lines = [f"  {label:<{width}}  {format_value(value)}" for label, value in rows]
    return "\n".join(([title] if title else []) + lines)


def format_value(value: object) -> str:
    """A float with four decimals; anything else by str()."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _require_writable(folder: Path, output: Path) -> None:
    """Writes LEAST_SPACE bytes into a file without a name in `folder`, or in the nearest folder above it that exists."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not place.is_dir():
        what = "is a link to nothing" if place.is_symlink() and not place.exists() else "is a file"
        raise NotADirectoryError(f"{output}: cannot be written: {place} {what}, expected a folder; give another name")
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(LEAST_SPACE))
            probe.flush()
    except OSError as e:
        if e.errno in FULL:
            raise OSError(f"{output}: cannot be written: no space is left in {place}; free some, or give another place") from e
        missing = "" if place == folder.absolute() else f"{folder} does not exist, and "
        raise OSError(
            f"{output}: cannot be written: {missing}{place} is not writable ({e.strerror or e}); give another place or "
            "change its permissions"
        ) from e


def _without_folders(argument: str) -> str:
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    hidden = path.is_absolute() or ".." in path.parts
    return flag + equals + (path.name if hidden else value)
