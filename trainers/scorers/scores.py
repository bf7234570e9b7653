"""Scores of all candidates by the scorers that a command names, and the checks before any of them runs.

Values are higher is better and are kept in a file (trainers.scorers.cache):

  geometry      minus the logarithm of the record's error; none for an undetermined clip that has no error
  flow_residual minus the mean squared error of the model's own velocity for the clip with noise added
  prompt_gap    how much smaller that error is with the prompt than with the negative prompt, at high noise
  prism         mean over noise levels and dimensions of a head's scores, of the same noise for all clips of a group
  shell_lcc     minus the difference between the root mean square distance of the clip's tokens and the shell's radius
  stored:NAME   a score that came with the preference records
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.geometry.record import GeometryRecord
from ..preferences.clips import ClipReader
from ..preferences.groups import Group
from ..running import results_log, shares
from ..running.shares import Share
from . import geometry, model_reward, prism, shell_lcc
from .cache import ScoreCache, known_of, sorted_rows
from .geometry import GEOMETRY, GeometryOptions, usable_records
from .model_reward import MODEL_REWARDS, ModelRewardOptions
from .prism import PRISM, PrismOptions
from .shell_lcc import SHELL_LCC

STORED = "stored:"
# Every scorer that needs no score which came with the candidates.
SCORERS = (GEOMETRY, *MODEL_REWARDS, PRISM, SHELL_LCC)
OF_PROMPTS = (*MODEL_REWARDS, PRISM)


class CandidateScoringError(ValueError):
    """Candidates cannot be scored as asked; the message states what is missing."""


@dataclass(frozen=True)
class ScoringOptions:
    """prism, model: their files are None where they were not given; manifold: a file or None; device: of the manifold."""

    geometry: GeometryOptions
    prism: PrismOptions | None = None
    model: ModelRewardOptions | None = None
    manifold: str | None = None
    device: str = "auto"


@dataclass
class Scores:
    """values, skipped: {scorer: {candidate: value or reason}}; records: {candidate: its geometry record}."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    records: dict[str, GeometryRecord] = field(default_factory=dict)


def score(
    groups: Sequence[Group], scorers: Iterable[str], options: ScoringOptions, reader: ClipReader, path: Path,
    share: Share = shares.WHOLE, score_again: bool = False,
) -> Scores:  # fmt: skip
    """Scores every candidate by these scorers; current scores in the file `path` and its shards' files are taken from there.

    share: score its groups only; `gather` then takes the scores of all. score_again: ignore what the files hold. Raises
    CandidateScoringError, and what loading a model raises; a clip that cannot be read is skipped.
    """
    known = known_of([] if score_again else shares.rows(path))
    with results_log.Log(share.path(path)) as log:
        cache, found = ScoreCache(known, log, groups, share.is_main), Scores()
        for scorer in scorers:
            _add(scorer, share.of(groups), options, reader, cache, found)
            # One share may have nothing but clips that cannot be scored.
            if share.whole:
                _require_some(scorer, groups, found)
    if share.whole:
        shares.settle(path, sorted_rows(known))
    _add_records(groups, found)
    return found


def gather(
    groups: Sequence[Group], scorers: Iterable[str], options: ScoringOptions, reader: ClipReader, path: Path,
    count: int | None = None,
) -> Scores:  # fmt: skip
    """The scores that all shards have written, which are put into the one file `path`; nothing is scored.

    count: of shards, None to take it from the files' names. Raises ShareError naming the shards that are missing, or
    CandidateScoringError.
    """
    known, found = known_of(shares.rows(path)), Scores()
    cache = ScoreCache(known, None, groups, shown=False)
    for scorer in scorers:
        _add(scorer, groups, options, reader, cache, found)
    missing = [k for k, group in enumerate(groups) if any(c.name in cache.missing for c in group.candidates)]
    shares.require_none(missing, len(groups), "groups", path, count)
    for scorer in scorers:
        _require_some(scorer, groups, found)
    shares.settle(path, sorted_rows(known))
    _add_records(groups, found)
    return found


def require_possible(groups: Sequence[Group], scorers: Iterable[str], options: ScoringOptions, reader: ClipReader) -> None:
    """Raises CandidateScoringError, before any long work, where an argument is missing that some clip needs."""
    for scorer in sorted(set(scorers)):
        if missing := lacking(groups, scorer, options, reader):
            raise CandidateScoringError(missing)


