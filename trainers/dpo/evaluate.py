"""Measures a LoRA on pairs that it was not trained on: implicit accuracy, and the errors of winners and losers apart.

Every held-out pair is measured at the same table of noise levels and noises, with the LoRA and without; winner and loser share
both. A pair is right where the mean of d over the table is above 0 (kernels.tuning.preference_loss). The interval is Wilson's
over prompts, since pairs of one prompt are alike. Accuracy alone proves nothing: a ruined model can have .90. Look at the
winners' error as well, which should not rise.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from ..kernels.tuning import split_step
from ..kernels.tuning.noise_levels import KINDS, SHIFTED, NoiseLevels
from ..kernels.tuning.preference_loss import PreferenceLoss
from ..reporting import intervals
from ..reporting.intervals import Interval
from ..running.device import init_distributed
from ..running.output import require_output
from ..running.progress import Bar
from ..tuning import backbone, lora, lora_files, run_setup
from ..tuning.backbone import EXPERTS
from . import data as dpo_data
from .data import DpoDataError, PairData, PairRow
from .draws import IMAGE_MASK, Draw, by_shape, noisy_pair, seed_of
from .objective import DpoObjective, Network

# Noise levels and noises per pair.
LEVELS, NOISES = 6, 1


def add_arguments(parser) -> None:
    what = parser.add_argument_group("files")
    what.add_argument("--data", required=True, metavar="DIR", help="folder written by `cache`")
    what.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    what.add_argument("--expert", choices=tuple(EXPERTS), help="for a folder with two transformers")
    what.add_argument("--lora", required=True, metavar="FILE.safetensors", help="layout of ComfyUI, diffusers or kohya")
    what.add_argument("--json", metavar="FILE", help="also write the figures there")
    how = parser.add_argument_group("measuring")
    how.add_argument("--held_out", type=float, help="share of prompts, as in training (default: the LoRA's record)")
    how.add_argument("--seed", type=int, help="that chose them (default: the LoRA's record)")
    how.add_argument("--all", action="store_true", help="measure all pairs, such as those of another folder")
    how.add_argument("--strength", type=float, default=1.0, help="of the LoRA (default 1)")
    add_levels(how)
    how.add_argument("--eval_levels", type=int, default=LEVELS, help=f"noise levels per pair (default {LEVELS})")
    how.add_argument("--eval_noises", type=int, default=NOISES, help=f"noises per level (default {NOISES})")
    how.add_argument("--base_dtype", choices=("stored", *lora_files.DTYPES), default="stored")
    how.add_argument("--eval_batch_size", type=int, default=1, help="pairs at a time (default 1)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def add_levels(group) -> None:
    """Adds the flags of the noise levels."""
    group.add_argument(
        "--sigma_sampling", choices=KINDS, default=SHIFTED,
        help="of noise levels: uniform; logit_normal and shifted use --shift; list takes --sigmas (default shifted)",
    )  # fmt: skip
    group.add_argument("--shift", type=float, default=5.0, help="of the schedule, as when sampling (default 5)")
    group.add_argument("--sigmas", type=float, nargs="+", default=(), metavar="SIGMA", help="noise levels after the shift")
    group.add_argument(
        "--sigma_range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels of the model (default 0 1; with --expert .875 1 for high_noise, 0 .875 for low_noise)",
    )  # fmt: skip


def levels_of(args) -> NoiseLevels:
    """The noise levels that `add_levels` and --expert name. Raises ValueError naming the flags."""
    kind = "list" if args.sigmas and args.sigma_sampling == SHIFTED else args.sigma_sampling
    default = {None: (0.0, 1.0), "high_noise": (0.875, 1.0), "low_noise": (0.0, 0.875)}[args.expert]
    low, high = args.sigma_range or default
    try:
        return NoiseLevels(kind, args.shift, low, high, tuple(sorted(args.sigmas)))
    except ValueError as e:
        raise ValueError(f"--sigma_sampling, --shift, --sigmas, --sigma_range: {e}") from e


def run(args) -> int:
    if min(args.eval_levels, args.eval_noises, args.eval_batch_size) < 1:
        raise ValueError("--eval_levels, --eval_noises and --eval_batch_size must be 1 or more")
    if args.json:
        require_output(Path(args.json), overwrite=True, suffix=None)
    context = init_distributed(args.device)
    try:
        return _evaluate(args, context)
    finally:
        context.close()


def _evaluate(args, context) -> int:
    data = dpo_data.load(args.data)
    record = json.loads(lora_files.read_modules(args.lora)[1].get(lora_files.RECORD, "{}"))
    rows = data.rows if args.all else _held_out(data, record, args)
    levels = levels_of(args)
    loaded = lora_files.load(args.lora)
    dtype = None if args.base_dtype == "stored" else lora_files.DTYPES[args.base_dtype]
    dit = backbone.load(args.backbone, dtype, context.device, args.expert)
    require_fit(data, dit, args.data)
    lora_files.attach(dit.model, loaded)
    network = network_of(dit, context.device)
    draws = table_of(rows, levels, args.eval_levels, args.eval_noises)
    rank, world = context.rank, context.world_size
    with lora.at_strength(dit.model, args.strength):
        first = int(dit.image_to_video)
        measured = measure(data, draws, network, args.eval_batch_size, None, first, context.is_main, (rank, world))
    figures = figures_of(run_setup.gathered(measured, world))
    if not context.is_main:
        return 0
    print(format_figures(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(to_json(figures), indent=1) + "\n", encoding="utf-8")
    return 0


def network_of(dit: backbone.TunableDit, device: torch.device, autocast: Callable | None = None) -> Network:
    """A tuned transformer whose adapter can be switched off. autocast: a context for every forward, None for none."""

    def velocity(x, sigma, text, bias, image):
        with nullcontext() if autocast is None else autocast():
            return backbone.velocity(dit.model, x, sigma, text, bias, image)

    return Network(velocity, lambda: lora.without_adapter(dit.model), lambda: lora.change_norm(dit.model), device)


def require_fit(data: PairData, dit: backbone.TunableDit, folder: str) -> None:
    """Raises DpoDataError where the latents are not of the model's latent space, or it needs an image."""
    channels = dit.model.config.out_channels
    if data.space.channels != channels:
        raise DpoDataError(
            f"{folder}: holds '{data.space.id}' latents of {data.space.channels} channels, and {dit.name} makes {channels}; "
            "give the model that the pairs were made with"
        )
    width = next(iter(data.texts.values())).shape[1]
    if width != dit.model.config.text_dim:
        raise DpoDataError(
            f"{folder}: holds prompts embedded to {width} numbers, and {dit.name} takes {dit.model.config.text_dim}; embed "
            "them with the model's own text encoder"
        )
    if dit.model.config.added_kv_proj_dim is not None:
        raise DpoDataError(
            f"{dit.name}: takes CLIP's embedding of an image, which {folder} does not hold; tune Wan 2.2's image-to-video "
            "model, which takes the image's latent alone, or a text-to-video model"
        )
    extra = dit.model.config.in_channels - channels
    with_image = all(row.image is not None for row in data.rows)
    if extra and (extra != IMAGE_MASK + channels or not with_image):
        raise DpoDataError(
            f"{dit.name}: takes {extra} input channels of an image, which {folder} does not hold; run `python -m trainers.dpo "
            "cache` with --image_to_video"
        )
    if not extra and any(row.image is not None for row in data.rows):
        raise DpoDataError(f"{folder}: is for image-to-video models, and {dit.name} takes no image; give another --backbone")


