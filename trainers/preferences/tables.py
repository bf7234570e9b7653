"""Readers of preference tables (VideoAlign, VideoGen-RewardBench, score tables, JSON Lines, preference records) as pairs.

  .csv    VideoGen-RewardBench and VideoAlign: path_A, path_B, prompt and labels A, B or same in columns such as VQ, MQ,
          TA, Overall; or VideoFeedback-like score rows: a prompt, a video and numbers, of which all pairs of one prompt
          are formed and equal scores are ties
  .jsonl  one object per line: {"prompt", "a", "b", "preference"}, where preference is "a", "b" or "tie", or an object of
          such by dimension; or score rows as above: {"prompt", "video", "scores": {dimension: number}}
  records preference records, a folder or its records.jsonl: the preferred pair of each record, as "overall", and all its
          pairs by the candidates' scores

Paths are relative to the table's folder, or to --root.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from ..kernels.files import preference_records
from ..kernels.prism.preference_loss import LOSS, TIE, WIN

LABELS = {"a": WIN, "b": LOSS, "same": TIE, "tie": TIE}
PAIR_COLUMNS = ("path_A", "path_B", "prompt")
# Columns of pair tables that hold no labels.
PLAIN = {*PAIR_COLUMNS, "fps_A", "fps_B", "num_frames_A", "num_frames_B", "A_model", "B_model"}
PROMPT_NAMES = ("prompt", "text prompt", "caption")
VIDEO_NAMES = ("video", "video link", "path", "video_path")


class PairsError(ValueError):
    """A table cannot be used; the message names the file, the expected content and what was found."""


@dataclass(frozen=True)
class Pair:
    """Two clips of one prompt. outcome: dimension -> 1 where a is better, 0 where they tie, -1 where b is better.

    scores: {"a" or "b": {scorer: number}} where the table has them; not compared by ==.
    """

    prompt: str
    a: Path
    b: Path
    outcome: dict[str, int]
    scores: dict[str, dict[str, float]] = field(default_factory=dict, compare=False)


def read(table: str | Path, root: str | Path | None = None, dimensions: Sequence[str] | None = None) -> list[Pair]:
    """All pairs of a table, in its order. dimensions: which to keep (None: all there are).

    Raises PairsError, RecordError or FileNotFoundError. Files that a table names are not opened here: see `require_files`.
    """
    path, base = Path(table), base_of(table, root)
    if not path.is_file() and not (path / preference_records.RECORDS).is_file():
        raise FileNotFoundError(f"{path}: no such table of preferences, nor a folder of preference records")
    if path.is_dir() or path.name == preference_records.RECORDS:
        pairs = _from_records(path)
    elif path.suffix.lower() == ".csv":
        pairs = _from_csv(path, base)
    elif path.suffix.lower() == ".jsonl":
        pairs = _from_jsonl(path, base)
    else:
        raise PairsError(f"{path}: expected a .csv or .jsonl table")
    if not pairs:
        raise PairsError(f"{path}: contains no pair")
    if dimensions is not None:
        known = sorted({d for p in pairs for d in p.outcome})
        missing = [d for d in dimensions if d not in known]
        if missing:
            raise PairsError(f"{path}: no dimension '{missing[0]}'; it has {', '.join(known)}")
        kept = [replace(p, outcome={d: p.outcome[d] for d in dimensions if d in p.outcome}) for p in pairs]
        pairs = [p for p in kept if p.outcome]
    return pairs


def base_of(table: str | Path, root: str | Path | None = None) -> Path:
    """The folder that a table's paths are relative to."""
    return Path(root) if root is not None else Path(table) if Path(table).is_dir() else Path(table).parent


def require_files(pairs: Iterable[Pair], source: str) -> None:
    """Raises PairsError with the number of missing files and the name of the first."""
    missing = sorted({str(f) for p in pairs for f in (p.a, p.b) if not f.is_file()})
    if missing:
        raise PairsError(f"{source}: lists {len(missing)} files that do not exist, the first is {missing[0]}; give --root")


def require_classes(pairs: Sequence[Pair], source: str) -> None:
    """Raises PairsError for a dimension in which every pair is a tie: there is nothing to learn from it."""
    for dimension in sorted({d for p in pairs for d in p.outcome}):
        decided = {p.outcome[dimension] for p in pairs if dimension in p.outcome} - {TIE}
        if not decided:
            raise PairsError(f"{source}: in dimension '{dimension}' every pair is a tie; leave it out with --dimensions")


