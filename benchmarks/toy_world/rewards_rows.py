"""Rows of the rewards' report: what each reward tells about finished clips, drafts and predictions, and what races gain.

The oracle is the judge's overall score of the finished clip; gains are over a random seed of the caption, intervals 95 % over
captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.kernels.prism.plan import make_plan
from trainers.kernels.rewards.mix import Z, normalised

from . import pipeline, statistics, training_free
from .prism_rows import DEPTH, PASSES, accuracy, over_captions
from .statistics import Estimate

# Blocks of a full run of one candidate.
RUN = pipeline.STEPS * PASSES * DEPTH
MIX = ("flow residual", "prompt gap")
# Forwards per clip of each reward with its defaults, see kernels.rewards.
FORWARDS = {"flow residual, published levels": 12, "flow residual": 12, "prompt gap": 8, "mix": 20}
# Chosen on the exploratory captions: prune at step 3 by two draws of the gap, that is 4 forwards.
EARLY_STEP, LATE_STEP = training_free.PREDICTED
EARLY_FORWARDS = 4


@dataclass(frozen=True)
class RewardRow:
    """One reward: accuracy over pairs of candidates, gains of its best half and of its favourite."""

    name: str
    accuracy: Estimate
    half: Estimate
    single: Estimate


@dataclass(frozen=True)
class RaceRow:
    """One way to search: gain of what it keeps; share: blocks over those of eight full runs; decodes per caption."""

    name: str
    gain: Estimate
    share: float
    decodes: int = 0


def tables(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[captions, candidates] of all captions, and the mixes."""
    found = {k: torch.stack([r[k] for r in results]) for k in results[0]}
    for stage in ("finished", "draft"):
        parts = [torch.stack([normalised(row, Z) for row in found[f"{name}/{stage}"]]) for name in MIX]
        found[f"mix/{stage}"] = sum(parts)
    return found


def best(scores: Tensor, count: int) -> Tensor:
    """[captions, count]: indices of the best candidates."""
    return scores.topk(count, dim=1).indices


def gain_of(oracle: Tensor, kept: Tensor) -> Estimate:
    """Gain of kept candidates [captions, k] over a random one."""
    return statistics.mean(oracle.gather(1, kept).mean(dim=1) - oracle.mean(dim=1))


def reward_rows(found: dict[str, Tensor]) -> list[RewardRow]:
    """Every score of the tables, the oracle first."""
    oracle = found["oracle.overall"]
    names = [k for k in found if "/" in k]
    return [reward_row("oracle", oracle, oracle)] + [reward_row(name, found[name], oracle) for name in sorted(names)]


