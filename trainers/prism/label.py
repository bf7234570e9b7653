"""Turns scores of runs into the preferences that `train` reads: all pairs of one prompt, tied where scores are close.

The scores are JSON Lines: {"run": name, "scores": {dimension: number}}, higher is better.
"""

import json
import math
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from ..kernels.files import lines
from ..running.output import require_output_folder
from . import data as prism_data
from .data import PrismDataError, Row


def add_arguments(parser) -> None:
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="a folder written by `collect`")
    parser.add_argument("--scores", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--tie", type=float, default=0.0, help="largest score difference that is a tie (default 0)")


def run(args) -> int:
    if args.tie < 0:
        raise ValueError(f"--tie must be 0 or more, got {args.tie}")
    prism_data.require_no_manifest(args.data)
    require_output_folder(args.data)
    runs = {name: prompt for prompt, names in prism_data.runs_of(args.data).items() for name in names}
    scores = read_scores(args.scores)
    unknown = [name for name in scores if name not in runs]
    if unknown:
        raise PrismDataError(f"{args.scores}: {len(unknown)} runs, such as '{unknown[0]}', are not in {args.data}")
    rows = rows_of({name: runs[name] for name in scores}, scores, args.tie)
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


def rows_of(prompts: dict[str, str], scores: dict[str, dict[str, float]], tie: float) -> list[Row]:
    """All pairs of runs of one prompt, in the dimensions that both have scores in. prompts: {run: prompt}; tie: see --tie."""
    groups = defaultdict(list)
    for name in sorted(scores):
        groups[prompts[name]].append(name)
    rows = []
    for prompt in sorted(groups):
        for a, b in combinations(groups[prompt], 2):
            gaps = {d: scores[a][d] - scores[b][d] for d in scores[a] if d in scores[b]}
            outcome = {d: 0 if abs(g) <= tie else (1 if g > 0 else -1) for d, g in gaps.items()}
            if outcome:
                rows.append(Row(prompt, a, b, outcome))
    return rows
