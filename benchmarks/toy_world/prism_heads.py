"""Trains PRISM heads on many seeds of many captions and measures them: by dimension, noise level, kind of pair and ablation.

    python -m benchmarks.toy_world.prism_heads --data outputs/toy_world/heads --output_dir outputs/toy_world/heads/study

--data holds folders of `prism_collect`: train-late, train-early, train-middle (the same captions sampled by the committed
model and by two checkpoints of a shorter training), and test-late, test-early, test-middle (captions of combinations that
nothing was trained on).

Pairs are of two kinds. Within a generator: seeds of one caption, at noisy latents that the sampling passed through. Between
generators, as in the paper: clips of one caption by different models, finished and then noised, both with the same noise.
The judge decides which clip is better; differences within `prism_collect.TIES` are ties, which are left out of accuracies.

The backbone is frozen, so the features of all latents are computed once and kept on disk. Each head trains by the loss of
`trainers.prism train` on all pairs of a batch of captions. Heads are compared on captions; an interval is over captions. What
exists in --output_dir is not computed again.
"""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.command_line import make_parser
from trainers.kernels.files import header, lines
from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism import accuracy as accuracies
from trainers.kernels.prism import files
from trainers.kernels.prism.accuracy import tie_threshold
from trainers.kernels.prism.files import LoadedHead
from trainers.kernels.prism.head import HeadConfig, PrismHead
from trainers.kernels.prism.preference_loss import ETA, rao_kupper
from trainers.prism.collect import path_of
from trainers.prism.train_loop import TrainSettings, learning_rate, make_optimiser
from trainers.tuning import lora
from trainers.wan import dit as wan_dit
from trainers.wan.dit import WanDit
from trainers.wan.text_padding import fold_padding

from .prism_collect import DIMENSIONS, LEVELS, TIES

GENERATORS = ("early", "middle", "late")
TAPS = (2, 5, 8, 11)
# Of finished latents: within a generator at the level of PRISM Score, between generators at those of the paper's table.
FINISHED = 0.2
BETWEEN = (0.944, 0.9, 0.75, 0.5, 0.25, 0.1)
CHUNK = 400
# Captions at the end of the training set that no head is trained on: settings are chosen on them.
HELD_OUT = 400
# Positions of a caption: at most 12 words, the end, and one for the rest of the padding.
WORDS = 14
WITHIN, ACROSS = "within", "between"
COMMON, INDEPENDENT = "common", "independent"


@dataclass
class Runs:
    """Clips of a folder of `prism_collect`, sorted by caption and seed. z: [N, 16, 5, 8, 8]; states: [N, L, 16, 5, 8, 8] at
    sigmas; scores: [N, DIMENSIONS]; caption: [N], index into texts; texts: of the captions, sorted by id."""

    z: Tensor
    states: Tensor
    sigmas: list[float]
    scores: Tensor
    caption: Tensor
    ids: list[str]
    texts: list[Tensor]

    @cached_property
    def members(self) -> list[Tensor]:
        """Indices of the clips of each caption."""
        return list(torch.arange(len(self.z)).split(torch.bincount(self.caption).tolist()))


def is_kept(sigma: float | None) -> bool:
    """Whether a state at this noise level is read: those of `prism_collect.LEVELS`; a folder may have others as well."""
    return sigma is not None and any(0 <= level - sigma < 2e-4 for levels in LEVELS.values() for level in levels)


def scored_runs(folder: Path) -> list[dict]:
    """The lines of a folder's scores: {"run", "scores"}."""
    return [json.loads(line) for _, line in lines.numbered(lines.read_text(folder / "scores.jsonl"))]


