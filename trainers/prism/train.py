"""Trains a PRISM head on preferences between latents, on a frozen backbone cut after the last tap.

Only the head is trained; features are computed for every batch, both clips of a pair with the same noise. Held-out prompts
are never trained on; the tie threshold is fitted on half of them, and figures are reported on the other half.
"""

from pathlib import Path

import torch

from ..kernels.prism import files
from ..kernels.prism.head import POOLINGS, HeadConfig, PrismHead
from ..kernels.prism.preference_loss import ETA
from ..running import accelerator as accelerators
from ..running import checkpoint
from ..running.device import BACKBONE_DTYPE, DTYPES, dtype_for, init_distributed
from ..running.loop import CheckpointOptions
from ..running.output import provenance, require_output, require_output_folder
from ..running.progress import Bar
from ..scorers.prism_network import Scorer
from ..wan import dit as wan_dit
from . import data as prism_data
from . import train_loop
from .accuracy_by_sigma import accuracies, format_accuracies, measured_sigmas
from .data import SAME_SIGMA, PreferenceData, Row
from .train_loop import SCHEDULES, TrainSettings


def add_arguments(parser) -> None:
    what = parser.add_argument_group("files")
    what.add_argument("--data", required=True, metavar="DIR", help="folder written by `cache`, or by `collect` and `label`")
    what.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    what.add_argument("--output", required=True, metavar="FILE.safetensors")
    what.add_argument("--overwrite", action="store_true", help="replace the output and an earlier run's checkpoints")
    head = parser.add_argument_group("head")
    head.add_argument("--taps", type=int, nargs="+", default=[11], help="backbone blocks whose outputs are read (default 11)")
    head.add_argument("--dim", type=int, default=1536, help="width (default 1536)")
    head.add_argument("--heads", type=int, default=12, help="attention heads (default 12)")
    head.add_argument("--layers", type=int, default=5, help="layers of the MLP (default 5)")
    head.add_argument("--queries", type=int, default=1, help="learned queries (default 1)")
    head.add_argument("--pooling", choices=POOLINGS, default="query", help="mean: the ablation without a query")
    head.add_argument("--time", action="store_true", help="condition the head on the noise level")
    head.add_argument("--temperatures", action="store_true", help="learn a temperature per noise level of --levels")
    how = parser.add_argument_group("training")
    how.add_argument("--held_out", type=float, default=0.1, help="share of prompts to measure on (default 0.1)")
    how.add_argument(
        "--levels", dest="sigmas", type=float, nargs="+", metavar="SIGMA",
        help="noise levels to measure at (default: those of the data, or 7)",
    )  # fmt: skip
    how.add_argument(
        "--sigma_range", type=float, nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0),
        help="noise levels to train on, such as those of one of two experts (default 0 1)",
    )  # fmt: skip
    how.add_argument("--max_train_steps", type=int, default=5000)
    how.add_argument("--train_batch_size", type=int, default=8, help="pairs per process and step (default 8)")
    how.add_argument("--learning_rate", type=float, default=1e-4)
    how.add_argument("--weight_decay", type=float, default=0.01)
    how.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant", help="after the warmup (default constant)")
    how.add_argument("--lr_warmup_steps", type=int, default=100)
    how.add_argument("--max_grad_norm", type=float, default=1.0, help="0: no clipping (default 1)")
    how.add_argument("--eta", type=float, default=ETA, help="tie parameter of the Rao-Kupper loss, above 1 (default 5)")
    how.add_argument(
        "--token_dropout", type=float, default=0.0, help="share of visual tokens withheld: helps with few pairs (default 0)"
    )
    how.add_argument("--backbone_dtype", choices=("auto", *DTYPES), default="auto", help=BACKBONE_DTYPE)
    how.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="default: accelerate's setting, else no")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--validation_steps", type=int, default=500, help="steps between held-out figures (default 500)")
    how.add_argument("--output_dir", metavar="DIR", help="for checkpoints and logs (default: OUTPUT's name + .checkpoints)")
    how.add_argument("--checkpointing_steps", type=int, default=500, help="0: the last and on Ctrl-C only (default 500)")
    how.add_argument("--checkpoints_total_limit", type=int, default=2, help="0 keeps all (default 2)")
    how.add_argument("--resume_from_checkpoint", metavar="latest|PATH")
    how.add_argument("--report_to", default="none", metavar="NAME", help="a logger of accelerate: tensorboard, wandb, ...")


def run(args) -> int:
    _check(args)
    context = init_distributed(args.device)
    try:
        return _train(args, context)
    finally:
        context.close()


