"""Training pairs from a folder of preference records: which candidate won, and the latents of both, from disk."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import comfy.model_management
import torch

from ..kernels.files import preference_records
from ..kernels.files.latents import describe_one, read_one
from ..kernels.files.preference_records import RECORDS, Record
from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..kernels.prism.preference_loss import TIE, WIN
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


@dataclass(frozen=True)
class Comparison:
    """Two candidates of one prompt; outcome: WIN where the first is better, TIE."""

    pair: RecordedPair
    outcome: int


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
    except (ValueError, OSError) as e:
        return str(e)


def read(folder: Path, decided_by: str) -> list[RecordedPair]:
    """The pairs of a folder: the recorded preferences, or where `decided_by` names a score, the best against the worst
    candidate of each record. Raises PairsError, RecordError or FileNotFoundError.
    """
    pairs = []
    for record in _records(folder):
        chosen = record.preference
        if decided_by:
            known = _scored(record, decided_by)
            best, worst = (max(known), min(known)) if known else ((0.0, 0), (0.0, 0))
            chosen = (best[1], worst[1]) if best[0] > worst[0] else None
        if chosen is not None:
            pairs.append(_pair(record, *chosen))
    return _some(pairs, folder, decided_by)


def read_comparisons(folder: Path, decided_by: str) -> list[Comparison]:
    """The comparisons of a folder: the recorded preferences, or where `decided_by` names a score, all pairs of candidates of
    each record, equal scores being ties. Raises PairsError, RecordError or FileNotFoundError.
    """
    found = []
    for record in _records(folder):
        if not decided_by:
            found += [Comparison(_pair(record, *record.preference), WIN)] if record.preference else []
            continue
        for (first, a), (second, b) in combinations(_scored(record, decided_by), 2):
            better, worse = (a, b) if first >= second else (b, a)
            found.append(Comparison(_pair(record, better, worse), TIE if first == second else WIN))
    if all(c.outcome == TIE for c in found):
        found = []
    return _some(found, folder, decided_by)


def require_fit(files: Sequence[Path], space: LatentSpace, model: str) -> tuple[int, ...]:
    """The latent shape [C, T, h, w] that all clips have, from the files' headers.

    Raises PairsError for several sizes, LatentSpaceError unless the clips are of `space`, that of `model`, and FormatError for
    a file that is damaged.
    """
    shape = None
    for path in files:
        found, own = describe_one(path)
        if not found.same_as(space):
            raise LatentSpaceError(
                f"{path}: holds '{found.id}' latents, {model} works in '{space.id}'; train the model that the candidates "
                "were made with"
            )
        shape = shape or own
        if own != shape:
            raise PairsError(
                f"{path}: is {list(own)} and {files[0].name} is {list(shape)} (channels, frames, height, width); record "
                "clips of one size and length in a folder of their own"
            )
    return shape


def require_different(pairs: Sequence[RecordedPair]) -> None:
    """Reads every file once, so that a bad one is found at the start. Raises PairsError for a winner equal to its loser, and
    FormatError for a file that is damaged or has NaN.
    """
    for pair in pairs:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if torch.equal(read_one(pair.winner), read_one(pair.loser)):
            raise PairsError(
                f"{pair.winner} and {pair.loser.name} have the same content, so neither is better; remove the record"
            )


def digest(pairs: Sequence[RecordedPair]) -> str:
    """16 hexadecimal digits that follow from the pairs and their order."""
    text = "\n".join(f"{p.prompt}\t{p.winner.name}\t{p.loser.name}" for p in pairs)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _records(folder: Path) -> list[Record]:
    records = preference_records.read(folder)
    if not records:
        raise PairsError(f"{folder / RECORDS}: contains no record; record candidates with Record Preference first")
    return records


def _scored(record: Record, name: str) -> list[tuple[float, int]]:
    return [(c.scores[name], i) for i, c in enumerate(record.candidates) if name in c.scores]


def _pair(record: Record, winner: int, loser: int) -> RecordedPair:
    return RecordedPair(record.prompt, record.candidates[winner].latent, record.candidates[loser].latent)


def _some(found: list, folder: Path, decided_by: str) -> list:
    """What was found, unless it is nothing. Raises PairsError that says why."""
    if found:
        return found
    records = preference_records.read(folder)
    known = sorted({name for r in records for c in r.candidates for name in c.scores})
    names = ", ".join(known) or "none"
    if decided_by:
        hint = "; clips that geometry cannot judge all score 0" if decided_by in known else ""
        raise PairsError(
            f"{folder / RECORDS}: no record has two candidates with different scores '{decided_by}'; scores found: "
            f"{names}{hint}"
        )
    raise PairsError(
        f"{folder / RECORDS}: none of its {len(records)} records has a preference; record winner and loser, or name the score "
        f"that decides in 'decided_by' (found: {names})"
    )
