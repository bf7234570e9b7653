"""Samples seeds of captions with a generator of the toy world and scores the finished clips by the judge: data of PRISM heads.

    python -m benchmarks.toy_world.prism_collect --output_dir outputs/toy_world/heads/train-late --captions 4000 --seeds 4

The runs are those of `trainers.prism collect`: finished latents and the noisy latents before some steps. scores.jsonl has the
judge's scores, read from decoded pictures, for `trainers.prism label`: alignment, motion (the geometric mean of smoothness,
dynamics and rigidity), visual (sharpness), and overall, as VideoAlign divides what people see. Sampling and judging can be
interrupted and resumed.

Ten steps instead of twenty, and a decoder in bfloat16 that is given clips in batches, take about a third of the time;

    python -m benchmarks.toy_world.prism_collect --check_labels 48

samples seeds both ways and prints how many pairs keep their order.
"""

import copy
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.command_line import make_parser
from benchmarks.mini_vae import decode
from trainers.kernels.files import lines
from trainers.kernels.latent_space import WAN21
from trainers.prism import cli as prism
from trainers.wan.prompts import write_embeddings

from . import candidates, judge, pipeline, text_encoder, weights
from .clips import as_frames, scene_of
from .statistics import Estimate, mean

NEGATIVE = "negative"
# Noise levels of the states that are kept, a little above those of the schedules of 10 and of 20 steps: `collect` takes the
# first step at or below each.
LEVELS = {10: (0.9644, 0.9232, 0.8751, 0.7501, 0.2501), 20: (0.9644, 0.9445, 0.9001, 0.7501, 0.2501)}
DIMENSIONS = ("alignment", "motion", "visual", "overall")
# Differences of scores that are no more than this are ties: a fifth to a half of the spread among seeds of one caption.
TIES = {"alignment": 0.02, "motion": 0.02, "visual": 0.01, "overall": 0.02}


def prompt_id(split: str, index: int) -> str:
    return f"{split}-{index:04d}"


def write_prompts(path: Path, folder: Path, split: str, indices: Sequence[int]) -> None:
    """Embeds the captions of these clips of a split, and the empty negative prompt."""
    encoder = text_encoder.load(folder / weights.TEXT)
    prompts = {prompt_id(split, i): scene_of(split, i)[1] for i in indices} | {NEGATIVE: ""}
    texts = dict(zip(prompts, encoder.words(list(prompts.values())), strict=True))
    write_embeddings(path, texts, WAN21, {}, prompts)


def run_prism(arguments: list) -> int:
    """Runs `trainers.prism` with these arguments on one thread. Returns its exit code."""
    torch.set_num_threads(1)
    return prism.main([str(a) for a in arguments])


