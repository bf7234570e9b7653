"""Groups of candidate clips of one prompt each: subfolders of a folder, or our preference records.

In a folder of subfolders, each subfolder has one prompt's clips: videos, latents (.safetensors, .latent, .pt, one clip a
file), or both of one clip under one name (a.mp4 and a.safetensors). The prompt stands in its prompt.txt, else the folder's
name is it. A folder that holds clips itself, and no such subfolder, is one group.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.files import preference_records
from ..kernels.geometry.record import GeometryRecord
from ..latents.read import LATENT_SUFFIXES
from ..video.read import VIDEO_SUFFIXES

PROMPT = "prompt.txt"


class GroupError(ValueError):
    """A folder has no groups that can be used; the message names it and says why."""


@dataclass(frozen=True)
class Candidate:
    """One clip. name: unique among all groups; stored: scores that came with it, higher is better."""

    name: str
    video: Path | None
    latents: Path | None
    seed: int | None = None
    stored: dict[str, float] = field(default_factory=dict)
    geometry: GeometryRecord | None = None

    @property
    def path(self) -> Path:
        """What a manifest names: latents where there are any, since they come straight from the sampler."""
        return self.latents or self.video


@dataclass(frozen=True)
class Group:
    """Candidates of one prompt, sorted by name."""

    name: str
    prompt: str
    candidates: list[Candidate]


def read(paths: Iterable[str | Path]) -> list[Group]:
    """Every group of folders and of records.jsonl files. Raises GroupError, RecordError or FileNotFoundError."""
    groups: list[Group] = []
    for path in map(Path, paths):
        if path.is_file() or (path / preference_records.RECORDS).is_file():
            groups += _of_records(path)
        elif path.is_dir():
            groups += _of_folder(path)
        else:
            raise FileNotFoundError(f"{path}: no such folder")
    known: dict[str, Group] = {}
    for group in groups:
        if known.setdefault(group.name, group) is not group:
            raise GroupError(f"two groups are called '{group.name}'; give the folder above both instead, or each only once")
    return groups


def prompt_of(folder: Path) -> str:
    """What prompt.txt in a folder says, else the folder's name. Raises GroupError for an empty one or one not in UTF-8."""
    path = folder / PROMPT
    if not path.is_file():
        return folder.resolve().name
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as e:
        raise GroupError(f"{path}: not a text file in UTF-8 ({e.reason})") from e
    if not text:
        raise GroupError(f"{path}: is empty; expected the prompt of the clips beside it")
    return text


def _of_records(path: Path) -> list[Group]:
    groups = []
    for record in preference_records.read(path):
        candidates = [
            Candidate(f"{record.id}/{c.latent.name}", None, c.latent, c.seed, c.scores, c.geometry) for c in record.candidates
        ]
        groups.append(Group(record.id, record.prompt, candidates))
    if not groups:
        raise GroupError(f"{path}: no record in it")
    return groups


def _of_folder(folder: Path) -> list[Group]:
    subfolders = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name[0] != "."]
    groups = [_of_subfolder(p) for p in subfolders]
    groups = [g for g in groups if g.candidates] or [_of_subfolder(folder)]
    if not groups[0].candidates:
        suffixes = ", ".join((*LATENT_SUFFIXES, *VIDEO_SUFFIXES))
        raise GroupError(f"{folder}: no {preference_records.RECORDS} and no clips in its subfolders (looked for {suffixes})")
    return groups


def _of_subfolder(folder: Path) -> Group:
    name = folder.resolve().name
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "."):
        suffix = path.suffix.lower()
        kind = "video" if suffix in VIDEO_SUFFIXES else "latents" if suffix in LATENT_SUFFIXES else None
        if kind and found[path.stem].setdefault(kind, path) is not path:
            other = found[path.stem][kind]
            raise GroupError(f"{other} and {path.name}: two files of {kind} under one name; leave one of them out")
    candidates = [Candidate(f"{name}/{stem}", f.get("video"), f.get("latents")) for stem, f in found.items() if f]
    return Group(name, prompt_of(folder), candidates)
