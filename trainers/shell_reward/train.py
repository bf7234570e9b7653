"""Trains a LoRA, or all parameters, of a Wan model with the Shell-LCC reward of its one-step predictions.

    python -m trainers.shell_reward train --backbone wan2.1_t2v_1.3B_bf16.safetensors --manifold wan21.safetensors \\
        --embeddings prompts.safetensors --output detail.safetensors

The model is given pure noise and called at noise levels from .7 to 1; x0 = x - sigma v is brought into the manifold's
calibrated band: tokens outside are moved towards it, from both sides, tokens inside are left alone. --objective distance and
mean_tau are the published ones. The published recipe (1e-5, batch 8) peaks after 80 to 100 steps at 1.3B and after about 20 at
14B; going on ruins the clips. So held-out clips are measured every --validation_steps, and the run ends when they violate the
band no less than before, or when their detail shows over-optimisation. The parameters of the best step are written. Keep the
alarm on: clips far from the shell, as a few steps with much guidance make them, violate the band less and less while they are
ruined; clips that begin on the shell show it in the violation, too.

A folder next to the output (--output_dir) gets checkpoints, log.jsonl with the figures of every step, validation clips,
report.json and index.html, a page that shows all of it.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ..kernels.shell_lcc import manifold as manifolds
from ..kernels.tuning import shell_objective as shell
from ..kernels.tuning.shell_objective import SigmaTargets
from ..latents.read import list_clips, read_clip, shape_of
from ..preferences import manifest
from ..running import accelerator as accelerators
from ..running import checkpoint, results_log
from ..running.device import init_distributed
from ..running.loop import CheckpointOptions
from ..running.output import provenance, require_output, require_output_folder
from ..running.progress import Bar
from ..tuning import arguments as shared
from ..tuning import backbone, loop, lora, memory_plan, run_setup
from ..tuning.memory_plan import MemoryPlan
from ..tuning.validation import ValidationOptions, Validator
from ..wan.prompts import text_id
from . import arguments, held_out, material, report
from .arguments import PER_SIGMA
from .best import BestParameters
from .draws import NOISED, Draws, seed_of, table_of
from .material import Material, ShellRewardError
from .objective import ShellObjective, ShellSettings, Stopping
from .predict import Network, OneStep

LOG, RADIUS = "log.jsonl", "radius.json"
# One-step predictions that a measurement takes with --criterion predictions, by noise level.
PREDICTION_LEVELS, PREDICTION_NOISES = 3, 8


def add_arguments(parser) -> None:
    arguments.add_train(parser)


def run(args) -> int:
    arguments.check_train(args)
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
    manifold = manifolds.load(args.manifold, context.device)
    settings, levels = shared.settings_of(args), arguments.levels_of(args)
    shape = _shape(args, manifold)
    plan = _plan(args, shape, manifold)
    if args.dry_run:
        print(memory_plan.format_plan(plan))
        return 0
    memory_plan.require_fits(plan, args.memory_limit_gb, context.device)
    _require_calibration(args, manifold)
    found = material.load(args, manifold.space, work, context, args.held_out, args.seed)
    dit = backbone.load(args.backbone, shared.dtype_of(args), context.device, args.expert)
    material.require_fit(manifold, dit, args.manifold, found.texts)
    parameters = run_setup.parameters_of(args, dit)
    accelerator = accelerators.accelerator_of(args, context, work)
    network = _network(args, dit, parameters, accelerator, context.device)
    resume = run_setup.resume_of(args, context, work)
    start = _step_of(resume)
    one_step = OneStep(network, found.texts, shape, found.latents)
    targets = _targets(args, work, found, one_step, manifold, levels, dit, context)
    draws = Draws(
        found.items(args.start == NOISED), levels, args.seed,
        args.train_batch_size * args.gradient_accumulation_steps * context.world_size,
    )  # fmt: skip
    if not draws.items:
        raise ShellRewardError("--held_out leaves no clip to train on; give more clips or a smaller share")
    best = BestParameters(work, parameters, context.is_main)
    validator = _validator(args, work, found, dit, shape, manifold, accelerator)
    clips: list[dict] = []
    shell_settings = ShellSettings(args.objective, targets, args.anchor_weight, args.anchor_margin)
    measure = _measure(args, found, one_step, manifold, shell_settings, validator, clips, levels, dit, context)
    if validator:
        validator.prepare(start)
    # The LoRA is still zero, and the parameters those of the file: this is the base, in a resumed run, too.
    base = measure(0) if measure else []
    objective = ShellObjective(
        manifold, shell_settings, draws, one_step, batch=args.train_batch_size, rank=context.rank, world=context.world_size,
        measure=measure, base=base,
        stopping=Stopping(args.validation_steps, args.patience, args.alarm, settings.steps), keep=best.keep,
    )  # fmt: skip
    described = _described(args, found, draws, dit, shape, manifold, targets)
    keep = CheckpointOptions(work, args.checkpointing_steps, args.checkpoints_total_limit or None, resume)
    accelerators.start_loggers(accelerator, args, "shell_reward")
    with Bar("training", settings.steps, "step", context.is_main) as bar:

        def started(step: int) -> None:
            if context.is_main:
                work.mkdir(parents=True, exist_ok=True)
                best.remove_after(step)
                results_log.write(work / LOG, [r for r in results_log.read(work / LOG) if r["step"] <= step])

        def stepped(step: int, figures: dict) -> None:
            if not context.is_main:
                return
            bar.reach(step, {"loss": f"{figures['loss']:.4f}", "distance": f"{figures['distance']:.3f}"})
            with results_log.Log(work / LOG) as log:
                log.add({"step": step} | results_log.plain(figures))
            accelerators.log(accelerator, args, step, figures)

        outcome = loop.train(accelerator, parameters, objective, settings, described, keep, stepped, started)
    accelerators.finish_loggers(accelerator, args)
    written = outcome.steps
    if measure:
        written = objective.best.step
        if written:
            best.restore(written)
            if validator:
                clips += _final_clips(validator, written, args)
    if not context.is_main:
        return 0
    record = _record(args, found, draws, shape, manifold, objective, outcome, written)
    if written:
        run_setup.save(args, output, dit, record)
    result = report.Result(outcome, objective.best.rows, objective.alarms, written, bool(measure))
    notes = {"record": record, "provenance": provenance(args.argv, "trainers.shell_reward"), "clips": clips}
    manifest.write_report(work / "report.json", results_log.plain(result.to_json() | notes))
    report.write_page(work, output.stem, result, clips, record)
    for line in _closing(args, output, work, result):
        print(line)
    return 0 if written else 1


def _shape(args, manifold) -> tuple[int, ...]:
    """[C, T, h, w] of what is trained on. Raises ShellRewardError for clips of several sizes."""
    if args.start != NOISED:
        return material.shape_of(args, manifold.space)
    refs = list_clips(args.latents, manifold.space)
    shapes = {}
    for ref in refs:
        shapes.setdefault(tuple(shape_of(ref)) if ref.path.suffix == ".safetensors" else None, ref)
    if None in shapes:
        raise ShellRewardError(f"{shapes[None].path}: has no captions; --latents need shards with captions")
    if len(shapes) > 1:
        (a, one), (b, other) = list(shapes.items())[:2]
        raise ShellRewardError(f"{one.path} has clips of {list(a)} and {other.path} of {list(b)}; give clips of one size")
    return next(iter(shapes))


def _plan(args, shape, manifold) -> MemoryPlan:
    """The plan of a step, with the manifold."""
    plan = run_setup.plan_of(args, shape)
    size = sum(t.numel() * t.element_size() for t in manifold.coder.state_dict().values())
    tokens = args.train_batch_size * math.prod(shape[1:])
    chunk = min(tokens, manifold.coder.chunk_tokens(manifold.device))
    bases = manifold.coder.config()["num_bases"]
    # Tokens, their gradient and the distances, and two buffers of a chunk's scores.
    return MemoryPlan((*plan.rows, ("manifold", size + 4 * tokens * (3 * shape[0] + 1) + 8 * chunk * bases)))


def _require_calibration(args, manifold) -> None:
    """Raises UncalibratedError before the model is read."""
    if args.objective != shell.DISTANCE and args.radius != PER_SIGMA:
        manifold.calibrated(f"--objective {args.objective}")
    if args.validation_steps:
        manifold.calibrated("the band of held-out clips (--validation_steps 0 does without)")


def _network(args, dit, parameters, accelerator, device) -> Network:
    mixed = args.mixed_precision != "no"

    def velocity(x, sigma, text, bias):
        with accelerator.autocast() if mixed else nullcontext():
            return backbone.velocity(dit.model, x, sigma, text, bias)

    reference = None if args.full else lambda: lora.without_adapter(dit.model)
    return Network(velocity, reference, run_setup.change_norm_of(args, dit, parameters), device)


def _targets(args, work: Path, found: Material, one_step: OneStep, manifold, levels, dit, context) -> SigmaTargets | None:
    """The base's own band at each noise level: measured now, or read from the run's folder."""
    if args.radius != PER_SIGMA:
        return None
    items = [(c, k) for k, c in found.captions.items()] if args.latents else [(p, None) for p in found.fit]
    key = {
        "backbone": dit.backbone.fingerprint, "base_dtype": args.base_dtype, "seed": args.seed, "shape": list(one_step.shape),
        "levels": [levels.low, levels.high, args.radius_bins], "predictions": args.radius_predictions,
        "items": seed_of(0, repr(items)), "manifold": _digest(manifold),
    }  # fmt: skip
    path = work / RADIUS
    stored = _read_json(path)
    if stored is not None and stored.get("key") == key:
        return SigmaTargets.from_json(stored["table"])
    sigmas, per = [float(s) for s in levels.fixed(args.radius_bins)], args.radius_predictions
    draws = table_of(items, sigmas, per, args.seed, "radius")
    predictions = one_step.each(draws, "measuring the radius", context.is_main)
    maps = [manifold.distance(x0)[0].cpu() for x0, _ in predictions]
    table = SigmaTargets.measured(sigmas, [maps[i * per : (i + 1) * per] for i in range(len(sigmas))])
    if context.is_main:
        work.mkdir(parents=True, exist_ok=True)
        manifest.write_report(path, {"key": key, "table": table.to_json()})
    return table


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _validator(args, work, found: Material, dit, shape, manifold, accelerator) -> Validator | None:
    if not args.validation_steps or args.criterion != held_out.SAMPLES:
        return None
    options = ValidationOptions(
        found.measured, found.names, tuple(args.validation_seeds), shape, args.validation_sampling_steps, args.shift,
        args.validation_cfg, (0.0, 1.0), tuple(args.validation_rewards), args.vae, args.vae_dtype, args.tiling, args.manifold,
        args.device,
    )  # fmt: skip
    negative = found.texts.get(text_id(args.negative_prompt))
    return Validator(work / "validation", dit, found.texts, negative, manifold.space, options, accelerator, not args.full)


def _measure(args, found: Material, one_step: OneStep, manifold, settings, validator, clips: list[dict], levels, dit, context):
    """step -> rows of held_out.figures_of, the same on every process; None without measurements."""
    if not args.validation_steps:
        return None
    if validator:
        return lambda step: _of_samples(validator, step, manifold, clips, context)
    sigmas, prompts = [float(s) for s in levels.fixed(PREDICTION_LEVELS)], set(found.measured)
    items = [(c, k) for k, c in found.captions.items() if c in prompts] if args.start == NOISED else []
    draws = table_of(items or [(p, None) for p in found.measured], sigmas, PREDICTION_NOISES, args.seed, "held out")
    mine = range(context.rank, len(draws), context.world_size)

    def measured(step: int) -> list[dict]:
        rows = []
        # Without dropout.
        with nullcontext() if args.full else lora.at_strength(dit.model, 1.0):
            predictions = one_step.each([draws[i] for i in mine], f"measuring step {step}", context.is_main)
            for i, (x0, sigma) in zip(mine, predictions, strict=True):
                rows.append(held_out.figures_of(f"{i:03d}", x0[0], manifold, settings.target(manifold, sigma)))
        return sorted(run_setup.gathered(rows, context.world_size), key=lambda r: r["name"])

    return measured


def _of_samples(validator: Validator, step: int, manifold, clips: list[dict], context) -> list[dict]:
    """Rows of the clips of a step, which the validator samples."""
    found = validator.run(step)
    rows = []
    if context.is_main:
        clips.extend(r for r in found if r not in clips)
        target = shell.target_of([manifold.calibrated("the band of held-out clips")])
        for clip in validator.clips(step):
            if clip.strength in (0, 1):
                (ref,) = list_clips([validator.folder / f"step-{step}" / f"{clip.name}.safetensors"], manifold.space)
                rows.append(held_out.figures_of(f"{clip.prompt} {clip.seed}", read_clip(ref), manifold, target))
    if context.world_size == 1:
        return rows
    from accelerate.utils import broadcast_object_list

    box = [rows]
    broadcast_object_list(box)
    return box[0]


def _final_clips(validator: Validator, step: int, args) -> list[dict]:
    """Clips of the best step at strength 0.5 as well, for the page."""
    if args.full:
        return []
    validator.options = replace(validator.options, strengths=(0.0, 0.5, 1.0))
    return [r for r in validator.run(step) if r["strength"] == 0.5]


def _described(args, found: Material, draws: Draws, dit, shape, manifold, targets) -> dict:
    """All that decides the result, apart from the loop's settings; how items are split over processes does not."""
    names = (
        "objective", "radius", "anchor_weight", "anchor_margin", "start", "seed", "base_dtype", "mixed_precision", "criterion",
        "validation_steps", "validation_seeds", "validation_sampling_steps", "validation_cfg", "shift", "patience", "alarm",
        "held_out",
    )  # fmt: skip
    lora_names = () if args.full else ("rank", "lora_alpha", "targets", "lora_dropout")
    return {name: getattr(args, name) for name in (*names, *lora_names)} | {
        "items_per_step": draws.count, "noise_levels": [draws.levels.low, draws.levels.high], "shape": list(shape),
        "items": seed_of(0, repr(list(draws.items))), "measured": list(found.measured), "manifold": _digest(manifold),
        "targets": None if targets is None else seed_of(0, repr(targets.to_json())), "backbone": dit.backbone.fingerprint,
        "full": args.full,
    }  # fmt: skip


