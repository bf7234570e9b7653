"""Atomic file writing: a temporary name in the same folder, then a rename, or a hard link that never replaces a file."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: str | Path, write: Callable[[str], object]) -> None:
    """Calls write(temporary name in the same folder) and renames the result to `path`. Raises OSError."""
    path = Path(path)
    with _partial(path) as partial:
        write(partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)


def write_new(names: Iterable[str | Path], write: Callable[[str], object]) -> Path:
    """Calls write(temporary name) once and gives the result the first of `names` that no file has; returns that name.

    names: paths in one folder, at least one; an endless iterable is allowed. The name is taken after the writing, in one step
    that fails where a file exists, so processes that write at the same time never replace each other's files, and a killed
    process leaves no name taken. Raises FileExistsError where all names are taken, OSError when writing fails.
    """
    names = iter(names)
    path = Path(next(names))
    with _partial(path) as partial:
        write(partial)
        os.chmod(partial, 0o644)
        while not _take(partial, path):
            following = next(names, None)
            if following is None:
                raise FileExistsError(f"{path}: was written by another process in the meantime")
            path = Path(following)
    return path


@contextmanager
def _partial(path: Path) -> Iterator[str]:
    """A temporary name in the folder of `path`, removed at the end if it still exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        yield partial
    finally:
        Path(partial).unlink(missing_ok=True)


def _take(partial: str, path: Path) -> bool:
    """Gives the file `partial` the name `path` as well; False where that name is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links, such as exFAT: the name is taken by an empty file, which is then replaced.
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(partial, path)
    return True
