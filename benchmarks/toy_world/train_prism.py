"""Trains the toy world's PRISM heads on CPU cores: samples seeds of training captions, compares them by the judge, trains.

    python -m benchmarks.toy_world.train_prism --output_dir outputs/toy_world/prism --processes 2

Sampling, scoring and training can be interrupted and resumed. Everything is done by the commands of `trainers.prism`, except
that the toy world's judge scores the clips.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.command_line import make_parser
from trainers.kernels.latent_space import WAN21
from trainers.prism import cli as prism
from trainers.wan.prompts import write_embeddings

from . import judge, pipeline, text_encoder, weights
from .candidates import HEADS, heads_folder, sigmas_before
from .clips import scene_of

SPLIT = "train"
NEGATIVE = "negative"
# Clips whose scores differ by no more are a tie.
TIE = 0.02
TRAIN = {
    "taps": 11, "dim": 128, "heads": 4, "layers": 2, "max_train_steps": 1800, "train_batch_size": 16, "learning_rate": 1e-3,
    "lr_scheduler": "cosine", "weight_decay": 0.3, "lr_warmup_steps": 100, "token_dropout": 0.6, "held_out": 0.08,
    "validation_steps": 600, "checkpointing_steps": 200,
}  # fmt: skip
# Noise levels at which held-out captions are evaluated during training.
LEVELS = (0.9444, 0.9, 0.75, 0.25)


def prompt_id(index: int) -> str:
    return f"{SPLIT}-{index:04d}"


def write_prompts(path: Path, folder: Path, count: int) -> None:
    """Embeds the captions of the first clips of the training split, and the empty negative prompt."""
    encoder = text_encoder.load(folder / weights.TEXT)
    prompts = {prompt_id(i): scene_of(SPLIT, i)[1] for i in range(count)} | {NEGATIVE: ""}
    texts = dict(zip(prompts, encoder.words(list(prompts.values())), strict=True))
    write_embeddings(path, texts, WAN21, {}, prompts)


def run_prism(arguments: list) -> int:
    """Runs `trainers.prism` with these arguments on one thread. Returns its exit code."""
    torch.set_num_threads(1)
    return prism.main([str(a) for a in arguments])


_models = None


def load_models(folder: Path, judge_path: Path) -> None:
    """Loads the models of a process of `write_scores`."""
    global _models
    torch.set_num_threads(1)
    _models = pipeline.load(folder), judge.load(judge_path)


def score(shard: Path) -> list[dict]:
    """The judge's scores of the finished clips of one caption: one row per run."""
    world, j = _models
    tensors = load_file(shard)
    names = sorted(k for k in tensors if "@" not in k)
    scene, _ = scene_of(SPLIT, int(names[0].split("-")[1]))
    with torch.no_grad():
        frames = world.decode(torch.stack([tensors[n].float() for n in names]))
    found = j.read(frames).scores([scene.attributes] * len(names))
    return [{"run": n, "scores": {"overall": float(s)}} for n, s in zip(names, found["overall"], strict=True)]


def write_scores(runs: Path, folder: Path, judge_path: Path, processes: int) -> Path:
    """Appends the scores of all shards to scores.jsonl, except those that are in it. Returns its path."""
    path = runs.parent / "scores.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {json.loads(line)["run"].rsplit("-", 1)[0] for line in lines}
    shards = [s for s in sorted(runs.glob("latents-*")) if prompt_of(s) not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, load_models, (folder, judge_path)) as pool:
        with open(path, "a", encoding="utf-8") as f:
            for rows in tqdm(pool.map(score, shards), total=len(shards), desc="judging", unit="caption"):
                f.write("".join(json.dumps(row) + "\n" for row in rows))
                f.flush()
    return path


def prompt_of(shard: Path) -> str:
    """The id of the caption of a shard's runs."""
    with safe_open(shard, framework="pt") as f:
        return next(iter(f.keys())).rsplit("-", 1)[0]


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.train_prism", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_world/prism"))
    parser.add_argument("--captions", type=int, default=1000, help="of the training split, eight seeds each (1000)")
    parser.add_argument("--weights", type=Path, default=weights.FOLDER, metavar="DIR")
    parser.add_argument("--judge", type=Path, default=judge.WEIGHTS, metavar="FILE")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number, of one thread each (one per core)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs, prompts = args.output_dir / "runs", args.output_dir / "prompts.safetensors"
    runs.mkdir(parents=True, exist_ok=True)
    write_prompts(prompts, args.weights, args.captions)
    common = [
        "collect", "--backbone", args.weights / weights.DIT, "--texts", prompts, "--negative", NEGATIVE, "--output", runs,
        "--width", 64, "--height", 64, "--frames", 17, "--steps", pipeline.STEPS, "--shift", pipeline.SHIFT,
        "--cfg", pipeline.CFG, "--seeds", 8, "--batch", 8, "--levels", *(f"{s + 1e-4:.4f}" for s in sigmas_before()),
    ]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context) as pool:
        parts = [[*common, "--part", f"{i + 1}/{args.processes}"] for i in range(args.processes)]
        if any(pool.map(run_prism, parts)):
            return 2
    scores = write_scores(runs, args.weights, args.judge, args.processes)
    code = prism.main(["label", "--data", str(runs), "--scores", str(scores), "--tie", str(TIE)])
    if code:
        return code
    target = heads_folder(args.output_dir)
    target.mkdir(exist_ok=True)
    options = [str(a) for k, v in TRAIN.items() for a in (f"--{k}", v)]
    every = []
    for pooling, name in HEADS.items():
        output = target / name
        command = ["train", "--data", runs, "--backbone", args.weights / weights.DIT, "--output", output, *options]
        command += ["--pooling", pooling, "--levels", *LEVELS]
        # An interrupted run left checkpoints: resume from the last one.
        if output.with_suffix(".checkpoints").exists():
            command += ["--resume_from_checkpoint", "latest", "--overwrite"]
        every.append(command)
    with ProcessPoolExecutor(min(len(every), args.processes), context) as pool:
        return max(pool.map(run_prism, every))


if __name__ == "__main__":
    raise SystemExit(main())
