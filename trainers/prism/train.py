"""Trains a PRISM head on preferences between latents, on a frozen backbone cut after the last tap.

Only the head is trained; features are computed anew for every batch, under the pair's common noise. Held-out prompts are
kept apart from the first step on; half of them fit the tie threshold, the other half are reported.
"""

from pathlib import Path

import torch

from ..kernels.prism import files
from ..kernels.prism.head import POOLINGS, HeadConfig, PrismHead
from ..kernels.prism.preference_loss import ETA
from ..running import checkpoint
from ..running import device as shell_lcc_device
from ..running.device import DTYPES
from ..running.loop import Checkpoints
from ..running.output import provenance, require_output
from ..running.progress import Bar
from ..scorers.prism_network import LEVELS, Scorer
from ..wan import dit as wan_dit
from . import data as prism_data
from . import train_loop as prism_train
from .data import SAME_LEVEL
from .train_loop import SCHEDULES, Settings


def add_arguments(parser) -> None:
    what = parser.add_argument_group("files")
    what.add_argument("--data", required=True, metavar="DIR", help="a folder that `cache` or `collect` made")
    what.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    what.add_argument("--output", required=True, metavar="FILE.safetensors")
    what.add_argument("--overwrite", action="store_true", help="replace the output and an earlier run's checkpoints")
    head = parser.add_argument_group("head")
    head.add_argument("--taps", type=int, nargs="+", default=[11], help="blocks whose outputs are read (default 11)")
    head.add_argument("--dim", type=int, default=1536, help="width (default 1536)")
    head.add_argument("--heads", type=int, default=12, help="of its attention (default 12)")
    head.add_argument("--layers", type=int, default=5, help="of its MLP (default 5)")
    head.add_argument("--queries", type=int, default=1, help="learned queries (default 1)")
    head.add_argument("--pooling", choices=POOLINGS, default="query", help="mean: the ablation without a query")
    head.add_argument("--time", action="store_true", help="condition the head on the noise level")
    head.add_argument("--temperatures", action="store_true", help="a learned temperature per level of --levels")
    how = parser.add_argument_group("training")
    how.add_argument("--held_out", type=float, default=0.1, help="share of prompts to measure on (default 0.1)")
    how.add_argument("--levels", type=float, nargs="+", help="noise levels to measure at (default: those of the data, or 7)")
    how.add_argument(
        "--sigma_range", type=float, nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0),
        help="noise levels to train on, such as those of one of two experts (default 0 1)",
    )  # fmt: skip
    how.add_argument("--max_train_steps", type=int, default=5000)
    how.add_argument("--train_batch_size", type=int, default=8, help="pairs a process and step (default 8)")
    how.add_argument("--learning_rate", type=float, default=1e-4)
    how.add_argument("--weight_decay", type=float, default=0.01)
    how.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant", help="after the warmup (default constant)")
    how.add_argument("--lr_warmup_steps", type=int, default=100)
    how.add_argument("--max_grad_norm", type=float, default=1.0, help="0 does not clip (default 1)")
    how.add_argument("--eta", type=float, default=ETA, help="width of the tie in the loss, above 1 (default 5)")
    how.add_argument(
        "--token_dropout", type=float, default=0.0, help="share of visual tokens kept from the head: helps with few pairs (0)"
    )
    how.add_argument("--backbone_dtype", choices=tuple(DTYPES), default="float32")
    how.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="default: accelerate's setting, else no")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--validation_steps", type=int, default=500, help="steps between held-out figures (default 500)")
    how.add_argument("--output_dir", metavar="DIR", help="for checkpoints and logs (default: OUTPUT's name + .checkpoints)")
    how.add_argument("--checkpointing_steps", type=int, default=500, help="0: the last and on Ctrl-C only (default 500)")
    how.add_argument("--checkpoints_total_limit", type=int, default=2, help="0 keeps all (default 2)")
    how.add_argument("--resume_from_checkpoint", metavar="latest|PATH")
    how.add_argument("--report_to", choices=("none", "tensorboard"), default="none")


def run(args) -> int:
    _check(args)
    place = shell_lcc_device.join(args.device)
    try:
        return _train(args, place)
    finally:
        place.leave()


def held_out_halves(data: prism_data.PreferenceData, share: float, seed: int):
    """(training rows, rows to fit ties on, rows to report); with two held-out prompts or fewer, none to fit ties on."""
    fit, held = prism_data.split(data, share, seed)
    prompts = sorted({row.prompt for row in held})
    tuning = set(prompts[1::2]) if len(prompts) > 2 else set()
    return fit, [r for r in held if r.prompt in tuning], [r for r in held if r.prompt not in tuning]