def table_of(rows: Sequence[PairRow], levels: NoiseLevels, count: int, noises: int, crop: int = 0) -> list[Draw]:
    """Each pair at `count` noise levels, each with `noises` noises, the same in every evaluation."""
    sigmas = levels.fixed(count).tolist()
    return [
        Draw(row, sigma, seed_of(0, f"held out {row.key} {i} {j}"), 0, min(crop, row.shape[1]) if crop else row.shape[1],
             i * noises + j)
        for row in rows for i, sigma in enumerate(sigmas) for j in range(noises)
    ]  # fmt: skip


@torch.no_grad()
def measure(
    data: PairData, draws: Sequence[Draw], network: Network, batch: int, table=None, first: int = 0, shown: bool = True,
    share: tuple[int, int] = (0, 1),
) -> list[dict]:  # fmt: skip
    """A row {pair, prompt, sigma, d, winner, loser, reference_winner, reference_loser, dynamics} for every draw.

    table: a ReferenceTable where the network has no reference of its own; share: (rank, world), to measure a part only.
    """
    objective = DpoObjective(data, None, network, PreferenceLoss(), None, batch=batch, table=table, first=first)
    groups = by_shape(draws, batch)[share[0] :: share[1]]
    rows = []
    with Bar("measuring held-out pairs", len(groups), "batch", shown) as bar:
        for group in groups:
            pair = noisy_pair(data, group, network.device, first)
            velocity = objective.velocity_of(group)
            reference = objective.reference_of(group, pair, velocity)
            found = split_step.measure(velocity, pair, reference, 1.0, PreferenceLoss())
            for i, draw in enumerate(group):
                values = {
                    "d": found.difference, "winner": found.winner, "loser": found.loser, "motion": found.motion,
                    "reference_winner": found.reference_winner, "reference_loser": found.reference_loser,
                    "reference_motion": found.reference_motion,
                }  # fmt: skip
                row = {"pair": draw.row.key, "prompt": draw.row.prompt, "sigma": draw.sigma}
                rows.append(row | {k: float(v[i]) for k, v in values.items()})
            bar.add()
    return rows


