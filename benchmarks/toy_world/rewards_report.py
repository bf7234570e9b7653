"""Measures rewards that need no training, and guidance at few steps, in the toy world: markdown and JSON.

    python -m benchmarks.toy_world.rewards_report [--captions 128] [--clips 64] [--output_dir outputs/toy_world/rewards]

Uses the committed weights on a CPU. Results are kept in the output folder, so an interrupted run can be resumed. All captions
are held out from training and none was used for another figure or to choose a setting.
"""

import json
import os
import time
from pathlib import Path

import torch

from benchmarks.command_line import make_parser
from trainers.running.identity import file_digest

from . import candidates, few_steps, few_steps_rows, jobs, judge, pipeline, prism_rows, rewards_rows, training_free, weights
from .jobs import Job, split_up
from .report import fit, write_text
from .statistics import Estimate

SPLIT = "unseen"
TEXT = """# Rewards that need no training, and guidance at few steps, in the toy world

`python -m benchmarks.toy_world.rewards_report --captions {captions} --clips {clips}`. Captions are held out from training, and
neither they nor their seeds were used for another figure or to choose a setting (settings: other captions of the same split).
Figures are the mean ± half of the 95 % interval over captions; bold where the interval leaves out zero.

## What each score tells

{captions} captions, {count} seeds each, {steps} steps, cfg 2; the oracle is the judge's overall score of the finished clip.
Pairs: those whose oracle scores differ by more than {tie}. Gain: oracle score over a random seed of the caption.
finished: of finished clips; draft: of clips sampled with {draft} steps from the same noise; 3, 8: of the prediction (or, for
the PRISM heads query and mean, of the noisy latent) before that step. mix: sum of z-scores of flow residual and prompt gap.
The judge on predictions is the oracle itself on decoded predictions: what a critic of frames could tell at that step.

{rewards}

## What a search gains

Searches among {count} seeds. Blocks: of the transformer, with the scoring, over those of {count} full runs (100 %: every
candidate sampled to its end). The settings were fixed on 128 exploratory captions, where the prompt gap of the prediction
before step 3 seemed to gain +0.047 ± 0.021: fresh captions did not confirm it.

{races}

Timed on one thread, {clocked} captions: {count} full runs {full:.1f} s, drafts of {draft} steps ranked by the prompt gap with
the winner's full run {drafts:.1f} s, {time_share:.1f} % of the time.

## Guidance at few steps

{clips} captions, one seed each. Latent error: mean squared difference of the latent from the 50-step solution of its own seed
and cfg; PSNR: of the decoded frames to those of that solution. The rows of a method show changes against none, paired by
prompt and seed. The random push moves tokens as far as `project` in a random direction.

{guidance}
"""


def jobs_of(captions: int, clips: int) -> dict[str, list[Job]]:
    """The jobs of the report, by kind."""
    first = training_free.FIRST
    found = {"training free": [Job("training free", SPLIT, first + i, training_free.COUNT) for i in range(captions)]}
    found |= {kind: split_up(kind, SPLIT, clips, start=few_steps.FIRST) for kind in jobs.FEW_STEPS}
    return found | {"siblings": split_up("siblings", SPLIT, clips, start=few_steps.FIRST)}


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.rewards_report", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_world/rewards"))
    parser.add_argument("--captions", type=int, default=128, help="held-out captions for rewards, 8 seeds each (128)")
    parser.add_argument("--clips", type=int, default=64, help="captions for guidance at few steps, at least 32 (64)")
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
    manifold = out / f"manifold-{file_digest(latents)}.safetensors"
    files = jobs.Files(
        args.weights, args.judge, manifold, out / "none", out / "none", latents, candidates.heads_folder(args.weights)
    )
    fit(files)
    plan = jobs_of(args.captions, args.clips)
    every = [job for part in plan.values() for job in part]
    results = jobs.run(every, files, out / "jobs", args.processes, "clips")
    found = rewards_rows.tables([results[job] for job in plan["training free"]])
    scores, races = rewards_rows.reward_rows(found), rewards_rows.race_rows(found, candidates.taps(files.heads))
    tables = {cfg: few_steps_rows.gather([results[job] for job in plan[kind]]) for kind, cfg in jobs.FEW_STEPS.items()}
    guidance = few_steps_rows.rows(tables, jobs.gather(results, plan["siblings"]))
    clocked = 6
    full, drafts = training_free.clock(pipeline.load(args.weights), SPLIT, clocked)
    text = TEXT.format(
        clocked=clocked, full=full, drafts=drafts, time_share=100 * drafts / full,
        captions=args.captions, clips=args.clips, count=training_free.COUNT, steps=pipeline.STEPS, tie=prism_rows.TIE,
        draft=training_free.DRAFT_STEPS, rewards=rewards_rows.reward_table(scores), races=rewards_rows.race_table(races),
        guidance=few_steps_rows.table(guidance),
    )  # fmt: skip
    write_text(out / "rewards.md", text)
    figures = {"captions": args.captions, "clips": args.clips, "clocked_s": [full, drafts]}
    figures |= {"scores": scores, "searches": races, "guidance": guidance}
    write_text(out / "rewards.json", json.dumps(figures, indent=1, default=plain) + "\n")
    print(text)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; see {out / 'rewards.md'}")
    return 0


def plain(value):
    """A row or an Estimate as JSON values."""
    if isinstance(value, Estimate):
        return [value.mean, value.half]
    return vars(value)


if __name__ == "__main__":
    raise SystemExit(main())
