"""Expansion of files, folders and glob patterns into a list of files, in an order that the file system does not affect."""

import glob
from collections.abc import Iterable
from pathlib import Path

MAGIC = "*?["


class InputError(ValueError):
    """An argument names no usable file or device; the message says which and why."""


def expand(arguments: Iterable[str | Path], suffixes: tuple[str, ...], what: str) -> dict[str, Path]:
    """{name relative to the folder it was found in: path}, sorted by name, each file once.

    A folder is searched recursively for files with one of `suffixes`; a file, or what a glob pattern matches, is taken
    whatever its suffix. what: plural for messages, such as "videos". Raises InputError for a folder, pattern or name
    without files, and when two files would have the same name.
    """
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    for argument in map(str, arguments):
        for path, root in _matches(argument, suffixes, what):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            name = path.relative_to(root).as_posix()
            if name in found:
                raise InputError(f"{found[name]} and {path} have the same name '{name}'; give the folder above both instead")
            found[name] = path
    return {name: found[name] for name in sorted(found)}


def _matches(argument: str, suffixes: tuple[str, ...], what: str) -> list[tuple[Path, Path]]:
    path = Path(argument)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file() and p.name[0] != ".")
        if not files:
            raise InputError(f"{path}: no {what} in this folder (looked for {', '.join(suffixes)})")
        return [(p, path) for p in files]
    if path.is_file():
        return [(path, path.parent)]
    if not any(c in argument for c in MAGIC):
        raise InputError(f"{path}: no such file or folder")
    root = Path(*_plain_parts(path))
    files = sorted(p for p in map(Path, glob.glob(argument, recursive=True)) if p.is_file())
    if not files:
        raise InputError(f"{argument}: this pattern matches no file")
    return [(p, root) for p in files]


def _plain_parts(pattern: Path) -> list[str]:
    parts = []
    for part in pattern.parts[:-1]:
        if any(c in part for c in MAGIC):
            break
        parts.append(part)
    return parts
