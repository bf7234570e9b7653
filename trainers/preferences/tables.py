"""Readers of preference tables (VideoAlign, VideoGen-RewardBench, score tables, JSON Lines, preference records) as pairs.

  .csv    VideoGen-RewardBench and VideoAlign: path_A, path_B, prompt and labels A, B or same in columns such as VQ, MQ,
          TA, Overall; or VideoFeedback-like score rows: a prompt, a video and numbers, of which all pairs of one prompt
          are formed and equal scores are ties. Separated by commas, semicolons or tabs
  .jsonl  one object per line: {"prompt", "a", "b", "preference"}, where preference is "a", "b" or "tie", or an object of
          such by dimension; or score rows as above: {"prompt", "video", "scores": {dimension: number}}
  records preference records, a folder or its records.jsonl: the preferred pair of each record, as "overall", and all its
          pairs by the candidates' scores

Paths are relative to the table's folder, or to --root. Columns of a .csv are dimensions if they are named, or have a name in
KNOWN. A cell that is no label or no number is left out and named in `TableNotes`; so are rows that compare nothing.
"""

import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from ..kernels.files import lines, preference_records
from ..kernels.prism.preference_loss import LOSS, TIE, WIN

LABELS = {"a": WIN, "b": LOSS, "same": TIE, "tie": TIE}
PAIR_COLUMNS = ("path_A", "path_B", "prompt")
PROMPT_NAMES = ("prompt", "text prompt", "caption")
VIDEO_NAMES = ("video", "video link", "path", "video_path")
# Dimensions of VideoAlign and VideoGen-RewardBench, and of VideoFeedback, in lower case.
KNOWN = {
    "vq", "mq", "ta", "overall", "visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment",
    "factual consistency",
}  # fmt: skip
SEPARATORS = ",;\t"
# Places of each kind that are named, before the others are counted.
NAMED = 3


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


@dataclass
class TableNotes:
    """What was left out of a table. places: {reason: places in the table}; ignored: columns that are no dimensions."""

    places: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, place: str) -> None:
        self.places.setdefault(reason, []).append(place)

    def text(self) -> list[str]:
        """A line for each reason, with the first places."""
        found = []
        for reason, places in self.places.items():
            more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
            found.append(f"{reason}: {'; '.join(places[:NAMED])}{more}")
        if self.ignored:
            found.append(f"columns that are not used (name them with --dimensions to use them): {', '.join(self.ignored)}")
        return found


def read(
    table: str | Path,
    root: str | Path | None = None,
    dimensions: Sequence[str] | None = None,
    notes: TableNotes | None = None,
) -> list[Pair]:
    """All pairs of a table, in its order. dimensions: which to keep (None: those of KNOWN in a .csv, else all there are);
    notes: filled with what is left out.

    Raises PairsError, TextError, RecordError or FileNotFoundError. Files that a table names are not opened here: see
    `with_files`.
    """
    path, base = Path(table), base_of(table, root)
    notes = TableNotes() if notes is None else notes
    if not path.is_file() and not (path / preference_records.RECORDS).is_file():
        raise FileNotFoundError(f"{path}: no such table of preferences, nor a folder of preference records")
    if path.is_dir() or path.name == preference_records.RECORDS:
        pairs = _from_records(path)
    elif path.suffix.lower() == ".csv":
        pairs = _from_csv(path, base, dimensions, notes)
    elif path.suffix.lower() == ".jsonl":
        pairs = _from_jsonl(path, base, notes)
    else:
        raise PairsError(f"{path}: expected a .csv or .jsonl table")
    if not pairs:
        raise PairsError(f"{path}: contains no pair{_because(notes)}")
    if dimensions is not None:
        known = sorted({d for p in pairs for d in p.outcome})
        missing = [d for d in dimensions if d not in known]
        if missing:
            raise PairsError(f"{path}: no dimension '{missing[0]}'; it has {', '.join(known)}{_because(notes)}")
        kept = [replace(p, outcome={d: p.outcome[d] for d in dimensions if d in p.outcome}) for p in pairs]
        pairs = [p for p in kept if p.outcome]
    return pairs


def base_of(table: str | Path, root: str | Path | None = None) -> Path:
    """The folder that a table's paths are relative to."""
    return Path(root) if root is not None else Path(table) if Path(table).is_dir() else Path(table).parent