def load_runs(folder: Path, captions: int | None = None, per: int | None = None) -> Runs:
    """The runs of a folder: of its first `captions` captions, the first `per` clips of each (None: all)."""
    scored = {r["run"]: r["scores"] for r in scored_runs(folder)}
    texts, _ = header.read(folder / "texts.safetensors", "texts")
    ids = sorted({run.rsplit("-", 1)[0] for run in scored})[:captions]
    rows = []
    for k in ids:
        tensors, found = header.read(path_of(folder, k), "latents")
        entries = found.config["clips"]
        own = sorted((k for k in tensors if entries[k]["sigma"] is None), key=lambda k: entries[k]["seed"])[:per]
        for name in own:
            states = {e["sigma"]: tensors[key] for key, e in entries.items() if e["run"] == name and is_kept(e["sigma"])}
            rows.append((k, tensors[name], states, scored[name]))
    sigmas = sorted(rows[0][2], reverse=True)
    place = {k: i for i, k in enumerate(ids)}
    return Runs(
        torch.stack([r[1] for r in rows]), torch.stack([torch.stack([r[2][s] for s in sigmas]) for r in rows]), sigmas,
        torch.tensor([[r[3][d] for d in DIMENSIONS] for r in rows]), torch.tensor([place[r[0]] for r in rows]), ids,
        [texts[k].float() for k in ids],
    )  # fmt: skip


def noise_of(prompt: str, sigma: float, salt: int, shape: Sequence[int]) -> Tensor:
    """Noise that follows from the caption, the noise level and `salt`: equal for all clips of a caption if that is."""
    seed = int.from_bytes(f"{prompt} {sigma:.4f}".encode(), "little") % (2**61 - 1) + 7919 * salt
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_at(runs: Runs, clip: int, what: str, level: int) -> Tensor:
    """`latents_of` of one clip at one of its levels, [16, 5, 8, 8]."""
    if what == WITHIN and level < len(runs.sigmas):
        return runs.states[clip, level].float()
    sigma = FINISHED if what == WITHIN else BETWEEN[level]
    salt = 1 + clip if what == INDEPENDENT else 0
    z = runs.z[clip].float()
    return sigma * noise_of(runs.ids[runs.caption[clip]], sigma, salt, z.shape) + (1 - sigma) * z


def latents_of(runs: Runs, part: Sequence[int], what: str) -> tuple[Tensor, list[float]]:
    """(latents [n, L, 16, 5, 8, 8], their noise levels).

    what: WITHIN for the sampling's own states and the finished clip with noise of FINISHED; COMMON or INDEPENDENT for the
    finished clip at the levels of BETWEEN, all clips of a caption with the same noise, or each with its own.
    """
    sigmas = [*runs.sigmas, FINISHED] if what == WITHIN else list(BETWEEN)
    rows = [torch.stack([latent_at(runs, i, what, k) for k in range(len(sigmas))]) for i in part]
    return torch.stack(rows), sigmas


# Features


@dataclass(frozen=True)
class Part:
    """Which latents of a folder of runs are read: `load_runs`' captions and clips of each, `latents_of`'s kind."""

    folder: str
    what: str
    captions: int | None
    per: int | None


# Captions with clips of every generator; a head is trained on all but the last.
ACROSS_CAPTIONS, ACROSS_HELD_OUT = 1000, 150
PARTS = (
    Part("train-late", WITHIN, None, None), Part("test-late", WITHIN, None, None),
    *(Part(f"train-{g}", what, ACROSS_CAPTIONS, 1) for g in GENERATORS for what in (COMMON, INDEPENDENT)),
    *(Part(f"test-{g}", COMMON, None, 2) for g in GENERATORS),
)  # fmt: skip


@dataclass(frozen=True)
class FeatureJob:
    """Features of one chunk of a part's clips by one backbone; one file for each tap."""

    data: Path
    folder: Path
    backbone: Path
    part: Part
    start: int

    def path(self, tap: int) -> Path:
        return self.folder / f"{self.backbone.stem}-{self.part.folder}-{self.part.what}-{tap}-{self.start:06d}.npy"


_loaded: dict = {}


