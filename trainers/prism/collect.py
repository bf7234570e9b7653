"""Samples several seeds of every prompt and stores the noisy latents that a head will score, and the finished latent.

Prompts are read embedded, from a file of kind "texts". Each prompt has its own seeds and its own shard, so an interrupted
command continues with the next prompt. No preferences are written: score the runs by any means, or with --score by the model
itself, and give the scores to `label`. With --records the finished clips and their scores also become preference records,
which `trainers.pairs build` and `trainers.dpo cache` read.

Processes of `accelerate launch` or torchrun share the prompts; so do those of a job array with --shard_index and
--shard_count. Latents and noise are the same whatever the count. The shard that completes the last prompt writes scores.jsonl
and records; the same command with --merge does so at any time, or names the shards that are missing.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.files import header as file_header
from ..kernels.files.atomic import write_atomic
from ..kernels.files.latents import write_unused_latents
from ..kernels.files.preference_records import Record
from ..kernels.latent_space import WAN21
from ..running import shares
from ..running.device import BACKBONE_DTYPE, DTYPES, dtype_for
from ..running.output import provenance, require_output_folder
from ..running.progress import Bar
from ..scorers.latent_view import ConditionalNetwork, LatentView
from ..scorers.model_reward import MODEL_REWARDS, reward_of
from ..wan import dit as wan_dit
from ..wan import sampling as wan_sampling
from ..wan.prompts import write_embeddings
from . import records_of_runs
from .data import TEXTS, require_no_manifest

SIGMAS = (0.99, 0.97, 0.93, 0.85, 0.7)
SCORES = "scores.jsonl"


def add_arguments(parser) -> None:
    parser.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    parser.add_argument("--texts", required=True, metavar="FILE", help="prompts embedded by `embed`")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--negative", metavar="ID", help="key of the negative prompt in --texts (default: empty)")
    parser.add_argument("--seeds", type=int, default=8, help="runs per prompt (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="determines the seeds of all runs (default 0)")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81, help="4n+1 (default 81)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shift", type=float, default=8.0)
    parser.add_argument("--cfg", type=float, default=6.0)
    parser.add_argument(
        "--levels", dest="sigmas", type=float, nargs="*", default=SIGMAS, metavar="SIGMA", help="noise levels to store"
    )
    parser.add_argument(
        "--score", nargs="+", choices=MODEL_REWARDS, default=[], metavar="NAME",
        help=f"also score finished clips by the model itself, into {SCORES} for `label`: {', '.join(MODEL_REWARDS)}",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, metavar="DIR", help="also write the finished clips as preference records")
    parser.add_argument("--batch", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--backbone_dtype", choices=("auto", *DTYPES), default="auto", help=BACKBONE_DTYPE)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    shares.add_arguments(parser)
    parser.add_argument("--part", type=_part, metavar="I/N", help="the same as --shard_index I-1 --shard_count N")


def run(args) -> int:
    _check(args)
    require_output_folder(args.output)
    require_no_manifest(args.output)
    if args.records is not None:
        require_output_folder(args.records)
        records_of_runs.require_usable(args.records)
    texts, header = file_header.read(args.texts, "texts")
    prompts = sorted(k for k in texts if k != args.negative)
    if not prompts:
        raise ValueError(f"{args.texts}: contains no prompt except the negative one")
    if args.negative is not None and args.negative not in texts:
        raise ValueError(f"{args.texts}: contains no text with the key '{args.negative}' (--negative)")
    named = header.config.get("prompts", {})
    share, device = shares.begin(args, args.device)
    with share:
        args.output.mkdir(parents=True, exist_ok=True)
        if share.index == 0 and Path(args.texts).resolve() != (args.output / TEXTS).resolve():
            known = {k: v for k, v in named.items() if k in prompts}
            kept_texts = {p: texts[p] for p in prompts}
            write_embeddings(args.output / TEXTS, kept_texts, header.latent_space, header.provenance, known)
        if not args.merge:
            _sample(args, texts, named, share.of(prompts), device, share.is_main)
        share.wait()
        if share.is_main:
            _finish(args, named, prompts, share)
    return 0


def _sample(
    args, texts: Mapping[str, Tensor], named: Mapping[str, str], prompts: Sequence[str], device: torch.device, shown: bool
) -> None:
    """Writes the runs of these prompts, one file a prompt; files that are there are kept. named: {key: text of the prompt}."""
    if not prompts:
        return
    dit = wan_dit.load(args.backbone, None, DTYPES[dtype_for(args.backbone_dtype, device)], device)
    sigmas = wan_sampling.sigmas(args.steps, args.shift).tolist()
    kept = steps_of(sigmas, args.sigmas)
    width = next(iter(texts.values())).shape[1]
    negative = texts[args.negative].float() if args.negative else torch.zeros(0, width)
    settings = _settings(args) | {"backbone": dit.backbone.to_json()}
    with Bar("sampling", len(prompts) * args.seeds, "run", shown) as bar:
        for prompt in prompts:
            target = path_of(args.output, prompt)
            if target.exists():
                _require_same(target, settings)
                _record(args, named, target)
                bar.add_many(args.seeds)
                continue
            tensors, clips, first = {}, {}, first_seed(prompt, args.seed)
            for start in range(0, args.seeds, args.batch):
                seeds = [first + i for i in range(start, min(start + args.batch, args.seeds))]
                for seed, states in zip(seeds, _runs(dit, texts[prompt], negative, seeds, sigmas, kept, args), strict=True):
                    name = f"{prompt}-{seed}"
                    for sigma, z in states.items():
                        key = name if sigma is None else f"{name}@{sigma:.4f}"
                        tensors[key] = z.half()
                        entry = {"run": name, "prompt": prompt, "sigma": sigma, "seed": seed, "source": name, "video": name}
                        if sigma is None and args.score:
                            entry["scores"] = scores_of(z, dit.model, texts[prompt], negative, args.score)
                        clips[key] = entry
                bar.add_many(len(seeds))
            notes = provenance(args.argv, "trainers.prism")
            try:
                write_unused_latents([target], tensors, WAN21, clips, settings=settings, provenance=notes)
            except FileExistsError:
                # Another process has sampled this prompt in the meantime: its runs are the same, or its settings are named.
                _require_same(target, settings)
            _record(args, named, target)


def _record(args, named: Mapping[str, str], runs: Path) -> Record | None:
    """The record of a prompt, its candidates' latents written; None without --records."""
    if args.records is None:
        return None
    negative = named.get(args.negative, "") if args.negative else ""
    record = records_of_runs.record_of(args.records, runs, named, negative, Path(args.backbone).name)
    records_of_runs.write_candidates(record, runs)
    return record


