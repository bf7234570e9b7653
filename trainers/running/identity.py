"""Digests of files and settings, by which a resumed run detects what has changed, and copies of a file are recognised."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

# A larger file is known by its size and by BLOCKS blocks, spread evenly from its first byte to its last. That reads at most
# 8 MiB of each of many long videos. Compressed videos differ in every block, and the first and last ones hold the containers'
# indices, so that two videos of one size that agree in all blocks are one.
BLOCK, BLOCKS = 1 << 20, 8


def identity(path: Path) -> list[int]:
    """[size in bytes, modification time in ns]: differs when the file has changed. Raises OSError."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def content_digest(path: Path) -> str:
    """16 hexadecimal digits that follow from a file's content, not from its name or times. Raises OSError.

    Of the SHA-256 of the size and all bytes, or for a file above BLOCK * BLOCKS bytes of the size and BLOCKS blocks of it.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    places = range(0, size, BLOCK)
    if size > BLOCK * BLOCKS:
        places = [(size - BLOCK) * i // (BLOCKS - 1) for i in range(BLOCKS)]
    with open(path, "rb") as f:
        for place in places:
            f.seek(place)
            found.update(f.read(BLOCK))
    return found.hexdigest()[:16]


def copies(files: Mapping[str, Path]) -> dict[str, str]:
    """{name of a copy: name of the first file with its content}; only files of equal size are read. Raises OSError."""
    sizes: dict[int, list[str]] = defaultdict(list)
    for name, path in files.items():
        sizes[path.stat().st_size].append(name)
    found: dict[str, str] = {}
    for names in sizes.values():
        first: dict[str, str] = {}
        for name in names if len(names) > 1 else ():
            original = first.setdefault(content_digest(files[name]), name)
            if original != name:
                found[name] = original
    return found


def digest_of(described: dict) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of settings as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256. Raises OSError."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


def weights_identity(path: str | None) -> list | None:
    """[[name, bytes, time of change], ...] of a file or folder of weights, which are not read; None for None."""
    if path is None:
        return None
    files = sorted(Path(path).rglob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    return [[f.name, *identity(f)] for f in files]
