"""The loop of the training nodes: steps, learning rate, saves in mid-run, interruption and resume.

What a step draws must follow from (seed, step): then a resumed training ends with the tensors of an unbroken one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import comfy.model_management
import torch

from ..kernels.files.header import DAMAGED, not_finite
from . import training_state
from .training_state import State, StateError

CONSTANT, COSINE = "constant", "cosine"
# Steps in a row whose loss or gradient is not finite, that end a training.
MOST_SKIPPED = 20
MAX_GRADIENT = 1.0
# Steps between two copies of healthy parameters, which are kept in main memory.
COPY_EVERY = 10
PARAMETERS, HEALTHY, HISTORY = "parameters.", "healthy.", "history"


class TrainingError(ValueError):
    """A training cannot go on; the message says why and what to do."""


class Objective(Protocol):
    """What is minimised. Its figures of a step are a fixed number of floats, the loss first."""

    healthy: bool
    """Whether the parameters of the latest steps are fit to be used."""

    def accumulate(self, step: int) -> list[float]:
        """Adds the step's gradient to .grad of the parameters and returns its figures."""

    def finish(self, figures: list[float]) -> None:
        """Takes in the figures of a step that was applied."""

    def stop_reason(self) -> str | None:
        """A sentence where the training must end now."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    """steps: optimiser steps; warmup: of them; schedule: CONSTANT or COSINE after it; save_every: steps, 0 for the end only;
    path: of the state file; described: JSON values that a resumed training must have alike.
    """

    steps: int
    learning_rate: float
    warmup: int
    schedule: str
    save_every: int
    path: Path
    described: Mapping

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0: linear warm-up times a constant or a half cosine that ends at 0."""
        decay = 0.5 + 0.5 * math.cos(math.pi * step / self.steps) if self.schedule == COSINE else 1.0
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup)) * decay


@dataclass(frozen=True)
class Outcome:
    """steps: done in all; parameters: on the CPU, of `healthy_step`; history: figures of all steps; stopped: the objective's
    reason, None at the planned end; skipped: steps whose loss or gradient was not finite.
    """

    steps: int
    healthy_step: int
    parameters: dict[str, torch.Tensor]
    history: list[list[float]]
    stopped: str | None = None
    skipped: int = 0


def load(settings: LoopSettings, figures: int) -> State | None:
    """The state of a training that was begun, None where there is none. figures: of a step. Raises StateError."""
    state = training_state.load(settings.path, settings.described)
    if state is None:
        return None
    counts = state.step, state.notes.get("healthy"), state.notes.get("skipped")
    history = state.tensors.get(HISTORY, torch.zeros(0))
    bad = not_finite({n: t for n, t in state.tensors.items() if n != HISTORY})
    if (
        not all(type(n) is int and 0 <= n <= state.step <= settings.steps for n in counts)
        or history.dtype != torch.float64 or list(history.shape) != [state.step, figures] or bad is not None
    ):  # fmt: skip
        raise StateError(f"{settings.path}: damaged ({bad or 'steps and figures'}); turn 'resume' off, which replaces it")
    return state


def finished(state: State | None, settings: LoopSettings) -> Outcome | None:
    """The outcome of a training that a state says is done; None where there are steps left."""
    if state is None or state.step < settings.steps:
        return None
    return Outcome(
        state.step, state.step, _part(state, PARAMETERS), state.tensors[HISTORY].tolist(), None, state.notes["skipped"]
    )


def train(
    parameters: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, objective: Objective,
    settings: LoopSettings, state: State | None, on_step: Callable[[int, list[list[float]]], None],
    on_save: Callable[[int, Mapping[str, torch.Tensor]], None],
) -> Outcome:  # fmt: skip
    """Trains the parameters in place, from a state if one is given.

    on_step(steps done, history) is called after each step, on_save(step, its parameters) after each save, with those of the
    last healthy step where the present ones are not. When ComfyUI interrupts the run, the last whole step is saved and the
    interruption goes on. Raises TrainingError, StateError or OSError.
    """
    step, skipped, bad, history = 0, 0, 0, []
    healthy = (0, _copies(parameters))
    if state is not None:
        step, skipped, history = state.step, state.notes["skipped"], state.tensors[HISTORY].tolist()
        healthy = _restore(state, parameters, optimiser, objective)
    saved, stopped = step, None

    def save() -> None:
        tensors = {PARAMETERS + n: p for n, p in parameters.items()} | training_state.pack_adam(optimiser, parameters)
        if healthy[0] != step:
            tensors |= {HEALTHY + n: t for n, t in healthy[1].items()}
        tensors[HISTORY] = torch.tensor(history, dtype=torch.float64)
        notes = {"objective": objective.state_dict(), "healthy": healthy[0], "skipped": skipped}
        training_state.save(settings.path, State(step, tensors, notes), settings.described)
        on_save(*((step, parameters) if objective.healthy else healthy))

    try:
        while step < settings.steps and not stopped:
            comfy.model_management.throw_exception_if_processing_interrupted()
            figures = objective.accumulate(step)
            length = torch.nn.utils.clip_grad_norm_(list(parameters.values()), MAX_GRADIENT)
            applied = bool(torch.isfinite(length)) and math.isfinite(figures[0])
            if applied:
                bad = 0
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate(step)
                optimiser.step()
                objective.finish(figures)
            else:
                skipped, bad = skipped + 1, bad + 1
            optimiser.zero_grad(set_to_none=True)
            step += 1
            history.append(figures)
            if bad >= MOST_SKIPPED:
                raise TrainingError(
                    f"{bad} steps in a row up to step {step} had a loss or gradient that is not finite; lower "
                    "'learning_rate', or load the model in bf16 instead of fp16"
                )
            stopped = objective.stop_reason()
            due = step == settings.steps or bool(settings.save_every and step % settings.save_every == 0)
            if applied and objective.healthy and not stopped and (due or step % COPY_EVERY == 0):
                healthy = (step, _copies(parameters))
            on_step(step, history)
            if due and not stopped:
                save()
                saved = step
    except comfy.model_management.InterruptProcessingException:
        # Whatever of a step was computed is left out: parameters and moments change at its end only.
        if step > saved:
            save()
        raise
    if stopped or healthy[0] == step:
        return Outcome(step, healthy[0], healthy[1], history, stopped, skipped)
    return Outcome(step, step, _copies(parameters), history, None, skipped)


def _copies(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}


def _part(state: State, prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)}


def _restore(state: State, parameters, optimiser, objective: Objective) -> tuple[int, dict[str, torch.Tensor]]:
    """Loads a state and returns (step, parameters) of its last healthy step."""
    own = _part(state, PARAMETERS)
    healthy = _part(state, HEALTHY) or own
    shapes = {n: p.shape for n, p in parameters.items()}
    if any({n: t.shape for n, t in part.items()} != shapes for part in (own, healthy)):
        raise StateError("the saved training is of another model; give another 'name', or turn 'resume' off")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(own[name])
    training_state.unpack_adam(optimiser, parameters, state.tensors)
    try:
        objective.load_state_dict(state.notes["objective"])
    except (*DAMAGED, AttributeError) as e:
        raise StateError(f"the saved training is damaged ({type(e).__name__}); turn 'resume' off, which replaces it") from e
    return state.notes["healthy"], healthy
