"""Measures Shell-LCC guidance and PRISM search in the toy world and writes a report: markdown, JSON and plots.

    python -m benchmarks.toy_world.report [--clips 64] [--output_dir outputs/toy_world/report]

Uses the committed weights on a CPU. Results of batches are kept in the output folder, so an interrupted run can be resumed and
more --clips add to it. Every comparison is with no intervention, with a random one of the same size and with the released
method's own objective, over the same prompts and seeds; intervals are 95%.
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.command_line import make_parser
from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.shell_lcc import manifold as manifolds
from trainers.latents.read import list_clips, read_clip
from trainers.running.identity import file_digest
from trainers.shell_lcc import cli as shell_lcc

from . import candidates, jobs, judge, pipeline, plots, prism_rows, shell_lcc_rows, stack_rows, weights
from .guidance import SigmaTable, fit_patch_manifold
from .pipeline import CFG, SHIFT, STEPS, sigmas

HELD_OUT = 0.25
TABLE_CLIPS = 32
PATCH_ANCHORS = 1024


def fit(files: jobs.Files) -> None:
    """Fits the manifold with the command that users run."""
    if files.manifold.exists():
        return
    command = ["fit", "--latents", files.latents, "--output", files.manifold, "--held_out", HELD_OUT]
    code = shell_lcc.main([str(a) for a in command])
    if code:
        raise SystemExit(code)


def fit_patches(files: jobs.Files) -> None:
    """Fits the manifold of 2x2 squares on the same clips."""
    if files.patches.exists():
        return
    manifold = manifolds.load(files.manifold)
    names = set(manifold.provenance["held_out_clips"])
    sides = {True: [], False: []}
    for ref in list_clips([files.latents], manifold.space):
        sides[ref.clip_id in names].append(read_clip(ref))
    manifolds.save(fit_patch_manifold(torch.stack(sides[False]), torch.stack(sides[True]), 2, PATCH_ANCHORS), files.patches)


def calibrate_predictions(files: jobs.Files, folder: Path, processes: int) -> SigmaTable:
    """Calibrates the shell at each sampling sigma on the model's predictions for held-out latents noised to it."""
    plan = shell_lcc_rows.sigma_table_jobs(TABLE_CLIPS)
    found = jobs.gather(jobs.run(plan, files, folder, processes, "predictions for real latents"), plan)
    table = SigmaTable.of_distances(sigmas(STEPS, SHIFT)[:-1], found["distance"].transpose(0, 1))
    table.save(files.table)
    return table


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


INTRODUCTION = """# Measurements in the toy world

`python -m benchmarks.toy_world.report --clips {clips}{extra}`: {clips} clips of each kind, {steps} Euler steps, cfg {cfg:g},
shift {shift:g}. Figures are the mean ± half of the 95% interval.

## The stack

PSNR of reconstructions {psnr:.2f} dB; per frame {per_frame}.
"""
SHELL_LCC = """## Shell-LCC guidance

{clips} held-out prompts, one seed each, the same in every row. Laplacian variance and high-frequency share are relative to
the VAE's reconstruction of a render of the same scene. The Frechet distance is taken to other renders of the same captions
("to rec.": to their reconstructions), in the judge's features and measured figures, each in units of its standard deviation
there, with its bias removed by a jackknife. change: relative norm of the difference from the latent without guidance.
"""
REFINED = """## Shell-LCC refinement of damaged latents

Latents of {refine_clips} renders of the same prompts, damaged, then corrected once (trust 20 %).
"""
SIGMAS = """Shell of the model's own predictions for held-out latents noised to sigma (that of the latents themselves: radius
{radius:.3f}, band {low:.3f} to {high:.3f}):

| sigma | radius | band |
|---|---|---|"""


