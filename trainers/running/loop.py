"""Parts shared by training loops: checkpoint options, signals deferred to the end of a step, and divergence."""

import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# A training stops after this many steps in a row with a loss or gradient that is not finite.
MAX_NONFINITE_STEPS = 20


class DivergedError(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class CheckpointOptions:
    """folder: where checkpoints are written; every: steps between two, 0 for the last step only; limit: how many are kept,
    None for all; resume: the checkpoint to load, None to start from the beginning.
    """

    folder: Path
    every: int = 0
    limit: int | None = None
    resume: Path | None = None


@contextmanager
def deferred_signals():
    """Defers SIGINT and SIGTERM, so that a step can be finished and saved before the program stops.

    Yields the list of the signals received so far; the caller checks it after each step.
    """
    received: list[int] = []
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda n, _: received.append(n))
    except ValueError:
        # Signal handlers can be set in the main thread only.
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
