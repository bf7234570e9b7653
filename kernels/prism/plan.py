"""Pruning plan of an early Best-of-N: the number of candidates that run each step, and the cost in blocks.

N candidates start; at each checkpoint those still in the race are ranked by a reward and the worst drop out. A checkpoint
is a noise level, not a step: the same step index is another noise level under another shift, schedule or number of steps.
The finalists, those left after the last checkpoint, are sampled to their end, and a reward of finished clips chooses among
them where there are more than are kept.
Scoring is separate from the steps. A PRISM head reads a conditional forward that ends at its tap; its blocks are not reused by
the step that follows. With 8 candidates halved thrice over 50 steps reuse would save 1.2 % of the blocks (7 x 12 of 6,768),
and a step that starts from them is exact only where no other patch looks at the forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

CONTINUE, RESTART = "continue", "restart"
# Halving after a tenth, a fifth and two fifths of a 50-step schedule at shift 8 (arXiv 2606.20310 finds accuracy there).
SIGMAS = (0.987, 0.970, 0.924)


class PlanError(ValueError):
    """No plan is possible for the arguments; the message names the argument and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """Before step `step` (from 0), at noise level `sigma`, all candidates but the best `survivors` are dropped.

    scoring: transformer blocks that scoring a candidate takes there.
    """

    step: int
    sigma: float
    survivors: int
    scoring: int = 0


@dataclass(frozen=True)
class Cost:
    """Cost of a run. evaluations: forwards of one candidate; scorings: candidates scored; blocks: of both."""

    evaluations: int
    scorings: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    """A pruned run of `candidates` over `steps` steps.

    checkpoints: steps ascending, survivors descending; none where nothing is dropped before the end. finalists: candidates
    that are sampled to the end; keep: how many of them are kept; final_scoring: blocks that scoring a finished candidate
    takes. passes: forwards of a candidate and step, 2 under classifier-free guidance, else 1; depth: blocks of the network.
    finish: CONTINUE continues from the survivors' states; RESTART runs the finalists again from their seeds.
    notes: what of the request the plan does not use, in words.
    """

    candidates: int
    finalists: int
    keep: int
    steps: int
    checkpoints: tuple[Checkpoint, ...]
    passes: int
    depth: int
    final_scoring: int = 0
    finish: str = CONTINUE
    notes: tuple[str, ...] = ()

    @property
    def restarts(self) -> bool:
        """Whether the finalists run again from their seeds."""
        return self.finish == RESTART and bool(self.checkpoints)

    def alive(self, step: int) -> int:
        """How many candidates run step `step` (from 0) to its end, before finalists that restart run again."""
        left = self.candidates
        for point in self.checkpoints:
            if step >= point.step:
                left = point.survivors
        return 0 if self.restarts and step >= self.checkpoints[-1].step else left

    @property
    def cost(self) -> Cost:
        """Cost of this plan."""
        evaluations = self.passes * sum(self.alive(step) for step in range(self.steps))
        if self.restarts:
            evaluations += self.passes * self.steps * self.finalists
        scorings, blocks, left = 0, evaluations * self.depth, self.candidates
        for point in self.checkpoints:
            scorings, blocks, left = scorings + left, blocks + left * point.scoring, point.survivors
        if self.finalists > self.keep:
            scorings, blocks = scorings + self.finalists, blocks + self.finalists * self.final_scoring
        return Cost(evaluations, scorings, blocks)

    @property
    def full_cost(self) -> Cost:
        """Cost of running every candidate to the end, without scoring."""
        evaluations = self.passes * self.steps * self.candidates
        return Cost(evaluations, 0, evaluations * self.depth)

    @property
    def share(self) -> float:
        """Blocks of this plan over those of running every candidate to the end."""
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
    scoring: int | Callable[[float], int] = 12,
    finish: str = CONTINUE,
    finalists: int | None = None,
    final_scoring: int = 0,
) -> Plan:
    """The plan for a schedule: checkpoints at noise levels `sigmas`, by successive halving unless `survivors` says otherwise.

    Halving that needs fewer rounds than there are sigmas uses the lowest of them, where scores are best. Sigmas that fall on
    one step become one checkpoint, with the fewest survivors; a sigma below the last step's is an error. scoring: blocks that
    scoring a candidate takes, or a function of the checkpoint's noise level. finalists: candidates that are sampled to the
    end, `keep` unless more are scored there. Raises PlanError.
    """
    steps, finalists = len(schedule) - 1, keep if finalists is None else finalists
    if steps < 1 or any(b >= a for a, b in zip(schedule, schedule[1:], strict=False)):
        raise PlanError(f"the schedule must descend over at least one step, found {list(schedule)}")
    if not 1 <= keep <= candidates:
        raise PlanError(f"keep {keep} of {candidates} candidates: expected 1 to {candidates}")
    if not keep <= finalists <= candidates:
        raise PlanError(f"{finalists} finalists of {candidates} candidates, {keep} kept: expected {keep} to {candidates}")
    if finish not in (CONTINUE, RESTART):
        raise PlanError(f"unknown finish '{finish}': expected {CONTINUE} or {RESTART}")
    if passes < 1:
        raise PlanError(f"{passes} forwards per step: expected at least 1")
    ordered = sorted(sigmas, reverse=True)
    counts = halving(candidates, finalists, len(ordered)) if survivors is None else tuple(survivors)
    if survivors is not None and len(counts) != len(ordered):
        raise PlanError(f"{len(ordered)} checkpoints and {len(counts)} survivor counts: expected one each")
    unused, used = ordered[: len(ordered) - len(counts)], ordered[len(ordered) - len(counts) :]
    notes = [f"sigma {s:g} is not used: {candidates} candidates take {len(counts)} of {len(ordered)} rounds" for s in unused]
    made = Plan(candidates, finalists, keep, steps, (), passes, depth, final_scoring, finish)
    if candidates == finalists:
        return made
    if not ordered:
        raise PlanError(f"{candidates} candidates and no checkpoint: give at least one noise level to prune at")
    points: dict[int, Checkpoint] = {}
    left = candidates
    for sigma, count in zip(used, counts, strict=True):
        step = step_at(schedule, sigma)
        if step >= steps:
            raise PlanError(
                f"no step starts at or below sigma {sigma:g}: the last of {steps} starts at {schedule[-2]:.3f}; "
                "prune at a higher noise level or use more steps"
            )
        if not finalists <= count <= left:
            raise PlanError(f"{count} survivors at sigma {sigma:g}: expected {finalists} to {left}")
        if count < left:
            if step in points:
                notes.append(f"sigma {sigma:g} and the one before fall on step {step} and are one checkpoint")
            level = float(schedule[step])
            points[step] = Checkpoint(step, level, count, scoring(level) if callable(scoring) else scoring)
            left = count
    if left != finalists:
        raise PlanError(f"after the last checkpoint {left} candidates are left: expected {finalists}")
    return replace(made, checkpoints=tuple(points.values()), notes=tuple(notes))


def rank(scores: Sequence[float], keep: int) -> list[int]:
    """Indices of the `keep` best scores, best first; of equal scores the earlier candidate wins. Raises PlanError for NaN."""
    bad = [i for i, s in enumerate(scores) if s != s]
    if bad:
        raise PlanError(f"candidate {bad[0]} scored NaN: the reward or the latent is broken")
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]
