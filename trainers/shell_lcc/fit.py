"""Fits a Shell-LCC manifold on latents, calibrates it on held-out clips and prints its held-out figures.

anchors: k-means by FAISS and closed-form thickness; minutes on a CPU. predictor: the network of arXiv 2606.30248 in two
stages (skeleton, then shell). It starts from k-means and a regressed last layer, and weights the locality term by 0.02
instead of the paper's 1: at 1 the code approaches vector quantisation, and on synthetic sheets minimisation then *added*
detail. `--locality_weight 1 --random_start --lr_scheduler constant` is the paper's recipe except for the codebook, which
starts from k-means. With several processes, BatchNorm normalises by each process's own tokens and keeps the first
process's running statistics.
"""

from pathlib import Path

import torch

from ..kernels.shell_lcc import evaluation, fit_predictor
from ..kernels.shell_lcc.calibration import calibrate
from ..kernels.shell_lcc.fit_anchors import fit_anchors
from ..kernels.shell_lcc.kmeans import kmeans
from ..kernels.shell_lcc.manifold import ShellManifold, save
from ..kernels.shell_lcc.predictor import Predictor
from ..running import accelerator as accelerators
from ..running import checkpoint
from ..running.device import init_distributed
from ..running.loop import CheckpointOptions
from ..running.output import format_table, provenance, require_output, require_output_folder
from ..running.progress import Bar
from . import train_predictor
from .arguments import add_latents
from .data import FitData, load_fit_data
from .metrics_table import metrics_rows
from .train_predictor import FitSettings

# FAISS warns below this number of points per centroid.
TOKENS_PER_BASE = 39
# The fast neighbour search of kernels.shell_lcc.knn takes bases in groups of this size.
GROUP = 16
VALIDATION_TOKENS = 20_000


def add_arguments(parser) -> None:
    files = parser.add_argument_group("files")
    add_latents(files, "--latents", True, "files, folders or patterns: .safetensors shards, .latent, .pt, .pth")
    files.add_argument("--output", required=True, metavar="FILE.safetensors")
    files.add_argument("--overwrite", action="store_true", help="replace the output and an earlier run's checkpoints")
    files.add_argument("--latent_space", metavar="ID", help="wan21 or wan22, for .latent, .pt, .pth (default: by channels)")
    what = parser.add_argument_group("manifold")
    what.add_argument("--coder", choices=("anchors", "predictor"), default="anchors")
    what.add_argument("--num_bases", type=int, default=4096, help="K (default 4096); fewer where there are too few tokens")
    what.add_argument("--neighbours", type=int, default=16, help="anchors: bases that code a token (default 16)")
    what.add_argument("--locality", type=float, default=0.2, help="anchors: weight of the distance penalty (default 0.2)")
    what.add_argument("--hidden_dim", type=int, default=512, help="predictor: width of its layers (default 512)")
    how = parser.add_argument_group("data")
    how.add_argument("--held_out", type=float, default=0.1, help="share of clips, by video, to measure on (default 0.1)")
    how.add_argument("--max_tokens", type=int, default=2_000_000, help="to fit on, drawn evenly over clips (default 2000000)")
    how.add_argument("--max_held_out_tokens", type=int, default=1_000_000, help="to measure on (default 1000000)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; k-means is always on the CPU")
    train = parser.add_argument_group("predictor training")
    train.add_argument("--lcc_steps", type=int, default=3000, help="steps of the skeleton stage (default 3000)")
    train.add_argument("--shell_steps", type=int, default=1000, help="steps of the shell stage (default 1000)")
    train.add_argument("--train_batch_size", type=int, default=4096, help="tokens per process and step (default 4096)")
    train.add_argument("--gradient_accumulation_steps", type=int, default=1)
    train.add_argument("--learning_rate", type=float, default=1e-3)
    train.add_argument("--lr_scheduler", choices=("linear", "constant"), default="linear", help="linear: to 0 in each stage")
    train.add_argument("--locality_weight", type=float, default=0.02, help="of the locality term (default 0.02; the paper: 1)")
    train.add_argument("--usage_weight", type=float, default=fit_predictor.USAGE_WEIGHT, help="of even usage of bases (0.1)")
    train.add_argument("--basis_weight", type=float, default=fit_predictor.BASIS_WEIGHT, help="of bases near the data (0.1)")
    train.add_argument("--max_grad_norm", type=float, default=1.0, help="0: no clipping (default 1)")
    train.add_argument("--random_start", action="store_true", help="do not initialise the last layer by regression")
    train.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="default: accelerate's setting, else no")
    train.add_argument("--validation_steps", type=int, default=500, help="steps between held-out figures (default 500)")
    train.add_argument("--output_dir", metavar="DIR", help="for checkpoints and logs (default: OUTPUT's name + .checkpoints)")
    train.add_argument("--checkpointing_steps", type=int, default=500, help="0: the last and on Ctrl-C only (default 500)")
    train.add_argument("--checkpoints_total_limit", type=int, default=2, help="0 keeps all (default 2)")
    train.add_argument("--resume_from_checkpoint", metavar="latest|PATH")
    train.add_argument("--report_to", default="none", metavar="NAME", help="a logger of accelerate: tensorboard, wandb, ...")
    train.add_argument("--logging_dir", metavar="DIR", help="where loggers write (default: the output_dir)")


