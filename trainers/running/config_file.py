"""--config FILE.toml: arguments of a command from a file, with the names of its flags; the command line comes after and wins.

    learning_rate = 1e-5
    targets = ["q", "k", "v", "o"]
    gradient_checkpointing = true
"""

from collections.abc import Sequence
from pathlib import Path

from ..kernels.files import lines

FLAG = "--config"


def add_argument(group) -> None:
    """Adds --config, which `expand` has replaced by the file's arguments before the parser sees it."""
    group.add_argument(FLAG, metavar="FILE.toml", help="arguments by the names of the flags; the command line wins")


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments with each --config FILE replaced by the file's, directly after the subcommand.

    true gives --name, false --no-name, a list its values one after the other. Raises ValueError or FileNotFoundError.
    """
    rest, added = [], []
    values = iter(argv)
    for value in values:
        if value == FLAG or value.startswith(f"{FLAG}="):
            path = value.partition("=")[2] if "=" in value else next(values, None)
            if path is None:
                raise ValueError(f"{FLAG}: expected a .toml file after it")
            added += _arguments(Path(path))
        else:
            rest.append(value)
    return [*rest[:1], *added, *rest[1:]]


def _arguments(path: Path) -> list[str]:
    try:
        import tomllib
    except ImportError as e:
        raise ValueError(f"{FLAG} needs Python 3.11 or newer; give the arguments of {path} on the command line") from e
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {FLAG} takes a .toml")
    try:
        content = tomllib.loads(lines.read_text(path))
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path}: not a TOML file ({e})") from e
    found = []
    for name, value in content.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: [{name}] is a table; expected plain entries such as learning_rate = 1e-5")
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            found += [f"--{name}", *map(str, value)]
        else:
            found.append(f"--{name}={value}")
    return found
