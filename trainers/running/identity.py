"""Digests of files and settings, by which a resumed run detects what has changed."""

import hashlib
import json
from pathlib import Path


def identity(path: Path) -> list[int]:
    """[size in bytes, modification time in ns]: differs when the file has changed. Raises OSError."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


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
