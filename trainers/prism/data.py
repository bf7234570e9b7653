"""What a PRISM head is trained on, in a folder: latents of runs, embedded prompts, and which run was preferred.

  latents-*.safetensors   shards of kind "latents"; a clip's entry holds "run", "prompt" and "sigma": None for a finished
                          or real clip, to be noised while training, or the noise level at which a run was caught
  texts.safetensors       of kind "texts": prompt id -> [words, width], the text encoder's output without padding
  pairs.jsonl             {"prompt", "a", "b", "outcome": {dimension: 1, 0 or -1}}, a and b being runs

`cache` and `collect` write it. Features are never stored: they are a hundred times larger than latents.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.files import header as formats
from ..kernels.files.atomic import write_atomic
from ..kernels.latent_space import LatentSpace
from ..latents import read as latent_data
from ..latents.read import ClipRef

TEXTS, PAIRS = "texts.safetensors", "pairs.jsonl"
MISSING = 2
# Noise levels are kept with six digits.
SAME_LEVEL = 1e-4


class PrismDataError(ValueError):
    """A folder of preferences cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Row:
    """One comparison of two runs of one prompt."""

    prompt: str
    a: str
    b: str
    outcome: Mapping[str, int]


@dataclass
class PreferenceData:
    """runs: run -> {sigma or None: its latent}; texts: prompt id -> [words, width]; dimensions: in a fixed order."""

    space: LatentSpace
    runs: dict[str, dict[float | None, ClipRef]]
    texts: dict[str, Tensor]
    rows: list[Row]
    dimensions: tuple[str, ...] = field(default=())
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def levels(self) -> list[float]:
        """Noise levels that runs were caught at, descending; empty where all latents are clean."""
        return sorted({s for states in self.runs.values() for s in states if s is not None}, reverse=True)

    def shape(self, run: str) -> tuple[int, ...]:
        """[C, T, H, W] of a run's latents, from a header and only once."""
        if run not in self._shapes:
            self._shapes[run] = tuple(latent_data.shape_of(next(iter(self.runs[run].values()))))
        return self._shapes[run]

    def state(self, run: str, sigma: float | None) -> Tensor:
        """The latent [C, T, H, W] of a run, fp32."""
        return latent_data.read_clip(self.runs[run][sigma])

    def outcomes(self, rows: Sequence[Row]) -> Tensor:
        """[N, dimensions] of 1, 0, -1, and MISSING where a row says nothing of a dimension."""
        return torch.tensor([[r.outcome.get(d, MISSING) for d in self.dimensions] for r in rows])


@dataclass(frozen=True)
class Batch:
    """Pairs at one noise level each. x: [2N, C, T, H, W], a's then b's; sigma: [2N]; words: 2N texts; outcome: [N, D]."""

    x: Tensor
    sigma: Tensor
    words: list[Tensor]
    outcome: Tensor


def load(folder: str | Path) -> PreferenceData:
    """Reads a folder's lists; latents stay on disk. Raises PrismDataError, FormatError or FileNotFoundError."""
    folder = Path(folder)
    for name in (TEXTS, PAIRS):
        if not (folder / name).is_file():
            raise PrismDataError(f"{folder}: no {name} in it; `python -m trainers.prism cache` or collect makes such a folder")
    texts, _ = formats.read(folder / TEXTS, "texts")
    shards = sorted(folder.glob("latents-*.safetensors"))
    if not shards:
        raise PrismDataError(f"{folder}: no latents-*.safetensors in it")
    runs: dict[str, dict[float | None, ClipRef]] = defaultdict(dict)
    for ref in latent_data.list_clips(shards):
        entry = ref.entry or {}
        if "run" not in entry:
            raise PrismDataError(f"{ref.path}: its clip '{ref.clip_id}' says of no run that it belongs to")
        runs[entry["run"]][entry.get("sigma")] = ref
    rows = _read_rows(folder / PAIRS)
    unknown = [r for row in rows for r in (row.a, row.b) if r not in runs]
    if unknown:
        raise PrismDataError(f"{folder / PAIRS}: names {len(unknown)} runs without latents, the first is '{unknown[0]}'")
    wordless = [row.prompt for row in rows if row.prompt not in texts]
    if wordless:
        raise PrismDataError(f"{folder / PAIRS}: prompt '{wordless[0]}' is not in {TEXTS}")
    dimensions = tuple(sorted({d for row in rows for d in row.outcome}))
    return PreferenceData(ref.space, dict(runs), {k: v.float() for k, v in texts.items()}, rows, dimensions)


def runs_of(folder: str | Path) -> dict[str, list[str]]:
    """{prompt: its runs} of a folder's shards, whether or not anything was preferred yet. Raises PrismDataError."""
    found = defaultdict(set)
    for ref in latent_data.list_clips(sorted(Path(folder).glob("latents-*.safetensors")) or [folder]):
        if "run" not in (ref.entry or {}):
            raise PrismDataError(f"{ref.path}: its clip '{ref.clip_id}' says of no run that it belongs to")
        found[ref.entry["prompt"]].add(ref.entry["run"])
    return {prompt: sorted(runs) for prompt, runs in sorted(found.items())}


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """All rows at once, whole or not at all. Raises OSError."""
    lines = [json.dumps({"prompt": r.prompt, "a": r.a, "b": r.b, "outcome": dict(r.outcome)}) for r in rows]
    write_atomic(folder / PAIRS, lambda partial: Path(partial).write_text("\n".join(lines) + "\n", encoding="utf-8"))