def run(args) -> int:
    _check(args)
    context = init_distributed(args.device)
    try:
        return _fit_anchors(args, context) if args.coder == "anchors" else _fit_predictor(args, context)
    finally:
        context.close()


def bases_for(tokens: int, wanted: int, least: int) -> int:
    """The number of bases to fit: `wanted`, or as many as 39 tokens each allow, a multiple of 16 where possible.

    Raises ValueError when that is less than `least`.
    """
    allowed = tokens // TOKENS_PER_BASE
    if allowed >= wanted:
        return wanted
    if allowed < least:
        raise ValueError(
            f"too few tokens: {tokens} to fit on allow {allowed} bases at {TOKENS_PER_BASE} tokens each, "
            f"but at least {least} are needed ({least * TOKENS_PER_BASE} tokens); give more or larger clips"
        )
    grouped = allowed // GROUP * GROUP
    return grouped if grouped >= least else allowed


def _fit_anchors(args, context) -> int:
    if not context.is_main:
        return 0
    output = Path(args.output)
    require_output(output, args.overwrite)
    data = _load(args, context)
    count = bases_for(len(data.tokens), args.num_bases, args.neighbours)
    with Bar("k-means, then thickness", 100, "%") as bar:
        coder = fit_anchors(
            data.tokens, count, args.neighbours, args.locality, args.seed, lambda share: bar.reach(round(100 * share))
        )
    return _finish(args, context, data, coder, {})


def _fit_predictor(args, context) -> int:
    output = Path(args.output)
    work = Path(args.output_dir) if args.output_dir else output.with_suffix(".checkpoints")
    require_output(output, args.overwrite)
    require_output_folder(work)
    logs = Path(args.logging_dir) if args.logging_dir else work
    accelerator = accelerators.accelerator_of(args, context, logs)
    data = _load(args, context)
    per_process = len(data.tokens) // (context.world_size * args.gradient_accumulation_steps)
    settings = FitSettings(
        num_bases=bases_for(len(data.tokens), args.num_bases, 2),
        hidden_dim=args.hidden_dim,
        lcc_steps=args.lcc_steps,
        shell_steps=args.shell_steps,
        batch=min(args.train_batch_size, per_process),
        processes=context.world_size,
        accumulation=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler=args.lr_scheduler,
        locality_weight=args.locality_weight,
        usage_weight=args.usage_weight,
        basis_weight=args.basis_weight,
        max_grad_norm=args.max_grad_norm,
        random_start=args.random_start,
        precision=accelerator.mixed_precision,
        seed=args.seed,
    )
    if settings.batch < args.train_batch_size:
        data.notes.append(f"batch of {settings.batch} instead of {args.train_batch_size} tokens: there are no more")
    resume = None
    if context.is_main or args.resume_from_checkpoint:
        # Only the first process clears the folder; all of them read the same checkpoint.
        resume, notes = checkpoint.choose(args.resume_from_checkpoint, work, args.overwrite)
        data.notes += notes
    keep = CheckpointOptions(work, args.checkpointing_steps, args.checkpoints_total_limit or None, resume)
    coder = _start(data, settings, context, resume)
    accelerators.start_loggers(accelerator, args, "shell_lcc")
    with Bar("fitting predictor", settings.steps, "step", context.is_main) as bar:
        log = _Log(args, accelerator, data, bar)
        figures = train_predictor.train(
            accelerator, coder, data.tokens, settings, keep, log.step, log.validate, args.validation_steps
        )
    accelerators.finish_loggers(accelerator, args)
    return _finish(args, context, data, coder, figures) if context.is_main else 0


def _start(data: FitData, settings: FitSettings, context, resume) -> Predictor:
    """The coder before its first step, initialised only where its values are used: first process, not resumed."""
    torch.manual_seed(settings.seed)
    coder = Predictor(data.space.channels, settings.num_bases, settings.hidden_dim)
    if context.is_main and resume is None:
        coder.basis.data.copy_(kmeans(data.tokens, settings.num_bases, seed=settings.seed))
        if not settings.random_start:
            fit_predictor.start_by_regression(coder, data.tokens)
    return coder


