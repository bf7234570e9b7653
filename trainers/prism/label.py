"""Turns scores of runs into the preferences that `train` reads: all pairs of one prompt, tied where scores are close.

The scores are JSON Lines: {"run": name, "scores": {dimension: number}}, higher is better.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from ..kernels.files import lines
from ..running.output import require_output_folder
from . import data as prism_data
from .data import PrismDataError, Row


def add_arguments(parser) -> None:
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="a folder written by `collect`")
    parser.add_argument("--scores", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--tie", nargs="+", default=["0"], metavar="[DIMENSION=]NUMBER",
        help="largest score difference that is a tie: of all dimensions, or of one, such as 0.02 visual=0.01 (default 0)",
    )  # fmt: skip


def run(args) -> int:
    tie, by_dimension = ties_of(args.tie)
    prism_data.require_no_manifest(args.data)
    require_output_folder(args.data)
    runs = {name: prompt for prompt, names in prism_data.runs_of(args.data).items() for name in names}
    scores = read_scores(args.scores)
    unknown = [name for name in scores if name not in runs]
    if unknown:
        raise PrismDataError(f"{args.scores}: {len(unknown)} runs, such as '{unknown[0]}', are not in {args.data}")
    known = {d for found in scores.values() for d in found}
    for name in by_dimension.keys() - known:
        raise ValueError(f"--tie {name}=...: {args.scores} has no dimension '{name}'; it has {', '.join(sorted(known))}")
    rows = rows_of({name: runs[name] for name in scores}, scores, tie, by_dimension)
    if not rows:
        raise PrismDataError(f"{args.scores}: no two runs of the same prompt have scores")
    prism_data.write_rows(args.data, rows)
    ties = sum(v == 0 for row in rows for v in row.outcome.values())
    print(f"{args.data / prism_data.COMPARISONS}: {len(rows)} pairs of {len(scores)} runs, {ties} ties")
    return 0


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """{run: {dimension: score}} of a JSON Lines file. Raises PrismDataError naming the line, or OSError."""
    found = {}
    for number, line in lines.numbered(lines.read_text(path)):
        try:
            row = json.loads(line)
            scores = {k: float(v) for k, v in row["scores"].items()}
            if not all(map(math.isfinite, scores.values())):
                raise ValueError("a score is NaN or infinite")
            if row["run"] in found:
                raise ValueError(f"the run '{row['run']}' has scores in an earlier line")
            found[row["run"]] = scores
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
            wanted = '{"run", "scores": {dimension: number}}'
            raise PrismDataError(f"{path}, line {number}: {type(e).__name__} {e}; expected {wanted}") from e
    return found


def ties_of(values: Sequence[str]) -> tuple[float, dict[str, float]]:
    """(tie of all dimensions, {dimension: its own}) of the values of --tie. Raises ValueError naming a bad one."""
    tie, by_dimension = 0.0, {}
    for value in values:
        name, equals, number = value.rpartition("=")
        try:
            found = float(number)
        except ValueError:
            found = math.nan
        if not 0 <= found < math.inf or (equals and not name):
            raise ValueError(f"--tie {value}: expected a number, 0 or more, or DIMENSION=NUMBER")
        if equals:
            by_dimension[name] = found
        else:
            tie = found
    return tie, by_dimension


def rows_of(
    prompts: dict[str, str], scores: dict[str, dict[str, float]], tie: float, by_dimension: Mapping[str, float] | None = None
) -> list[Row]:
    """All pairs of runs of one prompt, in the dimensions that both have scores in.

    prompts: {run: prompt}; tie: largest score difference that is a tie; by_dimension: those of some dimensions.
    """
    ties = by_dimension or {}
    groups = defaultdict(list)
    for name in sorted(scores):
        groups[prompts[name]].append(name)
    rows = []
    for prompt in sorted(groups):
        for a, b in combinations(groups[prompt], 2):
            gaps = {d: scores[a][d] - scores[b][d] for d in scores[a] if d in scores[b]}
            outcome = {d: 0 if abs(g) <= ties.get(d, tie) else (1 if g > 0 else -1) for d, g in gaps.items()}
            if outcome:
                rows.append(Row(prompt, a, b, outcome))
    return rows
