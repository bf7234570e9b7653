"""Scores of candidates on disk, each written as soon as it is known, so that a killed run continues where it stopped.

One JSON object per line:

  {"candidate", "scorer", "settings": digest, "files": [[bytes, time of change], ...], "value": number, "record": {...}}

or "skipped": reason instead of "value". A score is current while the digest of the settings and the identity of the
candidate's files (video, latents) are unchanged; skipped candidates are scored again. With several processes, each writes a
file of its own and all are read (trainers.running.shares).
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..preferences.groups import Candidate, Group
from ..running import results_log
from ..running.identity import identity

Known = dict[tuple[str, str], list[dict]]


@dataclass
class ScoreCache:
    """known: {(candidate, scorer): its rows, the newest last}; log: where new rows are written; None: nothing is scored, and
    candidates without a row are collected in `missing`; groups: all of the run, also those that other processes score;
    shown: whether this process shows progress."""

    known: Known
    log: results_log.Log | None
    groups: Sequence[Group]
    shown: bool = True
    missing: set[str] = field(default_factory=set)

    def find(self, candidate: Candidate, scorer: str, settings: str) -> dict | None:
        """The row of a candidate under a scorer and digest of settings, or None where it has to be scored."""
        rows = [r for r in self.known.get((candidate.name, scorer), ()) if r.get("settings") == settings]
        rows = rows and [r for r in rows if r.get("files") == file_identities(candidate)]
        scored = [r for r in rows if "skipped" not in r]
        if scored:
            return scored[-1]
        if self.log is not None:
            return None
        if rows:
            return rows[-1]
        self.missing.add(candidate.name)
        return {"candidate": candidate.name, "scorer": scorer, "skipped": f"{candidate.name}: not scored"}

    def add(self, candidate: Candidate, scorer: str, settings: str, found: dict) -> dict:
        """Writes and returns the row of a new score. Raises OSError."""
        row = {"candidate": candidate.name, "scorer": scorer, "settings": settings, "files": file_identities(candidate)}
        row |= found
        self.log.add(row)
        self.known[candidate.name, scorer].append(row)
        return row


def known_of(rows: Iterable[dict]) -> Known:
    """{(candidate, scorer): its rows} in the order of the rows of files."""
    known: Known = defaultdict(list)
    for row in rows:
        if "candidate" in row and "scorer" in row:
            known[row["candidate"], row["scorer"]].append(row)
    return known


def sorted_rows(known: Known) -> list[dict]:
    """All rows, sorted; of several for the same candidate, scorer, settings and files, one that has a score and is newest."""
    newest: dict[tuple[str, ...], dict] = {}
    for (candidate, scorer), rows in known.items():
        for row in rows:
            key = (candidate, scorer, str(row.get("settings")), json.dumps(row.get("files")))
            if "skipped" not in row or "skipped" in newest.get(key, row):
                newest[key] = row
    return [newest[key] for key in sorted(newest)]


def skipped(candidate: Candidate, e: Exception) -> dict:
    """The part of a row that states why a candidate could not be scored."""
    text = " ".join(str(e).split())
    return {"skipped": text if text.startswith(candidate.name) else f"{candidate.name}: {text}"}


def file_identities(candidate: Candidate) -> list[list[int] | None]:
    """[[bytes, time of change in ns], ...] of the candidate's video and latents, None where it has no such file."""
    return [identity(p) if p is not None else None for p in (candidate.video, candidate.latents)]