def reward_row(name: str, scores: Tensor, oracle: Tensor) -> RewardRow:
    right = over_captions(accuracy(scores, oracle))
    return RewardRow(name, right, gain_of(oracle, best(scores, scores.shape[1] // 2)), gain_of(oracle, best(scores, 1)))


def among(scores: Tensor, kept: Tensor, count: int) -> Tensor:
    """[captions, count]: the best by `scores` among the candidates kept [captions, k]."""
    return kept.gather(1, best(scores.gather(1, kept), count))


def early_mix(found: dict[str, Tensor], kept: Tensor) -> Tensor:
    """The mix of finished clips, normalised among the candidates that are kept."""
    out = torch.full_like(found["oracle.overall"], -torch.inf)
    for row, indices in enumerate(kept):
        parts = [normalised(found[f"{name}/finished"][row, indices], Z) for name in MIX]
        out[row, indices] = sum(parts)
    return out


def race_rows(found: dict[str, Tensor], taps: dict[str, int]) -> list[RaceRow]:
    """All searches among the candidates, N of them, with settings that were fixed before these captions were sampled.

    taps: head -> its last tap.
    """
    oracle = found["oracle.overall"]
    count = oracle.shape[1]
    early, late = found[f"prompt gap/{EARLY_STEP}"], found[f"prompt gap/{LATE_STEP}"]
    rows = [
        RaceRow("random seed", gain_of(oracle, torch.zeros(len(oracle), 1, dtype=torch.long)), 1 / count),
        RaceRow("oracle, all in full", gain_of(oracle, best(oracle, 1)), 1.0, count),
    ]
    for name, forwards in FORWARDS.items():
        share = 1 + forwards * DEPTH / RUN
        rows.append(RaceRow(f"{name}, all in full", gain_of(oracle, best(found[f"{name}/finished"], 1)), share))
    first = best(early, 1)
    for finish in ("continue", "restart"):
        rows.append(
            RaceRow(
                f"prompt gap, one prune at step {EARLY_STEP}, {finish}",
                gain_of(oracle, first),
                share_of(count, (1,), 1, finish),
            )
        )
    half = best(early, count // 2)
    rows.append(
        RaceRow(
            f"its best half at step {EARLY_STEP}, restart",
            gain_of(oracle, half),
            share_of(count, (count // 2,), count // 2, "restart"),
        )
    )
    two = among(late, half, 1)
    rows.append(
        RaceRow(
            f"prompt gap, halved at step {EARLY_STEP}, one at {LATE_STEP}, restart",
            gain_of(oracle, two),
            share_of(count, (count // 2, 1), 1, "restart"),
        )
    )
    for finalists in (2, 3):
        kept = best(early, finalists)
        chosen = among(early_mix(found, kept), kept, 1)
        share = share_of(count, (finalists,), 1, "continue", finalists, FORWARDS["mix"] * DEPTH)
        rows.append(
            RaceRow(f"{finalists} finalists of step {EARLY_STEP}, one by the mix, continue", gain_of(oracle, chosen), share)
        )
    draft = training_free.DRAFT_STEPS / pipeline.STEPS
    for name, forwards in FORWARDS.items():
        share = draft + forwards * DEPTH / RUN + 1 / count
        rows.append(
            RaceRow(
                f"drafts of {training_free.DRAFT_STEPS} steps by {name}",
                gain_of(oracle, best(found[f"{name}/draft"], 1)),
                share,
            )
        )
    for head in ("query", "mean"):
        if f"{head}/{EARLY_STEP}" in found:
            kept = best(found[f"{head}/{EARLY_STEP}"], count // 2)
            chosen = among(found[f"{head}/{LATE_STEP}"], kept, 1)
            share = share_of(count, (count // 2, 1), 1, "restart", scoring=taps[head] + 1)
            rows.append(
                RaceRow(
                    f"PRISM head ({head}), halved at step {EARLY_STEP}, one at {LATE_STEP}, restart",
                    gain_of(oracle, chosen),
                    share,
                )
            )
    for step in training_free.PREDICTED:
        share = share_of(count, (1,), 1, "restart", scoring=0, steps=(step,))
        rows.append(
            RaceRow(
                f"judge on decoded predictions, one prune at step {step}, restart",
                gain_of(oracle, best(found[f"judge/{step}"], 1)),
                share,
                count,
            )
        )
    return rows


def share_of(
    count: int, survivors: Sequence[int], keep: int, finish: str, finalists: int | None = None, final_scoring: int = 0,
    scoring: int = EARLY_FORWARDS * DEPTH, steps: Sequence[int] | None = None,
) -> float:  # fmt: skip
    """Blocks of a plan over those of `count` full runs."""
    schedule = pipeline.schedule()
    steps = steps or (EARLY_STEP, LATE_STEP)[: len(survivors)]
    plan = make_plan(
        schedule,
        count,
        keep,
        [schedule[s] for s in steps],
        survivors,
        PASSES,
        DEPTH,
        scoring,
        finish,
        finalists,
        final_scoring,
    )
    return plan.cost.blocks / plan.full_cost.blocks


def sure(e: Estimate) -> str:
    """Mean and interval, bold where the interval leaves out zero."""
    text = f"{e.mean:+.3f} ± {e.half:.3f}"
    return f"**{text}**" if abs(e.mean) > e.half else text


def reward_table(rows: Sequence[RewardRow]) -> str:
    """As markdown."""
    lines = [
        "| score | pairs ordered as the oracle | gain of the best half | gain of the single choice |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.name} | {r.accuracy.text()} | {sure(r.half)} | {sure(r.single)} |" for r in rows]
    return "\n".join(lines)


def race_table(rows: Sequence[RaceRow]) -> str:
    """As markdown."""
    lines = ["| search | gain of what it keeps | blocks, of all candidates in full | decodes |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {sure(r.gain)} | {100 * r.share:.1f} % | {r.decodes} |" for r in rows]
    return "\n".join(lines)
