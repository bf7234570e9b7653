"""Two-stage training of the predictor coder of Shell-LCC (arXiv 2606.30248), on one process or by `accelerate launch`.

With several processes each takes train_batch_size tokens of every batch, and DistributedDataParallel averages the
gradients. BatchNorm normalises by each process's own share, as in the paper's runs; its running statistics are those of
the first process, which broadcasts them before every step and writes the file. The usage term is of each share, too.
"""

import copy
import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.shell_lcc import fit_predictor
from ..kernels.shell_lcc.predictor import Predictor
from ..running import checkpoint
from ..running.accelerator import on_any_process
from ..running.checkpoint import TrainingState
from ..running.loop import MAX_NONFINITE_STEPS, CheckpointOptions, DivergedError, deferred_signals

STAGES = ("lcc", "shell")


@dataclass(frozen=True)
class FitSettings:
    """All that determines the result of a fit, together with the tokens. batch: tokens per process and micro-step;
    processes: their number; accumulation: micro-steps per step; precision: "no", "bf16" or "fp16".

    A checkpoint can only be resumed with equal settings.
    """

    num_bases: int
    hidden_dim: int
    lcc_steps: int
    shell_steps: int
    batch: int
    processes: int
    accumulation: int
    learning_rate: float
    lr_scheduler: str
    locality_weight: float
    usage_weight: float
    basis_weight: float
    max_grad_norm: float
    random_start: bool
    precision: str
    seed: int

    @property
    def steps(self) -> int:
        return self.lcc_steps + self.shell_steps


class Objective(torch.nn.Module):
    """The loss of one stage as a module, so that DistributedDataParallel and autocast wrap one forward call."""

    def __init__(self, coder: Predictor, stage: str, settings: FitSettings):
        super().__init__()
        self.coder, self.stage, self.settings = coder, stage, settings

    def forward(self, z: Tensor):
        s = self.settings
        if self.stage == "lcc":
            w = self.coder.weights(z)
            with _full_precision(z):
                return fit_predictor.lcc_loss(
                    self.coder, z, w.float(), s.locality_weight, s.usage_weight, s.basis_weight
                )
        with torch.no_grad(), _full_precision(z):
            skeleton = self.coder.skeleton(self.coder.weights(z))
        v = self.coder.surface_head(skeleton)
        with _full_precision(z):
            return fit_predictor.shell_loss(z, skeleton, v.float())


