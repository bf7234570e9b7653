"""Training pairs from a folder of preference records: which candidate won, and the latents of both, from disk."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import torch

from ..kernels.files import preference_records
from ..kernels.files.latents import describe_one, read_one
from ..kernels.files.preference_records import RECORDS, Record
from ..kernels.latent_space import LatentSpace, LatentSpaceError
from .model_files import file_state
from .output_names import NAME, in_output, is_in_output
from .record_preference import FOLDER


class PairsError(ValueError):
    """A folder of records gives no pairs to train on; the message names the folder or the file, and what to do."""


@dataclass(frozen=True)
class RecordedPair:
    """Two candidates of one prompt, the better one first."""

    prompt: str
    winner: Path
    loser: Path


def folder_of(text: str, source: str) -> Path:
    """The folder of records that an input names: one that Record Preference wrote, by its name or as its `folder` output.

    Raises PairsError, naming `source`, unless it lies in ComfyUI's output directory and has records.
    """
    plain = bool(NAME.fullmatch(text))
    path = Path(in_output(FOLDER, text) if plain else text)
    if not plain and not (os.path.isabs(text) and is_in_output(text)):
        raise PairsError(
            f"{source}: found {text!r}, expected the name of a folder in output/{FOLDER}, or the folder output of Record "
            "Preference"
        )
    if not (path / RECORDS).is_file():
        raise PairsError(f"{source}: there are no records in {path}; record candidates with Record Preference first")
    return path


def state_of(text: str, source: str) -> list[int] | str:
    """What changes when records are added, for a node's fingerprint."""
    try:
        return file_state(folder_of(text, source) / RECORDS)
    except ValueError as e:
        return str(e)


def read(folder: Path, decided_by: str) -> list[RecordedPair]:
    """The pairs of a folder: the recorded preferences, or where `decided_by` names a score, the best against the worst
    candidate of each record. Raises PairsError, RecordError or FileNotFoundError.
    """
    records = preference_records.read(folder)
    if not records:
        raise PairsError(f"{folder / RECORDS}: contains no record; record candidates with Record Preference first")
    pairs = [pair for record in records if (pair := _pair(record, decided_by)) is not None]
    if not pairs:
        names = ", ".join(sorted({name for r in records for c in r.candidates for name in c.scores})) or "none"
        if decided_by:
            raise PairsError(
                f"{folder / RECORDS}: no record has two candidates with different scores '{decided_by}'; scores found: {names}"
            )
        raise PairsError(
            f"{folder / RECORDS}: none of its {len(records)} records has a preference; record winner and loser, or name the "
            f"score that decides in 'decided_by' (found: {names})"
        )
    return pairs


def require_fit(pairs: Sequence[RecordedPair], space: LatentSpace, model: str) -> tuple[int, ...]:
    """The latent shape [C, T, h, w] that all clips have; every file is read once, so that a bad one is found at the start.

    Raises PairsError for several sizes and for a winner equal to its loser, LatentSpaceError unless the clips are of `space`,
    that of `model`, and FormatError for a file that is damaged or has NaN.
    """
    shape, first = None, None
    for pair in pairs:
        for path in (pair.winner, pair.loser):
            comfy.model_management.throw_exception_if_processing_interrupted()
            found, own = describe_one(path)
            if not found.same_as(space):
                raise LatentSpaceError(
                    f"{path}: holds '{found.id}' latents, {model} works in '{space.id}'; train the model that the candidates "
                    "were made with"
                )
            shape, first = shape or own, first or path
            if own != shape:
                raise PairsError(
                    f"{path}: is {list(own)} and {first.name} is {list(shape)} (channels, frames, height, width); record "
                    "clips of one size and length in a folder of their own"
                )
        if torch.equal(read_one(pair.winner), read_one(pair.loser)):
            raise PairsError(
                f"{pair.winner} and {pair.loser.name} have the same content, so neither is better; remove the record"
            )
    return shape


def digest(pairs: Sequence[RecordedPair]) -> str:
    """16 hexadecimal digits that follow from the pairs and their order."""
    text = "\n".join(f"{p.prompt}\t{p.winner.name}\t{p.loser.name}" for p in pairs)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pair(record: Record, decided_by: str) -> RecordedPair | None:
    if not decided_by:
        chosen = record.preference
    else:
        known = [(c.scores[decided_by], i) for i, c in enumerate(record.candidates) if decided_by in c.scores]
        best, worst = (max(known), min(known)) if known else ((0.0, 0), (0.0, 0))
        chosen = (best[1], worst[1]) if best[0] > worst[0] else None
    if chosen is None:
        return None
    winner, loser = (record.candidates[i].latent for i in chosen)
    return RecordedPair(record.prompt, winner, loser)
