"""Scores of candidates on disk, each written as soon as it is known, so that a killed run continues where it stopped.

One JSON object per line:

  {"candidate", "scorer", "settings": digest, "files": [[bytes, time of change], ...], "value": number, "record": {...}}

or "skipped": reason instead of "value". A score is current while the digest of the settings and the identity of the
candidate's files (video, latents) are unchanged; skipped candidates are scored again.
"""

from dataclasses import dataclass
from pathlib import Path

from ..preferences.groups import Candidate
from ..running import results_log
from ..running.identity import identity


@dataclass
class ScoreCache:
    """known: {(candidate, scorer): row}; log: where new rows are written."""

    known: dict[tuple[str, str], dict]
    log: results_log.Log

    def find(self, candidate: Candidate, scorer: str, settings: str) -> dict | None:
        """The row of a candidate under a scorer and digest of settings, or None where it has to be scored."""
        row = self.known.get((candidate.name, scorer))
        if row is None or "skipped" in row or row.get("settings") != settings:
            return None
        return row if row.get("files") == file_identities(candidate) else None

    def add(self, candidate: Candidate, scorer: str, settings: str, found: dict) -> dict:
        """Writes and returns the row of a new score. Raises OSError."""
        row = {"candidate": candidate.name, "scorer": scorer, "settings": settings, "files": file_identities(candidate)}
        row |= found
        self.log.add(row)
        self.known[candidate.name, scorer] = row
        return row


def read_known(path: Path) -> dict[tuple[str, str], dict]:
    """{(candidate, scorer): its last row} of a file. Raises LogError for a damaged file."""
    return {(r["candidate"], r["scorer"]): r for r in results_log.read(path) if "candidate" in r and "scorer" in r}


def skipped(candidate: Candidate, e: Exception) -> dict:
    """The part of a row that states why a candidate could not be scored."""
    text = " ".join(str(e).split())
    return {"skipped": text if text.startswith(candidate.name) else f"{candidate.name}: {text}"}


def file_identities(candidate: Candidate) -> list[list[int] | None]:
    """[[bytes, time of change in ns], ...] of the candidate's video and latents, None where it has no such file."""
    return [identity(p) if p is not None else None for p in (candidate.video, candidate.latents)]
