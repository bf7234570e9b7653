"""The exploration behind the settings of the rewards' report: scores of candidates of captions that the report does not use.

    python -m benchmarks.toy_world.rewards_search [--captions 128] [--output_dir outputs/toy_world/rewards_search]

For captions 5000 and on of the held-out split, 8 seeds each: residuals with the prompt and without one at many noise levels of
the finished clip, prompt gaps of drafts and of predictions, and likeness to the other candidates. Prints pair accuracy and the
gains of the best half and of the single choice. One file per caption is kept, so an interrupted run goes on. These figures
chose settings and are optimistic; those of `rewards_report`, on other captions, are the ones to quote.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers.kernels.files.atomic import write_atomic
from trainers.wan.sampling import euler

from . import candidates, judge, pipeline, training_free
from .rewards_rows import reward_row, reward_table

FIRST, COUNT, SPLIT = 5000, training_free.COUNT, "unseen"
LEVELS, NOISES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), 4
HIGH_LEVELS, HIGH_NOISES = (0.75, 0.85, 0.9, 0.93, 0.96, 0.98), 8
EARLY_LEVELS = (0.85, 0.93)
DRAFTS, PREDICTED = (6, 10), (3, 5, 8)


@torch.no_grad()
def collect(world, j: judge.Judge, index: int) -> dict[str, Tensor]:
    """Tables of one caption: oracle [N], likeness [N], and <clips>.<prompt or none> [N, levels, noises] residuals."""
    caption = candidates.caption_of(world, SPLIT, index)
    noise = pipeline.initial_noise([9_000_000 + 100 * index + k for k in range(COUNT)])
    denoiser, predictions = world.denoiser([caption.text] * COUNT), []

    def keep(x0: Tensor, sigma: float, step: int) -> Tensor:
        predictions.append(x0)
        return x0

    z = euler(denoiser, noise, pipeline.schedule(), keep)
    unit = torch.nn.functional.normalize(z.flatten(1), dim=1)
    oracle = j.read(world.decode(z)).scores([caption.attributes] * COUNT)["overall"]
    out = {"oracle": oracle, "likeness": ((unit @ unit.T).sum(dim=1) - 1) / (COUNT - 1)}
    networks = {"prompt": world.denoiser([caption.text] * COUNT, 1.0), "none": world.denoiser([""] * COUNT, 1.0)}

    def residuals(name: str, clips: Tensor, levels, seeds_of) -> None:
        for key, network in networks.items():
            rows = []
            for sigma in levels:
                draws = pipeline.initial_noise(seeds_of(sigma)).split(1)
                errors = [network.velocity((1 - sigma) * clips + sigma * e, sigma) - (e - clips) for e in draws]
                rows.append(torch.stack([e.square().mean(dim=(1, 2, 3, 4)) for e in errors], dim=1))
            out[f"{name}.{key}"] = torch.stack(rows, dim=1)

    first = 80_000_000 + 1000 * index
    residuals("finished", z, LEVELS, lambda s: [70_000_000 + 1000 * index + 10 * int(s * 10) + n for n in range(NOISES)])
    residuals("finished, high", z, HIGH_LEVELS, lambda s: range(first, first + HIGH_NOISES))
    early = {f"draft of {n} steps": euler(denoiser, noise, pipeline.sigmas(n, pipeline.SHIFT).tolist()) for n in DRAFTS}
    early |= {f"prediction before step {n}": predictions[n - 1] for n in PREDICTED}
    for name, clips in early.items():
        residuals(name, clips, EARLY_LEVELS, lambda s: range(first, first + NOISES))
    return out


def scores_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every score that was looked at, [captions, N], higher is better."""
    out = {"likeness to the other candidates": found["likeness"]}
    for name, levels in (("finished", LEVELS), ("finished, high", HIGH_LEVELS)):
        prompt, none = (found[f"{name}.{key}"].mean(dim=3) for key in ("prompt", "none"))
        for k, level in enumerate(levels):
            out[f"{name}: residual at {level}"] = -prompt[:, :, k]
            out[f"{name}: residual without prompt at {level}"] = -none[:, :, k]
            out[f"{name}: gap at {level}"] = none[:, :, k] - prompt[:, :, k]
    residual = found["finished.prompt"].mean(dim=3)
    out["finished: residual at 0.4 to 0.6"] = -residual[:, :, 2:5].mean(dim=2)
    out["finished: residual at 0.7 to 0.9"] = -residual[:, :, 5:8].mean(dim=2)
    for name in (*(f"draft of {n} steps" for n in DRAFTS), *(f"prediction before step {n}" for n in PREDICTED)):
        gap = found[f"{name}.none"] - found[f"{name}.prompt"]
        for draws in (1, 2, 4):
            out[f"{name}: gap at 0.93, {draws} draws"] = gap[:, :, 1, :draws].mean(dim=2)
    return out


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.toy_world.rewards_search", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_world/rewards_search"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    world, j = pipeline.load(), judge.load(judge.WEIGHTS)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tables = []
    for index in range(FIRST, FIRST + args.captions):
        path = args.output_dir / f"{index}.safetensors"
        if not path.exists():
            state = {k: v.contiguous() for k, v in collect(world, j, index).items()}
            write_atomic(path, lambda partial, state=state: save_file(state, partial))
        tables.append(load_file(path))
    found = {k: torch.stack([t[k] for t in tables]) for k in tables[0]}
    rows = [reward_row(name, scores, found["oracle"]) for name, scores in scores_of(found).items()]
    print(reward_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
