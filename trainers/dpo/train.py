"""Trains a LoRA, or all parameters, of a Wan model on preference pairs (Flow-DPO).

    python -m trainers.dpo train --data pairs/ --backbone wan2.1_t2v_1.3B_bf16.safetensors --output better.safetensors

A folder next to the output (--output_dir) gets checkpoints, log.jsonl with the figures of every step, validation clips,
report.json and index.html, a page that shows all of it. Look at winner_error and loser_error there, not at the accuracy alone:
a ruined model prefers winners too, while both errors grow. The run stops by itself where the winners' error rises past
--max_winner_rise, and writes the LoRA of its last healthy step.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

from ..preferences import manifest
from ..running import accelerator as accelerators
from ..running import results_log
from ..running.device import init_distributed
from ..running.loop import CheckpointOptions
from ..running.output import provenance, require_output, require_output_folder
from ..running.progress import Bar
from ..tuning import arguments as shared
from ..tuning import backbone, loop, memory_plan, run_setup, validation
from ..tuning.validation import ValidationOptions, Validator
from ..wan.prompts import read_prompts, text_id
from . import arguments, evaluate, report
from . import data as dpo_data
from .data import DpoDataError, PairData, PairRow
from .draws import Draw, Draws, noisy_pair
from .objective import DpoObjective, Network
from .reference_table import ReferenceTable

LOG = "log.jsonl"
# Of held-out pairs measured at the end.
MOST_HELD_OUT = 200


def add_arguments(parser) -> None:
    arguments.add(parser)


def run(args) -> int:
    arguments.check(args)
    context = init_distributed(args.device)
    try:
        return _train(args, context)
    finally:
        context.close()


def _train(args, context) -> int:
    output = Path(args.output)
    if not args.dry_run:
        require_output(output, args.overwrite)
    work = Path(args.output_dir) if args.output_dir else output.with_suffix(".checkpoints")
    if not args.dry_run:
        require_output_folder(work)
    data = dpo_data.load(args.data)
    fit, held_out = dpo_data.split(data, args.held_out, args.seed)
    levels, settings, loss = evaluate.levels_of(args), shared.settings_of(args), arguments.loss_of(args)
    plan = run_setup.plan_of(args, _largest(args, data))
    if args.dry_run:
        print(memory_plan.format_plan(plan))
        return 0
    memory_plan.require_fits(plan, args.memory_limit_gb, context.device)
    dit = backbone.load(args.backbone, shared.dtype_of(args), context.device, args.expert)
    evaluate.require_fit(data, dit, args.data)
    parameters = run_setup.parameters_of(args, dit)
    accelerator = accelerators.accelerator_of(args, context, work)
    network = _network(args, dit, parameters, accelerator, context.device)
    first = int(dit.image_to_video if args.mask_first_frame is None else args.mask_first_frame)
    count = args.train_batch_size * args.gradient_accumulation_steps * context.world_size
    slots = args.cache_size or (8 if args.cached_reference or args.full else 0)
    draws = Draws(fit, levels, args.seed, count, args.crop_frames, bool(first) or dit.image_to_video, slots)
    if min(r.shape[1] for r in data.rows) <= first:
        raise DpoDataError(f"{args.data}: has clips of one latent frame, which --mask_first_frame leaves nothing of")
    resume = run_setup.resume_of(args, context, work)
    measured = evaluate.table_of(_some(held_out), levels, args.eval_levels, 1, args.crop_frames)
    table, held_table = _reference_tables(args, work, data, draws, measured, network, first, accelerator, dit)
    beta = arguments.beta_of(args)
    objective = DpoObjective(
        data, draws, network, loss, beta, batch=args.train_batch_size, rank=context.rank, world=context.world_size,
        table=table, first=first, max_rise=args.max_winner_rise,
    )  # fmt: skip
    described = described_of(args, fit, draws, dit, first)
    keep = CheckpointOptions(work, args.checkpointing_steps, args.checkpoints_total_limit or None, resume)
    validator = _validator(args, work, data, dit, fit, held_out, accelerator)
    accelerators.start_loggers(accelerator, args, "dpo")
    held_rows: list[dict] = []
    clips: list[dict] = []

    def held_out_figures() -> dict | None:
        if not measured:
            return None
        rank, world = context.rank, context.world_size
        rows = evaluate.measure(
            data, measured, network, args.train_batch_size, held_table, first, context.is_main, (rank, world)
        )
        return evaluate.figures_of(run_setup.gathered(rows, world))

    def also(step: int, figures: dict) -> None:
        """Held-out figures and validation clips that are due."""
        if args.eval_steps and step % args.eval_steps == 0 and measured:
            found = held_out_figures()
            held_rows.append({"step": step} | evaluate.to_json(found))
            figures["held_out/accuracy"], figures["held_out/winner_error"] = found["accuracy"].mean, found["winner"].mean
            figures["held_out/loser_error"] = found["loser"].mean
        if validator and (step % args.validation_steps == 0 or step == settings.steps):
            rows = validator.run(step)
            clips.extend(rows)
            figures.update(validation.means(rows))

    with Bar("training", settings.steps, "step", context.is_main) as bar:

        def started(step: int) -> None:
            if context.is_main:
                work.mkdir(parents=True, exist_ok=True)
                results_log.write(work / LOG, [r for r in results_log.read(work / LOG) if r["step"] <= step])
            if validator:
                validator.prepare(step)
                clips.extend(validator.run(0))

        def stepped(step: int, figures: dict) -> None:
            also(step, figures)
            if not context.is_main:
                return
            shown = {"loss": f"{figures['loss']:.4f}", "accuracy": f"{figures['rewards/accuracies']:.2f}"}
            bar.reach(step, shown)
            with results_log.Log(work / LOG) as log:
                log.add({"step": step} | results_log.plain(figures))
            accelerators.log(accelerator, args, step, figures)

        outcome = loop.train(accelerator, parameters, objective, settings, described, keep, stepped, started)
    found = held_out_figures()
    accelerators.finish_loggers(accelerator, args)
    if not context.is_main:
        return 0
    record = _record(args, fit, held_out, draws, levels, outcome, found)
    wrote = not (outcome.stopped and outcome.healthy_step == 0)
    if wrote:
        run_setup.save(args, output, dit, record)
    figures = {"outcome": vars(outcome), "held_out": found and evaluate.to_json(found), "held_out_over_steps": held_rows}
    notes = {"record": record, "provenance": provenance(args.argv, "trainers.dpo"), "clips": clips}
    manifest.write_report(work / "report.json", results_log.plain(figures | notes))
    report.write_page(work, output.stem, outcome, found, held_rows, clips, record)
    for line in _closing(args, output, work, outcome, found, wrote):
        print(line)
    return 0 if wrote else 1


def described_of(args, fit: list[PairRow], draws: Draws, dit: backbone.TunableDit, first: int) -> dict:
    """All that decides the result, apart from the loop's settings; how pairs are split over processes does not."""
    names = (
        "loss", "beta", "beta_factor", "beta_min", "beta_max", "label_smoothing", "sft_weight", "winner_anchor",
        "reference_anchor", "static_penalty", "max_winner_rise", "seed", "base_dtype", "mixed_precision",
    )  # fmt: skip
    lora_names = () if args.full else ("rank", "lora_alpha", "targets", "lora_dropout")
    levels = draws.levels
    return {name: getattr(args, name) for name in (*names, *lora_names)} | {
        "pairs_per_step": draws.count, "crop_frames": draws.crop, "cache_size": draws.slots, "masked_frames": first,
        "noise_levels": [levels.kind, levels.shift, levels.low, levels.high, list(levels.levels)],
        "data": dpo_data.rows_digest(fit), "backbone": dit.backbone.fingerprint, "full": args.full,
    }  # fmt: skip


