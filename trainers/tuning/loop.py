"""Training loop of fine-tuning: any objective, any optimiser, one process or several, exact resume.

An objective adds its gradients to the parameters; the loop sums them over processes, clips, steps, logs and saves. What an
objective draws must follow from (seed, step, index among the step's items), not from its process: then a resumed run
ends with the tensors of an unbroken one, and two processes with those of one, up to the order of sums.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..running import checkpoint
from ..running.checkpoint import TrainingState
from ..running.loop import MAX_NONFINITE_STEPS, CheckpointOptions, DivergedError, deferred_signals
from . import optimisers

SCHEDULES = ("constant", "cosine")
# Prefixes in a checkpoint: the parameters, and those of the last healthy step where the checkpoint's own are not healthy.
PARAMETERS, HEALTHY = "parameters.", "healthy."
# Steps between two copies of healthy parameters, which are kept in main memory.
COPY_EVERY = 10


class TuningRunError(ValueError):
    """A run cannot be set up as asked; the message says why and what to do."""


class Objective(Protocol):
    """What is minimised. Every method is called on every process, with the same values where they are not its own."""

    healthy: bool
    """Whether the parameters of the latest steps are fit to be written as a result."""

    def accumulate(self, step: int) -> dict[str, float]:
        """Adds this process's share of the step's gradient to .grad and returns sums over its items, with the same keys on
        all processes; "items": their number, "loss": the sum of losses."""

    def finish(self, step: int, sums: dict[str, float], applied: bool) -> dict[str, float]:
        """Takes in a step's sums over all processes and returns the figures to log; applied: the step was not skipped."""

    def stop_reason(self) -> str | None:
        """A sentence where the run must end now. An objective that never gives one says so by `can_stop` = False, and no
        copies of healthy parameters are kept."""

    def state_dict(self) -> dict:
        """JSON values for a checkpoint."""

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class LoopSettings:
    """steps: optimiser steps; warmup: of them; schedule: one of SCHEDULES; max_grad_norm: 0 for no clipping; optimiser: dotted
    name; optimiser_args: its further arguments."""

    steps: int
    learning_rate: float = 5e-6
    warmup: int = 100
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    optimiser: str = optimisers.DEFAULT
    optimiser_args: Mapping[str, object] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0: linear warm-up times a constant or a half cosine that ends at 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        decay = 0.5 + 0.5 * math.cos(math.pi * step / self.steps) if self.schedule == "cosine" else 1.0
        return self.learning_rate * warm * decay

    def described(self) -> dict:
        """JSON values that a resumed run must have alike."""
        return {
            "steps": self.steps, "learning_rate": self.learning_rate, "warmup": self.warmup, "schedule": self.schedule,
            "max_grad_norm": self.max_grad_norm, "optimizer": self.optimiser,
            "optimizer_args": {k: repr(v) for k, v in sorted(self.optimiser_args.items())},
        }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """steps: done in all; skipped: of them, for a loss or gradient that was not finite; stopped: the objective's reason, None
    at the planned end; healthy_step: whose parameters the model has now; figures: of the last step."""

    steps: int
    skipped: int
    stopped: str | None
    healthy_step: int
    figures: dict[str, float]


