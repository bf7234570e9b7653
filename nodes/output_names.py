"""Names that a user gives to folders and files in ComfyUI's output directory."""

import os
import re

import folder_paths

# No separators, no drive, no leading dot, no trailing character that Windows removes.
NAME = re.compile(r"\w(?:[\w .-]{0,98}[\w-])?")
# In UTF-8. File systems take 255, of which suffixes and temporary names need some.
MOST_BYTES = 200
# Windows opens a device in the place of a file of this name, whatever its suffix.
DEVICE = re.compile(r"(?:CON|PRN|AUX|NUL|(?:COM|LPT)[0-9\u00b9\u00b2\u00b3]) *(?:\..*)?", re.IGNORECASE)


def require_plain(name: str, source: str, what: str) -> str:
    """The name, if it is one part of a path. source: node and input; what: such as "folder". Raises ValueError."""
    if not NAME.fullmatch(name) or len(name.encode()) > MOST_BYTES:
        raise ValueError(
            f"{source}: found {name[:MOST_BYTES]!r}, expected the name of one {what}: letters, digits, spaces, . _ and -, "
            f"beginning with a letter, a digit or _, up to {MOST_BYTES} bytes"
        )
    if DEVICE.fullmatch(name):
        raise ValueError(f"{source}: found {name!r}, which is a device on Windows; expected the name of one {what}")
    return name


def in_output(*parts: str) -> str:
    """A path in ComfyUI's output directory."""
    return os.path.join(folder_paths.get_output_directory(), *parts)


def is_in_output(path: str) -> bool:
    """Whether a path is that of something in ComfyUI's output directory, links resolved."""
    root = os.path.realpath(folder_paths.get_output_directory())
    try:
        return os.path.realpath(path).startswith(root + os.sep)
    except ValueError:
        # A text that no file system takes as a path.
        return False
