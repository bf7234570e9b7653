"""accelerate's Accelerator for a command's flags: mixed precision, loggers, and what processes have to agree on.

`args` has --mixed_precision and --report_to; `context` is what init_distributed returns.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch


def accelerator_of(args, context, work: Path):
    """The Accelerator; loggers write into `work`. Raises ValueError for a logger that is not installed, and ImportError
    without accelerate."""
    try:
        from accelerate import Accelerator
    except ImportError as e:
        raise ImportError('training needs accelerate: pip install "intrinsic-reward[train]"') from e
    logged = None if args.report_to == "none" else args.report_to
    try:
        return Accelerator(
            cpu=context.device.type == "cpu", mixed_precision=args.mixed_precision, device_placement=False, log_with=logged,
            project_dir=str(work),
        )  # fmt: skip
    except (ValueError, ImportError) as e:
        if logged is None:
            raise
        raise ValueError(f"--report_to {args.report_to}: {' '.join(str(e).split())}; install it, or give none") from e


def start_loggers(accelerator, args, name: str) -> None:
    """Starts the loggers of --report_to with the arguments as their configuration."""
    if args.report_to != "none":
        config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items() if k != "argv"}
        accelerator.init_trackers(name, config=config)


def log(accelerator, args, step: int, figures: Mapping[str, float]) -> None:
    """Sends the finite figures of a step to the loggers of --report_to."""
    if args.report_to != "none":
        accelerator.log({k: v for k, v in figures.items() if math.isfinite(v)}, step=step)


def finish_loggers(accelerator, args) -> None:
    if args.report_to != "none":
        for tracker in accelerator.trackers:
            tracker.finish()


def on_any_process(accelerator, flag: bool) -> bool:
    """Whether a flag is set on any process; every process has to ask."""
    if accelerator.num_processes == 1:
        return flag
    count = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(count, reduction="sum") > 0)
