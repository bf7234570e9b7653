"""Text and its lines: a line is what ends in a line feed.

str.splitlines() also cuts at U+2028, U+0085, form feeds and others, which are part of prompts and of JSON strings.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path

# UTF-32 begins with UTF-16's mark.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class TextError(ValueError):
    """A file is not text in a known encoding; the message names the file and the place."""


def decode(data: bytes, source: str | Path) -> str:
    """Text in UTF-8, or in UTF-16 with a byte order mark, without the mark. source: the file's name. Raises TextError."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise TextError(
            f"{source}, line {line}: not text in {'UTF-16' if encoding == 'utf-16' else 'UTF-8'} ({e.reason} at byte "
            f"{e.start}); save the file as UTF-8"
        ) from e


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of the lines that are not empty, without the line feed or the CR LF at their ends."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def read_text(path: str | Path) -> str:
    """The text of a file, see `decode`. Raises TextError or OSError."""
    return decode(Path(path).read_bytes(), path)
