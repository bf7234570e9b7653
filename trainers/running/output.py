"""Output files of commands: checks before long work begins, provenance for file headers, and tables as text."""

import shlex
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..kernels.version import CREATED_BY


def require_output(path: Path, overwrite: bool, suffix: str = ".safetensors") -> None:
    """Checks, before any long work begins, that `path` can be written.

    Raises ValueError for a wrong suffix or a folder, FileExistsError without `overwrite`, OSError where writing fails.
    """
    if path.suffix != suffix:
        raise ValueError(f"{path}: the output's name must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; give another name, or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise OSError(f"{path}: cannot be written ({e.strerror or e})") from e


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


def _without_folders(argument: str) -> str:
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    hidden = path.is_absolute() or ".." in path.parts
    return flag + equals + (path.name if hidden else value)