def _finish(args, named: Mapping[str, str], prompts: Sequence[str], share: shares.Share) -> None:
    """Writes the scores and records of all runs once every prompt has its file, and says what is there. Raises ShareError."""
    targets = [path_of(args.output, prompt) for prompt in prompts]
    missing = [k for k, target in enumerate(targets) if not target.exists()]
    if missing and share.context is None and not share.whole:
        mine = len(share.of(prompts))
        print(shares.done_text(share, args.output, f"{mine} of {len(prompts)} prompts, {args.seeds} runs each"))
        return
    shares.require_none(missing, len(prompts), "prompts", args.output, args.shard_count)
    settings = _settings(args)
    for target in targets:
        # The backbone that the first file names: all shards sampled from the same one.
        settings = _require_same(target, settings)
    if args.score:
        _write_scores(args.output)
    if args.records is not None:
        records_of_runs.write_lines(args.records, [_record(args, named, target) for target in targets])
    sigmas = wan_sampling.sigmas(args.steps, args.shift).tolist()
    shown = ", ".join(f"{s:.3f}" for s in steps_of(sigmas, args.sigmas).values())
    print(f"{args.output}: {len(prompts)} prompts, {args.seeds} runs each, at sigma {shown}")


def path_of(folder: Path, prompt: str) -> Path:
    """The file of a prompt's runs."""
    return folder / f"latents-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}.safetensors"


