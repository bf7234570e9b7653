"""Training data of a PRISM head, a folder: latents of runs, embedded prompts, and preferences between runs.

A run is one sampling of a prompt, or one real clip; its latents are stored clean, at some noise levels (sigma), or both.

  latents-*.safetensors   shards of kind "latents"; a clip's entry holds "run", "prompt" and "sigma": the noise level of an
                          intermediate latent of the run, or None for a clean one, which is noised while training
  texts.safetensors       of kind "texts": prompt id -> [words, width], the text encoder's output without padding
  comparisons.jsonl       {"prompt", "a", "b", "outcome": {dimension: 1, 0 or -1}}, a and b being runs; earlier versions
                          called it pairs.jsonl, which is still read

`cache`, or `collect` with `label`, write it. Features are not stored: they are a hundred times larger than latents.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import held_out
from ..kernels.files import header as file_header
from ..kernels.files import lines
from ..kernels.files.atomic import write_atomic
from ..kernels.latent_space import LatentSpace
from ..latents.read import ClipRef, list_clips, read_clip, related, shape_of
from ..preferences.manifest import COMPARISONS, PAIRS, is_comparisons, is_manifest
from ..scorers.prism_network import noised

TEXTS = "texts.safetensors"
# In tensors of outcomes: no preference is known.
MISSING = 2
# Stored noise levels are rounded to six digits.
SAME_SIGMA = 1e-4


class PrismDataError(ValueError):
    """A folder of training data cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Row:
    """A preference between the runs a and b of one prompt; outcome: {dimension: 1 (a is better), 0 (tie) or -1}."""

    prompt: str
    a: str
    b: str
    outcome: Mapping[str, int]


@dataclass
class PreferenceData:
    """runs: {run: {sigma, or None for clean: latent}}; texts: {prompt id: [words, width]}; dimensions: in a fixed order."""

    space: LatentSpace
    runs: dict[str, dict[float | None, ClipRef]]
    texts: dict[str, Tensor]
    rows: list[Row]
    dimensions: tuple[str, ...] = field(default=())
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _groups: dict[str, str] = field(default_factory=dict, repr=False)

    def sigmas(self) -> list[float]:
        """Noise levels of the stored intermediate latents, descending; empty where all latents are clean."""
        return sorted({s for states in self.runs.values() for s in states if s is not None}, reverse=True)

    def shape(self, run: str) -> tuple[int, ...]:
        """[C, T, H, W] of a run's latents, read from a header once."""
        if run not in self._shapes:
            self._shapes[run] = tuple(shape_of(next(iter(self.runs[run].values()))))
        return self._shapes[run]

    def state(self, run: str, sigma: float | None) -> Tensor:
        """The latent [C, T, H, W] of a run at a stored noise level, or clean for None; fp32, normalised."""
        return read_clip(self.runs[run][sigma])

    def outcomes(self, rows: Sequence[Row]) -> Tensor:
        """[N, dimensions] of 1, 0, -1, or MISSING where a row has no outcome in a dimension."""
        return torch.tensor([[r.outcome.get(d, MISSING) for d in self.dimensions] for r in rows])


@dataclass(frozen=True)
class Batch:
    """N pairs, each at one noise level. x: [2N, C, T, H, W], a's then b's; sigma: [2N]; words: 2N texts; outcome: [N, D]."""

    x: Tensor
    sigma: Tensor
    words: list[Tensor]
    outcome: Tensor


def load(folder: str | Path) -> PreferenceData:
    """Reads a folder's texts and preferences; latents stay on disk. Raises PrismDataError or FormatError."""
    folder = Path(folder)
    path = comparisons_file(folder)
    if not path.is_file():
        require_no_manifest(folder)
    for name in (TEXTS, path.name):
        if not (folder / name).is_file():
            raise PrismDataError(f"{folder}: no {name} in it; `python -m trainers.prism cache`, or collect and label, adds it")
    texts, _ = file_header.read(folder / TEXTS, "texts")
    shards = sorted(folder.glob("latents-*.safetensors"))
    if not shards:
        raise PrismDataError(f"{folder}: no latents-*.safetensors in it")
    runs: dict[str, dict[float | None, ClipRef]] = defaultdict(dict)
    for ref in list_clips(shards, noisy_states=True):
        entry = _entry_of(ref)
        runs[entry["run"]][entry.get("sigma")] = ref
    rows = _read_rows(path)
    unknown = [r for row in rows for r in (row.a, row.b) if r not in runs]
    if unknown:
        raise PrismDataError(f"{path}: {len(unknown)} runs have no latents; the first is '{unknown[0]}'")
    wordless = [row.prompt for row in rows if row.prompt not in texts]
    if wordless:
        raise PrismDataError(f"{path}: prompt '{wordless[0]}' is not in {TEXTS}")
    dimensions = tuple(sorted({d for row in rows for d in row.outcome}))
    return PreferenceData(ref.space, dict(runs), {k: v.float() for k, v in texts.items()}, rows, dimensions)