def lacking(groups: Sequence[Group], scorer: str, options: ScoringOptions, reader: ClipReader) -> str | None:
    """The sentence that says which argument a scorer lacks for these groups, None where it can run."""
    if scorer == PRISM:
        missing = [f"--{name}" for name in ("head", "backbone") if getattr(options.prism, name) is None]
        if missing:
            return f"--by {PRISM} needs {' and '.join(missing)}"
    if scorer in MODEL_REWARDS and options.model.backbone is None:
        return f"--by {scorer} needs --backbone, the whole model that the clips were made with"
    if scorer in OF_PROMPTS:
        made = options.prism if scorer == PRISM else options.model
        if made.texts is None and made.encoder is None:
            return f"--by {scorer} needs the prompts: --text_encoder, or --texts made by `trainers.prism embed`"
    if scorer == SHELL_LCC and options.manifold is None:
        return f"--by {SHELL_LCC} needs --manifold"
    if reader.options.vae is not None:
        return None
    videos = [c for g in groups for c in g.candidates if c.latents is None]
    if videos and scorer in (PRISM, SHELL_LCC, *MODEL_REWARDS):
        return f"{videos[0].video}: a video; --by {scorer} reads latents, so give --vae to encode it"
    latents = [c for g in groups if not usable_records(g) for c in g.candidates if c.video is None]
    if latents and scorer == GEOMETRY:
        return (
            f"{latents[0].latents}: latents without a geometry record that is comparable with its group's; give --vae to "
            "decode them, or add a video of the same name to the folder"
        )
    return None


def _add(
    scorer: str, groups: Sequence[Group], options: ScoringOptions, reader: ClipReader, cache: ScoreCache, found: Scores
) -> None:
    """Adds the scores of one scorer, in the order of the groups, whatever the order in which they become known."""
    found.values[scorer], found.skipped[scorer] = {}, {}
    if scorer.startswith(STORED):
        _take_stored(scorer, groups, found)
        return
    with closing(_rows(scorer, groups, options, reader, cache)) as rows:
        for row in rows:
            _take(row, found)
    names = [c.name for g in groups for c in g.candidates]
    for figures in (found.values, found.skipped):
        figures[scorer] = {name: figures[scorer][name] for name in names if name in figures[scorer]}


def _add_records(groups: Sequence[Group], found: Scores) -> None:
    """Adds records that came with the clips: the filters use them, whatever the scorers are."""
    for group in groups:
        if usable_records(group):
            for candidate in group.candidates:
                found.records.setdefault(candidate.name, candidate.geometry)


def _rows(
    scorer: str, groups: Sequence[Group], options: ScoringOptions, reader: ClipReader, cache: ScoreCache
) -> Iterator[dict]:
    if scorer == GEOMETRY:
        return geometry.score(groups, options.geometry, reader, cache)
    if scorer == PRISM:
        return prism.score(groups, options.prism, reader, cache)
    if scorer in MODEL_REWARDS:
        return model_reward.score(groups, scorer, options.model, reader, cache)
    return shell_lcc.score(groups, options.manifold, options.device, reader, cache)


def _take(row: dict, found: Scores) -> None:
    name, scorer = row["candidate"], row["scorer"]
    if "record" in row:
        found.records[name] = GeometryRecord.from_json(row["record"])
    if "skipped" in row:
        found.skipped[scorer][name] = row["skipped"]
    elif row["value"] is None:
        found.skipped[scorer][name] = f"undetermined: {found.records[name].reason}"
    else:
        found.values[scorer][name] = row["value"]


def _require_some(scorer: str, groups: Sequence[Group], found: Scores) -> None:
    # Geometry may be undetermined everywhere; a model that fails on every clip points at the arguments.
    if scorer == GEOMETRY or found.values[scorer]:
        return
    if scorer.startswith(STORED):
        held = ", ".join(sorted({k for g in groups for c in g.candidates for k in c.stored})) or "none"
        key = scorer.removeprefix(STORED)
        raise CandidateScoringError(f"--by {scorer}: no candidate has a stored score '{key}'; stored scores: {held}")
    reasons = list(found.skipped[scorer].values())
    raise CandidateScoringError(f"--by {scorer}: none of {len(reasons)} clips could be scored; the first: {reasons[0]}")


def _take_stored(scorer: str, groups: Sequence[Group], found: Scores) -> None:
    key = scorer.removeprefix(STORED)
    candidates = [c for g in groups for c in g.candidates]
    found.values[scorer] = {c.name: c.stored[key] for c in candidates if key in c.stored}
    found.skipped[scorer] = {c.name: f"no stored score '{key}'" for c in candidates if key not in c.stored}
