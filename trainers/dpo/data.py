"""Training data of preference pairs, a folder that `cache` writes and `train` and `eval` read.

  latents-*.safetensors   shards of kind "latents"; a clip's id is the digest of its content, so equal clips are stored once
  texts.safetensors       of kind "texts": text id -> [words, width], the text encoder's output without padding
  preferences.jsonl       {"prompt": text id, "winner": clip id, "loser": clip id, "shape": [C, T, h, w], "margin": number or
                          null, "scores": {"winner" or "loser": {scorer: number}}, "image": clip id of the first frame's
                          latent followed by grey, for image-to-video, or null}
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..kernels import held_out
from ..kernels.files import header as file_header
from ..kernels.latent_space import LatentSpace
from ..latents.read import ClipRef, list_clips, read_clip
from ..running import results_log

TEXTS, PREFERENCES = "texts.safetensors", "preferences.jsonl"


class DpoDataError(ValueError):
    """A folder of preference pairs cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class PairRow:
    """A preference: ids of the prompt's text and of two clips, whose latents are both `shape` [C, T, h, w]; margin: how much
    better the winner scored, None where that is not known; image: id of the image's latent, None for text-to-video.
    """

    prompt: str
    winner: str
    loser: str
    shape: tuple[int, ...]
    margin: float | None = None
    image: str | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits that identify the pair by its contents."""
        return hashlib.sha256(f"{self.prompt} {self.winner} {self.loser}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PairData:
    """clips: {id: where its latents are}; texts: {id: [words, width] fp32}; prompts: {text id: the prompt} where known."""

    space: LatentSpace
    clips: dict[str, ClipRef]
    texts: dict[str, Tensor]
    prompts: dict[str, str]
    rows: list[PairRow]

    def latents(self, clip: str, start: int = 0, frames: int | None = None) -> Tensor:
        """Normalised fp32 [C, frames, h, w] from latent frame `start` on. Raises LatentDataError for NaN, naming the file."""
        z = read_clip(self.clips[clip])
        return z if frames is None else z[:, start : start + frames]


def load(folder: str | Path) -> PairData:
    """Reads texts and pairs; latents stay on disk. Raises DpoDataError, FormatError or what a damaged shard raises."""
    folder = Path(folder)
    for name in (TEXTS, PREFERENCES):
        if not (folder / name).is_file():
            raise DpoDataError(f"{folder}: no {name} in it; `python -m trainers.dpo cache` writes such a folder")
    texts, header = file_header.read(folder / TEXTS, "texts")
    shards = sorted(folder.glob("latents-*.safetensors"))
    if not shards:
        raise DpoDataError(f"{folder}: no latents-*.safetensors in it; run `python -m trainers.dpo cache` again")
    refs = list_clips(shards, noisy_states=True)
    clips = {ref.clip_id: ref for ref in refs}
    rows = [_row(r, folder / PREFERENCES, n) for n, r in enumerate(results_log.read(folder / PREFERENCES), 1)]
    if not rows:
        raise DpoDataError(f"{folder / PREFERENCES}: contains no pair")
    for row in rows:
        for clip in (row.winner, row.loser, row.image):
            if clip is not None and clip not in clips:
                raise DpoDataError(f"{folder}: the latents of clip {clip} are missing; run `trainers.dpo cache` again")
        if row.prompt not in texts:
            raise DpoDataError(f"{folder}: the embedded prompt {row.prompt} is missing in {TEXTS}; run `cache` again")
    return PairData(refs[0].space, clips, {k: v.float() for k, v in texts.items()}, header.config.get("prompts", {}), rows)


def split(data: PairData, share: float, seed: int) -> tuple[list[PairRow], list[PairRow]]:
    """(training, held-out) rows with no prompt and no clip in both: clips' ids are digests of their content.

    share: of the prompts, or of the groups of those that share clips, at least one unless it is 0, never all. Raises
    DpoDataError where there are too few to hold one out.
    """
    if share == 0:
        return list(data.rows), []
    names = [row.prompt for row in data.rows]
    groups = held_out.linked_names(names, [(("clip", row.winner), ("clip", row.loser)) for row in data.rows])
    if len(set(groups)) < 2:
        found = "one" if len(set(names)) == 1 else f"{len(set(names))} that share clips"
        raise DpoDataError(
            f"held-out figures need pairs of at least two prompts with clips of their own, found {found}; give more, or "
            "--held_out 0"
        )
    held = held_out.draw(groups, share, seed)
    sides = [[row for row, group in zip(data.rows, groups, strict=True) if (group in held) == side] for side in (False, True)]
    return tuple(sides)


def rows_digest(rows: Sequence[PairRow]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the pairs in their order."""
    return hashlib.sha256("\n".join(row.key for row in rows).encode()).hexdigest()[:16]


def _row(row: dict, path: Path, number: int) -> PairRow:
    try:
        margin = None if row.get("margin") is None else float(row["margin"])
        shape = tuple(map(int, row["shape"]))
        return PairRow(str(row["prompt"]), str(row["winner"]), str(row["loser"]), shape, margin, row.get("image"))
    except (KeyError, TypeError, ValueError) as e:
        raise DpoDataError(f"{path}, line {number}: {type(e).__name__} {e}; run `python -m trainers.dpo cache` again") from e