def with_files(pairs: Iterable[Pair], source: str, notes: TableNotes) -> list[Pair]:
    """The pairs whose clips exist; missing files are named in `notes`. Raises PairsError where no pair is left."""
    pairs = list(pairs)
    files = {f for p in pairs for f in (p.a, p.b)}
    missing = {f for f in files if not f.is_file()}
    for name in sorted(str(f) for f in missing):
        notes.leave_out("files that do not exist, whose pairs are left out", name)
    kept = [p for p in pairs if p.a not in missing and p.b not in missing]
    if not kept:
        first = min(str(f) for f in missing)
        raise PairsError(
            f"{source}: no pair has two files that exist; {len(missing)} are missing, the first is {first}; give --root"
        )
    return kept


def require_classes(pairs: Sequence[Pair], source: str) -> None:
    """Raises PairsError for a dimension in which every pair is a tie: there is nothing to learn from it."""
    for dimension in sorted({d for p in pairs for d in p.outcome}):
        decided = {p.outcome[dimension] for p in pairs if dimension in p.outcome} - {TIE}
        if not decided:
            raise PairsError(f"{source}: in dimension '{dimension}' every pair is a tie; leave it out with --dimensions")


def counts(pairs: Sequence[Pair]) -> list[str]:
    """A line for each dimension: how many pairs are decided, tied, and without an outcome."""
    found = []
    for dimension in sorted({d for p in pairs for d in p.outcome}):
        outcomes = Counter(p.outcome.get(dimension) for p in pairs)
        text = f"{dimension}: {outcomes[WIN] + outcomes[LOSS]} decided, {outcomes[TIE]} ties"
        found.append(f"{text}, {outcomes[None]} without" if outcomes[None] else text)
    return found


def of_scores(rows: Sequence[tuple[str, Path, dict[str, float]]]) -> list[Pair]:
    """All pairs of clips of one prompt from (prompt, clip, {dimension: score}), in the dimensions that both clips have. A clip
    that is listed twice is not compared with itself."""
    groups = defaultdict(list)
    for prompt, clip, scores in rows:
        groups[prompt].append((clip, scores))
    pairs = []
    for prompt, members in groups.items():
        for (a, x), (b, y) in combinations(members, 2):
            outcome = {d: (x[d] > y[d]) - (x[d] < y[d]) for d in x if d in y}
            if outcome and a != b:
                pairs.append(Pair(prompt, a, b, outcome, {"a": x, "b": y}))
    return pairs


def _from_csv(path: Path, base: Path, wanted: Sequence[str] | None, notes: TableNotes) -> list[Pair]:
    columns, rows = _csv_rows(path, notes)
    if "path_A" in columns or "path_B" in columns:
        missing = [c for c in PAIR_COLUMNS if c not in columns]
        if missing:
            raise PairsError(f"{path}: no column '{missing[0]}'; found {', '.join(columns)}")
        others = [c for c in columns if c not in PAIR_COLUMNS]
        dimensions = _dimensions(path, others, wanted, rows, notes, "labels A, B or same", _label)
        return _labelled(rows, base, dimensions, notes)
    prompt, video = (_one_of(columns, names, path) for names in (PROMPT_NAMES, VIDEO_NAMES))
    others = [c for c in columns if c not in (prompt, video)]
    dimensions = _dimensions(path, others, wanted, rows, notes, "scores", _number)
    scored = []
    for number, row in rows:
        scores = _cells(row, number, dimensions, _number, "cells that are no number", notes)
        if _has_text(row, number, (prompt, video), notes):
            scored.append((row[prompt], base / row[video], scores))
    return of_scores(scored)


