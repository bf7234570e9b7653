"""Names that a user gives to folders and files in ComfyUI's output directory."""

import os
import re

import folder_paths

# No separators, no drive, no leading dot, no trailing character that Windows removes.
NAME = re.compile(r"\w(?:[\w .-]{0,98}[\w-])?")


def require_plain(name: str, source: str, what: str) -> str:
    """The name, if it is one part of a path. source: node and input; what: such as "folder". Raises ValueError."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{source}: found {name!r}, expected the name of one {what}: letters, digits, spaces, . _ and -, beginning with a "
            "letter, a digit or _"
        )
    return name


def in_output(*parts: str) -> str:
    """A path in ComfyUI's output directory."""
    return os.path.join(folder_paths.get_output_directory(), *parts)


def is_in_output(path: str) -> bool:
    """Whether a path is that of something in ComfyUI's output directory, links resolved."""
    root = os.path.realpath(folder_paths.get_output_directory())
    return os.path.realpath(path).startswith(root + os.sep)