def runs_of(folder: str | Path) -> dict[str, list[str]]:
    """{prompt: its runs, sorted} of a folder's shards; pairs need not exist yet. Raises PrismDataError or InputError."""
    found = defaultdict(set)
    for ref in list_clips(sorted(Path(folder).glob("latents-*.safetensors")) or [folder], noisy_states=True):
        entry = _entry_of(ref)
        found[entry["prompt"]].add(entry["run"])
    return {prompt: sorted(runs) for prompt, runs in sorted(found.items())}


def comparisons_file(folder: Path) -> Path:
    """The folder's comparisons: comparisons.jsonl, or the pairs.jsonl of an earlier version where only that exists."""
    earlier = folder / PAIRS
    path = folder / COMPARISONS
    return earlier if not path.is_file() and is_comparisons(earlier) else path


def require_no_manifest(folder: Path) -> None:
    """Raises PrismDataError for an output folder of `trainers.pairs build`, which holds a manifest and no latents."""
    if is_manifest(folder / PAIRS):
        raise PrismDataError(
            f"{folder / PAIRS}: a manifest of `python -m trainers.pairs build`; encode its clips with `python -m "
            f"trainers.prism cache --pairs {folder / PAIRS}` and another --output"
        )


def remove_comparisons(folder: Path) -> None:
    """Deletes the folder's comparisons, under their present and their earlier name. Raises OSError."""
    (folder / COMPARISONS).unlink(missing_ok=True)
    if is_comparisons(folder / PAIRS):
        (folder / PAIRS).unlink()


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Writes the folder's comparisons, atomically, and deletes those of an earlier version. Raises OSError."""
    lines = [json.dumps({"prompt": r.prompt, "a": r.a, "b": r.b, "outcome": dict(r.outcome)}) for r in rows]
    write_atomic(folder / COMPARISONS, lambda partial: Path(partial).write_text("\n".join(lines) + "\n", encoding="utf-8"))
    if is_comparisons(folder / PAIRS):
        (folder / PAIRS).unlink()


def draw(
    data: PreferenceData,
    rows: Sequence[Row],
    sigma: float | None,
    generator: torch.Generator,
    sigma_range: tuple[float, float] = (0.0, 1.0),
) -> Batch:
    """A batch of these rows, whose latents must have one shape.

    sigma: the noise level of all pairs; None draws one per pair within `sigma_range`: one that both runs have a latent at,
    else uniformly. Both clips of a pair get the same noise, noise level and length, so that they differ in content only.
    The longer latent is cut: Wan's VAE is causal, so its first frames equal the latent of a shorter clip. Raises
    PrismDataError where sizes differ or a run has no latent for the noise level.
    """
    xs, sigmas = ([], []), []
    for row in rows:
        pair_sigma, stored = _sigma_for(data, row, sigma, generator, sigma_range)
        latents = [data.state(run, pair_sigma if stored else None) for run in (row.a, row.b)]
        length = common_shape(row, latents[0].shape, latents[1].shape)[1]
        latents = [z[:, :length] for z in latents]
        if not stored:
            noise = torch.randn(latents[0].shape, generator=generator)
            latents = [pair_sigma * noise + (1 - pair_sigma) * z for z in latents]
        for column, z in zip(xs, latents, strict=True):
            column.append(z)
        sigmas.append(pair_sigma)
    words = [data.texts[row.prompt] for row in rows]
    return Batch(torch.stack(xs[0] + xs[1]), torch.tensor(2 * sigmas), words + words, data.outcomes(rows))


@dataclass(frozen=True)
class ClipAtSigma:
    """One clip of a pair at a noise level. stored: whether its run has a latent there, else the clean one is noised."""

    run: str
    prompt: str
    shape: tuple[int, ...]
    stored: bool

    def state(self, data: PreferenceData, sigma: float, seed: int) -> Tensor:
        """The noisy latent [C, T, H, W]; noise follows from the seed, the prompt and the shape."""
        if self.stored:
            level = next(s for s in data.runs[self.run] if s is not None and abs(s - sigma) < SAME_SIGMA)
            return data.state(self.run, level)[:, : self.shape[1]]
        return noised(data.state(self.run, None)[:, : self.shape[1]], sigma, seed, self.prompt)


def clips_at_sigma(data: PreferenceData, row: Row, sigma: float) -> tuple[ClipAtSigma, ClipAtSigma]:
    """Both clips of a row at a noise level. Raises PrismDataError where sizes differ or a latent is missing."""
    _, stored = _sigma_for(data, row, sigma, None, (0.0, 1.0))
    shape = common_shape(row, data.shape(row.a), data.shape(row.b))
    return ClipAtSigma(row.a, row.prompt, shape, stored), ClipAtSigma(row.b, row.prompt, shape, stored)