def _csv_rows(path: Path, notes: TableNotes) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(columns, [(line number of the row's end, cells by column)]). Raises PairsError or TextError."""
    text = lines.read_text(path)
    names = {*PAIR_COLUMNS, *PROMPT_NAMES, *VIDEO_NAMES}
    first = text.partition("\n")[0]
    separator = max(SEPARATORS, key=lambda s: (len(names & {c.strip().strip('"') for c in first.split(s)}), first.count(s)))
    # The csv module finds the ends of rows itself, since a quoted cell may hold several lines.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        columns = [c.strip() for c in next(reader, [])]
        twice = [c for c, n in Counter(columns).items() if n > 1]
        if twice:
            raise PairsError(f"{path}: two columns are called '{twice[0]}'; rename one of them")
        rows = []
        for cells in reader:
            if len(cells) > len(columns):
                reason = f"rows of more than {len(columns)} cells (a cell that holds the separator must be quoted)"
                notes.leave_out(reason, f"line {reader.line_num}")
            elif any(c.strip() for c in cells):
                cells += [""] * (len(columns) - len(cells))
                rows.append((reader.line_num, dict(zip(columns, (c.strip() for c in cells), strict=True))))
    except csv.Error as e:
        raise PairsError(f"{path}, line {reader.line_num}: not a table of text ({e}); save it as CSV in UTF-8") from e
    return columns, rows


def _dimensions(path: Path, columns: Sequence[str], wanted, rows, notes: TableNotes, what: str, parse) -> list[str]:
    """The columns to compare: the wanted ones, else those of KNOWN. parse: a cell's value, None where it has none."""
    if wanted is not None:
        missing = [d for d in wanted if d not in columns]
        if missing:
            raise PairsError(f"{path}: no dimension '{missing[0]}'; it has {', '.join(columns)}")
        return list(wanted)
    usable = [c for c in columns if any(parse(row[c]) is not None for _, row in rows)]
    found = [c for c in columns if c.lower() in KNOWN]
    notes.ignored = [c for c in usable if c not in found]
    if not found:
        named = f"; found {', '.join(usable)}: name those to use with --dimensions" if usable else ""
        raise PairsError(f"{path}: no column of {what} with a known name, such as VQ, MQ, TA or Overall{named}")
    return found


def _labelled(rows, base: Path, dimensions: Sequence[str], notes: TableNotes) -> list[Pair]:
    pairs = []
    for number, row in rows:
        outcome = _cells(row, number, dimensions, _label, "cells that are no label A, B or same", notes)
        if not _has_text(row, number, PAIR_COLUMNS, notes):
            continue
        pair = Pair(row["prompt"], base / row["path_A"], base / row["path_B"], outcome)
        pairs += _if_it_compares(pair, f"line {number}", notes)
    return pairs


def _from_jsonl(path: Path, base: Path, notes: TableNotes) -> list[Pair]:
    pairs, scored = [], []
    for number, line in lines.numbered(lines.read_text(path)):
        place = f"line {number}"
        try:
            row = json.loads(line)
            if "scores" in row:
                cells = {d: v if isinstance(v, (int, float)) else str(v) for d, v in row["scores"].items()}
                scores = _cells(cells, number, list(cells), _number, "scores that are no finite number", notes)
                scored.append((_prompt(row), base / row["video"], scores))
            else:
                labels = row["preference"]
                labels = {"overall": labels} if isinstance(labels, str) else labels
                outcome = {d: LABELS[label.strip().lower()] for d, label in labels.items() if label.strip()}
                stated = {side: row[f"scores_{side}"] for side in "ab" if f"scores_{side}" in row}
                pair = Pair(_prompt(row), base / row["a"], base / row["b"], outcome, stated)
                pairs += _if_it_compares(pair, place, notes)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            expected = '{"prompt", "a", "b", "preference"} or {"prompt", "video", "scores"}'
            raise PairsError(f"{path}, {place}: {type(e).__name__} {e}; expected {expected}") from e
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


def _if_it_compares(pair: Pair, place: str, notes: TableNotes) -> list[Pair]:
    """The pair in a list; an empty one, with a note, for a clip against itself and for a row without an outcome."""
    if pair.a == pair.b:
        notes.leave_out("rows that compare a clip with itself, left out", place)
    elif not pair.outcome:
        notes.leave_out("rows without any outcome, left out", place)
    else:
        return [pair]
    return []


def _cells(row: dict, number: int, columns: Sequence[str], parse, reason: str, notes: TableNotes) -> dict:
    """{column: value} of the cells that have one; others that are not empty are named."""
    found = {}
    for column in columns:
        value = parse(row[column])
        if value is not None:
            found[column] = value
        elif str(row[column]).strip():
            notes.leave_out(f"{reason}, left out", f"line {number}, {column} '{str(row[column])[:20]}'")
    return found


def _has_text(row: dict, number: int, columns: Sequence[str], notes: TableNotes) -> bool:
    empty = [c for c in columns if not row[c]]
    if empty:
        notes.leave_out("rows without a prompt or a clip, left out", f"line {number}, {empty[0]}")
    return not empty


def _prompt(row: dict) -> str:
    if not isinstance(row["prompt"], str):
        raise TypeError(f"prompt {row['prompt']!r} is no text")
    return row["prompt"]


def _because(notes: TableNotes) -> str:
    return "".join(f"; {line}" for line in notes.text())


def _one_of(columns: Sequence[str], names: Sequence[str], path: Path) -> str:
    for name in names:
        if name in columns:
            return name
    raise PairsError(f"{path}: no column '{names[0]}'; found {', '.join(columns)}")


def _label(text: str) -> int | None:
    return LABELS.get(text.strip().lower())


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