def by_dimension(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The judge's scores {dimension: [N]} as DIMENSIONS."""
    motion = torch.stack([scores[k].clamp(min=1e-4).log() for k in ("smoothness", "dynamics", "rigidity")]).mean(dim=0).exp()
    return {"alignment": scores["alignment"], "motion": motion, "visual": scores["sharpness"], "overall": scores["overall"]}


@torch.no_grad()
def pictures(vae, z: Tensor) -> Tensor:
    """Normalised latents [N, 16, 5, 8, 8] -> frames uint8 [N, 17, 3, 64, 64], in the VAE's dtype."""
    raw = WAN21.denormalise(z).to(vae.post_quant_conv.weight.dtype)
    return as_frames(torch.cat([decode(vae, part).float() for part in raw.split(pipeline.BATCH)]))


_models = None


def load_models(folder: Path, judge_path: Path) -> None:
    """Loads the models of a process of `write_scores`."""
    global _models
    torch.set_num_threads(1)
    _models = weights.load_vae(folder / weights.VAE).bfloat16(), judge.load(judge_path)


def score(shards: Sequence[Path]) -> list[dict]:
    """The judge's scores of the finished clips of some captions: one row per run."""
    vae, j = _models
    names, clips, truth = [], [], []
    for shard in shards:
        tensors = load_file(shard)
        own = sorted(k for k in tensors if "@" not in k)
        split, index = own[0].split("-")[:2]
        names += own
        clips += [tensors[n].float() for n in own]
        truth += [scene_of(split, int(index))[0].attributes] * len(own)
    found = by_dimension(j.read(pictures(vae, torch.stack(clips))).scores(truth))
    return [{"run": n, "scores": {k: round(float(v[i]), 6) for k, v in found.items()}} for i, n in enumerate(names)]


def write_scores(runs: Path, folder: Path, judge_path: Path, processes: int) -> Path:
    """Appends the scores of all shards to scores.jsonl, except those that are in it. Returns its path."""
    path = runs / "scores.jsonl"
    text = lines.read_text(path) if path.exists() else ""
    done = {json.loads(line)["run"].rsplit("-", 1)[0] for _, line in lines.numbered(text)}
    shards = [s for s in sorted(runs.glob("latents-*")) if prompt_of(s) not in done]
    parts = [shards[i : i + 4] for i in range(0, len(shards), 4)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, load_models, (folder, judge_path)) as pool:
        with open(path, "a", encoding="utf-8") as f:
            for rows in tqdm(pool.map(score, parts), total=len(parts), desc="judging", unit="part"):
                f.write("".join(json.dumps(row) + "\n" for row in rows))
                f.flush()
    return path


def prompt_of(shard: Path) -> str:
    """The id of the caption of a shard's runs."""
    with safe_open(shard, framework="pt") as f:
        return next(iter(f.keys())).rsplit("-", 1)[0]


@torch.no_grad()
def check_labels(folder: Path, judge_path: Path, captions: int, seeds: int = 4, first: int = 50_000) -> dict[str, dict]:
    """{way: {dimension: Estimate}}: share of the pairs of a caption's seeds, no ties, that have the same order as with 20
    steps decoded in fp32; of 10 steps, of the decoder in bfloat16, and of both."""
    world, j = pipeline.load(folder), judge.load(judge_path)
    half = copy.deepcopy(world.vae).bfloat16()
    kept: dict[str, dict[str, list[float]]] = {"10 steps": {}, "bfloat16": {}, "both": {}}
    for index in tqdm(range(first, first + captions), unit="caption"):
        caption = candidates.caption_of(world, "train", index)
        texts, noises, truth = [caption.text] * seeds, candidates.seeds(index, seeds), [caption.attributes] * seeds
        long, short = world.sample(texts, noises), world.sample(texts, noises, steps=10)
        ways = {"20 steps": (world.vae, long), "10 steps": (world.vae, short), "bfloat16": (half, long), "both": (half, short)}
        read = {k: by_dimension(j.read(pictures(vae, z)).scores(truth)) for k, (vae, z) in ways.items()}
        for d in DIMENSIONS:
            gaps = {k: v[d][:, None] - v[d] for k, v in read.items()}
            clear = gaps["20 steps"] > TIES[d]
            for way in kept:
                if clear.any():
                    kept[way].setdefault(d, []).append(float((gaps[way][clear] > 0).float().mean()))
    return {way: {d: mean(torch.tensor(v)) for d, v in found.items()} for way, found in kept.items()}


def print_check(found: Mapping[str, Mapping[str, Estimate]]) -> None:
    print("| pairs that keep their order | " + " | ".join(DIMENSIONS) + " |")
    print("|---" * (1 + len(DIMENSIONS)) + "|")
    for way, by in found.items():
        print(f"| {way} | " + " | ".join(f"{by[d].text()} ({by[d].n} captions)" for d in DIMENSIONS) + " |")


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.prism_collect", __doc__)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--check_labels", type=int, metavar="CAPTIONS", help="instead: compare ways to sample and to decode")
    parser.add_argument("--split", default="train")
    parser.add_argument("--first", type=int, default=0, help="index of the first caption (0)")
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=4, help="clips per caption (4)")
    parser.add_argument("--seed", type=int, default=0, help="determines the noise of all clips; generators need not share it")
    parser.add_argument("--steps", type=int, default=10, choices=tuple(LEVELS))
    parser.add_argument("--weights", type=Path, default=weights.FOLDER, metavar="DIR")
    parser.add_argument("--generator", type=Path, metavar="FILE", help="the transformer (default: that of --weights)")
    parser.add_argument("--judge", type=Path, default=judge.WEIGHTS, metavar="FILE")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number, of one thread each (one per core)")
    args = parser.parse_args(argv)
    if args.check_labels:
        torch.set_num_threads(1)
        print_check(check_labels(args.weights, args.judge, args.check_labels))
        return 0
    if args.output_dir is None:
        parser.error("give --output_dir or --check_labels")
    runs, prompts = args.output_dir, args.output_dir / "prompts.safetensors"
    runs.mkdir(parents=True, exist_ok=True)
    write_prompts(prompts, args.weights, args.split, range(args.first, args.first + args.captions))
    common = [
        "collect", "--backbone", args.generator or args.weights / weights.DIT, "--texts", prompts, "--negative", NEGATIVE,
        "--output", runs, "--width", 64, "--height", 64, "--frames", 17, "--steps", args.steps, "--shift", pipeline.SHIFT,
        "--cfg", pipeline.CFG, "--seeds", args.seeds, "--seed", args.seed, "--batch", args.seeds,
        "--levels", *LEVELS[args.steps],
    ]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context) as pool:
        parts = [[*common, "--part", f"{i + 1}/{args.processes}"] for i in range(args.processes)]
        if any(pool.map(run_prism, parts)):
            return 2
    print(write_scores(runs, args.weights, args.judge, args.processes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