def _largest(args, data: PairData) -> tuple[int, ...]:
    """[C, T, h, w] of the largest latents that a step takes."""
    latent = max((r.shape for r in data.rows), key=math.prod)
    return (latent[0], min(args.crop_frames, latent[1]), *latent[2:]) if args.crop_frames else latent


def _network(args, dit, parameters, accelerator, device) -> Network:
    autocast = accelerator.autocast if args.mixed_precision != "no" else None
    made = evaluate.network_of(dit, device, autocast)
    if not args.full:
        return made
    return replace(made, reference=None, change=run_setup.change_norm_of(args, dit, parameters))


def _some(rows: list[PairRow]) -> list[PairRow]:
    """At most MOST_HELD_OUT of the held-out rows, evenly spread."""
    return rows if len(rows) <= MOST_HELD_OUT else [rows[i * len(rows) // MOST_HELD_OUT] for i in range(MOST_HELD_OUT)]


def _reference_tables(args, work, data, draws: Draws, measured: list[Draw], network, first, accelerator, dit):
    """(of the training's draws, of the held-out ones), each None where the reference is at hand."""
    if not (args.cached_reference or args.full):
        return None, None
    objective = DpoObjective(data, draws, network, arguments.loss_of(args), None, first=first)
    levels = draws.levels
    common = {
        "backbone": dit.backbone.fingerprint, "dtype": args.base_dtype, "mixed": args.mixed_precision, "first": first,
        "crop": args.crop_frames, "levels": [levels.kind, levels.shift, levels.low, levels.high, list(levels.levels)],
    }  # fmt: skip
    kinds = [({"seed": args.seed, "slots": draws.slots}, draws.entries(args.max_train_steps))]
    kinds += [({"held_out": args.eval_levels}, measured)] if args.full else []
    tables = []
    for more, wanted in kinds:
        table = ReferenceTable(work, common | more)
        # On a resume, a full model's parameters are still those of the file here: the checkpoint is loaded later.
        with network.reference() if network.reference else torch.no_grad():
            table.fill(
                wanted, lambda d: noisy_pair(data, [d], network.device, first), lambda d: objective.velocity_of([d]),
                accelerator,
            )  # fmt: skip
        tables.append(table)
    return tables[0], tables[1] if args.full else None


def _validator(args, work, data: PairData, dit, fit, held_out, accelerator) -> Validator | None:
    if not args.validation_steps:
        return None
    if dit.image_to_video:
        raise DpoDataError(
            f"{dit.name}: validation clips of image-to-video models are not sampled here; leave out --validation_steps and "
            "compare with the LoRA in ComfyUI"
        )
    known = data.prompts
    if args.validation_prompts:
        names = {text_id(p): p for p in read_prompts(args.validation_prompts)}
        prompts = tuple(names)
    else:
        prompts = tuple(dict.fromkeys(r.prompt for r in held_out or fit))[:4]
        names = {p: known.get(p, p) for p in prompts}
    shape = data.rows[0].shape
    if args.validation_size:
        width, height, frames = args.validation_size
        stride = data.space.spatial_stride
        shape = (shape[0], 1 + (frames - 1) // data.space.temporal_stride, height // stride, width // stride)
    options = ValidationOptions(
        prompts, names, tuple(args.validation_seeds), shape, args.validation_sampling_steps, args.shift, args.validation_cfg,
        rewards=tuple(args.validation_rewards), vae=args.vae, vae_dtype=args.vae_dtype, tiling=args.tiling,
        manifold=args.manifold, device=args.device,
    )  # fmt: skip
    negative = data.texts.get(text_id(args.negative_prompt))
    return Validator(work / "validation", dit, data.texts, negative, data.space, options, accelerator, not args.full)


def _record(args, fit, held_out, draws: Draws, levels, outcome, found) -> dict:
    """The training record of the output's header: no paths, no prompts."""
    names = (
        "loss", "beta", "beta_min", "beta_max", "label_smoothing", "sft_weight", "winner_anchor", "reference_anchor",
        "static_penalty", "learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer", "seed", "held_out", "base_dtype",
        "mixed_precision",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names} | {
        "trainer": "dpo", "steps": outcome.healthy_step if outcome.stopped else outcome.steps, "skipped": outcome.skipped,
        "stopped": outcome.stopped, "pairs": len(fit), "prompts": len({r.prompt for r in fit}),
        "held_out_pairs": len(held_out), "pairs_per_step": draws.count, "crop_frames": draws.crop,
        "noise_levels": [levels.kind, levels.shift, levels.low, levels.high, *levels.levels],
        "figures": results_log.plain(outcome.figures), "metrics": found and results_log.plain(evaluate.to_json(found)),
        "command": provenance(args.argv, "trainers.dpo")["command"],
    }  # fmt: skip


def _closing(args, output: Path, work: Path, outcome, found, wrote: bool) -> list[str]:
    lines = [outcome.stopped] if outcome.stopped else []
    if not wrote:
        lines.append("no step was healthy, so no output was written")
    else:
        size = "the model" if args.full else f"a LoRA of rank {args.rank}"
        lines.append(f"wrote {output}: {size}, of step {outcome.healthy_step if outcome.stopped else outcome.steps}")
    if outcome.skipped:
        lines.append(f"{outcome.skipped} steps were skipped: their loss or gradient was not finite")
    if found:
        lines.append(evaluate.format_figures(found))
    lines.append(f"{work / report.PAGE}: curves and clips; {work / LOG}: figures of every step")
    return lines