def levels_of(data: prism_data.PreferenceData, wanted, within: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """The noise levels to measure at: as wanted, else those that runs were caught at, else LEVELS, within a range."""
    low, high = within
    known = wanted or [s for s in data.levels() or LEVELS if low - SAME_LEVEL <= s <= high + SAME_LEVEL]
    if not known:
        raise ValueError(f"--sigma_range {low:g} {high:g}: the runs were caught at {data.levels()}; give --levels")
    return sorted(known, reverse=True)


def table(found: dict) -> str:
    """The accuracy table as text."""
    lines = [f"{'dimension':<16} {'sigma':>6} {'pairs':>6} {'without ties':>13} {'with ties':>10} {'calibration':>12}"]
    for row in found["table"]:
        cells = [f"{row[k]:.3f}" if row[k] is not None else "-" for k in ("without_ties", "with_ties", "calibration")]
        lines.append(
            f"{row['dimension']:<16} {row['sigma']:>6.3f} {row['pairs']:>6} {cells[0]:>13} {cells[1]:>10} {cells[2]:>12}"
        )
    return "\n".join(lines)


def _train(args, place) -> int:
    from accelerate import Accelerator

    output = Path(args.output)
    require_output(output, args.overwrite)
    work = Path(args.output_dir) if args.output_dir else output.with_suffix(".checkpoints")
    data = prism_data.load(args.data)
    fit, tuning, held = held_out_halves(data, args.held_out, args.seed)
    prism_data.require_classes(fit, args.data)
    within = tuple(args.sigma_range)
    levels = levels_of(data, args.levels, within)
    dit = wan_dit.load(args.backbone, max(args.taps), DTYPES[args.backbone_dtype], place.device)
    config = HeadConfig(
        dit.backbone.width, args.dim, args.heads, args.layers, tuple(args.taps), args.queries, data.dimensions, args.time,
        tuple(levels) if args.temperatures else (), args.pooling,
    )  # fmt: skip
    accelerator = Accelerator(cpu=place.device.type == "cpu", mixed_precision=args.mixed_precision, device_placement=False)
    settings = Settings(
        args.max_train_steps, args.train_batch_size, place.count, args.learning_rate, args.weight_decay,
        args.lr_warmup_steps, args.max_grad_norm, args.eta, accelerator.mixed_precision, args.seed, within, args.token_dropout,
        args.lr_scheduler,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    head = PrismHead(config)
    resume = None
    if place.main or args.resume_from_checkpoint:
        resume, notes = checkpoint.choose(args.resume_from_checkpoint, work, args.overwrite)
        for note in notes:
            print(note)
    keep = Checkpoints(work, args.checkpointing_steps, args.checkpoints_total_limit or None, resume)
    writer = _writer(args, work) if place.main else None
    with Bar("training the head", args.max_train_steps, "step", place.main) as bar:

        def step(done: int, figures: dict) -> None:
            bar.reach(done, {"loss": f"{figures['loss']:.4f}"})
            _write(writer, done, figures)

        def validate(done: int, scorer: Scorer) -> None:
            found = prism_train.accuracies(scorer, data, held, tuning, levels, args.train_batch_size, args.seed)
            for row in found["table"]:
                if row["without_ties"] is not None:
                    _write(writer, done, {f"{row['dimension']}/sigma {row['sigma']:.3f}": row["without_ties"]})
            shown = [f"{r['sigma']:.2f} {r['without_ties']:.3f}" for r in found["table"] if r["without_ties"] is not None]
            bar.say(f"step {done}: held-out accuracy by sigma: {', '.join(shown)}")

        figures = prism_train.train(
            accelerator, dit, head, data, fit, settings, keep, step, validate, args.validation_steps
        )
    if writer is not None:
        writer.close()
    if not place.main:
        return 0
    found = prism_train.accuracies(Scorer(dit, head), data, held, tuning, levels, args.train_batch_size, args.seed)
    caught = [s for s in data.levels() if within[0] - SAME_LEVEL <= s <= within[1] + SAME_LEVEL]
    sigmas = (min(caught), max(caught)) if caught else within
    notes = {"seed": args.seed, "pairs": len(fit), "prompts": len({r.prompt for r in fit}), "held_out_pairs": len(held)}
    loaded = files.LoadedHead(
        head.cpu(), dit.backbone, data.space, sigmas, found["thresholds"],
        {"accuracy": found["table"], "training": figures}, provenance(args.argv, "trainers.prism") | notes, output.stem,
    )  # fmt: skip
    files.save(loaded, output)
    print(f"wrote {output}: {sum(p.numel() for p in head.parameters()) / 1e6:.2f} M weights, {figures['steps']} steps")
    print(table(found))
    return 0


def _writer(args, work: Path):
    if args.report_to != "tensorboard":
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError("--report_to tensorboard needs it: pip install tensorboard") from e
    return SummaryWriter(work / "logs")


def _write(writer, step: int, figures: dict[str, float]) -> None:
    if writer is not None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)


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
    for level in args.levels or ():
        if not 0 <= level <= 1:
            raise ValueError(f"--levels are noise levels from 0 to 1, got {level}")