def _finish(args, context, data: FitData, coder, fit: dict) -> int:
    """Calibrates, measures held-out figures, writes the file and prints the table."""
    manifold = ShellManifold(coder.to(context.device), data.space, name=Path(args.output).stem)
    with Bar("measuring", 2 * len(data.held_out), "clip") as bar:
        maps = []
        for _, z in data.held_out:
            maps.append(evaluation.score(manifold, z))
            bar.add()
        manifold.calibration = calibrate(maps)
        metrics = evaluation.evaluate(manifold, data.held_out, seed=args.seed, on_clip=lambda _: bar.add())
    bases = coder.config()["num_bases"]
    if bases < args.num_bases:
        data.notes.append(f"{bases} bases instead of {args.num_bases}: {TOKENS_PER_BASE} tokens each are needed")
    manifold.metrics = metrics | ({"fit": fit} if fit else {})
    facts = data.facts
    manifold.provenance = provenance(args.argv, "trainers.shell_lcc") | {"seed": args.seed, **facts, "notes": data.notes}
    save(manifold, args.output)
    rows = [
        ("coder", f"{args.coder}, {bases} bases"),
        ("fitted on", f"{facts['tokens']} of {facts['tokens_available']} tokens of {facts['fitted_clips']} clips"),
        ("latents", f"{facts['latent_space']}, {', '.join(facts['resolutions'])}"),
        *metrics_rows(metrics),
        ("radius", manifold.radius),
        ("band (5-95 %)", f"{manifold.band[0]:.4f} to {manifold.band[1]:.4f}"),
        *((k.replace("_", " "), v) for k, v in fit.items()),
        *(("note", note) for note in data.notes),
    ]
    print(format_table(rows, f"wrote {args.output}"))
    return 0


def _load(args, context) -> FitData:
    with Bar("reading latents", None, "clip", context.is_main) as bar:
        return load_fit_data(args, lambda _: bar.add())


class _Log:
    """Progress, held-out figures and loggers of a predictor fit; called on the first process."""

    def __init__(self, args, accelerator, data: FitData, bar: Bar):
        self.args, self.accelerator, self.bar = args, accelerator, bar
        self.space, self.seed = data.space, args.seed
        cap = VALIDATION_TOKENS // len(data.held_out)
        self.held = [(clip_id, evaluation.draw_frames(z, cap)) for clip_id, z in data.held_out]

    def step(self, step: int, stage: str, losses: dict[str, float]) -> None:
        if self.bar.bar is not None and self.bar.bar.n < step - 1:
            self.bar.reach(step - 1)
        self.bar.add({"stage": stage, "loss": f"{losses['total']:.4f}"})
        accelerators.log(self.accelerator, self.args, step, {f"{stage}/{k}": v for k, v in losses.items()})

    def validate(self, step: int, stage: str, coder: Predictor) -> None:
        m = evaluation.evaluate(ShellManifold(coder, self.space), self.held, seed=self.seed)
        c, r, d = m["codebook"], m["reconstruction"], m["distance"]
        text = f"step {step} ({stage}): held-out reconstruction {r['relative']:.4f} of the variance, perplexity "
        text += f"{c['perplexity']:.1f} of {c['bases']}, {c['dead']} dead"
        figures = {"reconstruction": r["relative"], "perplexity": c["perplexity"], "dead": c["dead"]}
        if stage == "shell":
            text += f", distance {d['median']:.3f} ({d['p05']:.3f} to {d['p95']:.3f}), AUROC clean over blurred "
            text += f"{m['auroc_clean_over_blurred']:.3f}, noisy over clean {m['auroc_noisy_over_clean']:.3f}"
            figures |= {"distance": d["median"], "auroc_clean_over_blurred": m["auroc_clean_over_blurred"]}
            figures |= {"auroc_noisy_over_clean": m["auroc_noisy_over_clean"]}
        self.bar.say(text)
        accelerators.log(self.accelerator, self.args, step, {f"held_out/{k}": v for k, v in figures.items()})


def _check(args) -> None:
    for name in ("num_bases", "neighbours", "hidden_dim", "max_tokens", "max_held_out_tokens", "train_batch_size",
                 "gradient_accumulation_steps", "lcc_steps", "shell_steps"):  # fmt: skip
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for name in ("locality", "locality_weight", "usage_weight", "basis_weight", "max_grad_norm", "checkpointing_steps",
                 "checkpoints_total_limit", "validation_steps", "seed"):  # fmt: skip
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if args.seed >= 2**31:
        raise ValueError(f"--seed must be below 2147483648, got {args.seed}")
    if args.learning_rate <= 0:
        raise ValueError(f"--learning_rate must be above 0, got {args.learning_rate}")
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held_out must lie between 0 and 1, got {args.held_out}")
    if args.coder == "anchors" and args.neighbours > args.num_bases:
        raise ValueError(f"--neighbours {args.neighbours} cannot exceed --num_bases {args.num_bases}")
    if args.coder == "anchors" and args.resume_from_checkpoint:
        raise ValueError("--resume_from_checkpoint is for --coder predictor: anchors are fitted without checkpoints")
