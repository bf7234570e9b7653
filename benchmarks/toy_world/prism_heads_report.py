"""Tables of `prism_heads`: accuracy by kind of pair, dimension and noise level; ablations; a learning curve over captions.

    python -m benchmarks.toy_world.prism_heads_report --data outputs/heads --study outputs/heads/study

Accuracies are shares of pairs that a head orders as the judge does, ties left out, averaged over captions; ± is half of the
95 % interval over captions. Differences are paired by caption.
"""

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.command_line import make_parser

from .prism_collect import DIMENSIONS, TIES
from .prism_heads import ACROSS, BETWEEN, FINISHED, GENERATORS, WITHIN, load_runs
from .statistics import Estimate, mean

Accuracies = dict[str, list[float]]
# The block that held-out captions chose.
BEST = ("within, block 11", "within, mean, block 11")
FIRST = ("within", "within, mean")
# Noise levels of the tables of ablations; of pairs within a generator the last is a finished clip's.
SHOWN = {WITHIN: (0.964, 0.944, 0.9, 0.75, 0.25, FINISHED), ACROSS: BETWEEN}


def over_captions(values: Sequence[float]) -> Estimate:
    x = torch.tensor(values, dtype=torch.float64)
    return mean(x[x.isfinite()])


def averaged(found: Accuracies, kind: str, captions: str, dimension: str, sigmas: Sequence[float]) -> list[float]:
    """Each caption's accuracy, averaged over noise levels."""
    rows = torch.tensor([found[f"{kind}/{captions}/{dimension}/{s:.3f}"] for s in sigmas], dtype=torch.float64)
    return rows.mean(dim=0).tolist()


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    return over_captions((torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).tolist())


def signed(e: Estimate) -> str:
    text = f"{e.mean:+.3f} ± {e.half:.3f}"
    return f"**{text}**" if abs(e.mean) > e.half else text


def text_of(e: Estimate) -> str:
    """Bold where the interval excludes chance."""
    return f"**{e.text()}**" if abs(e.mean - 0.5) > e.half else e.text()


def by_level(results: dict[str, Accuracies], kind: str, names: Sequence[str], captions: str, sigmas: Sequence[float]) -> str:
    """A row for each dimension and head, a column for each noise level."""
    lines = ["| dimension | head | " + " | ".join(f"sigma {s:g}" for s in sigmas) + " | all levels | captions |"]
    lines.append("|---" * (4 + len(sigmas)) + "|")
    for d in DIMENSIONS:
        for name in names:
            found = results[name]
            cells = [over_captions(found[f"{kind}/{captions}/{d}/{s:.3f}"]) for s in sigmas]
            whole = over_captions(averaged(found, kind, captions, d, sigmas))
            lines.append(f"| {d} | {name} | {' | '.join(map(text_of, [*cells, whole]))} | {whole.n} |")
        query, pooled = (averaged(results[n], kind, captions, d, sigmas) for n in names[:2])
        gaps = [difference(*(results[n][f"{kind}/{captions}/{d}/{s:.3f}"] for n in names[:2])) for s in sigmas]
        lines.append(f"| {d} | difference | {' | '.join(map(signed, [*gaps, difference(query, pooled)]))} | |")
    return "\n".join(lines)


def by_pair(results: dict[str, Accuracies], names: Sequence[str]) -> str:
    """Accuracy in "overall" for each pair of generators."""
    lines = [f"| pair | head | {' | '.join(f'sigma {s:g}' for s in BETWEEN)} | all levels |"]
    lines.append("|---" * (3 + len(BETWEEN)) + "|")
    for a, b in combinations(GENERATORS, 2):
        kind = f"{a} against {b}"
        for name in names:
            found = results[name]
            cells = [over_captions(found[f"{kind}/test/overall/{s:.3f}"]) for s in BETWEEN]
            whole = over_captions(averaged(found, kind, "test", "overall", BETWEEN))
            lines.append(f"| {kind} | {name} | {' | '.join(map(text_of, [*cells, whole]))} |")
    return "\n".join(lines)


def ablations(results: dict[str, Accuracies], kind: str, names: Sequence[str], base: str, sigma: float) -> str:
    """Accuracy in "overall" at one level and over all, and the difference from `base`, on test captions."""
    sigmas = SHOWN[kind]
    lines = [f"| head | overall, sigma {sigma:g} | overall, all levels | against {base} | alignment | motion | visual |"]
    lines.append("|---" * 7 + "|")
    reference = averaged(results[base], kind, "test", "overall", sigmas)
    for name in names:
        found = results[name]
        own = averaged(found, kind, "test", "overall", sigmas)
        at = over_captions(found[f"{kind}/test/overall/{sigma:.3f}"])
        others = [
            text_of(over_captions(averaged(found, kind, "test", d, sigmas))) if f"{kind}/test/{d}/{sigma:.3f}" in found else ""
            for d in DIMENSIONS[:3]
        ]
        gap = "" if name == base else signed(difference(own, reference))
        lines.append(f"| {name} | {text_of(at)} | {text_of(over_captions(own))} | {gap} | {' | '.join(others)} |")
    return "\n".join(lines)


