"""Early Best-of-N (arXiv 2606.20310): candidates run to a checkpoint, are ranked there, and the worst are dropped.

A candidate is a sampler that hands its network calls to the race instead of computing them. The race sees every call before
it is answered: it scores the calls at a checkpoint, and can answer the calls of several candidates in one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .coroutine import Coroutine
from .plan import RESTART, Plan, rank

# Noise levels closer than this are equal: schedules are fp32.
SIGMA_TOLERANCE = 1e-6


class Call(Protocol):
    """The arguments of one network call. sigma: the noise level."""

    sigma: float


Ask = Callable[[Call], object]


class Network(Protocol):
    """Evaluates and scores calls; both methods take calls of different candidates at one noise level."""

    def evaluate(self, calls: Sequence[Call], features: Sequence[object | None]) -> Sequence[object]:
        """An output for each call. features: what `score` returned for the same call, or None."""

    def score(self, calls: Sequence[Call]) -> Sequence[tuple[float, object]]:
        """(score, features) for each call."""


@dataclass
class CandidateResult:
    """One candidate. scores: {step of the checkpoint: score}; dropped: the step at which it was dropped, None for a winner."""

    index: int
    scores: dict[int, float] = field(default_factory=dict)
    dropped: int | None = None


@dataclass(frozen=True)
class RaceResult:
    """results: of the winners, best first; winners: their indices; board: one entry for every candidate."""

    results: list
    winners: list[int]
    board: list[CandidateResult]


def run(
    plan: Plan,
    start: Callable[[int, Ask], object],
    network: Network,
    restart: Callable[[int, Ask], object] | None = None,
    on_rank: Callable[[Sequence[int]], None] = lambda order: None,
    chunk: int = 1,
) -> RaceResult:
    """Runs the plan's candidates.

    start(i, ask): samples candidate i to its end and returns its result; ask(call) returns its network's output.
    restart(i, ask): the same for the winners of a plan that restarts them (None: start). on_rank(remaining candidates, best
    first) is called after every checkpoint. chunk: how many candidates are evaluated together; with 1 they run one after
    another from checkpoint to checkpoint, and each result is bit for bit that of the candidate alone.
    An exception of a candidate, the network or on_rank cancels all candidates and is raised here. Raises PlanError for a NaN
    score and RuntimeError for a candidate that returns before its checkpoint.
    """
    board = [CandidateResult(i) for i in range(plan.candidates)]
    running = _start(start, range(plan.candidates))
    features: dict[int, object] = {}
    try:
        for checkpoint in plan.checkpoints:
            for part in _chunks(list(running), chunk):
                _advance(running, part, checkpoint.sigma, network, features)
                ended = [i for i in part if running[i].done]
                if ended:
                    raise RuntimeError(f"candidate {ended[0]} ended before its checkpoint at step {checkpoint.step}")
                found = network.score([running[i].value for i in part])
                for i, (score, seen) in zip(part, found, strict=True):
                    board[i].scores[checkpoint.step], features[i] = float(score), seen
            indices = list(running)
            order = [indices[k] for k in rank([board[i].scores[checkpoint.step] for i in indices], len(indices))]
            for i in order[checkpoint.survivors :]:
                board[i].dropped = checkpoint.step
                running.pop(i).cancel()
                features.pop(i)
            on_rank(order[: checkpoint.survivors])
        # Without a checkpoint nothing is ranked: the candidates keep their order.
        winners = order[: plan.keep] if plan.checkpoints else list(running)
        if plan.finish == RESTART and plan.checkpoints:
            for i in winners:
                running.pop(i).cancel()
            features.clear()
            running = _start(restart or start, winners)
        for part in _chunks(winners, chunk):
            _advance(running, part, None, network, features)
        return RaceResult([running[i].value for i in winners], winners, board)
    finally:
        for coroutine in running.values():
            coroutine.cancel()


def _start(function, indices: Sequence[int]) -> dict[int, Coroutine]:
    return {i: Coroutine(lambda ask, i=i: function(i, ask)) for i in indices}


def _chunks(members: list[int], size: int) -> list[list[int]]:
    return [members[k : k + size] for k in range(0, len(members), size)]


def _advance(running, members: list[int], sigma: float | None, network: Network, features: dict) -> None:
    """Runs the members until each calls its network at noise level `sigma` or below, or returns (None: until each returns)."""
    for i in members:
        if not running[i].started:
            running[i].resume()
    while True:
        waiting = [i for i in members if not running[i].done and _is_above(running[i].value.sigma, sigma)]
        if not waiting:
            return
        # Samplers with adaptive step sizes may be at different noise levels.
        highest = max(running[i].value.sigma for i in waiting)
        batch = [i for i in waiting if running[i].value.sigma == highest]
        outputs = network.evaluate([running[i].value for i in batch], [features.pop(i, None) for i in batch])
        for i, out in zip(batch, outputs, strict=True):
            running[i].resume(out)


def _is_above(sigma: float, limit: float | None) -> bool:
    return limit is None or sigma > limit + SIGMA_TOLERANCE