def figures_of(rows: Sequence[dict]) -> dict:
    """{accuracy: Interval over prompts; winner, loser: Intervals of the error's change; relative changes; dynamics: ratio;
    by_sigma: rows; pairs, prompts} of what `measure` returned.
    """
    pairs = defaultdict(list)
    for row in rows:
        pairs[row["pair"]].append(row)
    prompts = defaultdict(list)
    for found in pairs.values():
        d = _mean(found, "d")
        prompts[found[0]["prompt"]].append(1.0 if d > 0 else 0.5 if d == 0 else 0.0)
    by_sigma = []
    for sigma in sorted({row["sigma"] for row in rows}):
        at = [row for row in rows if row["sigma"] == sigma]
        right = [1.0 if r["d"] > 0 else 0.5 if r["d"] == 0 else 0.0 for r in at]
        change = {side: _change(at, side) for side in ("winner", "loser")}
        by_sigma.append({"sigma": sigma, "accuracy": sum(right) / len(right)} | change)
    moving = sum(r["reference_motion"] for r in rows)
    return {
        "accuracy": intervals.share(sum(sum(v) / len(v) for v in prompts.values()), len(prompts)),
        "winner": _by_prompt(rows, "winner"), "loser": _by_prompt(rows, "loser"),
        "winner_relative": _change(rows, "winner") / _mean(rows, "reference_winner"),
        "loser_relative": _change(rows, "loser") / _mean(rows, "reference_loser"),
        "dynamics": sum(r["motion"] for r in rows) / moving if moving else None,
        "by_sigma": by_sigma, "pairs": len(pairs), "prompts": len(prompts),
    }  # fmt: skip


def to_json(figures: dict) -> dict:
    """The figures with intervals as objects."""
    return {k: v.to_json() if isinstance(v, Interval) else v for k, v in figures.items()}


def format_figures(figures: dict) -> str:
    """The figures as text."""
    a, w, l = figures["accuracy"], figures["winner"], figures["loser"]
    lines = [
        f"held-out pairs: {figures['pairs']} of {figures['prompts']} prompts",
        f"  implicit accuracy        {a.mean:.3f} (95 % interval {a.low:.3f} to {a.high:.3f})",
        f"  change of winners' error {w.mean:+.5f} ({w.low:+.5f} to {w.high:+.5f}), {100 * figures['winner_relative']:+.2f} %",
        f"  change of losers' error  {l.mean:+.5f} ({l.low:+.5f} to {l.high:+.5f}), {100 * figures['loser_relative']:+.2f} %",
    ]
    if figures["dynamics"] is not None:
        lines.append(f"  motion of predictions    {figures['dynamics']:.3f} of the reference's")
    lines.append("  sigma   accuracy   winners' error   losers' error")
    for r in figures["by_sigma"]:
        lines.append(f"  {r['sigma']:.3f}   {r['accuracy']:.3f}      {r['winner']:+.5f}         {r['loser']:+.5f}")
    return "\n".join(lines)


def _held_out(data: PairData, record: dict, args) -> list[PairRow]:
    share = args.held_out if args.held_out is not None else record.get("held_out")
    seed = args.seed if args.seed is not None else record.get("seed")
    if share is None or seed is None:
        raise DpoDataError(
            f"{args.lora}: its header does not say which prompts were held out; give --held_out and --seed as in training, or "
            "--all to measure all pairs"
        )
    rows = dpo_data.split(data, float(share), int(seed))[1]
    if not rows:
        raise DpoDataError(f"{args.lora}: no prompt was held out (--held_out 0); give --all to measure all pairs")
    return rows


def _by_prompt(rows: Sequence[dict], side: str) -> Interval:
    found = defaultdict(list)
    for row in rows:
        found[row["prompt"]].append(row[side] - row[f"reference_{side}"])
    return intervals.mean([sum(v) / len(v) for v in found.values()])


def _change(rows: Sequence[dict], side: str) -> float:
    return _mean(rows, side) - _mean(rows, f"reference_{side}")


def _mean(rows: Sequence[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