def compute_features(job: FeatureJob) -> None:
    """Writes [n, L, 80, 128] in fp16 for each tap."""
    torch.set_num_threads(1)
    if all(job.path(t).exists() for t in TAPS):
        return
    if _loaded.get("part") != job.part:
        _loaded.update(part=job.part, runs=load_runs(job.data / job.part.folder, job.part.captions, job.part.per))
    if _loaded.get("backbone") != job.backbone:
        _loaded.update(backbone=job.backbone, dit=wan_dit.load(job.backbone, max(TAPS)))
    runs, dit = _loaded["runs"], _loaded["dit"]
    part = list(range(job.start, min(job.start + CHUNK, len(runs.z))))
    rows = [features_of(runs, i, job.part.what, dit, TAPS) for i in part]
    for tap, found in zip(TAPS, zip(*rows, strict=True), strict=True):
        write_atomic(job.path(tap), lambda partial, found=found: _save_array(partial, torch.stack(found)))


@torch.no_grad()
def features_of(runs: Runs, clip: int, what: str, dit: WanDit, taps: Sequence[int]) -> list[Tensor]:
    """Of one clip at all of its levels: [L, 80, 128] in fp16 for each tap."""
    x, sigmas = latents_of(runs, [clip], what)
    text, bias, _ = fold_padding([runs.texts[runs.caption[clip]]] * len(sigmas))
    visual, _ = dit.features(x[0], torch.tensor(sigmas), text, list(taps), bias)
    return [v.half() for v in visual]


def _save_array(path: str, values: Tensor) -> None:
    with open(path, "wb") as f:
        np.save(f, values.numpy())


class Computed:
    """`Features` of a part by a tuned backbone, computed for all of its clips."""

    def __init__(self, runs: Runs, what: str, dit: WanDit, tap: int):
        self.values = torch.stack([features_of(runs, i, what, dit, [tap])[0] for i in range(len(runs.z))])

    def read(self, clips: Sequence[int], levels: Sequence[int]) -> Tensor:
        return self.values[list(clips), list(levels)].float()


