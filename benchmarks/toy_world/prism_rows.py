"""Rows of the report for PRISM: pairwise accuracy of heads against the oracle, and the gain of early Best-of-N.

Captions are held out: neither the DiT nor the heads were trained on their combinations of attributes. The oracle is the
judge's overall score of the finished clip. Plans are simulated on tables of candidates (see `candidates`): subsets of N of a
caption's candidates represent N seeds, and figures are means over many subsets, with intervals over captions.
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
# Pairs whose oracle scores differ by no more are ties and are excluded from accuracies.
TIE = 0.02
# Before steps 3, 5 and 8 of 20 at shift 3: Best-of-8 at 33 % of its blocks. Chosen on training captions.
HALVING = (0.945, 0.901, 0.819)
EARLY = (0.945,)
DRAFTED = 8
JUDGED_CAPTIONS, JUDGED_COUNT = 16, 8
DEPTH, PASSES = 12, 2
# Captions for which plain and pruned searches are timed.
CLOCKED = 6


@dataclass(frozen=True)
class SigmaAccuracy:
    """Pairwise accuracies at one noise level: scorer -> Estimate."""

    sigma: float
    accuracy: dict[str, Estimate]


@dataclass(frozen=True)
class ChoiceRow:
    """One way to choose among N seeds.

    oracle: score of the chosen one; gain: over a random choice; share: of the gain of full Best-of-N with the same head (None
    where the interval of that gain includes zero); evaluations, blocks: cost of one choice; blocks_share: of the blocks of N
    full runs.
    """

    size: int
    name: str
    oracle: Estimate
    gain: Estimate
    share: Estimate | None
    evaluations: float
    blocks: float
    blocks_share: float


def jobs(captions: int) -> dict[str, list[Job]]:
    """The jobs that the rows need, by kind."""
    return {
        "candidates": [Job("candidates", SPLIT, i, candidates.COUNT) for i in range(captions)],
        "drafts": [Job("drafts", SPLIT, i, DRAFTED) for i in range(captions)],
        "judged": [Job("judged", SPLIT, i, JUDGED_COUNT) for i in range(min(captions, JUDGED_CAPTIONS))],
    }


def tables(results: dict, part: Sequence[Job]) -> dict[str, Tensor]:
    """The results of some jobs, stacked by caption: [captions, candidates, ...]."""
    found = gather(results, part)
    return {k: v.view(len(part), -1, *v.shape[1:]) for k, v in found.items()}


def accuracy(scores: Tensor, oracle: Tensor) -> Tensor:
    """Share [captions] of pairs without ties that scores order as the oracle does, NaN where all are ties. Both are
    [captions, N]; equal scores count as half."""
    gap, predicted = (x[:, :, None] - x[:, None, :] for x in (oracle, scores))
    decided = gap > TIE
    right = (predicted > 0).double() + 0.5 * (predicted == 0).double()
    return (right * decided).sum(dim=(1, 2)) / decided.sum(dim=(1, 2))


def accuracies(pool: dict[str, Tensor], judged: dict[str, Tensor]) -> list[SigmaAccuracy]:
    """By noise level: heads, and the judge at the steps that it read; last, finished clips with noise of 0.1 to 0.3."""
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
        out.append(SigmaAccuracy(sigma, found))
    finished = {n: over_captions(accuracy(pool[f"finished.{n}"], oracle)) for n in names}
    return [*out, SigmaAccuracy(0.2, finished)]


def over_captions(values: Tensor) -> Estimate:
    """Mean over captions whose value is finite."""
    return statistics.mean(values[values.isfinite()])


def plan_of(size: int, checkpoints: Sequence[float], tap: int, survivors: Sequence[int] | None = None) -> Plan:
    """The plan of one search over `size` candidates; checkpoints: noise levels at which candidates are dropped."""
    sigmas = pipeline.schedule()
    return make_plan(sigmas, size, 1, checkpoints, survivors, passes=PASSES, depth=DEPTH, scoring=tap + 1)


def play(plan: Plan, scores: Tensor) -> int:
    """Index of the candidate that wins under a plan. scores: [N, len(candidates.STEPS)]."""
    racing = list(range(plan.candidates))
    for point in plan.checkpoints:
        now = scores[racing, candidates.STEPS.index(point.step)].tolist()
        racing = [racing[i] for i in rank(now, point.survivors)]
    return racing[0]


def subsets(size: int, count: int, seed: int) -> list[list[int]]:
    """SUBSETS random sets of `size` of `count` candidates; one set of all where size is count."""
    if size == count:
        return [list(range(count))]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator)[:size].tolist() for _ in range(SUBSETS)]


def chosen(oracle: Tensor, size: int, choose: Callable[[int, list[int]], int]) -> Tensor:
    """[captions]: mean oracle score of the chosen candidates. choose(caption, candidates) -> position in candidates."""
    captions, count = oracle.shape
    values = []
    for p in range(captions):
        sets = subsets(size, count, seed=p)
        values.append(torch.stack([oracle[p, s[choose(p, s)]] for s in sets]).mean())
    return torch.stack(values)


def rows(pool: dict[str, Tensor], drafts: dict[str, Tensor], taps: dict[str, int]) -> list[ChoiceRow]:
    """All ways to choose, for every N. taps: head -> its last tap."""
    return [row for size in SIZES for row in rows_of(size, pool, drafts, taps)]


def rows_of(size: int, pool: dict[str, Tensor], drafts: dict[str, Tensor], taps: dict[str, int]) -> list[ChoiceRow]:
    """All ways to choose among `size` seeds."""
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
) -> ChoiceRow:
    """One way to choose. values: [captions], its oracle scores, instead of choosing; against: those of full Best-of-N."""
    base = at_random(oracle, size)
    values = chosen(oracle, size, choose) if values is None else values
    gain = values - base
    # A share of a gain that may be zero is meaningless.
    shared = against is not None and statistics.mean(against - base).low > 0
    share = statistics.ratio(gain, against - base) if shared else None
    full = size * pipeline.STEPS * PASSES * DEPTH
    return ChoiceRow(size, name, statistics.mean(values), statistics.mean(gain), share, evaluations, blocks, blocks / full)


def at_random(oracle: Tensor, size: int) -> Tensor:
    """[captions]: expected oracle score of a random seed, as the mean over the same subsets that are chosen from."""
    captions, count = oracle.shape
    values = [torch.stack([oracle[p, s].mean() for s in subsets(size, count, seed=p)]).mean() for p in range(captions)]
    return torch.stack(values)


@dataclass(frozen=True)
class Clocked:
    """Timed searches on one thread: seconds and blocks of plain Best-of-N and of halving, summed over captions.

    ratio: measured time of halving over the time that its blocks predict, an Estimate over captions.
    """

    size: int
    captions: int
    full_s: float
    halving_s: float
    full_blocks: int
    halving_blocks: int
    ratio: Estimate


def clock(world: pipeline.ToyWorld, scorer, captions: int = CLOCKED, size: int = 8) -> Clocked:
    """Times plain Best-of-N and halving alternately, caption by caption, so that other load slows both."""
    plan = plan_of(size, HALVING, max(scorer.head.config.taps))
    rows = []
    for index in range(captions):
        caption = candidates.caption_of(world, SPLIT, index)
        whole = search.full(world, scorer, caption, index, size)
        rows.append((whole, search.search(world, scorer, caption, index, plan)))
    ratios = torch.tensor([h.seconds / f.seconds * f.blocks / h.blocks for f, h in rows])
    sums = [sum(column) for column in zip(*((f.seconds, h.seconds, f.blocks, h.blocks) for f, h in rows), strict=True)]
    return Clocked(size, captions, *sums, statistics.mean(ratios))


def accuracy_table(found: list[SigmaAccuracy]) -> str:
    """As markdown."""
    names = sorted({n for level in found for n in level.accuracy}, key=lambda n: (n.startswith("judge"), n))
    lines = ["| sigma | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for level in found:
        cells = [level.accuracy[n].text() if n in level.accuracy else "" for n in names]
        label = "finished, 0.1 to 0.3" if level is found[-1] else f"{level.sigma:.3f}"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(found: list[ChoiceRow]) -> str:
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


def as_json(accuracies_by_sigma: list[SigmaAccuracy], found: list[ChoiceRow]) -> dict:
    def plain(e: Estimate | None):
        return None if e is None else [e.mean, e.half]

    return {
        "accuracy": [
            {"sigma": v.sigma, "by": {k: plain(e) for k, e in v.accuracy.items()}} for v in accuracies_by_sigma
        ],
        "best_of_n": [
            {
                "n": r.size, "choice": r.name, "oracle": plain(r.oracle), "gain": plain(r.gain), "share": plain(r.share),
                "evaluations": r.evaluations, "blocks": r.blocks, "blocks_share": r.blocks_share,
            }
            for r in found
        ],
    }  # fmt: skip
