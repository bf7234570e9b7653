"""Rows of the report for PRISM: how often heads order same-model seeds as the oracle does, and what early Best-of-N gains.

Held-out captions, whose combinations of attributes neither the DiT nor the heads were trained on. The oracle is the judge's
overall score of the finished clip. Plans are played over tables of candidates (see `candidates`): subsets of N of a caption's
candidates stand for N seeds, and figures are means over many subsets, with intervals over captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.kernels.prism.plan import Plan, make_plan, rank

from . import candidates, pipeline, search, statistics
from .jobs import Job, gather
from .statistics import Estimate

SPLIT = "unseen"
SIZES = (4, 8, 16)
SUBSETS = 64
# Scores that differ by no more are a tie, and left out of accuracies.
TIE = 0.02
# Before steps 3, 5 and 8 of 20 at shift 3: Best-of-8 for 33 % of its blocks. Chosen on training captions.
HALVING = (0.945, 0.901, 0.819)
EARLY = (0.945,)
DRAFTED = 8
JUDGED_CAPTIONS, JUDGED_COUNT = 16, 8
DEPTH, PASSES = 12, 2
# Captions for which plain and pruned searches are timed.
CLOCKED = 6


@dataclass(frozen=True)
class Level:
    """Accuracies of ordered pairs at one noise level, by scorer; an Estimate each."""

    sigma: float
    accuracy: dict[str, Estimate]


@dataclass(frozen=True)
class Row:
    """One way to choose among N. oracle: of the chosen; gain: over a random choice; share: of the gain of full Best-of-N
    with the same head (None where that gain's interval reaches zero); evaluations, blocks: of one choice; blocks_share: of N
    full runs'."""

    size: int
    name: str
    oracle: Estimate
    gain: Estimate
    share: Estimate | None
    evaluations: float
    blocks: float
    blocks_share: float


def jobs(captions: int) -> dict[str, list[Job]]:
    """What must be made."""
    return {
        "candidates": [Job("candidates", SPLIT, i, candidates.COUNT) for i in range(captions)],
        "drafts": [Job("drafts", SPLIT, i, DRAFTED) for i in range(captions)],
        "judged": [Job("judged", SPLIT, i, JUDGED_COUNT) for i in range(min(captions, JUDGED_CAPTIONS))],
    }


def tables(results: dict, part: Sequence[Job]) -> dict[str, Tensor]:
    """The results of some jobs with captions as a dimension of their own: [captions, candidates, ...]."""
    found = gather(results, part)
    return {k: v.view(len(part), -1, *v.shape[1:]) for k, v in found.items()}


def accuracy(scores: Tensor, oracle: Tensor) -> Tensor:
    """Share of a caption's decided pairs ordered right, [captions], NaN where all are ties. Both [captions, N]."""
    gap, told = (x[:, :, None] - x[:, None, :] for x in (oracle, scores))
    decided = gap > TIE
    right = (told > 0).double() + 0.5 * (told == 0).double()
    return (right * decided).sum(dim=(1, 2)) / decided.sum(dim=(1, 2))


def accuracies(pool: dict[str, Tensor], judged: dict[str, Tensor]) -> list[Level]:
    """By noise level: heads, and where it looked the judge of pixels; "finished" as the lowest level, 0.1 to 0.3."""
    oracle, out = pool["oracle.overall"], []
    names = [k.removeprefix("score.") for k in pool if k.startswith("score.")]
    for k, (step, sigma) in enumerate(zip(candidates.STEPS, candidates.sigmas_before(), strict=True)):
        found = {n: over_captions(accuracy(pool[f"score.{n}"][:, :, k], oracle)) for n in names}
        if step in candidates.JUDGED_STEPS:
            place = candidates.JUDGED_STEPS.index(step)
            truth = oracle[: len(judged["judge.noisy"]), :JUDGED_COUNT]
            found |= {
                f"judge, {what}": over_captions(accuracy(judged[f"judge.{what}"][:, :, place], truth))
                for what in ("noisy", "prediction")
            }
        out.append(Level(sigma, found))
    finished = {n: over_captions(accuracy(pool[f"finished.{n}"], oracle)) for n in names}
    return [*out, Level(0.2, finished)]


def over_captions(values: Tensor) -> Estimate:
    """Mean over captions that have a value."""
    return statistics.mean(values[values.isfinite()])


def plan_of(size: int, levels: Sequence[float], tap: int, survivors: Sequence[int] | None = None) -> Plan:
    path = pipeline.sigmas(pipeline.STEPS, pipeline.SHIFT).tolist()
    return make_plan(path, size, 1, levels, survivors, passes=PASSES, depth=DEPTH, tap=tap)


def play(plan: Plan, scores: Tensor) -> int:
    """Which of N candidates wins under a plan. scores: [N, len(candidates.STEPS)]."""
    racing = list(range(plan.candidates))
    for point in plan.checkpoints:
        now = scores[racing, candidates.STEPS.index(point.step)].tolist()
        racing = [racing[i] for i in rank(now, point.survivors)]
    return racing[0]


def subsets(size: int, count: int, seed: int) -> list[list[int]]:
    """Sets of `size` of `count` candidates, at random; the one there is where all are taken."""
    if size == count:
        return [list(range(count))]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[:size].tolist() for _ in range(SUBSETS)]