def by_shape(data: PreferenceData, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows grouped by `common_shape`; only headers are read. Raises PrismDataError where sizes differ."""
    groups = defaultdict(list)
    for row in rows:
        groups[common_shape(row, data.shape(row.a), data.shape(row.b))].append(row)
    return list(groups.values())


def common_shape(row: Row, a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape [C, T, H, W] of both latents after cutting to the smaller T. Raises PrismDataError where sizes differ."""
    if (a[0], *a[2:]) != (b[0], *b[2:]):
        raise PrismDataError(f"runs '{row.a}' and '{row.b}' have latents {list(a)} and {list(b)}: encode both at one size")
    return (a[0], min(a[1], b[1]), *a[2:])


def split(data: PreferenceData, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows with no prompt and no clip in both. share: of the groups to hold out, at least one, never all.

    Raises PrismDataError for fewer than two groups of `prompt_groups`.
    """
    groups = prompt_groups(data)
    if len(set(groups.values())) < 2:
        prompts = len(groups)
        found = f"{prompts} prompts whose runs share clips" if prompts > 1 else prompts
        raise PrismDataError(f"held-out figures need at least two prompts with clips of their own, found {found}")
    held = held_out.draw(groups.values(), share, seed)
    return [r for r in data.rows if groups[r.prompt] not in held], [r for r in data.rows if groups[r.prompt] in held]


def prompt_groups(data: PreferenceData) -> dict[str, str]:
    """{prompt: name of its group}: prompts whose runs are related (`latents.read.related`) are in one group.

    A clip that the folder has no digest of, as in those of earlier versions, is read. Raises LatentDataError for a damaged
    one.
    """
    if not data._groups:
        names = [row.prompt for row in data.rows]
        known = {run: related(_one_state(data.runs[run])) for run in {r for row in data.rows for r in (row.a, row.b)}}
        groups = held_out.linked_names(names, [known[row.a] + known[row.b] for row in data.rows])
        data._groups.update(zip(names, groups, strict=True))
    return data._groups


def require_classes(rows: Sequence[Row], source: str | Path) -> None:
    """Raises PrismDataError for a dimension in which all rows are ties: there is nothing to learn from it."""
    for name in sorted({d for row in rows for d in row.outcome}):
        if not any(row.outcome.get(name) for row in rows):
            raise PrismDataError(f"{source}: in dimension '{name}' every training pair is a tie; leave that dimension out")


def _one_state(states: Mapping[float | None, ClipRef]) -> ClipRef:
    """The clean latent of a run, or its least noisy one."""
    return states[min(states, key=lambda sigma: sigma or 0.0)]


def _entry_of(ref: ClipRef) -> dict:
    if "run" not in (ref.entry or {}):
        raise PrismDataError(f"{ref.path}: clip '{ref.clip_id}' has no \"run\" entry in the shard's header")
    return ref.entry


def _sigma_for(
    data: PreferenceData, row: Row, sigma: float | None, generator: torch.Generator | None, sigma_range: tuple[float, float]
) -> tuple[float, bool]:
    """(noise level, whether both runs have a latent at it); sigma None draws one as `draw` describes."""
    low, high = sigma_range
    common = sorted(s for s in data.runs[row.a].keys() & data.runs[row.b].keys() if s is not None)
    clean = None in data.runs[row.a] and None in data.runs[row.b]
    if sigma is None:
        usable = [s for s in common if low - SAME_SIGMA <= s <= high + SAME_SIGMA]
        if usable:
            return usable[int(torch.randint(0, len(usable), (), generator=generator))], True
        if common and not clean:
            raise PrismDataError(f"runs '{row.a}' and '{row.b}' have no common sigma from {low:g} to {high:g}")
        sigma = low + (high - low) * float(torch.rand((), generator=generator))
    near = [s for s in common if abs(s - sigma) < SAME_SIGMA]
    if near:
        return near[0], True
    if not clean:
        raise PrismDataError(f"runs '{row.a}' and '{row.b}' have no latents at sigma {sigma:g} and no clean ones to noise")
    return sigma, False


def _read_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in lines.numbered(lines.read_text(path)):
        try:
            values = json.loads(line)
            outcome = {k: int(v) for k, v in values["outcome"].items()}
            if not set(outcome.values()) <= {-1, 0, 1}:
                raise ValueError(f"outcomes must be 1, 0 or -1, found {outcome}")
            rows.append(Row(values["prompt"], values["a"], values["b"], outcome))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
            raise PrismDataError(f"{path}, line {number}: {type(e).__name__} {e}") from e
    if not rows:
        raise PrismDataError(f"{path}: contains no pair")
    return rows
