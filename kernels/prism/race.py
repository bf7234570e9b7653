"""An early Best-of-N as a race: candidates run to a checkpoint, are ranked there, and the worst drop out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .pausing import Pausing
from .plan import RESTART, Plan, rank

Stop = Callable[[object], None]


@dataclass
class Standing:
    """One candidate. scores: checkpoint's step -> score; dropped: the step at which it dropped out, None if it won."""

    index: int
    scores: dict[int, float] = field(default_factory=dict)
    dropped: int | None = None


@dataclass(frozen=True)
class Outcome:
    """results: of the winners, best first; winners: their indices; board: every candidate."""

    results: list
    winners: list[int]
    board: list[Standing]


def run(
    plan: Plan,
    start: Callable[[int, Stop], object],
    again: Callable[[int], object] | None = None,
    on_rank: Callable[[Sequence[int]], None] = lambda order: None,
) -> Outcome:
    """Runs the plan's candidates.

    start(i, stop): runs candidate i whole and returns its result; at every checkpoint that it reaches it calls stop(score)
    once, and does not come back from it when it drops out. again(i): runs it whole without stopping, for plans that restart
    their winners. on_rank(candidates in the race, best first) is called after every checkpoint.
    What a candidate raises ends the race and is raised here; all others are dropped. Raises PlanError for a NaN score.
    """
    board = [Standing(i) for i in range(plan.candidates)]
    racing = {i: Pausing(lambda stop, i=i: start(i, stop)) for i in range(plan.candidates)}
    try:
        for point in plan.checkpoints:
            for i in racing:
                board[i].scores[point.step] = float(racing[i].resume())
                if racing[i].done:
                    raise RuntimeError(f"candidate {i} ended before its checkpoint at step {point.step}")
            indices = list(racing)
            order = [indices[k] for k in rank([board[i].scores[point.step] for i in indices], len(indices))]
            for i in order[point.survivors :]:
                board[i].dropped = point.step
                racing.pop(i).drop()
            on_rank(order[: point.survivors])
        # Without a checkpoint there is nothing to rank by: candidates come out in their order.
        winners = order[: plan.keep] if plan.checkpoints else list(racing)
        if plan.finish == RESTART and plan.checkpoints:
            for i in winners:
                racing.pop(i).drop()
            return Outcome([again(i) for i in winners], winners, board)
        return Outcome([racing[i].resume() for i in winners], winners, board)
    finally:
        for paused in racing.values():
            paused.drop()
