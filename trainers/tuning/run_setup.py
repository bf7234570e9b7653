"""What fine-tuning commands share around the loop: memory plan, parameters and the file that is written.

`args` has the flags that trainers.tuning.arguments adds; `context` is what init_distributed returns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..running import checkpoint
from . import arguments, backbone, dit_shapes, full_model, lora, lora_files, memory_plan
from .backbone import TunableDit, TuningError
from .memory_plan import MemoryPlan


def plan_of(args, latent: Sequence[int]) -> MemoryPlan:
    """The plan of a step on latents [C, T, h, w]. Raises TuningError for all parameters of a quantised base."""
    expanded = args.full and args.base_dtype == "stored"
    if expanded and dit_shapes.read_shapes(args.backbone, None, args.expert).quantised:
        raise TuningError(
            f"{args.backbone}: is stored in fp8, and --full trains weights that it lacks; train a LoRA, give a bf16, fp16 or "
            "fp32 file, or --base_dtype fp32 to expand it"
        )
    return memory_plan.plan(
        args.backbone, latent, options=None if args.full else arguments.lora_of(args), batch=args.train_batch_size,
        base_dtype="fp32" if expanded else args.base_dtype, checkpointing=args.gradient_checkpointing,
        optimizer=args.optimizer, expert=args.expert,
    )  # fmt: skip


def parameters_of(args, dit: TunableDit) -> dict[str, torch.nn.Parameter]:
    """The parameters to train, by name: those of a new LoRA, or with --full all of the model's. Raises TuningError."""
    if args.full:
        found = backbone.full_parameters(dit.model)
    else:
        lora.add(dit.model, arguments.lora_of(args), args.seed)
        found = lora.parameters(dit.model)
    if args.gradient_checkpointing:
        backbone.enable_checkpointing(dit.model)
    return found


def change_norm_of(args, dit: TunableDit, parameters: Mapping[str, torch.nn.Parameter]) -> Callable[[], float]:
    """A function that returns the Frobenius norm of the weights' change since this call (--full) or by the LoRA."""
    if not args.full:
        return lambda: lora.change_norm(dit.model)
    start = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}

    @torch.no_grad()
    def change() -> float:
        return math.sqrt(sum(float((p - start[n].to(p.device)).float().square().sum()) for n, p in parameters.items()))

    return change


def resume_of(args, context, work: Path) -> Path | None:
    """The checkpoint to go on from, None to begin; notes are printed. Raises CheckpointError."""
    if not (context.is_main or args.resume_from_checkpoint):
        return None
    resume, notes = checkpoint.choose(args.resume_from_checkpoint, work, args.overwrite)
    for note in notes if context.is_main else ():
        print(note)
    return resume


def gathered(rows: list[dict], world: int) -> list[dict]:
    """The rows of all processes, on each of them."""
    if world == 1:
        return rows
    from accelerate.utils import gather_object

    return gather_object(rows)


def save(args, output: Path, dit: TunableDit, record: dict) -> None:
    """Writes the LoRA, or with --full the model, with the training record in its header. Raises OSError."""
    dtype = lora_files.DTYPES[args.save_dtype]
    if args.full:
        full_model.save(output, dit, dtype=dtype, metadata=record)
    else:
        lora_files.save(output, dit.model, arguments.lora_of(args), dit, format=args.format, dtype=dtype, metadata=record)
