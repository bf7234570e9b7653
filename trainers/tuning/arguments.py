"""Flags that fine-tuning commands share, with the same names and meanings, their ranges, and the settings they stand for."""

import argparse
from collections.abc import Sequence

import torch

from ..running import config_file
from . import lora_files, optimisers
from .backbone import EXPERTS
from .loop import SCHEDULES, LoopSettings
from .lora import DEFAULT_TARGETS, TARGETS, LoraOptions


def add_files(group) -> None:
    """Adds --backbone, --expert, --output, --overwrite, --output_dir, --format, --save_dtype and --config."""
    group.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    group.add_argument("--expert", choices=tuple(EXPERTS), help="which of two transformers (Wan 2.2 A14B)")
    group.add_argument("--output", required=True, metavar="FILE.safetensors", help="the LoRA, or with --full the model")
    group.add_argument("--overwrite", action="store_true", help="replace the output and an earlier run's checkpoints")
    group.add_argument("--output_dir", metavar="DIR", help="of the run (default: OUTPUT's name + .checkpoints)")
    group.add_argument("--format", choices=lora_files.FORMATS, default="comfy", help="of the LoRA's keys (default comfy)")
    group.add_argument("--save_dtype", choices=tuple(lora_files.DTYPES), default="bf16", help="of the output (default bf16)")
    config_file.add_argument(group)


def add_trained(group, rank: int) -> None:
    """Adds --rank and --lora_alpha, both with the default `rank`, --targets, --lora_dropout and --full."""
    group.add_argument("--rank", type=int, default=rank, help=f"(default {rank})")
    group.add_argument(
        "--lora_alpha", type=float, default=float(rank), help=f"the LoRA is scaled by alpha / rank (default {rank})"
    )
    group.add_argument(
        "--targets", nargs="+", default=list(DEFAULT_TARGETS), metavar="NAME",
        help=f"layers: {', '.join(TARGETS)} or all (default {' '.join(DEFAULT_TARGETS)}, of both attentions)",
    )  # fmt: skip
    group.add_argument("--lora_dropout", type=float, default=0.0)
    group.add_argument("--full", action="store_true", help="train all parameters, in fp32")


def add_training(group, *, steps: int, rate: float, warmup: int, schedule: str, items: str) -> None:
    """Adds the flags of the loop with these defaults. items: what a batch consists of, such as "pairs"."""
    group.add_argument("--max_train_steps", type=int, default=steps, help=f"(default {steps})")
    group.add_argument("--train_batch_size", type=int, default=1, help=f"{items} at a time on a process (default 1)")
    group.add_argument("--gradient_accumulation_steps", type=int, default=8, help="batches a step (default 8)")
    group.add_argument("--learning_rate", type=float, default=rate, help=f"(default {rate:g})")
    group.add_argument("--lr_warmup_steps", type=int, default=warmup, help=f"(default {warmup})")
    group.add_argument("--lr_scheduler", choices=SCHEDULES, default=schedule, help=f"(default {schedule})")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="0: no clipping (default 1)")
    group.add_argument(
        "--optimizer", default=optimisers.DEFAULT, metavar="DOTTED.NAME",
        help=f"such as bitsandbytes.optim.AdamW8bit (default {optimisers.DEFAULT})",
    )  # fmt: skip
    group.add_argument("--optimizer_args", nargs="+", default=[], metavar="KEY=VALUE", help="such as weight_decay=0.01")
    group.add_argument("--seed", type=int, default=0)


def add_computing(group) -> None:
    """Adds --base_dtype, --mixed_precision, --gradient_checkpointing, --memory_limit_gb, --dry_run and --device."""
    group.add_argument(
        "--base_dtype", choices=("stored", *lora_files.DTYPES), default="stored",
        help="of the frozen weights; stored keeps the file's, fp8 included (default stored)",
    )  # fmt: skip
    group.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="compute fp32 weights in bf16")
    group.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--memory_limit_gb", type=float, help="refuse a plan above it (default: what the device has free)")
    group.add_argument("--dry_run", action="store_true", help="print the memory plan and end; nothing is written")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_saving(group, every: int) -> None:
    """Adds the flags of checkpoints, every `every` steps by default, and --report_to."""
    group.add_argument(
        "--checkpointing_steps", type=int, default=every, help=f"0: the last and on Ctrl-C only (default {every})"
    )
    group.add_argument("--checkpoints_total_limit", type=int, default=2, help="0 keeps all (default 2)")
    group.add_argument("--resume_from_checkpoint", metavar="latest|PATH")
    group.add_argument("--report_to", default="none", metavar="NAME", help="a logger of accelerate: tensorboard, wandb, ...")


def check(args, least_one: Sequence[str] = (), least_zero: Sequence[str] = ()) -> None:
    """Raises ValueError, naming the flag, for a value out of its range, of this file's flags and of further ones whose least
    value is 1 or 0; OptimiserError for an optimiser that is not there or refuses its arguments, before a model is read.
    """
    for name in ("rank", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", *least_one):
        if not getattr(args, name) >= 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for name in ("lr_warmup_steps", "max_grad_norm", "checkpointing_steps", "checkpoints_total_limit", "seed", *least_zero):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if not args.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {args.learning_rate}")
    if args.memory_limit_gb is not None and not args.memory_limit_gb > 0:
        raise ValueError(f"--memory_limit_gb must be above 0, got {args.memory_limit_gb}")
    if args.full and args.format != "comfy":
        raise ValueError(f"--format {args.format} is a layout of LoRAs; --full writes a whole model, so leave it out")
    settings = settings_of(args)
    dummy = [torch.nn.Parameter(torch.zeros(8, 8))]
    optimisers.make(settings.optimiser, settings.optimiser_args, dummy, settings.learning_rate)


def settings_of(args) -> LoopSettings:
    """Raises OptimiserError."""
    return LoopSettings(
        args.max_train_steps, args.learning_rate, args.lr_warmup_steps, args.lr_scheduler, args.max_grad_norm, args.optimizer,
        optimisers.parse_arguments(args.optimizer_args),
    )  # fmt: skip


def lora_of(args) -> LoraOptions:
    """Raises TuningError."""
    return LoraOptions(args.rank, args.lora_alpha, tuple(args.targets), args.lora_dropout)


def dtype_of(args) -> torch.dtype | None:
    """The dtype to load the backbone in, None for the file's: fp32 where all parameters are trained."""
    return lora_files.DTYPES.get("fp32" if args.full and args.base_dtype == "stored" else args.base_dtype)
