"""Parts of a training loop: where checkpoints go, stopping on Ctrl-C after a whole step, and divergence."""

import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BAD_IN_A_ROW = 20


class DivergedError(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Checkpoints:
    """folder: where; every: steps between two, 0 for none but the last; limit: how many stay; resume: the one to load."""

    folder: Path
    every: int = 0
    limit: int | None = None
    resume: Path | None = None


@contextmanager
def signals():
    """A list that is not empty once Ctrl-C (or the launcher's request to end) came: steps are finished first."""
    asked: list[int] = []
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda received, _: asked.append(received))
    except ValueError:
        # Outside the main thread there are no signals to handle.
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