def scores_of(z: Tensor, dit: torch.nn.Module, words: Tensor, negative: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Scores by the model itself of a finished latent z [C, T, H, W], higher is better. names: of MODEL_REWARDS."""
    view, found = LatentView(ConditionalNetwork(dit, words.float(), negative), z[None].float()), {}
    for name in sorted(names):
        # The seed is the same for all runs, so that they share their noise.
        reward = reward_of(name, draws=4, seed=0)
        found[name] = float(reward.scores(reward.measure(view)))
    return found


def _write_scores(folder: Path) -> None:
    """Writes the scores in the headers of all shards to SCORES, one line per run."""
    lines = []
    for shard in sorted(folder.glob("latents-*.safetensors")):
        for entry in file_header.read_header(shard, "latents").config["clips"].values():
            if "scores" in entry:
                lines.append(json.dumps({"run": entry["run"], "scores": entry["scores"]}))
    write_atomic(folder / SCORES, lambda partial: Path(partial).write_text("\n".join(lines) + "\n", encoding="utf-8"))


def first_seed(prompt: str, seed: int) -> int:
    """The seed of a prompt's first run; the other runs count up from it.

    Prompts have different seeds; otherwise a head could memorise which of a few noise seeds do well.
    """
    return int(hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:8], 16)


def steps_of(sigmas: list[float], wanted: Sequence[float]) -> dict[int, float]:
    """{step: its sigma}: for each wanted noise level the first step, from 1, that starts at or below it, else the last."""
    last = len(sigmas) - 1
    steps = {next((k for k in range(1, last) if sigmas[k] <= sigma + 1e-6), last - 1) for sigma in wanted}
    return {k: sigmas[k] for k in sorted(steps)}


def _runs(dit, words, negative, seeds, sigmas, kept: dict[int, float], args) -> list[dict]:
    """For each seed {sigma: noisy latent, None: finished latent}."""
    denoiser = wan_sampling.Denoiser(dit.model, [words.float()] * len(seeds), negative, args.cfg)
    shape = (dit.model.config.in_channels, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    states = [{} for _ in seeds]

    def watch(x, sigma: float, step: int) -> None:
        if step in kept:
            for one, z in zip(states, x, strict=True):
                one[round(sigma, 6)] = z.cpu()

    z = wan_sampling.euler(denoiser, wan_sampling.noise(shape, seeds), sigmas, watch=watch)
    if not bool(torch.isfinite(z).all()):
        raise ValueError(f"seeds {seeds}: sampling gave NaN or infinite values; try --backbone_dtype float32")
    for one, finished in zip(states, z, strict=True):
        one[None] = finished.cpu()
    return states


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a part: expected I/N such as 1/2")
    return int(number), int(count)


def _settings(args) -> dict:
    """What decides the latents, without the backbone."""
    return {
        "steps": args.steps, "shift": args.shift, "cfg": args.cfg, "size": [args.width, args.height, args.frames],
        "seeds": args.seeds, "seed": args.seed,
    } | ({"score": sorted(args.score)} if args.score else {})  # fmt: skip


def _require_same(path: Path, settings: dict) -> dict:
    """`settings` with the file's backbone. Raises ValueError for a file that was made with others."""
    other = file_header.read_header(path, "latents").config.get("settings", {})
    differing = [k for k in settings if other.get(k) != settings[k]]
    if differing:
        raise ValueError(f"{path}: made with another {differing[0]}; give another --output")
    return settings | {"backbone": other.get("backbone")}


def _check(args) -> None:
    if args.part is not None:
        if args.shard_index is not None or args.shard_count is not None:
            raise ValueError("--part is the same as --shard_index and --shard_count: give one or the other")
        args.shard_index, args.shard_count = args.part[0] - 1, args.part[1]
    shares.check(args)
    for name in ("seeds", "steps", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if args.frames % 4 != 1 or args.width % 16 or args.height % 16:
        raise ValueError(f"{args.width}x{args.height}, {args.frames} frames: sizes must be multiples of 16, frames 4n+1")
    if not math.isfinite(args.shift) or args.shift <= 0:
        raise ValueError(f"--shift must be above 0, got {args.shift}")