def held_out_halves(data: PreferenceData, share: float, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """(training rows, rows to fit tie thresholds on, rows to report), with no prompt and no clip in two of them.

    With two held-out groups of prompts or fewer there are no rows to fit thresholds on. Raises PrismDataError as
    prism.data.split does.
    """
    fit, held_out = prism_data.split(data, share, seed)
    groups = prism_data.prompt_groups(data)
    names = sorted({groups[row.prompt] for row in held_out})
    ties = set(names[1::2]) if len(names) > 2 else set()
    return fit, [r for r in held_out if groups[r.prompt] in ties], [r for r in held_out if groups[r.prompt] not in ties]


def _train(args, context) -> int:
    output = Path(args.output)
    require_output(output, args.overwrite)
    work = Path(args.output_dir) if args.output_dir else output.with_suffix(".checkpoints")
    require_output_folder(work)
    data = prism_data.load(args.data)
    fit, tie_rows, held_out = held_out_halves(data, args.held_out, args.seed)
    prism_data.require_classes(fit, args.data)
    sigma_range = tuple(args.sigma_range)
    sigmas = measured_sigmas(data, args.sigmas, sigma_range)
    dtype = DTYPES[dtype_for(args.backbone_dtype, context.device)]
    dit = wan_dit.load(args.backbone, max(args.taps), dtype, context.device)
    config = HeadConfig(
        dit.backbone.width, args.dim, args.heads, args.layers, tuple(args.taps), args.queries, data.dimensions, args.time,
        tuple(sigmas) if args.temperatures else (), args.pooling,
    )  # fmt: skip
    accelerator = accelerators.accelerator_of(args, context, work)
    settings = TrainSettings(
        args.max_train_steps, args.train_batch_size, context.world_size, args.learning_rate, args.weight_decay,
        args.lr_warmup_steps, args.max_grad_norm, args.eta, accelerator.mixed_precision, args.seed, sigma_range,
        args.token_dropout, args.lr_scheduler,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    head = PrismHead(config)
    resume = None
    if context.is_main or args.resume_from_checkpoint:
        resume, notes = checkpoint.choose(args.resume_from_checkpoint, work, args.overwrite)
        for note in notes:
            print(note)
    keep = CheckpointOptions(work, args.checkpointing_steps, args.checkpoints_total_limit or None, resume)
    accelerators.start_loggers(accelerator, args, "prism")
    with Bar("training the head", args.max_train_steps, "step", context.is_main) as bar:

        def step(done: int, figures: dict) -> None:
            bar.reach(done, {"loss": f"{figures['loss']:.4f}"})
            accelerators.log(accelerator, args, done, figures)

        def validate(done: int, scorer: Scorer) -> None:
            found = accuracies(scorer, data, held_out, tie_rows, sigmas, args.train_batch_size, args.seed)
            known = [row for row in found["table"] if row["without_ties"] is not None]
            by_sigma = {f"{row['dimension']}/sigma {row['sigma']:.3f}": row["without_ties"] for row in known}
            accelerators.log(accelerator, args, done, by_sigma)
            shown = [f"{r['sigma']:.2f} {r['without_ties']:.3f}" for r in known]
            bar.say(f"step {done}: held-out accuracy by sigma: {', '.join(shown)}")

        figures = train_loop.train(
            accelerator, dit, head, data, fit, settings, keep, step, validate, args.validation_steps
        )
    accelerators.finish_loggers(accelerator, args)
    if not context.is_main:
        return 0
    found = accuracies(Scorer(dit, head), data, held_out, tie_rows, sigmas, args.train_batch_size, args.seed)
    stored = [s for s in data.sigmas() if sigma_range[0] - SAME_SIGMA <= s <= sigma_range[1] + SAME_SIGMA]
    trained_range = (min(stored), max(stored)) if stored else sigma_range
    notes = {"seed": args.seed, "pairs": len(fit), "prompts": len({r.prompt for r in fit}), "held_out_pairs": len(held_out)}
    loaded = files.LoadedHead(
        head.cpu(), dit.backbone, data.space, trained_range, found["thresholds"],
        {"accuracy": found["table"], "training": figures}, provenance(args.argv, "trainers.prism") | notes, output.stem,
    )  # fmt: skip
    files.save(loaded, output)
    print(f"wrote {output}: {sum(p.numel() for p in head.parameters()) / 1e6:.2f} M weights, {figures['steps']} steps")
    print(format_accuracies(found))
    return 0


def _check(args) -> None:
    for name in ("dim", "heads", "layers", "queries", "max_train_steps", "train_batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for name in ("weight_decay", "lr_warmup_steps", "max_grad_norm", "checkpointing_steps", "checkpoints_total_limit",
                 "validation_steps", "seed"):  # fmt: skip
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if args.learning_rate <= 0:
        raise ValueError(f"--learning_rate must be above 0, got {args.learning_rate}")
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held_out must lie between 0 and 1, got {args.held_out}")
    if not 0 <= args.token_dropout < 1:
        raise ValueError(f"--token_dropout must be 0 or more and below 1, got {args.token_dropout}")
    low, high = args.sigma_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"--sigma_range {low:g} {high:g}: expected two noise levels from 0 to 1, the lower first")
    for sigma in args.sigmas or ():
        if not 0 <= sigma <= 1:
            raise ValueError(f"--levels are noise levels from 0 to 1, got {sigma}")
