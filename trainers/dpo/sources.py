"""Preference pairs from manifests, tables and records, with the rule that makes pairs of scores."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..kernels.files import preference_records
from ..preferences import manifest
from ..preferences.manifest import PreferencePair
from ..preferences.tables import PairsError


@dataclass(frozen=True)
class SourcePair:
    """Two files of one prompt; margin: the winner's score above the loser's by the deciding scorer, None where unknown."""

    prompt: str
    winner: Path
    loser: Path
    margin: float | None
    scores: dict[str, dict[str, float]]
    source: str


def read(paths: Sequence[str | Path], root: str | None, by: str | None, most: int) -> list[SourcePair]:
    """The decided pairs of all `paths`, each pair once, in order.

    paths: files or folders: a manifest pairs.jsonl or the folder with it, preference records, a .csv or .jsonl table. by: the
    score or dimension that decides; None: the preference itself ("overall"). Where `by` is a score, at most `most` pairs of
    each group of clips that are compared with each other are taken, those with the largest margins: 1 is best against worst.
    Raises PairsError, RecordError or FileNotFoundError.
    """
    found: dict[tuple[str, Path, Path], SourcePair] = {}
    for path in map(Path, paths):
        path = path / manifest.PAIRS if manifest.is_manifest(path / manifest.PAIRS) else path
        if path.is_dir() and not (path / preference_records.RECORDS).is_file():
            raise PairsError(
                f"{path}: neither {manifest.PAIRS} of `python -m trainers.pairs build` nor {preference_records.RECORDS} in it"
            )
        for pair in _of_one(path, root, by, most):
            found.setdefault((pair.prompt, pair.winner, pair.loser), pair)
    return list(found.values())


def _of_one(path: Path, root: str | None, by: str | None, most: int) -> list[SourcePair]:
    pairs = manifest.read(path, root, by)
    made = [SourcePair(p.prompt, p.winner, p.loser, _margin(p, by), p.scores, path.name) for p in pairs]
    if not made:
        why = "a preference" if by is None else f"different scores '{by}'"
        raise PairsError(f"{path}: none of its pairs has {why}; name the score that decides with --by")
    if by is None or manifest.is_manifest(path):
        return made
    kept = []
    for group in _groups(made):
        known = [p for p in group if p.margin is not None]
        kept += [p for p in group if p.margin is None]
        kept += sorted(known, key=lambda p: (-p.margin, str(p.winner), str(p.loser)))[:most]
    return kept


def _groups(pairs: Sequence[SourcePair]) -> list[list[SourcePair]]:
    """The pairs, those that share a clip, directly or over others, together: one group for each record."""
    above: dict[Path, Path] = {}

    def root_of(clip: Path) -> Path:
        while above.setdefault(clip, clip) != clip:
            clip = above[clip]
        return clip

    for pair in pairs:
        above[root_of(pair.winner)] = root_of(pair.loser)
    groups = defaultdict(list)
    for pair in pairs:
        groups[root_of(pair.winner)].append(pair)
    return list(groups.values())


def _margin(pair: PreferencePair, by: str | None) -> float | None:
    winner, loser = pair.scores.get("winner", {}), pair.scores.get("loser", {})
    common = sorted(winner.keys() & loser.keys())
    name = by if by in common else common[0] if by is None and len(common) == 1 else None
    return None if name is None else float(winner[name]) - float(loser[name])
