"""Measures the committed stack: reconstruction, what the judge reads where, sizes and times.

    python -m benchmarks.toy_world.measure --output measured.json

Clean renders, their reconstructions, samples of captions of seen combinations of attributes and of unseen ones: the judge's
share of right readings per attribute, against chance, and its dimensions. Intervals are 95% (normal approximation).
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from . import judge, pipeline, weights
from .captions import VALUES, Attributes
from .clips import clip, scene_of


def readings(the_judge: judge.Judge, frames: Tensor, truth: list[Attributes], reference: Tensor) -> dict:
    """What the judge says of clips: per attribute [share right, half interval], per dimension the mean, the distance."""
    reading = the_judge.read(frames)
    right = {k: reading.correct(truth, k).float() for k in VALUES}
    out = {k: [float(v.mean()), 1.96 * float((v.mean() * (1 - v.mean()) / len(v)).sqrt())] for k, v in right.items()}
    scores = {k: [float(v.mean()), 1.96 * float(v.std() / len(v) ** 0.5)] for k, v in reading.scores(truth).items()}
    sharpness = {k: float(reading.relative(truth, k).mean()) for k in judge.REFERENCE}
    return {
        "n": len(truth),
        "right": out,
        "scores": scores,
        "relative": sharpness,
        "frechet": judge.frechet(reading.features, reference),
    }


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """dB per frame of uint8 clips [N, T, 3, H, W]."""
    return (-10 * ((a.float() - b.float()) / 255).square().mean(dim=(0, 2, 3, 4)).log10()).tolist()


def run(folder: Path, judge_path: Path, count: int, cfg: float, shift: float) -> dict:
    """All figures. `count` clips of each kind."""
    world, the_judge = pipeline.load(folder), judge.load(judge_path)
    material = [clip("test", i) for i in range(count)]
    frames, truth = torch.stack([c.frames for c in material]), [c.scene.attributes for c in material]
    held_out = torch.stack([clip("judge_test", i).frames for i in range(2 * count)])
    reference = the_judge.read(held_out).features
    again = world.decode(world.encode(frames))
    per_frame = psnr(again, frames)
    out = {
        "psnr": {"mean": sum(per_frame) / len(per_frame), "per_frame": per_frame},
        "chance": {k: 1 / len(v) for k, v in VALUES.items()},
        "renders": readings(the_judge, frames, truth, reference),
        "reconstructions": readings(the_judge, again, truth, reference),
    }
    for name, split in (("samples", "test"), ("samples of unseen combinations", "unseen")):
        scenes = [scene_of(split, i) for i in range(count)]
        started = time.monotonic()
        drawn = []
        for start in range(0, count, 8):
            part = range(start, min(start + 8, count))
            drawn.append(world.decode(world.sample([scenes[i][1] for i in part], part, cfg=cfg, shift=shift)))
        seconds = (time.monotonic() - started) / count
        read = readings(the_judge, torch.cat(drawn), [s.attributes for s, _ in scenes], reference)
        out[name] = read | {"seconds_per_clip": seconds}
    files = sorted(folder.glob("*.safetensors"))
    return out | {"megabytes": {f.name: round(f.stat().st_size / 1e6, 2) for f in files}}


def table(figures: dict) -> str:
    """The readings as markdown."""
    kinds = [k for k in figures if isinstance(figures[k], dict) and "right" in figures[k]]
    lines = ["| attribute | chance | " + " | ".join(kinds) + " |", "|---|---|" + "---|" * len(kinds)]
    for k in VALUES:
        cells = [f"{figures[kind]['right'][k][0]:.2f} +- {figures[kind]['right'][k][1]:.2f}" for kind in kinds]
        lines.append(f"| {k} | {figures['chance'][k]:.2f} | " + " | ".join(cells) + " |")
    for k in (*judge.DIMENSIONS, "overall"):
        cells = [f"{figures[kind]['scores'][k][0]:.2f} +- {figures[kind]['scores'][k][1]:.2f}" for kind in kinds]
        lines.append(f"| {k} | | " + " | ".join(cells) + " |")
    for k in judge.REFERENCE:
        lines.append(f"| {k}, relative | | " + " | ".join(f"{figures[kind]['relative'][k]:.2f}" for kind in kinds) + " |")
    lines.append("| Frechet distance | | " + " | ".join(f"{figures[kind]['frechet']:.2f}" for kind in kinds) + " |")
    return "\n".join(lines)


def main(argv=None) -> int:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.toy_world.measure",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", metavar="FILE", help="JSON to write")
    parser.add_argument("--weights", type=Path, default=weights.FOLDER, metavar="DIR")
    parser.add_argument("--judge", type=Path, default=judge.WEIGHTS, metavar="FILE")
    parser.add_argument("--count", type=int, default=64, help="clips of each kind")
    parser.add_argument("--cfg", type=float, default=pipeline.CFG)
    parser.add_argument("--shift", type=float, default=pipeline.SHIFT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures = run(args.weights, args.judge, args.count, args.cfg, args.shift)
    print(f"PSNR {figures['psnr']['mean']:.2f} dB; per frame", " ".join(f"{v:.1f}" for v in figures["psnr"]["per_frame"]))
    print(table(figures))
    print(f"{figures['samples']['seconds_per_clip']:.2f} s per sampled clip; {figures['megabytes']}")
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
