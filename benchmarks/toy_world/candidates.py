"""Tables of Best-of-N candidates: many seeds of one caption, sampled to the end, scored by heads at several steps and judged.

The winner under any pruning plan follows from these tables, because dropping a candidate does not change the others' runs:
no plan needs new samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainers.kernels.prism import files
from trainers.scorers.prism_network import Scorer
from trainers.wan import dit as wan_dit
from trainers.wan.sampling import euler
from trainers.wan.text_padding import fold_padding

from . import judge, pipeline, weights
from .captions import Attributes
from .clips import scene_of
from .easy_cache import draft

COUNT = 16
# Steps whose input is scored: densest early, where dropping a run saves most.
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18)
# Noise levels at which finished clips are scored, as in PRISM Score.
FINISHED_SIGMAS = (0.1, 0.2, 0.3)
# Steps at which the judge reads decoded noisy latents and decoded predictions.
JUDGED_STEPS = (3, 8)
Heads = Mapping[str, Scorer]
HEADS = {"query": "toy_prism_head.safetensors", "mean": "toy_prism_mean_head.safetensors"}


@dataclass(frozen=True)
class Caption:
    """A caption, its attributes, and its embedding [words, width]."""

    text: str
    attributes: Attributes
    words: Tensor


def caption_of(world: pipeline.ToyWorld, split: str, index: int) -> Caption:
    scene, text = scene_of(split, index)
    return Caption(text, scene.attributes, world.text.words([text])[0])


def seeds(index: int, count: int = COUNT) -> list[int]:
    """Seeds of a caption's candidates; no two captions share a seed."""
    return [1_000_000 + 100 * index + k for k in range(count)]


def load_heads(folder: Path, dit: Path) -> dict[str, Scorer]:
    """name -> head with its backbone up to the last tap, for those of HEADS that are in the folder."""
    found = {}
    for name, file in HEADS.items():
        if (folder / file).exists():
            head = files.load(folder / file).head
            found[name] = Scorer(wan_dit.load(dit, max(head.config.taps)), head)
    return found


@torch.no_grad()
def run(world, j: judge.Judge, heads: Heads, split: str, index: int, count: int) -> dict[str, Tensor]:
    """Tables of one caption: the judge's scores of N finished clips (oracle.<dimension> [N]), their latents "z", and by head

    score.<head> [N, len(STEPS)]: scores of the latents before those steps; finished.<head> [N]: scores of finished latents
    with little noise, as in PRISM Score.
    """
    caption = caption_of(world, split, index)
    schedule = pipeline.schedule()
    states: dict[int, Tensor] = {}
    denoiser, noise = world.denoiser([caption.text] * count), pipeline.initial_noise(seeds(index, count))
    z = euler(denoiser, noise, schedule, watch=lambda x, sigma, step: states.__setitem__(step, x))
    noisy = [scores(heads, states[k], schedule[k], caption) for k in STEPS]
    out = {"z": z} | {f"score.{name}": torch.stack([found[name] for found in noisy], dim=1) for name in heads}
    out |= {f"finished.{name}": found for name, found in finished(heads, z, caption, index).items()}
    return out | of_reading(j.read(world.decode(z)), caption)


@torch.no_grad()
def run_drafts(world, j, heads, split: str, index: int, count: int) -> dict[str, Tensor]:
    """The same candidates under a step cache: "evaluations" [N], the steps computed for each, and finished.<head> [N]."""
    caption = caption_of(world, split, index)
    schedule = pipeline.schedule()
    z, evaluations = draft(lambda n: world.denoiser([caption.text] * n), pipeline.initial_noise(seeds(index, count)), schedule)
    found = finished(heads, z, caption, index)
    return {"evaluations": evaluations} | {f"finished.{name}": values for name, values in found.items()}


@torch.no_grad()
def run_judged(world, j, heads, split: str, index: int, count: int) -> dict[str, Tensor]:
    """The judge's overall scores of unfinished candidates: judge.noisy and judge.prediction, [N, len(JUDGED_STEPS)]."""
    caption = caption_of(world, split, index)
    schedule = pipeline.schedule()
    seen: dict[str, list[Tensor]] = {"noisy": [], "prediction": []}

    def watch(x: Tensor, sigma: float, step: int) -> None:
        if step in JUDGED_STEPS:
            seen["noisy"].append(x)

    def hook(x0: Tensor, sigma: float, step: int) -> Tensor:
        if step in JUDGED_STEPS:
            seen["prediction"].append(x0)
        return x0

    denoiser = world.denoiser([caption.text] * count)
    euler(denoiser, pipeline.initial_noise(seeds(index, count)), schedule, hook, watch)
    out = {}
    for kind, latents in seen.items():
        read = [j.read(world.decode(x)).scores([caption.attributes] * count)["overall"] for x in latents]
        out[f"judge.{kind}"] = torch.stack(read, dim=1)
    return out


def scores(heads: Heads, x: Tensor, sigma: float, caption: Caption) -> dict[str, Tensor]:
    """head -> [N], mean over its dimensions. The backbone runs once for all heads."""
    n = len(x)
    if not heads:
        return {}
    dit = max((s.dit for s in heads.values()), key=lambda d: len(d.model.blocks))
    taps = sorted({t for s in heads.values() for t in s.head.config.taps})
    text, bias, mask = fold_padding([caption.words] * n)
    levels = torch.full((n,), sigma)
    visual, words = dit.features(x, levels, text, taps, bias)
    seen = dict(zip(taps, visual, strict=True))
    return {name: s.head([seen[t] for t in s.head.config.taps], words, mask, levels).mean(dim=1) for name, s in heads.items()}


def finished(heads: Heads, z: Tensor, caption: Caption, index: int) -> dict[str, Tensor]:
    """head -> [N]: mean over FINISHED_SIGMAS; the candidates share their noise."""
    found = []
    for k, sigma in enumerate(FINISHED_SIGMAS):
        noise = pipeline.initial_noise([2_000_000 + 100 * index + k])
        found.append(scores(heads, sigma * noise + (1 - sigma) * z, sigma, caption))
    return {name: torch.stack([f[name] for f in found]).mean(dim=0) for name in heads}


def of_reading(reading: judge.Reading, caption: Caption) -> dict[str, Tensor]:
    """oracle.<dimension> [N]."""
    scores = reading.scores([caption.attributes] * len(reading.rigid))
    return {f"oracle.{k}": v for k, v in scores.items()}


def sigmas_before(steps: Sequence[int] = STEPS) -> list[float]:
    """The noise level of the input of each step."""
    schedule = pipeline.schedule()
    return [schedule[k] for k in steps]


def heads_folder(folder: Path = weights.FOLDER) -> Path:
    return folder / "prism"


def taps(folder: Path) -> dict[str, int]:
    """The last block that each head in the folder reads, by the head's name."""
    found = {name: folder / file for name, file in HEADS.items() if (folder / file).exists()}
    return {name: max(files.load(path).head.config.taps) for name, path in found.items()}