def draw(
    data: PreferenceData,
    rows: Sequence[Row],
    sigma: float | None,
    generator: torch.Generator,
    within: tuple[float, float] = (0.0, 1.0),
) -> Batch:
    """A batch of these rows, all latents of one shape.

    sigma: the noise level; None draws one for each pair from the range `within`: of those that both runs were caught at,
    else uniformly. A pair shares its noise, its level and its length, so that what differs is the clips: Wan's VAE is
    causal, and the first frames of the longer latent are what the shorter clip would have been. Raises PrismDataError
    where sizes differ.
    """
    xs, sigmas = ([], []), []
    for row in rows:
        level, caught = _level(data, row, sigma, generator, within)
        sides = [data.state(run, level if caught else None) for run in (row.a, row.b)]
        length = common_shape(row, sides[0].shape, sides[1].shape)[1]
        sides = [z[:, :length] for z in sides]
        if not caught:
            noise = torch.randn(sides[0].shape, generator=generator)
            sides = [level * noise + (1 - level) * z for z in sides]
        for side, z in zip(xs, sides, strict=True):
            side.append(z)
        sigmas.append(level)
    words = [data.texts[row.prompt] for row in rows]
    return Batch(torch.stack(xs[0] + xs[1]), torch.tensor(2 * sigmas), words + words, data.outcomes(rows))


@dataclass(frozen=True)
class Side:
    """One clip of a comparison at a noise level. caught: whether its run was caught there, else it is to be noised."""

    run: str
    prompt: str
    shape: tuple[int, ...]
    caught: bool

    def state(self, data: PreferenceData, sigma: float, seed: int) -> Tensor:
        """The noisy latent [C, T, H, W]; noise follows from the seed, the prompt and the shape."""
        if self.caught:
            level = next(s for s in data.runs[self.run] if s is not None and abs(s - sigma) < SAME_LEVEL)
            return data.state(self.run, level)[:, : self.shape[1]]
        digest = hashlib.sha256(f"{seed} {self.prompt}".encode()).digest()
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        return sigma * noise + (1 - sigma) * data.state(self.run, None)[:, : self.shape[1]]


def sides_at(data: PreferenceData, row: Row, sigma: float) -> tuple[Side, Side]:
    """Both clips of a row at a noise level. Raises PrismDataError where they cannot be compared there."""
    _, caught = _level(data, row, sigma, None, (0.0, 1.0))
    shape = common_shape(row, data.shape(row.a), data.shape(row.b))
    return Side(row.a, row.prompt, shape, caught), Side(row.b, row.prompt, shape, caught)


def by_shape(data: PreferenceData, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows parted by their latents' common shape, which only headers are read for. Raises PrismDataError."""
    groups = defaultdict(list)
    for row in rows:
        groups[common_shape(row, data.shape(row.a), data.shape(row.b))].append(row)
    return list(groups.values())


def common_shape(row: Row, a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape [C, T, H, W] at which two latents are compared: the shorter's. Raises PrismDataError where sizes differ."""
    if (a[0], *a[2:]) != (b[0], *b[2:]):
        raise PrismDataError(f"runs '{row.a}' and '{row.b}' have latents {list(a)} and {list(b)}: encode both to one size")
    return (a[0], min(a[1], b[1]), *a[2:])


def split(data: PreferenceData, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows with no prompt in both, at least one prompt each. Raises PrismDataError for one prompt."""
    prompts = sorted({row.prompt for row in data.rows})
    if len(prompts) < 2:
        raise PrismDataError(f"held-out figures need at least two prompts, found {len(prompts)}")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    held = {prompts[i] for i in order[:count]}
    return [r for r in data.rows if r.prompt not in held], [r for r in data.rows if r.prompt in held]


def require_classes(rows: Sequence[Row], source: str | Path) -> None:
    """Raises PrismDataError for a dimension in which every comparison is a tie: there is nothing to learn from it."""
    for name in sorted({d for row in rows for d in row.outcome}):
        if not any(row.outcome.get(name) for row in rows):
            raise PrismDataError(f"{source}: in dimension '{name}' every training pair is a tie; leave that dimension out")


def _level(
    data: PreferenceData, row: Row, sigma: float | None, generator: torch.Generator | None, within: tuple[float, float]
) -> tuple[float, bool]:
    """(noise level, whether both runs were caught at it)."""
    low, high = within
    common = sorted(s for s in data.runs[row.a].keys() & data.runs[row.b].keys() if s is not None)
    clean = None in data.runs[row.a] and None in data.runs[row.b]
    if sigma is None:
        usable = [s for s in common if low - SAME_LEVEL <= s <= high + SAME_LEVEL]
        if usable:
            return usable[int(torch.randint(0, len(usable), (), generator=generator))], True
        if common and not clean:
            raise PrismDataError(f"runs '{row.a}' and '{row.b}' were both caught at no sigma from {low:g} to {high:g}")
        sigma = low + (high - low) * float(torch.rand((), generator=generator))
    near = [s for s in common if abs(s - sigma) < SAME_LEVEL]
    if near:
        return near[0], True
    if not clean:
        raise PrismDataError(f"runs '{row.a}' and '{row.b}' have no latents at sigma {sigma:g} and no finished ones to noise")
    return sigma, False


def _read_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            outcome = {k: int(v) for k, v in values["outcome"].items()}
            if not set(outcome.values()) <= {-1, 0, 1}:
                raise ValueError(f"outcomes are 1, 0 or -1, found {outcome}")
            rows.append(Row(values["prompt"], values["a"], values["b"], outcome))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise PrismDataError(f"{path}, line {number}: {type(e).__name__} {e}") from e
    if not rows:
        raise PrismDataError(f"{path}: no pair in it")
    return rows