PRISM = """
## PRISM: ranking seeds at high noise

{captions} held-out captions, {count} seeds each; the oracle is the judge's overall score of the finished clip (mean of a
random seed {random:.3f}, mean spread within a caption {spread:.3f}). Accuracy: share of a caption's pairs of seeds, of those
whose oracle scores differ by more than {tie}, that the latents before a step order in the same way; the judge reads
decoded noisy latents, or decoded predictions of the clean clip, which cost a whole forward and a VAE decode each
({judged} captions, {judged_count} seeds).
"""
BEST_OF_N = """
Best-of-N over subsets of those seeds. Halving keeps half at each of sigma {halving} (and one at the last); one
early prune keeps one at sigma {early}. Full: every seed runs to the end and is scored as in PRISM Score. Cached drafts: every
seed runs under a step cache ({draft_steps:.1f} of {steps} steps are computed), and the best is sampled again without it.
Share: of the gain of full Best-of-N with the same head, omitted where the interval of that gain includes zero. Other attempts
and limits: ../README.md, Results.
"""


CLOCKED = """Timed searches of {captions} captions, N = {size}, one thread, alternating: plain {full_s:.1f} s for
{full_blocks} blocks, halving {halving_s:.1f} s for {halving_blocks}. Its time over what its blocks predict: {ratio}.
"""


def clock(files: jobs.Files) -> prism_rows.Clocked:
    """Timed searches with the query head."""
    world = pipeline.load(files.weights)
    return prism_rows.clock(world, candidates.load_heads(files.heads, files.weights / weights.DIT)["query"])


def compose_prism(figures: dict, levels: list, chosen: list, drafts: dict, clocked: prism_rows.Clocked) -> str:
    """The report's part on PRISM as markdown."""
    by_name = {(r.size, r.name): r for r in chosen}
    known = figures | {
        "count": candidates.COUNT, "random": by_name[8, "random seed"].oracle.mean, "tie": prism_rows.TIE, "steps": STEPS,
        "judged": min(figures["captions"], prism_rows.JUDGED_CAPTIONS), "judged_count": prism_rows.JUDGED_COUNT,
        "halving": ", ".join(f"{s:g}" for s in prism_rows.HALVING), "early": f"{prism_rows.EARLY[0]:g}",
        "draft_steps": float(drafts["evaluations"].double().mean()),
    }  # fmt: skip
    parts = [
        PRISM.format_map(known),
        prism_rows.accuracy_table(levels),
        BEST_OF_N.format_map(known),
        prism_rows.table(chosen) + "\n",
        CLOCKED.format_map(asdict(clocked) | {"ratio": clocked.ratio.text()}),
        "![accuracy by noise level, and gain by cost](prism.png)\n",
    ]
    return "\n".join(parts)