def chosen(oracle: Tensor, size: int, choose: Callable[[int, list[int]], int]) -> Tensor:
    """[captions]: mean oracle score of what is chosen. choose(caption, candidates) -> place in candidates."""
    captions, count = oracle.shape
    values = []
    for p in range(captions):
        sets = subsets(size, count, seed=p)
        values.append(torch.stack([oracle[p, s[choose(p, s)]] for s in sets]).mean())
    return torch.stack(values)


def rows(pool: dict[str, Tensor], drafts: dict[str, Tensor], taps: dict[str, int]) -> list[Row]:
    """Every way to choose, by N. taps: head -> its last tap."""
    return [row for size in SIZES for row in rows_of(size, pool, drafts, taps)]


def rows_of(size: int, pool: dict[str, Tensor], drafts: dict[str, Tensor], taps: dict[str, int]) -> list[Row]:
    """Every way to choose among `size` seeds."""
    oracle = pool["oracle.overall"]
    runs = pipeline.STEPS * PASSES
    out = [
        row_of(size, "random seed", oracle, lambda p, s: 0, runs, runs * DEPTH, at_random(oracle, size)),
        row_of(size, "oracle, full", oracle, lambda p, s: int(oracle[p, s].argmax()), size * runs, size * runs * DEPTH),
    ]
    for head, tap in taps.items():
        scores, ends = pool[f"score.{head}"], pool[f"finished.{head}"]
        reading = size * len(candidates.FINISHED_SIGMAS) * (tap + 1)

        def best(p: int, s: list[int], ends=ends) -> int:
            return int(ends[p, s].argmax())

        full = chosen(oracle, size, best)
        out.append(row_of(size, f"{head}, full", oracle, best, size * runs, size * runs * DEPTH + reading, against=full))
        for kind, plan in (("halving", plan_of(size, HALVING, tap)), ("one early prune", plan_of(size, EARLY, tap, (1,)))):

            def pruned(p: int, s: list[int], plan=plan, scores=scores) -> int:
                return play(plan, scores[p, s])

            cost = plan.cost
            out.append(row_of(size, f"{head}, {kind}", oracle, pruned, cost.evaluations, cost.blocks, against=full))
        if size <= DRAFTED:
            drafted, first = drafts[f"finished.{head}"], oracle[:, :DRAFTED]

            def best_draft(p: int, s: list[int], drafted=drafted) -> int:
                return int(drafted[p, s].argmax())

            steps = float(drafts["evaluations"].double().mean()) * size + pipeline.STEPS
            cost = (steps * PASSES, steps * PASSES * DEPTH + reading)
            row = row_of(size, f"{head}, cached drafts", first, best_draft, *cost, against=chosen(first, size, best))
            out.append(row)
    return out