class Batches:
    """Indices of a process's share of each batch: a permutation of the tokens per epoch, drawn from (seed, stage, epoch)."""

    def __init__(self, count: int, settings: FitSettings, stage: str, rank: int):
        self.count, self.batch, self.rank = count, settings.batch, rank
        self.rows = settings.batch * settings.processes
        self.name = f"{settings.seed} {stage}"
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.count // self.rows)
        if epoch != self.epoch:
            seed = int.from_bytes(hashlib.sha256(f"{self.name} {epoch}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(seed)
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator)
        start = place * self.rows + self.rank * self.batch
        return self.order[start : start + self.batch]


def train(
    accelerator,
    coder: Predictor,
    tokens: Tensor,
    settings: FitSettings,
    keep: CheckpointOptions,
    on_step: Callable[[int, str, dict], None] = lambda step, stage, losses: None,
    on_validate: Callable[[int, str, Predictor], None] = lambda step, stage, coder: None,
    validate_every: int = 0,
) -> dict:
    """Fits the coder in place on tokens [N, C] (fp32, CPU) and returns {steps, skipped steps, last losses}.

    coder: initialised, on the CPU; the first process's values are used. on_step(steps done, stage, losses) and
    on_validate(steps done, stage, a copy of the coder) are called on the first process between steps. They may raise
    KeyboardInterrupt, which has the effect of Ctrl-C: a checkpoint is written, and the KeyboardInterrupt raised tells how
    to resume. Raises DivergedError or CheckpointError.
    """
    described = asdict(settings) | {"tokens": checkpoint.tensor_digest(tokens)}
    state = checkpoint.load(keep.resume, described) if keep.resume else None
    if state:
        checkpoint.unpack_model(state.tensors, coder)
    coder.to(accelerator.device)
    tokens = tokens.to(accelerator.device)
    run = _Run(accelerator, coder, tokens, settings, state)
    with deferred_signals() as received:
        try:
            while run.step < settings.steps:
                losses = run.advance(received)
                if accelerator.is_main_process:
                    on_step(run.step, run.stage, losses)
                    if validate_every and (run.step % validate_every == 0 or run.step == settings.steps):
                        on_validate(run.step, run.stage, copy.deepcopy(coder))
                last = run.step == settings.steps
                if last or (keep.every and run.step % keep.every == 0):
                    run.save(keep, described)
        except KeyboardInterrupt:
            if not run.between_steps:
                raise KeyboardInterrupt("in the middle of a step; resume from the last checkpoint") from None
            path = run.save(keep, described)
            if not accelerator.is_main_process:
                raise SystemExit(130) from None
            raise KeyboardInterrupt(
                f"saved {path} after step {run.step} of {settings.steps}; "
                "add --resume_from_checkpoint latest to the same command to continue"
            ) from None
    return {"steps": run.step, "skipped_steps": run.skipped, **{f"loss_{k}": v for k, v in run.losses.items()}}


class _Run:
    """The state of a training between steps."""

    def __init__(self, accelerator, coder: Predictor, tokens: Tensor, settings: FitSettings, state: TrainingState | None):
        self.accelerator, self.coder, self.tokens, self.settings = accelerator, coder, tokens, settings
        self.step = state.step if state else 0
        self.skipped = state.skipped if state else 0
        self.bad_in_a_row = 0
        self.between_steps = True
        self.losses: dict[str, float] = {}
        self.prepared = None
        if self.step < settings.steps:
            self._begin(state)

    @property
    def stage(self) -> str:
        """The stage of the last step; before the first step, the first stage."""
        return STAGES[self.step > self.settings.lcc_steps]

    def advance(self, received: list) -> dict[str, float]:
        """One optimiser step; returns the losses of its last micro-batch.

        Raises DivergedError, or KeyboardInterrupt after a step during which a process received a signal.
        """
        self.between_steps = True
        if self._next_stage() != self.prepared:
            self._begin(None)
        self.between_steps = False
        done = self.step - (0 if self.prepared == "lcc" else self.settings.lcc_steps)
        losses, bad = self._gradients(done)
        # All processes must take the same branch: one that skipped or stopped alone would leave the others waiting.
        bad, stop = (on_any_process(self.accelerator, flag) for flag in (bad, bool(received)))
        if bad:
            self._skip()
        else:
            self._apply(done)
        self.optimiser.zero_grad()
        self.step += 1
        self.losses = losses
        self.between_steps = True
        if self.bad_in_a_row >= MAX_NONFINITE_STEPS:
            raise DivergedError(
                f"{self.bad_in_a_row} steps in a row up to step {self.step} had a loss or gradient that is not finite "
                f"({self.skipped} in all): lower --learning_rate, or omit --mixed_precision"
            )
        if stop:
            raise KeyboardInterrupt
        return losses

    def save(self, keep: CheckpointOptions, described: dict) -> Path:
        """Saves a checkpoint on the first process; returns its path on all."""
        path = keep.folder / f"checkpoint-{self.step}"
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            tensors = checkpoint.pack(self.coder, self.optimiser.optimizer)
            checkpoint.save(keep.folder, TrainingState(self.step, tensors, self.skipped, scaler), described, keep.limit)
        return path

    def _next_stage(self) -> str:
        return STAGES[self.step >= self.settings.lcc_steps]

    def _begin(self, state: TrainingState | None) -> None:
        self.prepared = self._next_stage()
        (fit_predictor.prepare_lcc if self.prepared == "lcc" else fit_predictor.prepare_shell)(self.coder)
        self.parameters = [p for p in self.coder.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(self.parameters, lr=self.settings.learning_rate)
        if state:
            checkpoint.unpack_optimiser(state.tensors, self.coder, optimiser)
        objective = Objective(self.coder, self.prepared, self.settings)
        objective.training = self.coder.training
        self.model, self.optimiser = self.accelerator.prepare(objective, optimiser)
        if state and state.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.batches = Batches(len(self.tokens), self.settings, self.prepared, self.accelerator.process_index)

    def _gradients(self, done: int) -> tuple[dict[str, float], bool]:
        """Accumulates a step's gradients; (losses of the last micro-batch, whether any loss or gradient was not finite)."""
        count = self.settings.accumulation
        norm = self.coder.predictor[1]
        self.before = {k: v.clone() for k, v in norm.named_buffers()}
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(count):
            z = self.tokens[self.batches[done * count + part].to(self.tokens.device)]
            with nullcontext() if part == count - 1 else self.accelerator.no_sync(self.model):
                loss = self.model(z)
                self.accelerator.backward(loss.total / count)
            total += loss.total.detach()
        length = self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or float("inf"))
        bad = not bool(torch.isfinite(total) & torch.isfinite(length))
        return {k: float(v.detach()) for k, v in loss._asdict().items()}, bad

    def _apply(self, done: int) -> None:
        self.bad_in_a_row = 0
        if self.settings.lr_scheduler == "linear":
            length = self.settings.lcc_steps if self.prepared == "lcc" else self.settings.shell_steps
            for group in self.optimiser.param_groups:
                group["lr"] = self.settings.learning_rate * (1 - done / length)
        self.optimiser.step()

    def _skip(self) -> None:
        """Skips the step and restores BatchNorm's running statistics, where an infinite activation would remain."""
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.accelerator.scaler:
            # fp16's GradScaler detects this too: it skips the step and lowers its scale.
            self.optimiser.step()
        for name, value in self.before.items():
            getattr(self.coder.predictor[1], name).copy_(value)


def _full_precision(z: Tensor):
    return torch.amp.autocast(z.device.type, enabled=False)
