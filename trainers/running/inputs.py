"""Expansion of files, folders and glob patterns into a list of files, in an order that the file system does not affect."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

MAGIC = "*?["
PICTURES = {".bmp", ".exr", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class InputError(ValueError):
    """An argument names no usable file or device; the message says which and why."""


def expand(
    arguments: Iterable[str | Path], suffixes: tuple[str, ...], what: str, left_out: Counter | None = None
) -> dict[str, Path]:
    """{name relative to the folder it was found in: path}, sorted by name, each file once.

    A folder is searched recursively, through symbolic links, for files with one of `suffixes`; a file, or what a glob pattern
    matches, is taken whatever its suffix. what: plural for messages, such as "videos"; left_out: counts the other files of
    folders by suffix, without hidden ones. Raises InputError for a folder, pattern or name without files, and when two files
    would have the same name.
    """
    found: dict[str, Path] = {}
    seen: set[Path] = set()
    others: Counter = Counter()
    for argument in map(str, arguments):
        for path, root in _matches(argument, suffixes, what, others):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            name = path.relative_to(root).as_posix()
            if name in found:
                raise InputError(f"{found[name]} and {path} have the same name '{name}'; give the folder above both instead")
            found[name] = path
    if left_out is not None:
        left_out.update(others)
    return {name: found[name] for name in sorted(found)}


def describe(left_out: Counter, what: str) -> str | None:
    """One sentence on files that are no `what`, such as "videos"; None where there are none."""
    if not left_out:
        return None
    counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(left_out.items()))
    pictures = "; a sequence of pictures has to be made a video first" if PICTURES & left_out.keys() else ""
    return f"left out, no {what} by their names: {counts}{pictures}"


def _matches(argument: str, suffixes: tuple[str, ...], what: str, others: Counter) -> list[tuple[Path, Path]]:
    path = Path(argument)
    if path.is_dir():
        every = [p for p in _files_below(path) if p.name[0] != "."]
        files = sorted(p for p in every if p.suffix.lower() in suffixes)
        others.update(p.suffix.lower() for p in every if p.suffix.lower() not in suffixes)
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


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, symbolic links to folders followed, each folder once."""
    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (path for path in (Path(parent) / name for name in names) if path.is_file())


def _plain_parts(pattern: Path) -> list[str]:
    parts = []
    for part in pattern.parts[:-1]:
        if any(c in part for c in MAGIC):
            break
        parts.append(part)
    return parts