class Features:
    """Features of all clips of a folder at one tap, on disk: read [n, 80, 128] by (clip, level)."""

    def __init__(self, jobs: Sequence[FeatureJob], tap: int):
        self.parts = [np.load(job.path(tap), mmap_mode="r") for job in sorted(jobs, key=lambda j: j.start)]

    def read(self, clips: Sequence[int], levels: Sequence[int]) -> Tensor:
        rows = [self.parts[i // CHUNK][i % CHUNK, k] for i, k in zip(clips, levels, strict=True)]
        return torch.from_numpy(np.stack(rows)).float()


@torch.no_grad()
def text_features(runs: Runs, backbone: Path) -> tuple[Tensor, Tensor]:
    """(embedded captions [captions, WORDS, 128], bool mask)."""
    dit = wan_dit.load(backbone, 0)
    texts, masks = [], []
    for words in runs.texts:
        text, bias, mask = fold_padding([words])
        _, embedded = dit.features(torch.zeros(1, 16, 5, 8, 8), torch.ones(1), text, [0], bias)
        room = WORDS - embedded.shape[1]
        texts.append(torch.nn.functional.pad(embedded[0], (0, 0, 0, room)))
        masks.append(torch.nn.functional.pad(mask[0], (0, room)))
    return torch.stack(texts), torch.stack(masks)


# Training


@dataclass(frozen=True)
class HeadRun:
    """One head. kind: WITHIN or ACROSS, the pairs that it is trained on; captions: how many; noise: of pairs between
    generators; backbone: whose features; dimensions: what it scores; tuned: rank of a LoRA that is trained in the backbone,
    0 for a frozen one."""

    name: str
    kind: str = WITHIN
    captions: int = 3600
    pooling: str = "query"
    taps: tuple[int, ...] = (8,)
    noise: str = COMMON
    backbone: str = "late"
    dimensions: tuple[str, ...] = DIMENSIONS
    queries: int = 1
    dim: int = 128
    layers: int = 2
    steps: int = 1500
    batch: int = 24
    rate: float = 1e-3
    decay: float = 0.3
    dropout: float = 0.5
    seed: int = 0
    tuned: int = 0


@dataclass
class Material:
    """What heads on one backbone read, by (folder, what): runs, features by tap, and captions (text, mask)."""

    runs: dict[tuple[str, str], Runs]
    features: dict[tuple[str, str], dict[int, Features]]
    texts: dict[tuple[str, str], tuple[Tensor, Tensor]]

    def visual(self, key: tuple[str, str], taps: Sequence[int], clips: Sequence[int], levels: Sequence[int]) -> list[Tensor]:
        return [self.features[key][t].read(clips, levels) for t in taps]

    def words(self, key: tuple[str, str], clips: Sequence[int]) -> tuple[Tensor, Tensor]:
        text, mask = self.texts[key]
        at = self.runs[key].caption[list(clips)]
        return text[at], mask[at]

    def levels(self, key: tuple[str, str]) -> list[float]:
        return [*self.runs[key].sigmas, FINISHED] if key[1] == WITHIN else list(BETWEEN)


def outcomes(gap: Tensor, dimensions: Sequence[str]) -> Tensor:
    """1, 0 or -1 [..., D] of score differences a - b [..., DIMENSIONS], those of `dimensions`."""
    index = [DIMENSIONS.index(d) for d in dimensions]
    ties = torch.tensor([TIES[d] for d in dimensions])
    gap = gap[..., index]
    return torch.where(gap.abs() <= ties, 0, gap.sign()).long()


@dataclass(frozen=True)
class Batch:
    """Clips of a batch of captions, each caption at one noise level.

    parts: (key of the material, clips, levels); pairs: [P, 2], positions in the batch; outcome: [P, D].
    """

    parts: list[tuple[tuple[str, str], list[int], list[int]]]
    pairs: Tensor
    outcome: Tensor

    def features(self, material: Material, taps: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """(visual tokens by tap, words, mask) of all clips."""
        visual = [material.visual(key, taps, clips, levels) for key, clips, levels in self.parts]
        words, masks = zip(*(material.words(key, clips) for key, clips, _ in self.parts), strict=True)
        return [torch.cat(v) for v in zip(*visual, strict=True)], torch.cat(words), torch.cat(masks)


def draw_batch(run: HeadRun, material: Material, generator: torch.Generator) -> Batch:
    keys = [("train-late", WITHIN)] if run.kind == WITHIN else [(f"train-{g}", run.noise) for g in GENERATORS]
    captions = torch.randint(0, run.captions, (run.batch,), generator=generator).tolist()
    levels = torch.randint(0, len(material.levels(keys[0])), (run.batch,), generator=generator).tolist()
    parts, scores, owner = [], [], []
    for key in keys:
        members = [material.runs[key].members[c] for c in captions]
        clips, at = torch.cat(members).tolist(), [k for k, m in zip(levels, members, strict=True) for _ in m]
        parts.append((key, clips, at))
        scores.append(material.runs[key].scores[clips])
        owner += [i for i, m in enumerate(members) for _ in m]
    scores, owner = torch.cat(scores), torch.tensor(owner)
    pairs = torch.tensor([(a, b) for a, b in combinations(range(len(owner)), 2) if owner[a] == owner[b]])
    return Batch(parts, pairs, outcomes(scores[pairs[:, 0]] - scores[pairs[:, 1]], run.dimensions))


def kept_tokens(visual: Sequence[Tensor], share: float, generator: torch.Generator) -> list[Tensor]:
    """The same random share of the tokens of all clips, so that pairs are compared on the same places."""
    count = visual[0].shape[1]
    chosen = torch.randperm(count, generator=generator)[: max(1, round(share * count))]
    return [v[:, chosen] for v in visual]


def train_head(run: HeadRun, material: Material, tuned: WanDit | None = None) -> PrismHead:
    """A head trained on pairs of a batch of captions at a time, with `trainers.prism train`'s loss, optimiser and schedule.

    tuned: a backbone whose LoRA is trained with the head; features are then computed and not read.
    """
    torch.manual_seed(run.seed)
    config = HeadConfig(128, run.dim, 4, run.layers, run.taps, run.queries, run.dimensions, pooling=run.pooling)
    head = PrismHead(config).train(True)
    settings = TrainSettings(
        run.steps, run.batch, 1, run.rate, run.decay, 100, 1.0, ETA, "no", run.seed, (0.0, 1.0), run.dropout, "cosine"
    )
    optimiser, generator = make_optimiser(head, settings), torch.Generator().manual_seed(run.seed)
    adapter = list(lora.parameters(tuned.model).values()) if tuned else []
    if tuned:
        optimiser.add_param_group({"params": adapter, "weight_decay": 0.0})
    for step in range(run.steps):
        batch = draw_batch(run, material, generator)
        found = online_features(batch, material, tuned, run.taps) if tuned else batch.features(material, run.taps)
        visual, words, mask = found
        if run.dropout:
            visual = kept_tokens(visual, 1 - run.dropout, generator)
        scores = head(visual, words, mask)
        loss = rao_kupper(scores[batch.pairs[:, 0]] - scores[batch.pairs[:, 1]], batch.outcome, ETA).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*head.parameters(), *adapter], 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimiser.step()
    return head.train(False)


def online_features(batch: Batch, material: Material, dit: WanDit, taps: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """`Batch.features` by a backbone that is being tuned, with gradients."""
    x, sigmas, texts = [], [], []
    for key, clips, levels in batch.parts:
        runs, known = material.runs[key], material.levels(key)
        for i, k in zip(clips, levels, strict=True):
            x.append(latent_at(runs, i, key[1], k))
            sigmas.append(known[k])
            texts.append(runs.texts[runs.caption[i]])
    text, bias, mask = fold_padding(texts)
    # Without the decorator that computes features without gradients.
    visual, words = WanDit.features.__wrapped__(dit, torch.stack(x), torch.tensor(sigmas), text, list(taps), bias)
    return visual, words, mask


# Measuring


@torch.no_grad()
def scores_of(head: PrismHead, material: Material, key: tuple[str, str], captions: Sequence[int]) -> Tensor:
    """[captions, clips of a caption, levels, dimensions]."""
    count, rows = len(material.levels(key)), []
    for c in captions:
        clips = material.runs[key].members[c].tolist()
        every, levels = [i for i in clips for _ in range(count)], list(range(count)) * len(clips)
        found = head(material.visual(key, head.config.taps, every, levels), *material.words(key, every))
        rows.append(found.view(len(clips), count, -1))
    return torch.stack(rows)


def truth_of(runs: Runs, captions: Sequence[int]) -> Tensor:
    """The judge's scores [captions, clips of a caption, DIMENSIONS]."""
    return torch.stack([runs.scores[runs.members[c]] for c in captions])


def accuracy(predicted: Tensor, truth: Tensor, tie: float, allowed: Tensor | None = None) -> Tensor:
    """Share [captions] of pairs beyond the tie that scores [captions, clips] order as truth does; NaN where there is none.

    allowed: bool [clips, clips], which pairs count (None: all).
    """
    gap, found = (x[:, :, None] - x[:, None, :] for x in (truth, predicted))
    decided = gap > tie
    if allowed is not None:
        decided = decided & allowed
    right = (found > 0).double() + 0.5 * (found == 0).double()
    return (right * decided).sum(dim=(1, 2)) / decided.sum(dim=(1, 2))


def gains(head: PrismHead, scores: Tensor, truth: Tensor, sigmas: Sequence[float]) -> dict[str, list[float]]:
    """{way to choose one clip of each caption: the judge's overall score of it, less the mean of all, for each caption}.

    By the head at each noise level; by halving, from the highest level on until one clip is left; and by the judge itself.
    """
    overall, own = truth[:, :, DIMENSIONS.index("overall")], scores[..., head.config.dimensions.index("overall")]
    best = {f"{s:.3f}": own[:, :, k].argmax(dim=1) for k, s in enumerate(sigmas)} | {"judge": overall.argmax(dim=1)}
    halved = []
    for one in own:
        racing = torch.arange(len(one))
        for k in range(len(sigmas)):
            if len(racing) > 1:
                racing = racing[one[racing, k].topk(max(1, len(racing) // 2)).indices]
        halved.append(racing[0])
    best["halving"] = torch.stack(halved)
    return {k: (overall.gather(1, i[:, None])[:, 0] - overall.mean(dim=1)).tolist() for k, i in best.items()}


def measure(head: PrismHead, material: Material) -> dict[str, list[float]]:
    """{"<kind>/<captions>/<dimension>/<sigma>": accuracy of each caption}.

    kind: WITHIN, ACROSS, or two generators; captions: "held out" (of training combinations) or "test" (of others).
    """
    found: dict[str, list[float]] = {}

    def note(kind: str, captions: str, scores: Tensor, truth: Tensor, sigmas: Sequence[float], allowed=None) -> None:
        for k, sigma in enumerate(sigmas):
            for d, name in enumerate(head.config.dimensions):
                right = accuracy(scores[:, :, k, d], truth[:, :, DIMENSIONS.index(name)], TIES[name], allowed)
                found[f"{kind}/{captions}/{name}/{sigma:.3f}"] = right.tolist()

    for part, captions in (("train", "held out"), ("test", "test")):
        if (f"{part}-late", COMMON) not in material.runs:
            continue
        key = (f"{part}-late", WITHIN)
        if key in material.runs:
            count = len(material.runs[key].ids)
            which = range(count - HELD_OUT if part == "train" else 0, count)
            truth = truth_of(material.runs[key], which)
            scores = scores_of(head, material, key, which)
            note(WITHIN, captions, scores, truth, material.levels(key))
            found |= {f"gain/{captions}/{k}": v for k, v in gains(head, scores, truth, material.levels(key)).items()}
        keys = [(f"{part}-{g}", COMMON) for g in GENERATORS]
        count = len(material.runs[keys[0]].ids)
        which = range(count - ACROSS_HELD_OUT if part == "train" else 0, count)
        every = [(scores_of(head, material, k, which), truth_of(material.runs[k], which)) for k in keys]
        scores, truth = (torch.cat(x, dim=1) for x in zip(*every, strict=True))
        owner = torch.arange(len(GENERATORS)).repeat_interleave(scores.shape[1] // len(GENERATORS))
        note(ACROSS, captions, scores, truth, BETWEEN, owner[:, None] != owner)
        for a, b in combinations(range(len(GENERATORS)), 2):
            pair = ((owner == a)[:, None] & (owner == b)) | ((owner == b)[:, None] & (owner == a))
            note(f"{GENERATORS[a]} against {GENERATORS[b]}", captions, scores, truth, BETWEEN, pair)
    return found


def compared(head: PrismHead, material: Material, kind: str, captions: slice) -> dict[float, tuple[Tensor, Tensor]]:
    """{noise level: (score differences [P, D], outcomes [P, D])} of pairs of held-out training captions, a slice of them."""
    keys = [("train-late", WITHIN)] if kind == WITHIN else [(f"train-{g}", COMMON) for g in GENERATORS]
    count = len(material.runs[keys[0]].ids)
    which = range(count - (HELD_OUT if kind == WITHIN else ACROSS_HELD_OUT), count)[captions]
    scores = torch.cat([scores_of(head, material, k, which) for k in keys], dim=1)
    truth = torch.cat([truth_of(material.runs[k], which) for k in keys], dim=1)
    a, b = torch.tensor(list(combinations(range(scores.shape[1]), 2))).T
    outcome = outcomes(truth[:, a] - truth[:, b], head.config.dimensions).flatten(0, 1)
    gap = scores[:, a] - scores[:, b]
    return {s: (gap[:, :, k].flatten(0, 1), outcome) for k, s in enumerate(material.levels(keys[0]))}


def loaded_head(run: HeadRun, head: PrismHead, material: Material, backbone: Path) -> LoadedHead:
    """The head as a file that nodes load; its tie thresholds and its table are of different held-out captions."""
    fitted = compared(head, material, run.kind, slice(1, None, 2))
    thresholds, table = {}, []
    for d, name in enumerate(run.dimensions):
        gaps, known = (torch.cat([x[:, d] for x in column]) for column in zip(*fitted.values(), strict=True))
        thresholds[name] = tie_threshold(gaps, known)
    for sigma, (gap, outcome) in compared(head, material, run.kind, slice(0, None, 2)).items():
        for d, name in enumerate(run.dimensions):
            found = asdict(accuracies.accuracy(gap[:, d], outcome[:, d], thresholds[name]))
            found.pop("threshold")
            error = accuracies.calibration_error(gap[:, d], outcome[:, d])
            table.append({"dimension": name, "sigma": round(sigma, 6), **found, "calibration": error})
    levels = [row["sigma"] for row in table]
    notes = {"command": "benchmarks.toy_world.prism_heads", "seed": run.seed, "prompts": run.captions, "run": run.name}
    identity = wan_dit.load(backbone, 0).backbone
    return LoadedHead(
        head, identity, WAN21, (min(levels), max(levels)), thresholds,
        {"accuracy": table, "training": {"steps": run.steps}}, notes, run.name,
    )  # fmt: skip


def only(loaded: LoadedHead, dimension: str) -> LoadedHead:
    """The head without its other dimensions; its scores in this one are the same."""
    config = loaded.head.config
    k, last = config.dimensions.index(dimension), len(loaded.head.mlp) - 1
    state = loaded.head.state_dict()
    for name in (f"mlp.{last}.weight", f"mlp.{last}.bias"):
        state[name] = state[name][k : k + 1]
    head = PrismHead(replace(config, dimensions=(dimension,)))
    head.load_state_dict(state)
    table = [row for row in loaded.metrics["accuracy"] if row["dimension"] == dimension]
    threshold = {dimension: loaded.threshold[dimension]}
    return replace(loaded, head=head.train(False), threshold=threshold, metrics=loaded.metrics | {"accuracy": table})


# All runs


def runs_to_do() -> list[HeadRun]:
    """Every head of the study; names say what differs from "within" and "between", which read block 8 by a query."""
    within, between = HeadRun("within"), HeadRun("between", ACROSS, ACROSS_CAPTIONS - ACROSS_HELD_OUT)
    found = [
        within, between, replace(within, name="within, mean", pooling="mean"),
        replace(between, name="between, mean", pooling="mean"),
    ]  # fmt: skip
    for tap in (t for t in TAPS if t != 8):
        found += [
            replace(within, name=f"within, block {tap}", taps=(tap,)),
            replace(between, name=f"between, block {tap}", taps=(tap,)),
        ]
    for count in (450, 900, 1800):
        found += [
            replace(within, name=f"within, {count} captions", captions=count),
            replace(within, name=f"within, mean, {count} captions", captions=count, pooling="mean"),
        ]
    found += [
        replace(within, name="within, blocks 5 8 11", taps=(5, 8, 11)),
        replace(within, name="within, overall only", dimensions=("overall",)),
        replace(within, name="within, 4 queries", queries=4),
        replace(within, name="within, block 11, 4 queries", taps=(11,), queries=4),
        replace(within, name="within, mean, block 11", taps=(11,), pooling="mean"),
        replace(between, name="between, independent noise", noise=INDEPENDENT),
    ]
    found += [replace(between, name=f"between, {b} backbone", backbone=b) for b in GENERATORS if b != "late"]
    # As many steps and pairs with a frozen and with a tuned backbone, whose features have to be computed in every step.
    for run in (within, between):
        short = replace(run, steps=200, batch=8)
        found += [
            replace(short, name=f"{run.name}, frozen, 200 steps of 8"),
            replace(short, name=f"{run.name}, LoRA, 200 steps of 8", tuned=8),
        ]
    return found + [replace(r, name=f"{r.name}, seed 1", seed=1) for r in found[:4]]


def parts_of(backbone: str) -> list[Part]:
    """What heads on a backbone read."""
    return [p for p in PARTS if backbone == "late" or p.what == COMMON]


def feature_jobs(data: Path, folder: Path, backbone: Path, part: Part) -> list[FeatureJob]:
    runs = [r["run"] for r in scored_runs(data / part.folder)]
    captions = {r.rsplit("-", 1)[0] for r in runs}
    per = part.per or len(runs) // len(captions)
    count = min(len(captions), part.captions or len(captions)) * per
    return [FeatureJob(data, folder, backbone, part, i) for i in range(0, count, CHUNK)]


_materials: dict[str, Material] = {}


def material_of(data: Path, folder: Path, backbone: Path, name: str) -> Material:
    """What heads on the backbone `name` read; kept for the next head of this process."""
    if name not in _materials:
        _materials.clear()
        runs, features, texts = {}, {}, {}
        for part in parts_of(name):
            key = (part.folder, part.what)
            runs[key] = load_runs(data / part.folder, part.captions, part.per)
            jobs = feature_jobs(data, folder, backbone, part)
            features[key] = {t: Features(jobs, t) for t in TAPS}
            texts[key] = text_features(runs[key], backbone)
        _materials[name] = Material(runs, features, texts)
    return _materials[name]


def tests_of(material: Material, dit: WanDit, taps: Sequence[int]) -> Material:
    """The test captions of a material with a tuned backbone's features."""
    keys = [k for k in material.runs if k[0].startswith("test")]
    runs = {k: material.runs[k] for k in keys}
    features = {k: {t: Computed(runs[k], k[1], dit, t) for t in taps} for k in keys}
    return Material(runs, features, {k: material.texts[k] for k in keys})


def do_run(arguments: tuple[HeadRun, Path, Path, Path, Path]) -> str:
    """Trains and measures a head; writes heads/<name>.safetensors and results/<name>.json."""
    run, data, output, features, backbone = arguments
    torch.set_num_threads(1)
    result = output / "results" / f"{run.name}.json"
    if not result.exists():
        material = material_of(data, features, backbone, run.backbone)
        tuned = None
        if run.tuned:
            tuned = wan_dit.load(backbone, max(run.taps))
            lora.add(tuned.model, lora.LoraOptions(run.tuned, run.tuned), run.seed)
        head = train_head(run, material, tuned)
        if tuned:
            # Only the tests are measured: the features of every training clip would have to be computed again. The head is not
            # kept: it is of no use without its LoRA.
            material = tests_of(material, tuned, run.taps)
        else:
            files.save(loaded_head(run, head, material, backbone), output / "heads" / f"{run.name}.safetensors")
        found = json.dumps({"run": asdict(run), "accuracy": measure(head, material)})
        write_atomic(result, lambda partial: Path(partial).write_text(found, encoding="utf-8"))
    return run.name


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.prism_heads", __doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--generators", type=Path, nargs=3, required=True, metavar="FILE", help="early, middle, late")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number, of one thread each (one per core)")
    parser.add_argument(
        "--export", nargs=3, metavar=("RUN", "DIMENSION", "FILE"), help="instead: write a head's dimension to a file"
    )
    args = parser.parse_args(argv)
    if args.export:
        run, dimension, file = args.export
        files.save(only(files.load(args.output_dir / "heads" / f"{run}.safetensors"), dimension), file)
        return 0
    backbones = dict(zip(GENERATORS, args.generators, strict=True))
    folder = args.output_dir / "features"
    for sub in ("features", "heads", "results"):
        (args.output_dir / sub).mkdir(parents=True, exist_ok=True)
    jobs = [j for name, path in backbones.items() for p in parts_of(name) for j in feature_jobs(args.data, folder, path, p)]
    jobs.sort(key=lambda j: j.backbone != backbones["late"])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context) as pool:
        list(tqdm(pool.map(compute_features, jobs), total=len(jobs), desc="features", unit="chunk"))
        tasks = [(r, args.data, args.output_dir, folder, backbones[r.backbone]) for r in runs_to_do()]
        for name in tqdm(pool.map(do_run, tasks), total=len(tasks), desc="heads", unit="head"):
            tqdm.write(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
