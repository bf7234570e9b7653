"""Arguments of `train`: flags, their ranges, and the settings that they stand for."""

import argparse
from pathlib import Path

import torch

from ..kernels.tuning.auto_beta import FACTOR, HIGH, LOW, AutoBeta, FixedBeta
from ..kernels.tuning.preference_loss import IPO, LOSSES, SIGMOID, PreferenceLoss
from ..running import config_file
from ..tuning import lora_files, optimisers
from ..tuning.backbone import EXPERTS
from ..tuning.loop import SCHEDULES, LoopSettings
from ..tuning.lora import DEFAULT_TARGETS, TARGETS
from ..tuning.validation import REWARDS
from . import evaluate


def add(parser) -> None:
    """Adds all flags of `train`."""
    what = parser.add_argument_group("files")
    what.add_argument("--data", required=True, metavar="DIR", help="folder written by `cache`")
    what.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    what.add_argument("--expert", choices=tuple(EXPERTS), help="which of two transformers (Wan 2.2 A14B)")
    what.add_argument("--output", required=True, metavar="FILE.safetensors", help="the LoRA, or with --full the model")
    what.add_argument("--overwrite", action="store_true", help="replace the output and an earlier run's checkpoints")
    what.add_argument("--output_dir", metavar="DIR", help="of the run (default: OUTPUT's name + .checkpoints)")
    what.add_argument("--format", choices=lora_files.FORMATS, default="comfy", help="of the LoRA's keys (default comfy)")
    what.add_argument("--save_dtype", choices=tuple(lora_files.DTYPES), default="bf16", help="of the output (default bf16)")
    config_file.add_argument(what)
    which = parser.add_argument_group("what is trained")
    which.add_argument("--rank", type=int, default=32)
    which.add_argument("--lora_alpha", type=float, default=32.0, help="the LoRA is scaled by alpha / rank (default 32)")
    which.add_argument(
        "--targets", nargs="+", default=list(DEFAULT_TARGETS), metavar="NAME",
        help=f"layers: {', '.join(TARGETS)} or all (default {' '.join(DEFAULT_TARGETS)}, of both attentions)",
    )  # fmt: skip
    which.add_argument("--lora_dropout", type=float, default=0.0)
    which.add_argument(
        "--full", action="store_true", help="train all parameters, in fp32; the reference's errors are stored first"
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss", choices=LOSSES, default=SIGMOID, help="sft: the winners' error alone, to compare with (default sigmoid)"
    )
    loss.add_argument(
        "--beta", default="auto", metavar="auto|NUMBER",
        help=f"auto keeps the gradient factor near {FACTOR:g}; fixed values of mean errors are 500 to 2500 (default auto)",
    )  # fmt: skip
    loss.add_argument("--beta_factor", type=float, default=FACTOR, help=f"that auto holds (default {FACTOR:g})")
    loss.add_argument("--beta_min", type=float, default=LOW, help=f"of auto: holds the model back (default {LOW:g})")
    loss.add_argument("--beta_max", type=float, default=HIGH, help=f"of auto (default {HIGH:g})")
    loss.add_argument("--label_smoothing", type=float, default=0.0, help="share of preferences taken for wrong (default 0)")
    unit = "in units of the preference's slope at d = 0"
    loss.add_argument("--winner_anchor", type=float, default=1.0, help=f"of a rise of winners' error, {unit} (default 1)")
    loss.add_argument("--sft_weight", type=float, default=0.0, help=f"of the winners' error, {unit} (default 0)")
    loss.add_argument(
        "--reference_anchor", type=float, default=0.0, help=f"of the distance to the reference's velocity, {unit} (default 0)"
    )
    loss.add_argument(
        "--static_penalty", type=float, default=0.1, help=f"of motion lost against the reference, {unit} (default 0.1)"
    )
    noise = parser.add_argument_group("noise and clips")
    evaluate.add_levels(noise)
    noise.add_argument(
        "--mask_first_frame", action=argparse.BooleanOptionalAction,
        help="leave the first latent frame out of the errors (default: for image-to-video models)",
    )  # fmt: skip
    noise.add_argument(
        "--crop_frames", type=int, default=0, help="train on so many latent frames of a clip, from a random one on; 0: all"
    )
    noise.add_argument(
        "--cached_reference", action="store_true",
        help="compute the reference's errors once, for --cache_size noises a pair, instead of in every step",
    )  # fmt: skip
    noise.add_argument(
        "--cache_size", type=int, default=0, help="noises a pair is seen with (default: new ones each time; 8 if cached)"
    )
    how = parser.add_argument_group("training")
    how.add_argument("--max_train_steps", type=int, default=1000)
    how.add_argument("--train_batch_size", type=int, default=1, help="pairs at a time on a process (default 1)")
    how.add_argument("--gradient_accumulation_steps", type=int, default=8, help="batches a step (default 8)")
    how.add_argument("--learning_rate", type=float, default=5e-6)
    how.add_argument("--lr_warmup_steps", type=int, default=100)
    how.add_argument("--lr_scheduler", choices=SCHEDULES, default="cosine")
    how.add_argument("--max_grad_norm", type=float, default=1.0, help="0: no clipping (default 1)")
    how.add_argument(
        "--optimizer", default=optimisers.DEFAULT, metavar="DOTTED.NAME",
        help=f"such as bitsandbytes.optim.AdamW8bit (default {optimisers.DEFAULT})",
    )  # fmt: skip
    how.add_argument("--optimizer_args", nargs="+", default=[], metavar="KEY=VALUE", help="such as weight_decay=0.01")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument(
        "--max_winner_rise", type=float, default=0.05,
        help="stop where the running mean of the winners' error is this share above the reference's (default 0.05; 0: never)",
    )  # fmt: skip
    compute = parser.add_argument_group("computing")
    compute.add_argument(
        "--base_dtype", choices=("stored", *lora_files.DTYPES), default="stored",
        help="of the frozen weights; stored keeps the file's, fp8 included (default stored)",
    )  # fmt: skip
    compute.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="compute fp32 weights in bf16")
    compute.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    compute.add_argument("--memory_limit_gb", type=float, help="refuse a plan above it (default: what the device has free)")
    compute.add_argument("--dry_run", action="store_true", help="print the memory plan and end; nothing is written")
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    save = parser.add_argument_group("checkpoints and figures")
    save.add_argument("--checkpointing_steps", type=int, default=100, help="0: the last and on Ctrl-C only (default 100)")
    save.add_argument("--checkpoints_total_limit", type=int, default=2, help="0 keeps all (default 2)")
    save.add_argument("--resume_from_checkpoint", metavar="latest|PATH")
    save.add_argument("--report_to", default="none", metavar="NAME", help="a logger of accelerate: tensorboard, wandb, ...")
    save.add_argument("--held_out", type=float, default=0.1, help="share of prompts to measure on (default 0.1; 0: none)")
    save.add_argument("--eval_levels", type=int, default=evaluate.LEVELS, help="noise levels a held-out pair is measured at")
    save.add_argument("--eval_steps", type=int, default=0, help="steps between held-out figures; 0: at the end only")
    clips = parser.add_argument_group("validation clips")
    clips.add_argument("--validation_steps", type=int, default=0, help="steps between validation clips; 0: none (default)")
    clips.add_argument("--validation_prompts", type=Path, metavar="FILE.txt", help="one per line (default: 4 held-out ones)")
    clips.add_argument("--validation_seeds", type=int, nargs="+", default=[0], metavar="SEED")
    clips.add_argument(
        "--validation_size", type=int, nargs=3, metavar=("WIDTH", "HEIGHT", "FRAMES"), help="(default: that of the first pair)"
    )
    clips.add_argument("--validation_sampling_steps", type=int, default=30)
    clips.add_argument("--validation_cfg", type=float, default=5.0)
    clips.add_argument("--validation_rewards", nargs="+", choices=REWARDS, default=[], help="scores of the clips")
    clips.add_argument("--negative_prompt", default="", metavar="TEXT", help="of the validation (default: empty)")
    clips.add_argument("--vae", metavar="FILE_OR_DIR", help="writes the clips as videos, too; for the geometry score")
    clips.add_argument("--vae_dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    clips.add_argument("--tiling", action="store_true", help="decode in tiles: less memory")
    clips.add_argument("--manifold", metavar="FILE", help="for the shell_lcc score")


def check(args) -> None:
    """Raises ValueError for any argument out of its range, naming the flag."""
    for name in ("rank", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "eval_levels",
                 "validation_sampling_steps"):  # fmt: skip
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for name in ("lr_warmup_steps", "max_grad_norm", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
                 "eval_steps", "seed", "crop_frames", "cache_size", "max_winner_rise"):  # fmt: skip
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if not args.learning_rate > 0:
        raise ValueError(f"--learning_rate must be above 0, got {args.learning_rate}")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held_out must be 0 or more and below 1, got {args.held_out}")
    if args.memory_limit_gb is not None and not args.memory_limit_gb > 0:
        raise ValueError(f"--memory_limit_gb must be above 0, got {args.memory_limit_gb}")
    if args.validation_size:
        width, height, frames = args.validation_size
        if min(width, height) < 16 or width % 16 or height % 16 or frames < 1 or frames % 4 != 1:
            raise ValueError("--validation_size: expected a width and height that are multiples of 16, and 4n+1 frames")
    loss, cached = loss_of(args), args.cached_reference or args.full
    if loss.needs_reference_velocity and cached:
        which = "--full" if args.full else "--cached_reference"
        raise ValueError(f"--reference_anchor needs the reference's velocities, but {which} stores errors only; leave one out")
    if args.full and args.format != "comfy":
        raise ValueError(f"--format {args.format} is a layout of LoRAs; --full writes a whole model, so leave it out")
    beta_of(args)
    # Before the model is read: an optimiser that is not there, or refuses its arguments.
    settings = settings_of(args)
    dummy = [torch.nn.Parameter(torch.zeros(8, 8))]
    optimisers.make(settings.optimiser, settings.optimiser_args, dummy, settings.learning_rate)


def loss_of(args) -> PreferenceLoss:
    """Raises LossError."""
    return PreferenceLoss(
        args.loss, args.label_smoothing, args.sft_weight, args.winner_anchor, args.reference_anchor, args.static_penalty
    )


def beta_of(args) -> AutoBeta | FixedBeta:
    """Raises ValueError naming the flag."""
    if args.beta == "auto":
        if args.loss == IPO:
            raise ValueError(
                "--loss ipo needs a number as --beta: its target is d = 1 / (2 beta), which would shrink as auto follows d; "
                "100 aims at .005"
            )
        try:
            return AutoBeta(args.beta_factor, low=args.beta_min, high=args.beta_max)
        except ValueError as e:
            raise ValueError(f"--beta_factor, --beta_min, --beta_max: {e}") from e
    try:
        return FixedBeta(float(args.beta))
    except ValueError as e:
        raise ValueError(f"--beta {args.beta}: expected auto, or a number above 0") from e


def settings_of(args) -> LoopSettings:
    return LoopSettings(
        args.max_train_steps, args.learning_rate, args.lr_warmup_steps, args.lr_scheduler, args.max_grad_norm, args.optimizer,
        optimisers.parse_arguments(args.optimizer_args),
    )  # fmt: skip
