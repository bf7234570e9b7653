"""The manifest of preference pairs (pairs.jsonl): writing it, and reading winners and losers from it or from any table.

pairs.jsonl has a line for each pair: {"prompt", "a": winner's file, "b": loser's file, "preference": "a", or an object of
"a", "b" or "tie" by dimension, "scores_a", "scores_b": {scorer: number}, "group", "seed_a", "seed_b",
"margin", "gap"}. Files are relative to the manifest.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from ..kernels.prism.preference_loss import LOSS, TIE
from ..latents.read import list_clips
from ..running import results_log
from . import tables
from .tables import PairsError

OVERALL = "overall"
PAIRS = "pairs.jsonl"
# Comparisons of runs in a folder of training data for PRISM heads; earlier versions called that file pairs.jsonl as well.
COMPARISONS = "comparisons.jsonl"


@dataclass(frozen=True)
class PreferencePair:
    """Two clips of one prompt. scores: {"winner" or "loser": {scorer: number}}, empty where the table has none."""

    prompt: str
    winner: Path
    loser: Path
    scores: dict[str, dict[str, float]]


def read(path: str | Path, root: str | Path | None = None, dimension: str | None = None) -> list[PreferencePair]:
    """The decided pairs of a manifest, a table or a folder of preference records, in order; ties are left out.

    dimension: by which one is the winner; None: "overall" where there is such a one, else the only one. Raises PairsError,
    RecordError or FileNotFoundError.
    """
    # Columns of a .csv are not guessed: one with a name of its own counts if it is asked for.
    pairs = tables.read(path, root, None if dimension is None else [dimension])
    known = sorted({d for p in pairs for d in p.outcome})
    if dimension is None:
        dimension = OVERALL if OVERALL in known else known[0]
        if dimension != OVERALL and len(known) > 1:
            raise PairsError(f"{path}: has the dimensions {', '.join(known)}; name the one that decides")
    if dimension not in known:
        raise PairsError(f"{path}: no dimension '{dimension}'; it has {', '.join(known)}")
    found = []
    for pair in pairs:
        outcome = pair.outcome.get(dimension, TIE)
        if outcome == TIE:
            continue
        sides, names = (pair.a, pair.b), ("a", "b")
        if outcome == LOSS:
            sides, names = sides[::-1], names[::-1]
        scores = {role: pair.scores[n] for role, n in zip(("winner", "loser"), names, strict=True) if n in pair.scores}
        found.append(PreferencePair(pair.prompt, *sides, scores))
    return found


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of pairs: its first line has "preference"; False where there is no such file."""
    return "preference" in _first_row(path)


def is_comparisons(path: Path) -> bool:
    """Whether a file has comparisons of runs as `trainers.prism` writes them: its first line has "outcome"."""
    return "outcome" in _first_row(path)


def require_no_foreign(folder: Path) -> None:
    """Raises PairsError for a folder of training data for PRISM heads: `pairs build` would replace some of its files.

    Raises FormatError or InputError for a damaged latents-*.safetensors in it.
    """
    for name in (COMPARISONS, PAIRS):
        if is_comparisons(folder / name):
            raise PairsError(
                f"{folder / name}: comparisons of runs, written by `python -m trainers.prism`; give another --output to "
                "`python -m trainers.pairs build`"
            )
    for path in sorted(folder.glob("latents-*.safetensors")):
        # `collect` writes latents before there are comparisons.
        if any("run" in (ref.entry or {}) for ref in list_clips([path], noisy_states=True)):
            raise PairsError(
                f"{path}: latents of runs, written by `python -m trainers.prism`; give another --output to "
                "`python -m trainers.pairs build`"
            )


def write(path: Path, rows: Iterable[dict]) -> None:
    """Writes all rows, whose "a" and "b" are Paths, atomically. Raises OSError."""
    results_log.write(path, [row | {side: relative(row[side], path.parent) for side in "ab"} for row in rows])


def write_report(path: Path, report: dict) -> None:
    """Writes a JSON object atomically. Raises OSError."""
    text = json.dumps(report, indent=1) + "\n"
    write_atomic(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def relative(file: Path, folder: Path) -> str:
    """The path of a file relative to a folder, so that both can be moved together; absolute on another Windows drive."""
    try:
        # ".." after a symbolic link leads elsewhere, so folders are resolved; the file itself may be a link.
        return Path(os.path.relpath(file.parent.resolve() / file.name, folder.resolve())).as_posix()
    except ValueError:
        return file.resolve().as_posix()


def _first_row(path: Path) -> dict:
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as f:
        line = f.readline()
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