def compose(figures: dict, stack: list, shell: list, refined: list, sigma_table: SigmaTable) -> str:
    """The report as markdown."""
    psnr = figures["psnr_per_frame"]
    low, high = figures["band"]
    known = figures | {"steps": STEPS, "cfg": CFG, "shift": SHIFT, "psnr": sum(psnr) / len(psnr), "low": low, "high": high}
    known["extra"] = " --extra" if refined else ""
    known["refine_clips"] = shell_lcc_rows.REFINE_CLIPS
    known["per_frame"] = ", ".join(f"{v:.1f}" for v in psnr)
    levels = list(zip(sigma_table.sigmas.tolist(), sigma_table.calibrations, strict=True))
    parts = [
        INTRODUCTION.format_map(known),
        stack_rows.table(stack) + "\n",
        "![what the judge reads](stack.png)\n",
        SHELL_LCC.format_map(known),
        shell_lcc_rows.table(shell) + "\n",
        shell_lcc_rows.verdict(shell, shell_lcc_rows.DEFAULT) + "\n",
        "Other attempts and limits of guidance in this world: ../README.md, Results.\n",
        "![what guidance changes](shell_lcc.png)\n",
        "Changes against no guidance, paired by prompt and seed; bold where the interval excludes zero:\n",
        shell_lcc_rows.change_table(shell) + "\n",
        *([REFINED.format_map(known), shell_lcc_rows.refine_table(refined) + "\n"] if refined else []),
        SIGMAS.format_map(known),
        *(f"| {s:.3f} | {c.radius:.3f} | {c.band[0]:.3f} to {c.band[1]:.3f} |" for s, c in levels[::3]),
    ]
    return "\n".join(parts) + "\n"


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.report", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_world/report"))
    parser.add_argument("--clips", type=int, default=64, help="prompts of each kind, at least 32 (64)")
    parser.add_argument("--captions", type=int, default=48, help="held-out captions for PRISM, 16 seeds each (48)")
    parser.add_argument(
        "--extra", action="store_true", help="also measure manifolds of 2x2 squares and refinement of damaged latents"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number, of one thread each (one per core)")
    parser.add_argument("--weights", type=Path, default=weights.FOLDER, metavar="DIR")
    parser.add_argument("--judge", type=Path, default=judge.WEIGHTS, metavar="FILE")
    args = parser.parse_args(argv)
    if args.captions < 4:
        parser.error(f"--captions {args.captions}: intervals need at least 4")
    if args.clips < 32:
        parser.error(f"--clips {args.clips}: intervals need at least 32")
    torch.set_num_threads(1)
    started = time.monotonic()
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    latents = args.weights / weights.LATENTS
    manifold_path = out / f"manifold-{file_digest(latents)}.safetensors"
    patch_path = manifold_path.with_name(manifold_path.name.replace("manifold", "patches"))
    files = jobs.Files(
        args.weights, args.judge, manifold_path, patch_path, out / "predictions.safetensors", latents,
        candidates.heads_folder(args.weights),
    )  # fmt: skip
    fit(files)
    fit_patches(files)
    manifold, reference = manifolds.load(files.manifold), judge.load(files.judge).reference
    sigma_table = calibrate_predictions(files, out / "jobs", args.processes)
    settings = shell_lcc_rows.HEADLINE | shell_lcc_rows.SWEEP | (shell_lcc_rows.EXTRA if args.extra else {})
    prism = prism_rows.jobs(args.captions)
    plans = {
        "stack": stack_rows.jobs(args.clips),
        "shell": shell_lcc_rows.jobs(args.clips, settings),
        "refine": shell_lcc_rows.refine_jobs() if args.extra else {},
        "prism": prism,
    }
    every = [job for plan in plans.values() for part in plan.values() for job in part]
    results = jobs.run(list(dict.fromkeys(every)), files, out / "jobs", args.processes, "clips")
    stack = stack_rows.rows(results, plans["stack"], reference)
    shell = shell_lcc_rows.rows(results, plans["shell"], manifold, reference)
    refined = shell_lcc_rows.refine_rows(
        results, plans["refine"], plans["shell"]["scene"], plans["shell"]["sibling reconstructions"], manifold
    )
    pool, drafts, judged = (prism_rows.tables(results, prism[k]) for k in ("candidates", "drafts", "judged"))
    levels = prism_rows.accuracies(pool, judged)
    chosen = prism_rows.rows(pool, drafts, candidates.taps(files.heads))
    clocked = clock(files)
    figures = {
        "clips": args.clips,
        "psnr_per_frame": stack_rows.psnr_per_frame(results, plans["stack"]),
        "stack": stack_rows.as_json(stack),
        "followed": stack_rows.followed(stack),
        "radius": manifold.radius,
        "band": manifold.band,
        "predictions": [[s, c.radius] for s, c in zip(sigma_table.sigmas.tolist(), sigma_table.calibrations, strict=True)],
        "shell_lcc": shell_lcc_rows.as_json(shell),
        "refine": [r | {"figures": {k: [e.mean, e.half] for k, e in r["figures"].items()}} for r in refined],
        "captions": args.captions,
        "spread": float(pool["oracle.overall"].std(dim=1).mean()),
        "prism": prism_rows.as_json(levels, chosen),
        "clocked": {**asdict(clocked), "ratio": [clocked.ratio.mean, clocked.ratio.half]},
    }
    plots.stack(stack, out / "stack.png")
    plots.shell_lcc(shell, out / "shell_lcc.png")
    write_text(out / "report.json", json.dumps(figures, indent=1) + "\n")
    plots.prism(levels, chosen, out / "prism.png")
    text = compose(figures, stack, shell, refined, sigma_table) + compose_prism(figures, levels, chosen, drafts, clocked)
    write_text(out / "report.md", text)
    print(stack_rows.table(stack), shell_lcc_rows.table(shell), prism_rows.table(chosen), sep="\n\n")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; see {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