def later_is_better(scores: Sequence[Tensor], dimension: int, tie: float) -> dict[str, Estimate]:
    """Share of pairs, no ties, in which the clip of the later checkpoint is better.

    scores: of each generator [captions, clips, dimensions], early first.
    """
    found = {}
    for a, b in combinations(range(len(scores)), 2):
        gap = scores[b][:, :, None, dimension] - scores[a][:, None, :, dimension]
        decided = gap.abs() > tie
        share = ((gap > tie) & decided).sum(dim=(1, 2)) / decided.sum(dim=(1, 2))
        found[f"{GENERATORS[a]} against {GENERATORS[b]}"] = over_captions(share.tolist())
    return found


def generators_table(data: Path) -> str:
    """How good the three checkpoints are, and how often the later one's clip is better."""
    runs = {g: load_runs(data / f"test-{g}", None, 2) for g in GENERATORS}
    scores = [torch.stack([r.scores[m] for m in r.members]) for r in runs.values()]
    lines = ["| | " + " | ".join(DIMENSIONS) + " |", "|---" * (1 + len(DIMENSIONS)) + "|"]
    for g, s in zip(GENERATORS, scores, strict=True):
        cells = [mean(s[:, :, d].mean(dim=1)).text() for d in range(len(DIMENSIONS))]
        lines.append(f"| {g}: mean score | {' | '.join(cells)} |")
    shares = [later_is_better(scores, d, TIES[name]) for d, name in enumerate(DIMENSIONS)]
    for pair in shares[0]:
        lines.append(f"| {pair}: the later is better | " + " | ".join(s[pair].text() for s in shares) + " |")
    return "\n".join(lines)


def curve(results: dict[str, Accuracies], sigma: float) -> str:
    """Accuracy within a generator over the number of captions, held-out and test captions, query and mean."""
    lines = ["| captions | head | held-out combinations of training, all levels | test, all levels | test, sigma "
             f"{sigma:g} | test, finished |", "|---" * 6 + "|"]  # fmt: skip
    for count in (450, 900, 1800, 3600):
        for pooling in ("", ", mean"):
            name = f"within{pooling}" + ("" if count == 3600 else f", {count} captions")
            found = results[name]
            known = sorted({float(k.split("/")[3]) for k in found if k.startswith(f"{WITHIN}/held out/overall/")})
            cells = [
                averaged(found, WITHIN, "held out", "overall", known),
                averaged(found, WITHIN, "test", "overall", SHOWN[WITHIN]),
                found[f"{WITHIN}/test/overall/{sigma:.3f}"], found[f"{WITHIN}/test/overall/{FINISHED:.3f}"],
            ]  # fmt: skip
            shown = " | ".join(text_of(over_captions(c)) for c in cells)
            lines.append(f"| {count} | {'mean' if pooling else 'query'} | {shown} |")
    return "\n".join(lines)


def choices(results: dict[str, Accuracies], names: Sequence[str], sigmas: Sequence[float]) -> str:
    """Gain of choosing one of the seeds of a test caption, in the judge's overall score over a random one."""
    ways = [*(f"{s:.3f}" for s in sigmas), "halving"]
    lines = [f"| head | {' | '.join(f'at sigma {w}' for w in ways[:-1])} | halving |", "|---" * (1 + len(ways)) + "|"]
    for name in names:
        cells = [signed(over_captions(results[name][f"gain/test/{w}"])) for w in ways]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    judge = over_captions(results[names[0]]["gain/test/judge"])
    return "\n".join([*lines, f"\nThe judge's own choice gains {signed(judge)} ({judge.n} captions)."])


def main(argv=None) -> None:
    parser = make_parser("benchmarks.toy_world.prism_heads_report", __doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--study", type=Path, required=True)
    args = parser.parse_args(argv)
    results = {}
    for path in sorted((args.study / "results").glob("*.json")):
        results[path.stem] = json.loads(path.read_text(encoding="utf-8"))["accuracy"]

    def tried(kind: str) -> list[str]:
        return [n for n, found in results.items() if f"{kind}/test/overall/0.900" in found]

    parts: list[tuple[str, Callable[[], str]]] = [
        ("Generators", lambda: generators_table(args.data)),
        ("Pairs between generators", lambda: by_level(results, ACROSS, ("between", "between, mean"), "test", BETWEEN)),
        ("The same by pair of generators, overall", lambda: by_pair(results, ("between", "between, mean"))),
        ("Pairs within a generator, block 11", lambda: by_level(results, WITHIN, BEST, "test", SHOWN[WITHIN])),
        ("Pairs within a generator, block 8", lambda: by_level(results, WITHIN, FIRST, "test", SHOWN[WITHIN])),
        ("Best of 8 by a head", lambda: choices(results, (*BEST, *FIRST, "between"), SHOWN[WITHIN])),
        ("Learning curve", lambda: curve(results, 0.9)),
        ("Ablations, pairs between generators", lambda: ablations(results, ACROSS, tried(ACROSS), "between", 0.9)),
        ("Ablations, pairs within a generator", lambda: ablations(results, WITHIN, tried(WITHIN), "within", 0.9)),
    ]
    for title, part in parts:
        print(f"## {title}\n\n{part()}\n")


if __name__ == "__main__":
    main()
