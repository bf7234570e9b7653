"""Training of a PRISM head on a frozen, cut backbone: plain, or on several processes under `accelerate launch`.

Batches follow from (seed, step, process), so a run that was cut off and resumed ends with the tensors of an unbroken one.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..kernels.prism import accuracy
from ..kernels.prism.head import PrismHead
from ..kernels.prism.preference_loss import TIE, rao_kupper
from ..running import checkpoint
from ..running.loop import BAD_IN_A_ROW, Checkpoints, DivergedError, signals
from ..scorers.prism_network import Scorer
from ..wan.dit import WanDit
from .data import MISSING, Batch, PreferenceData, Row, by_shape, draw, sides_at

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a training, together with the data and the head's configuration.

    batch: pairs a process and step; eta: of the loss; sigmas: lowest and highest noise level; token_dropout:
    share of the visual tokens that the head is not given; schedule: one of SCHEDULES.
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
    """Mean Rao-Kupper loss of scores [2N, D], a's then b's, over the outcomes [N, D] that are there."""
    a, b = scores.float().chunk(2)
    known = outcome != MISSING
    return rao_kupper(a - b, outcome, eta)[known].mean()


def train(
    accelerator,
    dit: WanDit,
    head: PrismHead,
    data: PreferenceData,
    rows: Sequence[Row],
    settings: Settings,
    keep: Checkpoints,
    on_step: Callable[[int, dict], None] = lambda step, figures: None,
    on_validate: Callable[[int, Scorer], None] = lambda step, scorer: None,
    validate_every: int = 0,
) -> dict:
    """Trains the head in place and returns {steps, skipped steps, last loss}.

    on_step(steps done, figures) and on_validate(steps done, scorer) are called on the first process after every step. Ctrl-C
    lets the step finish, writes a checkpoint and becomes a KeyboardInterrupt. Raises DivergedError or CheckpointError.
    """
    described = asdict(settings) | {"head": head.config.to_json(), "data": digest(rows)}
    described = {k: list(v) if isinstance(v, tuple) else v for k, v in described.items()}
    described["head"] = {k: list(v) if isinstance(v, tuple) else v for k, v in described["head"].items()}
    state = checkpoint.load(keep.resume, described) if keep.resume else None
    if state:
        checkpoint.unpack_coder(state.tensors, head)
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
            checkpoint.save(keep.folder, checkpoint.State(step, tensors, skipped, scaler), described, keep.limit)

    with signals() as asked:
        while step < settings.steps:
            generator = generator_of(settings, step, accelerator.process_index)
            batch = batch_of(data, groups, settings, generator)
            scores = model(batch.x, batch.sigma, batch.words, 1.0 - settings.token_dropout, generator)
            loss = loss_of(scores, batch.outcome.to(accelerator.device), settings.eta)
            accelerator.backward(loss)
            length = accelerator.clip_grad_norm_(head.parameters(), settings.max_grad_norm or float("inf"))
            # Gradients are averaged over processes, so one that is not finite is so in all of them.
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
            if bad >= BAD_IN_A_ROW:
                raise DivergedError(f"{bad} steps in a row up to step {step} were not finite: lower --learning_rate")
            if accelerator.is_main_process:
                on_step(step, figures)
                if validate_every and (step % validate_every == 0 or step == settings.steps):
                    on_validate(step, scorer)
            if step == settings.steps or (keep.every and step % keep.every == 0) or asked:
                save()
            if asked:
                raise KeyboardInterrupt(
                    f"saved step {step} of {settings.steps}; add --resume_from_checkpoint latest to the same command to go on"
                )
    return {"steps": step, "skipped_steps": skipped, **figures}


def learning_rate(settings: Settings, step: int) -> float:
    """Of a step, from 0: rising over the warmup, then constant, or falling to nothing as a half cosine over all steps."""
    risen = min(1.0, (step + 1) / max(1, settings.warmup))
    fallen = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps) if settings.schedule == "cosine" else 1.0
    return settings.learning_rate * risen * fallen


def make_optimiser(head: PrismHead, settings: Settings) -> torch.optim.AdamW:
    """AdamW; norms, biases, the query and temperatures are not decayed."""
    named = [(p, p.ndim == 2 and n != "query") for n, p in head.named_parameters()]
    groups = [
        {"params": [p for p, is_matrix in named if is_matrix == matrices], "weight_decay": decay}
        for matrices, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def generator_of(settings: Settings, step: int, process: int) -> torch.Generator:
    """What a step of a process draws from."""
    seed = hashlib.sha256(f"{settings.seed} {step} {process}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))


def batch_of(
    data: PreferenceData, groups: Sequence[Sequence[Row]], settings: Settings, generator: torch.Generator
) -> Batch:
    """A step's batch: a group of one latent shape by its size, rows of it at random, in either order."""
    sizes = torch.tensor([len(g) for g in groups], dtype=torch.float64)
    group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
    rows = [group[i] for i in torch.randint(0, len(group), (settings.batch,), generator=generator).tolist()]
    swap = torch.rand(len(rows), generator=generator) < 0.5
    rows = [swapped(r) if s else r for r, s in zip(rows, swap.tolist(), strict=True)]
    return draw(data, rows, None, generator, settings.sigmas)


