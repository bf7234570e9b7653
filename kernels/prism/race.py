"""Early Best-of-N (arXiv 2606.20310): candidates run to a checkpoint, are ranked there, and the worst are dropped.

A candidate is a sampler that hands its network calls to the race instead of computing them. The race sees every call before
it is answered: it scores the calls at a checkpoint, and can answer the calls of several candidates in one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .coroutine import Coroutine
from .plan import Checkpoint, Plan, PlanError, rank

# Noise levels closer than this are equal: schedules are fp32.
SIGMA_TOLERANCE = 1e-6


class Call(Protocol):
    """The arguments of one network call. sigma: the noise level."""

    sigma: float


Ask = Callable[[Call], object]


class Network(Protocol):
    """Evaluates and scores calls of candidates."""

    def evaluate(self, calls: Sequence[Call]) -> Sequence[object]:
        """An output for each call. The calls are at one noise level."""

    def score(self, calls: Sequence[Call], checkpoint: Checkpoint) -> Sequence[Sequence[float]]:
        """For each call the scores of its clips, higher is better; a candidate is ranked by their mean.

        The calls are those of all candidates that still race.
        """


@dataclass
class CandidateResult:
    """One candidate. clip_scores: {step of the checkpoint: score of each of its clips}; dropped: the step at which it was
    dropped, None for a winner."""

    index: int
    clip_scores: dict[int, list[float]] = field(default_factory=dict)
    dropped: int | None = None

    @property
    def scores(self) -> dict[int, float]:
        """{step of the checkpoint: mean score of the candidate's clips}."""
        return {step: sum(clips) / len(clips) for step, clips in self.clip_scores.items()}


@dataclass(frozen=True)
class RaceResult:
    """winners: indices of the finalists, best first; results: theirs, empty where the plan restarts them; board: one entry
    for every candidate."""

    results: list
    winners: list[int]
    board: list[CandidateResult]


def run(
    plan: Plan,
    start: Callable[[int, Ask], object],
    network: Network,
    on_rank: Callable[[Sequence[int], Sequence[CandidateResult]], None] = lambda order, board: None,
    chunk: int = 1,
) -> RaceResult:
    """Runs the plan's candidates: to the end for a plan that continues, to its last checkpoint for one that restarts.

    start(i, ask): samples candidate i to its end and returns its result; ask(call) returns its network's output.
    on_rank(remaining candidates, best first; the board so far) is called after every checkpoint. chunk: how many candidates
    are evaluated together; with 1 they run one after another from checkpoint to checkpoint, and each result is bit for bit
    that of the candidate alone. An exception of a candidate, the network or on_rank cancels all candidates and is raised
    here. Raises PlanError for a NaN score and for a candidate that returns before its checkpoint.
    """
    board = [CandidateResult(i) for i in range(plan.candidates)]
    running = {i: Coroutine(lambda ask, i=i: start(i, ask)) for i in range(plan.candidates)}
    winners = list(running)
    try:
        for checkpoint in plan.checkpoints:
            for part in _chunks(list(running), chunk):
                _advance(running, part, checkpoint.sigma, network)
                ended = [i for i in part if running[i].done]
                if ended:
                    raise PlanError(
                        f"candidate {ended[0]} ended before the checkpoint at sigma {checkpoint.sigma:.3f}: the sampler "
                        "chooses its own noise levels; drop candidates at a higher sigma, or use another sampler"
                    )
            indices = list(running)
            found = network.score([running[i].value for i in indices], checkpoint)
            for i, clips in zip(indices, found, strict=True):
                board[i].clip_scores[checkpoint.step] = [float(score) for score in clips]
            order = [indices[k] for k in rank([board[i].scores[checkpoint.step] for i in indices], len(indices))]
            for i in order[checkpoint.survivors :]:
                board[i].dropped = checkpoint.step
                running.pop(i).cancel()
            winners = order[: checkpoint.survivors]
            on_rank(winners, board)
        if plan.restarts:
            return RaceResult([], winners, board)
        for part in _chunks(winners, chunk):
            _advance(running, part, None, network)
        return RaceResult([running[i].value for i in winners], winners, board)
    finally:
        for coroutine in running.values():
            coroutine.cancel()


def _chunks(members: list[int], size: int) -> list[list[int]]:
    return [members[k : k + size] for k in range(0, len(members), size)]


def _advance(running, members: list[int], sigma: float | None, network: Network) -> None:
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
        outputs = network.evaluate([running[i].value for i in batch])
        for i, out in zip(batch, outputs, strict=True):
            running[i].resume(out)


def _is_above(sigma: float, limit: float | None) -> bool:
    return limit is None or sigma > limit + SIGMA_TOLERANCE
