"""Pruning plan of an early Best-of-N: the number of candidates that run each step, and the cost in blocks.

N candidates start; at each checkpoint those still in the race are ranked by the head and the worst drop out. A checkpoint
is a noise level, not a step: the same step index is another noise level under another shift, schedule or number of steps.
Scoring needs the conditional forward's blocks up to the tap, which the step runs anyway: survivors go on from there, so
that only who drops out there pays for a part of a forward that leads nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CONTINUE, RESTART = "continue", "restart"
# Halving after a tenth, a fifth and two fifths of a 50-step schedule at shift 8 (arXiv 2606.20310 finds accuracy there).
SIGMAS = (0.987, 0.970, 0.924)


class PlanError(ValueError):
    """No plan is possible for the arguments; the message names the argument and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """Before step `step` (from 0), at noise level `sigma`, all candidates but the best `survivors` are dropped."""

    step: int
    sigma: float
    survivors: int


@dataclass(frozen=True)
class Cost:
    """Cost of a run. evaluations: whole forwards of one candidate; partial: forwards that end at the tap; blocks: of both."""

    evaluations: int
    partial: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    """A pruned run of `candidates` over `steps` steps.

    checkpoints: steps ascending, survivors descending, the last of them `keep`; none where candidates == keep.
    passes: forwards of a candidate and step, 2 under classifier-free guidance, else 1.
    depth: blocks of the network; tap: index of the block whose output is scored.
    finish: CONTINUE continues from the survivors' states; RESTART runs the winners again from their seeds.
    """

    candidates: int
    keep: int
    steps: int
    checkpoints: tuple[Checkpoint, ...]
    passes: int
    depth: int
    tap: int
    finish: str = CONTINUE

    def alive(self, step: int) -> int:
        """How many candidates run step `step` (from 0) to its end."""
        left = self.candidates
        for point in self.checkpoints:
            if step >= point.step:
                left = point.survivors
        if self.finish == RESTART and self.checkpoints and step >= self.checkpoints[-1].step:
            return 0
        return left

    @property
    def cost(self) -> Cost:
        """Cost of this plan."""
        evaluations = self.passes * sum(self.alive(step) for step in range(self.steps))
        partial, left = 0, self.candidates
        for point in self.checkpoints:
            restarts = self.finish == RESTART and point is self.checkpoints[-1]
            partial += left - (0 if restarts else point.survivors)
            left = point.survivors
        if self.finish == RESTART and self.checkpoints:
            evaluations += self.passes * self.steps * self.keep
        return Cost(evaluations, partial, evaluations * self.depth + partial * (self.tap + 1))

    @property
    def full_cost(self) -> Cost:
        """Cost of plain Best-of-N: every candidate sampled to the end and scored there."""
        evaluations = self.passes * self.steps * self.candidates
        return Cost(evaluations, 0, evaluations * self.depth)

    @property
    def share(self) -> float:
        """Blocks of this plan over those of plain Best-of-N."""
        return self.cost.blocks / self.full_cost.blocks


def halving(candidates: int, keep: int, rounds: int) -> tuple[int, ...]:
    """Survivors after each of at most `rounds` checkpoints: half each time, rounded up, and `keep` after the last.

    Fewer than `rounds` where halving ends sooner; the last checkpoint drops all that remain to be dropped.
    """
    left, out = candidates, []
    while left > keep and len(out) < rounds:
        left = keep if len(out) == rounds - 1 else max(keep, -(-left // 2))
        out.append(left)
    return tuple(out)


def step_at(schedule: Sequence[float], sigma: float) -> int:
    """The first step whose input is no noisier than `sigma`, from 1, or len(schedule) - 1 when there is none.

    schedule: sigmas, descending, one more than there are steps.
    """
    last = len(schedule) - 1
    return next((k for k in range(1, last) if schedule[k] <= sigma + 1e-6), last)


def make_plan(
    schedule: Sequence[float],
    candidates: int,
    keep: int = 1,
    sigmas: Sequence[float] = SIGMAS,
    survivors: Sequence[int] | None = None,
    passes: int = 2,
    depth: int = 30,
    tap: int = 11,
    finish: str = CONTINUE,
) -> Plan:
    """The plan for a schedule: checkpoints at noise levels `sigmas`, by successive halving unless `survivors` says otherwise.

    Sigmas that fall on one step become one checkpoint, with the fewest survivors; a sigma below the last step's is an error.
    Raises PlanError.
    """
    steps = len(schedule) - 1
    if steps < 1 or any(b >= a for a, b in zip(schedule, schedule[1:], strict=False)):
        raise PlanError(f"the schedule must descend over at least one step, found {list(schedule)}")
    if not 1 <= keep <= candidates:
        raise PlanError(f"keep {keep} of {candidates} candidates: expected 1 to {candidates}")
    if finish not in (CONTINUE, RESTART):
        raise PlanError(f"unknown finish '{finish}': expected {CONTINUE} or {RESTART}")
    if not 0 <= tap < depth or passes < 1:
        raise PlanError(f"tap {tap} is not a block of a network of {depth}, or passes {passes} < 1")
    ordered = sorted(sigmas, reverse=True)
    counts = halving(candidates, keep, len(ordered)) if survivors is None else tuple(survivors)
    if survivors is not None and len(counts) != len(ordered):
        raise PlanError(f"{len(ordered)} checkpoints and {len(counts)} survivor counts: expected one each")
    if candidates == keep:
        return Plan(candidates, keep, steps, (), passes, depth, tap, finish)
    if not ordered:
        raise PlanError(f"{candidates} candidates and no checkpoint: give at least one noise level to prune at")
    points: dict[int, Checkpoint] = {}
    left = candidates
    for sigma, count in zip(ordered, counts, strict=False):
        step = step_at(schedule, sigma)
        if step >= steps:
            raise PlanError(
                f"no step starts at or below sigma {sigma:g}: the last of {steps} starts at {schedule[-2]:.3f}; "
                "prune at a higher noise level or use more steps"
            )
        if not keep <= count <= left:
            raise PlanError(f"{count} survivors at sigma {sigma:g}: expected {keep} to {left}")
        if count < left:
            points[step] = Checkpoint(step, float(schedule[step]), count)
            left = count
    if left != keep:
        raise PlanError(f"after the last checkpoint {left} candidates are left: expected {keep}")
    return Plan(candidates, keep, steps, tuple(points.values()), passes, depth, tap, finish)


def rank(scores: Sequence[float], keep: int) -> list[int]:
    """Indices of the `keep` best scores, best first; of equal scores the earlier candidate wins. Raises PlanError for NaN."""
    bad = [i for i, s in enumerate(scores) if s != s]
    if bad:
        raise PlanError(f"candidate {bad[0]} scored NaN: the head or the latent is broken")
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