def swapped(row: Row) -> Row:
    """The same comparison the other way round."""
    return Row(row.prompt, row.b, row.a, {k: -v for k, v in row.outcome.items()})


@torch.no_grad()
def differences(scorer, data: PreferenceData, rows: Sequence[Row], sigma: float, batch: int, seed: int = 0) -> Tensor:
    """Score differences [N, dimensions] of rows at a noise level, on the CPU; the same noise whatever the batch.

    All runs of a prompt share their noise, so each is scored once, however many rows it is in. batch: runs at a time.
    """
    sides = [sides_at(data, row, sigma) for row in rows]
    places = {key: i for i, key in enumerate(dict.fromkeys(key for pair in sides for key in pair))}
    # Only latents of one shape make a batch.
    order = sorted(places, key=lambda key: key.shape)
    scores: list[Tensor | None] = [None] * len(places)
    for _, group in groupby(order, key=lambda key: key.shape):
        group = list(group)
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            x = torch.stack([key.state(data, sigma, seed) for key in part])
            words = [data.texts[key.prompt] for key in part]
            found = scorer(x, torch.full((len(part),), sigma), words).float().cpu()
            for key, score in zip(part, found, strict=True):
                scores[places[key]] = score
    return torch.stack([scores[places[a]] - scores[places[b]] for a, b in sides])


def accuracies(
    scorer,
    data: PreferenceData,
    rows: Sequence[Row],
    tuning: Sequence[Row],
    levels: Sequence[float],
    batch: int,
    seed: int = 0,
    known_thresholds: dict[str, float] | None = None,
) -> dict:
    """Held-out figures: per dimension a threshold for ties, fitted on `tuning` or known, and a table by noise level.

    {"thresholds": {dimension: float}, "table": [{dimension, sigma, pairs, decided, without_ties, with_ties, calibration}]}
    """
    was = scorer.head.training
    scorer.head.train(False)
    fitted = {s: (differences(scorer, data, tuning, s, batch, seed), data.outcomes(tuning)) for s in levels} if tuning else {}
    thresholds, table = {}, []
    for d, name in enumerate(data.dimensions):
        pooled = [(diff[:, d][o[:, d] != MISSING], o[:, d][o[:, d] != MISSING]) for diff, o in fitted.values()]
        diff, outcome = (torch.cat(x) for x in zip(*pooled, strict=True)) if pooled else (torch.empty(0), torch.empty(0))
        has_ties = bool((outcome == TIE).any())
        thresholds[name] = accuracy.tie_threshold(diff, outcome) if has_ties else (known_thresholds or {}).get(name, 0.0)
    for s in levels:
        diff, outcome = differences(scorer, data, rows, s, batch, seed), data.outcomes(rows)
        for d, name in enumerate(data.dimensions):
            known = outcome[:, d] != MISSING
            found = accuracy.accuracy(diff[known, d], outcome[known, d], thresholds[name])
            error = accuracy.calibration_error(diff[known, d], outcome[known, d])
            entry = {k: v for k, v in asdict(found).items() if k != "threshold"}
            table.append({"dimension": name, "sigma": s, **entry, "calibration": error})
    scorer.head.train(was)
    return {"thresholds": thresholds, "table": table}


def digest(rows: Sequence[Row]) -> str:
    """Sixteen hexadecimal digits of the rows in their order."""
    text = "\n".join(f"{r.prompt}\t{r.a}\t{r.b}\t{sorted(r.outcome.items())}" for r in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
