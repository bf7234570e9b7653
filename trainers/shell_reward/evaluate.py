"""Measures a LoRA against its base: held-out clips, and one-step predictions by noise level, with the manifold's distances.

Clips are sampled with --validation_sampling_steps from the same noise with the LoRA and without; differences are paired, with
Student's 95 % interval over clips. violation: mean distance of tokens outside the calibrated band; below: share of tokens
nearer to the skeleton than real ones, where plain minimisation ends. Look at the detail as well: a high-frequency share far
above the Laplacian variance, both of the base's, is noise.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..kernels.shell_lcc import manifold as manifolds
from ..kernels.tuning import latent_detail
from ..kernels.tuning import shell_objective as shell
from ..reporting import intervals
from ..reporting.intervals import Interval
from ..running import results_log
from ..running.device import init_distributed
from ..running.output import format_table, require_output
from ..running.progress import Bar
from ..tuning import backbone, lora, lora_files
from ..tuning.backbone import EXPERTS, TunableDit
from ..wan import sampling
from ..wan.prompts import text_id
from . import arguments, held_out, material
from .draws import NOISED, table_of
from .material import Material, ShellRewardError
from .predict import Network, OneStep

DIFFERENCES = ("violation", "outside", "below", "distance")
RATIOS = ("laplacian", "high_frequency", "motion")


def add_arguments(parser) -> None:
    what = parser.add_argument_group("files")
    what.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    what.add_argument("--expert", choices=tuple(EXPERTS), help="for a folder with two transformers")
    what.add_argument("--lora", required=True, metavar="FILE.safetensors", help="layout of ComfyUI, diffusers or kohya")
    what.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments.add_material(what)
    how = parser.add_argument_group("measuring")
    arguments.add_held_out(how)
    how.add_argument("--held_out", type=float, help="share of prompts, as in training (default: the LoRA's record)")
    how.add_argument("--seed", type=int, help="that chose them (default: the LoRA's record)")
    how.add_argument("--all", action="store_true", help="measure all prompts, such as those of another file")
    how.add_argument("--strength", type=float, default=1.0, help="of the LoRA (default 1)")
    how.add_argument("--eval_levels", type=int, default=6, help="noise levels of predictions (default 6)")
    how.add_argument("--eval_noises", type=int, default=8, help="predictions at each (default 8)")
    how.add_argument("--base_dtype", choices=("stored", *lora_files.DTYPES), default="stored")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args) -> int:
    if min(args.eval_levels, args.eval_noises, args.validation_sampling_steps) < 1:
        raise ValueError("--eval_levels, --eval_noises and --validation_sampling_steps must be 1 or more")
    arguments.check_material(args)
    if args.json:
        require_output(Path(args.json), overwrite=True, suffix=None)
    context = init_distributed(args.device)
    try:
        return _evaluate(args, context)
    finally:
        context.close()


def _evaluate(args, context) -> int:
    loaded, header = lora_files.load(args.lora), lora_files.read_modules(args.lora)[1]
    record = json.loads(header.get(lora_files.RECORD, "{}"))
    manifold = manifolds.load(args.manifold, context.device)
    manifold.calibrated("the band")
    share, seed = _held_out(args, record)
    found = material.load(args, manifold.space, Path(args.lora).with_suffix(".checkpoints"), context, share, seed)
    dtype = None if args.base_dtype == "stored" else lora_files.DTYPES[args.base_dtype]
    dit = backbone.load(args.backbone, dtype, context.device, args.expert)
    material.require_fit(manifold, dit, args.manifold, found.texts)
    lora_files.attach(dit.model, loaded)
    shape = material.shape_of(args, manifold.space)
    if args.start == NOISED:
        shape = tuple(found.latents(next(iter(found.clips))).shape)
    clips = {s: _clips(args, s, dit, found, shape, manifold) for s in (0.0, args.strength)}
    levels = arguments.levels_of(args)
    by_sigma = _by_sigma(args, dit, found, shape, manifold, [float(s) for s in levels.fixed(args.eval_levels)], context)
    figures = figures_of(clips[0.0], clips[args.strength]) | {"predictions": by_sigma, "strength": args.strength}
    if not context.is_main:
        return 0
    print(format_figures(figures))
    if args.json:
        text = json.dumps(results_log.plain(to_json(figures)), indent=1) + "\n"
        Path(args.json).write_text(text, encoding="utf-8")
    return 0


def figures_of(base: Sequence[dict], tuned: Sequence[dict]) -> dict:
    """{base, tuned: means as Intervals; change: paired differences; ratio: paired ratios; alarm: sentence or None; clips} of
    rows of held_out.figures_of in one order.
    """
    ratio = {}
    for k in RATIOS:
        pairs = [(t[k], b[k]) for t, b in zip(tuned, base, strict=True) if t[k] > 0 and b[k] > 0]
        ratio[k] = intervals.paired_ratio(*zip(*pairs, strict=True)) if pairs else intervals.mean([])
    return {
        "base": {k: intervals.mean([r[k] for r in base]) for k in DIFFERENCES},
        "tuned": {k: intervals.mean([r[k] for r in tuned]) for k in DIFFERENCES},
        "change": {
            k: intervals.paired_difference([r[k] for r in tuned], [r[k] for r in base]) for k in DIFFERENCES
        },
        "ratio": ratio, "alarm": latent_detail.alarm(ratio["laplacian"].mean, ratio["high_frequency"].mean),
        "clips": len(base),
    }  # fmt: skip


def to_json(value):
    """The figures with intervals as objects."""
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value.to_json() if isinstance(value, Interval) else value


def format_figures(figures: dict) -> str:
    """The figures as text."""
    rows = []
    for k in DIFFERENCES:
        c = figures["change"][k]
        values = f"{figures['base'][k].mean:.4f} -> {figures['tuned'][k].mean:.4f}"
        rows.append((k, f"{values}   change {c.mean:+.4f} ({c.low:+.4f} to {c.high:+.4f})"))
    for k, r in figures["ratio"].items():
        rows.append((k, f"{r.mean:.3f} of the base's ({r.low:.3f} to {r.high:.3f})"))
    text = format_table(rows, f"{figures['clips']} held-out clips, base -> LoRA (95 % intervals of paired changes)")
    lines = [text, "predictions in one step: mean distance, share of tokens outside the band"]
    lines.append("  sigma   base            LoRA")
    for row in figures["predictions"]:
        a, b = ((row[k]["distance"], row[k]["outside"]) for k in ("base", "tuned"))
        lines.append(f"  {row['sigma']:.3f}   {a[0]:.3f}  {a[1]:.3f}    {b[0]:.3f}  {b[1]:.3f}")
    if figures["alarm"]:
        lines.append(f"over-optimised: {figures['alarm']}")
    return "\n".join(lines)


def _held_out(args, record: dict) -> tuple[float, int]:
    """(share, seed) as in training; share 0 for --all."""
    seed = args.seed if args.seed is not None else record.get("seed", 0)
    if args.all:
        return 0.0, int(seed)
    share = args.held_out if args.held_out is not None else record.get("held_out")
    if share is None:
        raise ShellRewardError(
            f"{args.lora}: its header does not say which prompts were held out; give --held_out and --seed as in training, or "
            "--all to measure all prompts"
        )
    if not 0 <= float(share) < 1:
        raise ShellRewardError(f"--held_out must be 0 or more and below 1, got {share}")
    return float(share), int(seed)


@torch.no_grad()
def _clips(args, strength: float, dit: TunableDit, found: Material, shape, manifold) -> list[dict]:
    """Rows of the clips of the measured prompts and seeds at a strength of the LoRA."""
    negative = found.texts.get(text_id(args.negative_prompt))
    target = shell.target_of([manifold.calibration])
    schedule = sampling.sigmas(args.validation_sampling_steps, args.shift).tolist()
    rows, device = [], dit.model.patch_embedding.weight.device
    wanted = [(p, s) for p in found.measured for s in args.validation_seeds]
    with Bar(f"clips at {strength:g}", len(wanted), "clip") as bar, lora.at_strength(dit.model, strength):
        for prompt, seed in wanted:
            denoiser = sampling.Denoiser(dit.model, [found.texts[prompt]], negative, args.validation_cfg)
            z = sampling.euler(denoiser, sampling.noise(shape, [seed]).to(device), schedule)[0].float().cpu()
            rows.append(held_out.figures_of(f"{prompt} {seed}", z, manifold, target))
            bar.add()
    return rows


def _by_sigma(args, dit, found: Material, shape, manifold, sigmas: list[float], context) -> list[dict]:
    """[{sigma, base, tuned: {distance, outside}}] of one-step predictions for the measured prompts."""

    def velocity(x, sigma, text, bias):
        return backbone.velocity(dit.model, x, sigma, text, bias)

    one_step = OneStep(Network(velocity, None, lambda: 0.0, context.device), found.texts, shape, found.latents)
    prompts = set(found.measured)
    items = [(c, k) for k, c in found.captions.items() if c in prompts] if args.start == NOISED else []
    draws = table_of(items or [(p, None) for p in found.measured], sigmas, args.eval_noises, 0, "eval")
    means: dict[str, list[tuple[float, float]]] = {}
    for name, strength in (("base", 0.0), ("tuned", args.strength)):
        with lora.at_strength(dit.model, strength):
            maps = [manifold.distance(x0) for x0, _ in one_step.each(draws, f"predictions, {name}", context.is_main)]
        each = [(float(d.mean()), float(manifold.outside_band(d).float().mean())) for d in maps]
        per = args.eval_noises
        groups = [each[i * per : (i + 1) * per] for i in range(len(sigmas))]
        means[name] = [tuple(sum(v) / per for v in zip(*g, strict=True)) for g in groups]
    return [
        {"sigma": s} | {n: dict(zip(("distance", "outside"), means[n][i], strict=True)) for n in means}
        for i, s in enumerate(sigmas)
    ]  # fmt: skip