def of_scores(rows: Sequence[tuple[str, Path, dict[str, float]]]) -> list[Pair]:
    """All pairs of clips of one prompt from (prompt, clip, {dimension: score}), in the dimensions that both clips have."""
    groups = defaultdict(list)
    for prompt, clip, scores in rows:
        groups[prompt].append((clip, scores))
    pairs = []
    for prompt, members in groups.items():
        for (a, x), (b, y) in combinations(members, 2):
            outcome = {d: (x[d] > y[d]) - (x[d] < y[d]) for d in x if d in y}
            if outcome:
                pairs.append(Pair(prompt, a, b, outcome, {"a": x, "b": y}))
    return pairs


def _from_csv(path: Path, base: Path) -> list[Pair]:
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f)
        columns = reader.fieldnames or []
        rows = list(reader)
    if "path_A" in columns or "path_B" in columns:
        missing = [c for c in PAIR_COLUMNS if c not in columns]
        if missing:
            raise PairsError(f"{path}: no column '{missing[0]}'; found {', '.join(columns)}")
        # Every other column whose values are labels is a dimension: names differ between releases.
        dimensions = [c for c in columns if c not in PLAIN and all(_is_label(r[c]) for r in rows)]
        if not dimensions:
            raise PairsError(f"{path}: no column of labels A, B or same, such as VQ, MQ, TA or Overall")
        return [_pair(r["prompt"], base / r["path_A"], base / r["path_B"], {d: r[d] for d in dimensions}) for r in rows]
    prompt, video = (_one_of(columns, names, path) for names in (PROMPT_NAMES, VIDEO_NAMES))
    dimensions = [c for c in columns if c not in (prompt, video, "id") and rows and all(_is_number(r[c]) for r in rows)]
    if not dimensions:
        raise PairsError(f"{path}: no column of scores other than '{prompt}' and '{video}'")
    return of_scores([(r[prompt], base / r[video], {d: float(r[d]) for d in dimensions}) for r in rows])


def _from_jsonl(path: Path, base: Path) -> list[Pair]:
    pairs, scored = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "scores" in row:
                scored.append((row["prompt"], base / row["video"], {k: float(v) for k, v in row["scores"].items()}))
            else:
                labels = row["preference"]
                labels = {"overall": labels} if isinstance(labels, str) else labels
                scores = {side: row[f"scores_{side}"] for side in "ab" if f"scores_{side}" in row}
                pairs.append(_pair(row["prompt"], base / row["a"], base / row["b"], labels, scores))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            wanted = '{"prompt", "a", "b", "preference"} or {"prompt", "video", "scores"}'
            raise PairsError(f"{path}, line {number}: {type(e).__name__} {e}; expected {wanted}") from e
    return pairs + of_scores(scored)


def _from_records(path: Path) -> list[Pair]:
    pairs = []
    for record in preference_records.read(path):
        clips = [c.latent for c in record.candidates]
        found = {(p.a, p.b): p for p in of_scores([(record.prompt, c.latent, c.scores) for c in record.candidates])}
        if record.preference is not None:
            winner, loser = record.preference
            a, b = (clips[i] for i in sorted(record.preference))
            scores = {side: record.candidates[i].scores for side, i in zip("ab", sorted(record.preference), strict=True)}
            pair = found.setdefault((a, b), Pair(record.prompt, a, b, {}, scores))
            pair.outcome["overall"] = WIN if winner < loser else LOSS
        pairs += found.values()
    return pairs


def _pair(prompt: str, a: Path, b: Path, labels: dict[str, str], scores: dict | None = None) -> Pair:
    outcome = {d: LABELS[label.strip().lower()] for d, label in labels.items() if label.strip()}
    return Pair(prompt, a, b, outcome, scores or {})


def _one_of(columns: Sequence[str], names: Sequence[str], path: Path) -> str:
    for name in names:
        if name in columns:
            return name
    raise PairsError(f"{path}: no column '{names[0]}'; found {', '.join(columns)}")


def _is_label(text: str | None) -> bool:
    return text is not None and text.strip().lower() in ("", *LABELS)


def _is_number(text: str | None) -> bool:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return False
    return value == value