def row_of(
    size: int,
    name: str,
    oracle: Tensor,
    choose: Callable[[int, list[int]], int],
    evaluations: float,
    blocks: float,
    values: Tensor | None = None,
    against: Tensor | None = None,
) -> Row:
    """One way to choose. values: [captions], what it gets, where no choice is made; against: what full Best-of-N gets."""
    base = at_random(oracle, size)
    values = chosen(oracle, size, choose) if values is None else values
    gain = values - base
    # A share of a gain that may be none says nothing.
    shared = against is not None and statistics.mean(against - base).low > 0
    share = statistics.ratio(gain, against - base) if shared else None
    full = size * pipeline.STEPS * PASSES * DEPTH
    return Row(size, name, statistics.mean(values), statistics.mean(gain), share, evaluations, blocks, blocks / full)


def at_random(oracle: Tensor, size: int) -> Tensor:
    """[captions]: the mean over the subsets that are chosen from, of which any seed may be taken."""
    captions, count = oracle.shape
    values = [torch.stack([oracle[p, s].mean() for s in subsets(size, count, seed=p)]).mean() for p in range(captions)]
    return torch.stack(values)


@dataclass(frozen=True)
class Clocked:
    """Real searches, one thread: seconds and blocks of plain Best-of-N and of halving, summed over captions, and the ratio
    of the time that halving took to what its blocks predict, an Estimate over captions."""

    size: int
    captions: int
    full_s: float
    halving_s: float
    full_blocks: int
    halving_blocks: int
    ratio: Estimate


def clock(world: pipeline.ToyWorld, scorer, captions: int = CLOCKED, size: int = 8) -> Clocked:
    """Plain Best-of-N and halving in turn, caption by caption, so that a machine that slows down slows both."""
    plan = plan_of(size, HALVING, max(scorer.head.config.taps))
    rows = []
    for index in range(captions):
        caption = candidates.caption_of(world, SPLIT, index)
        whole = search.full(world, scorer, caption, index, size)
        rows.append((whole, search.search(world, scorer, caption, index, plan)))
    ratios = torch.tensor([h.seconds / f.seconds * f.blocks / h.blocks for f, h in rows])
    sums = [sum(column) for column in zip(*((f.seconds, h.seconds, f.blocks, h.blocks) for f, h in rows), strict=True)]
    return Clocked(size, captions, *sums, statistics.mean(ratios))


def accuracy_table(found: list[Level]) -> str:
    """As markdown."""
    names = sorted({n for level in found for n in level.accuracy}, key=lambda n: (n.startswith("judge"), n))
    lines = ["| sigma | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for level in found:
        cells = [level.accuracy[n].text() if n in level.accuracy else "" for n in names]
        label = "finished, 0.1 to 0.3" if level is found[-1] else f"{level.sigma:.3f}"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(found: list[Row]) -> str:
    """As markdown."""
    head = "| N | choice | oracle | gain | share of the full gain | evaluations | blocks | of N full runs |"
    lines = [
        head,
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        share = "" if r.share is None else f"{100 * r.share.mean:.0f} ± {100 * r.share.half:.0f} %"
        cost = f"{r.evaluations:.0f} | {r.blocks:.0f} | {100 * r.blocks_share:.1f} %"
        gain = f"{r.gain.mean:+.3f} ± {r.gain.half:.3f}"
        lines.append(f"| {r.size} | {r.name} | {r.oracle.text()} | {gain} | {share} | {cost} |")
    return "\n".join(lines)


def as_json(levels: list[Level], found: list[Row]) -> dict:
    def plain(e: Estimate | None):
        return None if e is None else [e.mean, e.half]

    return {
        "accuracy": [{"sigma": v.sigma, "by": {k: plain(e) for k, e in v.accuracy.items()}} for v in levels],
        "best_of_n": [
            {
                "n": r.size, "choice": r.name, "oracle": plain(r.oracle), "gain": plain(r.gain), "share": plain(r.share),
                "evaluations": r.evaluations, "blocks": r.blocks, "blocks_share": r.blocks_share,
            }
            for r in found
        ],
    }  # fmt: skip
