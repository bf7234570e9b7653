"""An early Best-of-N as a race: candidates run to a checkpoint, are ranked there, and the worst drop out.

A candidate is a sampler that asks for its network's outputs instead of computing them. So the race sees every call before it
is answered: it scores the calls that meet a checkpoint, and answers several candidates' calls at once where that is wanted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .pausing import Pausing
from .plan import RESTART, Plan, rank

# Schedules are fp32.
SAME = 1e-6


class Call(Protocol):
    """What a sampler calls its network with. sigma: the noise level."""

    sigma: float


Ask = Callable[[Call], object]


class Network(Protocol):
    """What answers the calls; both methods take calls of different candidates at one noise level."""

    def evaluate(self, calls: Sequence[Call], features: Sequence[object | None]) -> Sequence[object]:
        """An output for each call. features: what `score` found for the very call, or None."""

    def score(self, calls: Sequence[Call]) -> Sequence[tuple[float, object]]:
        """(score, features) for each call."""


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
    start: Callable[[int, Ask], object],
    network: Network,
    again: Callable[[int, Ask], object] | None = None,
    on_rank: Callable[[Sequence[int]], None] = lambda order: None,
    chunk: int = 1,
) -> Outcome:
    """Runs the plan's candidates.

    start(i, ask): runs candidate i whole and returns its result, with ask(call) for its network. again(i, ask): the same
    for the winners of a plan that restarts them (None: start). on_rank(candidates in the race, best first) is called after
    every checkpoint. chunk: how many candidates are answered together; 1 runs one after another from checkpoint to
    checkpoint, which leaves each bit for bit what it is alone.
    What a candidate or the network raises ends the race and is raised here; all candidates are dropped. Raises PlanError
    for a NaN score.
    """
    board = [Standing(i) for i in range(plan.candidates)]
    racing = _runners(start, range(plan.candidates))
    features: dict[int, object] = {}
    try:
        for point in plan.checkpoints:
            for part in _chunks(list(racing), chunk):
                _advance(racing, part, point.sigma, network, features)
                ended = [i for i in part if racing[i].done]
                if ended:
                    raise RuntimeError(f"candidate {ended[0]} ended before its checkpoint at step {point.step}")
                found = network.score([racing[i].value for i in part])
                for i, (score, seen) in zip(part, found, strict=True):
                    board[i].scores[point.step], features[i] = float(score), seen
            indices = list(racing)
            order = [indices[k] for k in rank([board[i].scores[point.step] for i in indices], len(indices))]
            for i in order[point.survivors :]:
                board[i].dropped = point.step
                racing.pop(i).drop()
                features.pop(i)
            on_rank(order[: point.survivors])
        # Without a checkpoint there is nothing to rank by: candidates come out in their order.
        winners = order[: plan.keep] if plan.checkpoints else list(racing)
        if plan.finish == RESTART and plan.checkpoints:
            for i in winners:
                racing.pop(i).drop()
            features.clear()
            racing = _runners(again or start, winners)
        for part in _chunks(winners, chunk):
            _advance(racing, part, None, network, features)
        return Outcome([racing[i].value for i in winners], winners, board)
    finally:
        for paused in racing.values():
            paused.drop()


def _runners(start, indices: Sequence[int]) -> dict[int, Pausing]:
    return {i: Pausing(lambda ask, i=i: start(i, ask)) for i in indices}


def _chunks(members: list[int], size: int) -> list[list[int]]:
    return [members[k : k + size] for k in range(0, len(members), size)]


def _advance(racing, members: list[int], level: float | None, network: Network, features: dict) -> None:
    """Until each of the members has returned, or asks for an output at noise level `level` or below."""
    for i in members:
        if not racing[i].started:
            racing[i].resume()
    while True:
        asking = [i for i in members if not racing[i].done and (level is None or racing[i].value.sigma > level + SAME)]
        if not asking:
            return
        # Samplers of their own step size may be at different levels.
        sigma = max(racing[i].value.sigma for i in asking)
        together = [i for i in asking if racing[i].value.sigma == sigma]
        outputs = network.evaluate([racing[i].value for i in together], [features.pop(i, None) for i in together])
        for i, out in zip(together, outputs, strict=True):
            racing[i].resume(out)
