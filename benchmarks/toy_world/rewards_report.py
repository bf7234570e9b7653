"""Measures rewards that need no training, and guidance at few steps, in the toy world: markdown and JSON.

    python -m benchmarks.toy_world.rewards_report [--captions 128] [--clips 64] [--output_dir outputs/toy_world/rewards]

Uses the committed weights on a CPU. Results are kept in the output folder, so an interrupted run can be resumed. All captions
are held out from training and none was used for another figure or to choose a setting.
"""

import os
import time
from pathlib import Path

import torch

from benchmarks.command_line import make_parser
from trainers.running.identity import file_digest

from . import candidates, few_steps, jobs, judge, training_free, weights
from .jobs import Job, split_up
from .report import fit

SPLIT = "unseen"


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
    print(len(results), f"{(time.monotonic() - started) / 60:.1f} minutes; see {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