def train(
    accelerator,
    parameters: Mapping[str, torch.nn.Parameter],
    objective: Objective,
    settings: LoopSettings,
    described: dict,
    keep: CheckpointOptions,
    on_step: Callable[[int, dict], None] = lambda step, figures: None,
    on_start: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Trains the parameters in place.

    described: JSON values that a resumed run must have alike, apart from `settings`. on_start(steps done) is called on every
    process before the first step, on_step(steps done, figures) after each, on every process too. On Ctrl-C or SIGTERM all
    processes finish the step, a checkpoint is written and KeyboardInterrupt raised. Where the objective stops the run, the
    parameters are those of the last healthy step. Raises DivergedError, CheckpointError, OptimiserError or OSError.
    """
    require_plain_processes(accelerator)
    described = settings.described() | described
    optimiser = optimisers.make(settings.optimiser, settings.optimiser_args, parameters.values(), settings.learning_rate)
    step, skipped, bad, figures = 0, 0, 0, {}
    watched = getattr(objective, "can_stop", True)
    healthy = (0, _copies(parameters) if watched else {})
    if keep.resume:
        state = checkpoint.load(keep.resume, described)
        step, skipped = state.step, state.skipped
        healthy = _restore(state, parameters, optimiser, objective)
    if accelerator.is_main_process:
        checkpoint.remove_partial(keep.folder)

    def save() -> None:
        if not accelerator.is_main_process:
            return
        tensors, note = optimisers.pack(optimiser)
        tensors |= {PARAMETERS + n: p for n, p in parameters.items()}
        if watched and healthy[0] != step:
            tensors |= {HEALTHY + n: t for n, t in healthy[1].items()}
        notes = {"optimiser": note, "objective": objective.state_dict(), "healthy": healthy[0]}
        _save(keep, TrainingState(step, tensors, skipped, None, notes), described)

    on_start(step)
    stopped, last_saved = None, step if keep.resume else 0
    with deferred_signals() as received:
        while step < settings.steps:
            sums = objective.accumulate(step)
            sums = _sum_over_processes(accelerator, parameters.values(), sums | {"signals": float(len(received))})
            length = torch.nn.utils.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm or math.inf)
            # Both are sums over processes, so all processes agree.
            applied = bool(torch.isfinite(length)) and math.isfinite(sums["loss"])
            if applied:
                bad = 0
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate(step)
                optimiser.step()
            else:
                skipped, bad = skipped + 1, bad + 1
            optimiser.zero_grad(set_to_none=True)
            step += 1
            stop_now = bool(sums.pop("signals"))
            figures = objective.finish(step, sums, applied) | {
                "learning_rate": settings.rate(step - 1), "gradient_norm": float(length), "skipped": skipped,
            }  # fmt: skip
            if bad >= MAX_NONFINITE_STEPS:
                raise DivergedError(
                    f"{bad} steps in a row up to step {step} had a loss or gradient that is not finite: lower "
                    f"--learning_rate, or check the latents{_resume_hint(last_saved)}"
                )
            stopped = objective.stop_reason()
            due = step == settings.steps or bool(keep.every and step % keep.every == 0) or stop_now
            copied = watched and (due or step % COPY_EVERY == 0)
            if copied and applied and objective.healthy and not stopped:
                healthy = (step, _copies(parameters))
            on_step(step, figures)
            if stopped:
                break
            if due:
                save()
                last_saved = step
            if stop_now:
                raise KeyboardInterrupt(
                    f"saved step {step} of {settings.steps}; "
                    "add --resume_from_checkpoint latest to the same command to continue"
                )
    if stopped:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(healthy[1][name])
    return Outcome(step, skipped, stopped, healthy[0] if stopped else step, figures)


def require_plain_processes(accelerator) -> None:
    """Raises TuningRunError where the launcher shards the model: the loop sums gradients of whole parameters."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise TuningRunError(
            f"accelerate is configured for {kind}, and here every process holds the whole model; choose multi-GPU without it "
            "in `accelerate config`, or give --multi_gpu to `accelerate launch`"
        )


def _sum_over_processes(accelerator, parameters, sums: dict[str, float]) -> dict[str, float]:
    """Sums the gradients over processes in place, a missing one being 0, and returns the sums of `sums`."""
    if accelerator.num_processes == 1:
        return sums
    buckets: dict[tuple, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        buckets.setdefault((parameter.dtype, parameter.device), []).append(parameter.grad)
    for grads in buckets.values():
        flat = accelerator.reduce(torch.cat([g.flatten() for g in grads]), reduction="sum")
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
    names = sorted(sums)
    values = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=accelerator.device)
    return dict(zip(names, accelerator.reduce(values, reduction="sum").tolist(), strict=True))


def _copies(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}


def _restore(state: TrainingState, parameters, optimiser, objective: Objective) -> tuple[int, dict[str, Tensor]]:
    """Loads a checkpoint and returns (step, copies) of the last healthy parameters."""
    notes = state.notes or {}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.tensors[PARAMETERS + name])
        optimisers.unpack(optimiser, state.tensors, notes["optimiser"])
        objective.load_state_dict(notes["objective"])
    except (KeyError, RuntimeError, ValueError) as e:
        raise checkpoint.CheckpointError(
            f"the checkpoint of step {state.step} does not fit ({type(e).__name__}: {' '.join(str(e).split())[:120]}); "
            "resume with the model and the settings that it was made with"
        ) from e
    if not getattr(objective, "can_stop", True):
        return state.step, {}
    return notes["healthy"], {n: state.tensors.get(HEALTHY + n, state.tensors[PARAMETERS + n]) for n in parameters}


def _save(keep: CheckpointOptions, state: TrainingState, described: dict) -> None:
    try:
        checkpoint.save(keep.folder, state, described, keep.limit)
    except OSError as e:
        present = checkpoint.list_checkpoints(keep.folder)
        left = "no checkpoint was written before"
        if present:
            left = f"{present[-1].name} is kept, and --resume_from_checkpoint latest continues from it"
        raise OSError(f"{e}; free some space: {left}") from e


def _resume_hint(last_saved: int) -> str:
    return f"; checkpoint-{last_saved} can be resumed from" if last_saved else ""
