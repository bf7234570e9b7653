"""Training loop of a PRISM head on a frozen backbone, on one process or by `accelerate launch`.

Batches are drawn from (seed, step, process), so a resumed training ends with the same tensors as an uninterrupted one.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..kernels.prism.head import PrismHead
from ..kernels.prism.preference_loss import rao_kupper
from ..running import checkpoint
from ..running.accelerator import on_any_process
from ..running.checkpoint import TrainingState
from ..running.loop import MAX_NONFINITE_STEPS, CheckpointOptions, DivergedError, deferred_signals
from ..scorers.prism_network import Scorer
from ..wan.dit import WanDit
from .data import MISSING, Batch, PreferenceData, Row, by_shape, draw

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class TrainSettings:
    """All that determines the result of a training, together with the rows and the head's configuration.

    batch: pairs per process and step; processes: their number; warmup: steps; max_grad_norm: 0 for no clipping; eta: of the
    loss; precision: "no", "bf16" or "fp16"; sigmas: lowest and highest noise level; token_dropout: share of the visual
    tokens that are withheld from the head; schedule: one of SCHEDULES. A checkpoint can only be resumed with equal settings.
    """

    steps: int
    batch: int
    processes: int
    learning_rate: float
    weight_decay: float
    warmup: int
    max_grad_norm: float
    eta: float
    precision: str
    seed: int
    sigmas: tuple[float, float] = (0.0, 1.0)
    token_dropout: float = 0.0
    schedule: str = "constant"


def loss_of(scores: Tensor, outcome: Tensor, eta: float) -> Tensor:
    """Mean Rao-Kupper loss of scores [2N, D], a's then b's, over the outcomes [N, D] that are not MISSING."""
    a, b = scores.float().chunk(2)
    known = outcome != MISSING
    return rao_kupper(a - b, outcome, eta)[known].mean()


def train(
    accelerator,
    dit: WanDit,
    head: PrismHead,
    data: PreferenceData,
    rows: Sequence[Row],
    settings: TrainSettings,
    keep: CheckpointOptions,
    on_step: Callable[[int, dict], None] = lambda step, figures: None,
    on_validate: Callable[[int, Scorer], None] = lambda step, scorer: None,
    validate_every: int = 0,
) -> dict:
    """Trains the head in place and returns {steps, skipped steps, last loss and gradient norm}.

    On the first process, on_step(steps done, figures) is called after every step, and on_validate(steps done, scorer) after
    every `validate_every` steps (0: never) and the last. On Ctrl-C the step is finished and a checkpoint written before
    KeyboardInterrupt is raised. Raises DivergedError or CheckpointError.
    """
    described = asdict(settings) | {"head": head.config.to_json(), "data": rows_digest(rows)}
    described = {k: list(v) if isinstance(v, tuple) else v for k, v in described.items()}
    described["head"] = {k: list(v) if isinstance(v, tuple) else v for k, v in described["head"].items()}
    state = checkpoint.load(keep.resume, described) if keep.resume else None
    if state:
        checkpoint.unpack_model(state.tensors, head)
    scorer = Scorer(dit, head.to(accelerator.device).train(True).requires_grad_(True))
    optimiser = make_optimiser(head, settings)
    if state:
        checkpoint.unpack_optimiser(state.tensors, head, optimiser)
    model, prepared = accelerator.prepare(scorer, optimiser)
    if state and state.scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(state.scaler)
    groups = by_shape(data, rows)
    step, skipped, bad, figures = (state.step if state else 0), (state.skipped if state else 0), 0, {}

    def save() -> None:
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
            tensors = checkpoint.pack(head, prepared.optimizer)
            checkpoint.save(keep.folder, TrainingState(step, tensors, skipped, scaler), described, keep.limit)

    with deferred_signals() as received:
        while step < settings.steps:
            generator = generator_of(settings, step, accelerator.process_index)
            batch = batch_of(data, groups, settings, generator)
            scores = model(batch.x, batch.sigma, batch.words, 1.0 - settings.token_dropout, generator)
            loss = loss_of(scores, batch.outcome.to(accelerator.device), settings.eta)
            accelerator.backward(loss)
            length = accelerator.clip_grad_norm_(head.parameters(), settings.max_grad_norm or float("inf"))
            # Gradients are averaged over processes, so all processes agree on whether they are finite.
            if bool(torch.isfinite(length)):
                bad = 0
                for group in prepared.param_groups:
                    group["lr"] = learning_rate(settings, step)
                prepared.step()
            else:
                skipped, bad = skipped + 1, bad + 1
                if accelerator.scaler:
                    prepared.step()
            prepared.zero_grad()
            step += 1
            figures = {"loss": float(loss.detach()), "gradient": float(length)}
            if bad >= MAX_NONFINITE_STEPS:
                raise DivergedError(f"{bad} steps in a row up to step {step} had no finite gradient: lower --learning_rate")
            validating = bool(validate_every) and (step % validate_every == 0 or step == settings.steps)
            if accelerator.is_main_process:
                on_step(step, figures)
                if validating:
                    on_validate(step, scorer)
            # A signal may reach one process only, or a process that waits for the validation.
            stop = on_any_process(accelerator, bool(received))
            if step == settings.steps or (keep.every and step % keep.every == 0) or stop:
                save()
            if stop:
                raise KeyboardInterrupt(
                    f"saved step {step} of {settings.steps}; "
                    "add --resume_from_checkpoint latest to the same command to continue"
                )
    return {"steps": step, "skipped_steps": skipped, **figures}


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of a step, from 0: linear warmup times a constant or a half cosine that reaches 0 after all steps."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup))
    decay = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps) if settings.schedule == "cosine" else 1.0
    return settings.learning_rate * warmup * decay


def make_optimiser(head: PrismHead, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW without weight decay on norms, biases, the query and temperatures."""
    named = [(p, p.ndim == 2 and n != "query") for n, p in head.named_parameters()]
    groups = [
        {"params": [p for p, is_matrix in named if is_matrix == matrices], "weight_decay": decay}
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def generator_of(settings: TrainSettings, step: int, process: int) -> torch.Generator:
    """The random generator of one step of one process."""
    seed = hashlib.sha256(f"{settings.seed} {step} {process}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))


def batch_of(
    data: PreferenceData, groups: Sequence[Sequence[Row]], settings: TrainSettings, generator: torch.Generator
) -> Batch:
    """A step's batch: a group of one latent shape, drawn by its size, then rows of it, each with a and b in random order."""
    sizes = torch.tensor([len(g) for g in groups], dtype=torch.float64)
    group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
    rows = [group[i] for i in torch.randint(0, len(group), (settings.batch,), generator=generator).tolist()]
    swap = torch.rand(len(rows), generator=generator) < 0.5
    rows = [swapped(r) if s else r for r, s in zip(rows, swap.tolist(), strict=True)]
    return draw(data, rows, None, generator, settings.sigmas)


def swapped(row: Row) -> Row:
    """The same preference with a and b swapped."""
    return Row(row.prompt, row.b, row.a, {k: -v for k, v in row.outcome.items()})


def rows_digest(rows: Sequence[Row]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the rows in their order."""
    text = "\n".join(f"{r.prompt}\t{r.a}\t{r.b}\t{sorted(r.outcome.items())}" for r in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
