"""The sides of a comparison: clips of folders or .jsonl files, matched by file name, or by prompt and seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..kernels.files import lines
from ..latents.read import LATENT_SUFFIXES, clip_files
from ..preferences.groups import PROMPT, Candidate, Group
from ..video.read import VIDEO_SUFFIXES

JSONL = ".jsonl"
NAMED = 3


class SideError(ValueError):
    """A side of a comparison cannot be used; the message names the folder or file and states the reason."""


@dataclass(frozen=True)
class SideClip:
    """One clip of a side, its prompt and seed None where they are not known."""

    video: Path | None
    latents: Path | None
    prompt: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Matched:
    """groups: one for each clip that all sides have, its candidates in the order of the sides and named SIDE/NAME, its prompt
    "" where none is known; by: what they were matched by; unmatched: {side: names that some other side lacks}."""

    groups: list[Group]
    by: str
    unmatched: dict[str, list[str]] = field(default_factory=dict)


def read(sources: Mapping[str, Path]) -> Matched:
    """Clips of every side that all sides have. sources: {side's name: folder or .jsonl}.

    Raises SideError where a side has no clips, or no clip is in all of them; FileNotFoundError.
    """
    sides = {name: _of_jsonl(path) if path.suffix == JSONL else _of_folder(path) for name, path in sources.items()}
    by = "name"
    if all(path.suffix == JSONL for path in sources.values()) and all(
        c.prompt is not None and c.seed is not None for clips in sides.values() for c in clips.values()
    ):
        sides, by = _by_prompt_and_seed(sides, sources), "prompt and seed"
    first, *others = sides
    common = [n for n in sorted(sides[first]) if all(n in sides[o] for o in others)]
    if not common:
        shown = "; ".join(f"{sources[s]} has {', '.join(sorted(c)[:NAMED])}" for s, c in sides.items())
        raise SideError(f"no clip has the same {by} in all of the folders: {shown}; give clips of the same prompts and seeds")
    groups = [_group(name, {side: clips[name] for side, clips in sides.items()}, sources) for name in common]
    unmatched = {side: sorted(set(clips) - set(common)) for side, clips in sides.items()}
    return Matched(groups, by, {side: names for side, names in unmatched.items() if names})


def _group(name: str, clips: Mapping[str, SideClip], sources: Mapping[str, Path]) -> Group:
    prompts = {side: clip.prompt for side, clip in clips.items() if clip.prompt is not None}
    if len(set(prompts.values())) > 1:
        told = "; ".join(f"{sources[side]}: '{text[:60]}'" for side, text in prompts.items())
        raise SideError(f"'{name}' has different prompts in the folders ({told}); compare clips of the same prompt")
    seeds = {side: clip.seed for side, clip in clips.items() if clip.seed is not None}
    if len(set(seeds.values())) > 1:
        told = "; ".join(f"{sources[side]}: {seed}" for side, seed in seeds.items())
        raise SideError(f"'{name}' has different seeds in the folders ({told}); compare clips of the same seed")
    candidates = [Candidate(f"{side}/{name}", c.video, c.latents, c.seed) for side, c in clips.items()]
    return Group(name, next(iter(prompts.values()), ""), candidates)


def _of_folder(folder: Path) -> dict[str, SideClip]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of clips, nor a {JSONL} file")
    found: dict[str, dict[str, Path]] = {}
    for path in clip_files(p for p in sorted(folder.rglob("*")) if _kind(p) and p.name[0] != "." and p.is_file()):
        kind = _kind(path)
        name = path.relative_to(folder).with_suffix("").as_posix()
        other = found.setdefault(name, {}).setdefault(kind, path)
        if other is not path:
            raise SideError(f"{other} and {path.name}: two files of {kind} with one name; remove one of them")
    if not found:
        raise SideError(f"{folder}: no clips in this folder (looked for {', '.join((*VIDEO_SUFFIXES, *LATENT_SUFFIXES))})")
    prompts: dict[Path, str | None] = {}
    return {name: SideClip(f.get("video"), f.get("latents"), _prompt_of(name, folder, prompts)) for name, f in found.items()}


def _prompt_of(name: str, folder: Path, known: dict[Path, str | None]) -> str | None:
    for path in ((folder / name).parent / f"{Path(name).name}.txt", (folder / name).parent / PROMPT):
        if path not in known:
            known[path] = _text(path) if path.is_file() else None
        if known[path] is not None:
            return known[path]
    return None


def _text(path: Path) -> str:
    text = " ".join(lines.read_text(path).split())
    if not text:
        raise SideError(f"{path}: is empty; expected the prompt of a clip")
    return text


def _of_jsonl(path: Path) -> dict[str, SideClip]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of clips")
    found: dict[str, SideClip] = {}
    for number, line in lines.numbered(lines.read_text(path)):
        name, clip = _row(line, f"{path}, line {number}", path.parent)
        if found.setdefault(name, clip) is not clip:
            raise SideError(f"{path}, line {number}: the clip '{name}' comes twice; name each file once")
    if not found:
        raise SideError(f'{path}: has no line; expected {{"file", "prompt", "seed"}} for each clip')
    return found


def _row(line: str, where: str, folder: Path) -> tuple[str, SideClip]:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise SideError(f"{where}: not JSON ({e})") from e
    file = row.get("file") if isinstance(row, dict) else None
    if not isinstance(file, str) or _kind(Path(file)) is None:
        raise SideError(f'{where}: expected an object with "file", a video or latents, and "prompt" and "seed"')
    prompt, seed = row.get("prompt"), row.get("seed")
    if not isinstance(prompt, str | None) or not isinstance(seed, int | None) or isinstance(seed, bool):
        raise SideError(f'{where}: expected "prompt" to be text and "seed" a whole number')
    path = folder / file
    videos, latents = (path, None) if _kind(path) == "video" else (None, path)
    return Path(file).with_suffix("").as_posix(), SideClip(videos, latents, prompt, seed)


def _by_prompt_and_seed(sides: Mapping[str, Mapping[str, SideClip]], sources: Mapping[str, Path]) -> dict:
    """The same sides under the names that the first one has for a prompt and seed."""
    names: dict[tuple, str] = {}
    renamed = {}
    for side, clips in sides.items():
        mine: dict[str, SideClip] = {}
        for name, clip in clips.items():
            called = names.setdefault((clip.prompt, clip.seed), name)
            if mine.setdefault(called, clip) is not clip:
                raise SideError(f"{sources[side]}: two clips of seed {clip.seed} and the prompt '{clip.prompt[:60]}'")
        renamed[side] = mine
    return renamed


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return "video" if suffix in VIDEO_SUFFIXES else "latents" if suffix in LATENT_SUFFIXES else None


def known_prompts(groups: Sequence[Group]) -> list[Group]:
    """Those whose prompt is known."""
    return [g for g in groups if g.prompt]
