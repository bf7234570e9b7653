"""Groups of candidate clips, one prompt per group: subfolders of a folder, or preference records.

Each subfolder has the clips of one prompt: videos, latents (.safetensors, .latent, .pt, .pth, one clip per file), or both for
one clip under one name (a.mp4 and a.safetensors). The prompt is the text of its prompt.txt, otherwise the folder's name. A
folder that has clips of its own and no such subfolder is one group. Files of this pack that hold no finished clip are left
out, which is said.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.files import lines, preference_records
from ..kernels.geometry.record import GeometryRecord
from ..latents.read import LATENT_SUFFIXES, clip_files
from ..video.read import VIDEO_SUFFIXES

PROMPT = "prompt.txt"


class GroupError(ValueError):
    """A folder has no usable group; the message names it and states the reason."""


@dataclass(frozen=True)
class Candidate:
    """A candidate clip. name: unique among all groups; stored: scores of its preference record, higher is better."""

    name: str
    video: Path | None
    latents: Path | None
    seed: int | None = None
    stored: dict[str, float] = field(default_factory=dict)
    geometry: GeometryRecord | None = None

    @property
    def path(self) -> Path:
        """The file that a manifest names: the latents if there are any, since they come straight from the sampler."""
        return self.latents or self.video


@dataclass(frozen=True)
class Group:
    """Candidates of one prompt, sorted by name."""

    name: str
    prompt: str
    candidates: list[Candidate]


def read(paths: Iterable[str | Path]) -> list[Group]:
    """All groups of folders and of records.jsonl files. Raises GroupError, RecordError or FileNotFoundError."""
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
            raise GroupError(f"two groups have the name '{group.name}'; give their parent folder, or each folder only once")
    return groups


def prompt_of(folder: Path) -> str:
    """The text of a folder's prompt.txt, otherwise the folder's name. Raises GroupError for an empty file, TextError for one
    that is no text."""
    path = folder / PROMPT
    if not path.is_file():
        return folder.resolve().name
    text = " ".join(lines.read_text(path).split())
    if not text:
        raise GroupError(f"{path}: is empty; expected the prompt of the clips in this folder")
    return text


def _of_records(path: Path) -> list[Group]:
    groups = []
    for record in preference_records.read(path):
        candidates = [
            Candidate(f"{record.id}/{c.latent.name}", None, c.latent, c.seed, c.scores, c.geometry) for c in record.candidates
        ]
        groups.append(Group(record.id, record.prompt, candidates))
    if not groups:
        raise GroupError(f"{path}: contains no record")
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
    for path in clip_files(p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."):
        suffix = path.suffix.lower()
        kind = "video" if suffix in VIDEO_SUFFIXES else "latents" if suffix in LATENT_SUFFIXES else None
        if kind and found[path.stem].setdefault(kind, path) is not path:
            other = found[path.stem][kind]
            raise GroupError(f"{other} and {path.name}: two files of {kind} with one name; remove one of them")
    candidates = [Candidate(f"{name}/{stem}", f.get("video"), f.get("latents")) for stem, f in found.items() if f]
    return Group(name, prompt_of(folder), candidates)