def _digest(manifold) -> str:
    """Of the coder's tensors and the calibration."""
    tensors = dict(manifold.coder.state_dict())
    if manifold.calibration is not None:
        tensors["calibration"] = manifold.calibration.token_quantiles
    found = {k: checkpoint.tensor_digest(v.cpu()) for k, v in sorted(tensors.items())}
    return f"{seed_of(0, repr(found)):x}"


def _step_of(resume: Path | None) -> int:
    match = checkpoint.NAME.fullmatch(resume.name) if resume else None
    return int(match[1]) if match else 0


def _record(args, found: Material, draws: Draws, shape, manifold, objective, outcome, written: int) -> dict:
    """The training record of the output's header: no paths, no prompts."""
    names = (
        "objective", "radius", "anchor_weight", "start", "learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer",
        "seed", "held_out", "base_dtype", "mixed_precision", "criterion", "validation_steps", "patience", "alarm", "shift",
    )  # fmt: skip
    best = next((r for r in objective.best.rows if r["step"] == written), None)
    return {name: getattr(args, name) for name in names} | {
        "trainer": "shell_reward", "steps": written, "steps_done": outcome.steps, "skipped": outcome.skipped,
        "stopped": outcome.stopped, "prompts": len(found.fit), "held_out_prompts": len(found.held_out),
        "items_per_step": draws.count, "noise_levels": [draws.levels.low, draws.levels.high], "shape": list(shape),
        "manifold": manifold.name, "radius_of_the_file": manifold.radius, "figures": results_log.plain(outcome.figures),
        "metrics": results_log.plain({"base": objective.best.rows[0], "best": best}) if objective.best.rows else None,
        "command": provenance(args.argv, "trainers.shell_reward")["command"],
    }  # fmt: skip


def _closing(args, output: Path, work: Path, result: report.Result) -> list[str]:
    lines = [result.outcome.stopped] if result.outcome.stopped else []
    if result.written:
        size = "the model" if args.full else f"a LoRA of rank {args.rank}"
        lines.append(f"wrote {output}: {size}, of step {result.written}")
    else:
        lines.append("no measured step was better than the base, so no output was written; try a lower --learning_rate")
    if result.outcome.skipped:
        lines.append(f"{result.outcome.skipped} steps were skipped: their loss or gradient was not finite")
    lines += report.lines(result)
    lines.append(f"{work / report.PAGE}: curves and clips; {work / LOG}: figures of every step")
    return lines
