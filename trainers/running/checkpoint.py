"""Training checkpoints as safetensors files, so that loading one runs no code.

`<folder>/checkpoint-<step>/state.safetensors` holds the model, the optimiser's state for the parameters in training and, in
its header, the step, the settings, with a digest of the data, and what else a trainer keeps as JSON. Batches are drawn from
(seed, step), so nothing else is needed: a resumed run ends with exactly the tensors of an uninterrupted one.
"""

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "intrinsic_reward_checkpoint"
NAME = re.compile(r"checkpoint-(\d+)")
FILE = "state.safetensors"
# Prefix of the model's tensors, for every kind of model: part of the file format.
PREFIX = "coder."
# Of folders that are being written, or were when the process was killed.
PARTIAL = ".checkpoint-"


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed from; the message says why."""


@dataclass
class TrainingState:
    """step: optimiser steps done, over all stages; tensors: of `pack`; skipped: steps skipped because loss or gradient was
    not finite; scaler: state of fp16's GradScaler; notes: further JSON values of the trainer.
    """

    step: int
    tensors: dict[str, Tensor]
    skipped: int = 0
    scaler: dict | None = None
    notes: dict | None = None


def tensor_digest(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a CPU tensor's values in their order."""
    return hashlib.sha256(tensor.contiguous().numpy().data).hexdigest()[:16]


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's complete checkpoints, sorted by step."""
    paths = [p for p in folder.glob("checkpoint-*") if NAME.fullmatch(p.name) and (p / FILE).is_file()]
    return sorted(paths, key=lambda p: int(NAME.fullmatch(p.name)[1]))


def save(folder: Path, state: TrainingState, settings: dict, limit: int | None) -> Path:
    """Writes checkpoint-<step> atomically, then deletes the oldest ones beyond `limit` (None: keeps all).

    Raises OSError, naming the checkpoint, when it cannot be written; those before it are then still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"checkpoint-{state.step}"
    note = {"step": state.step, "skipped": state.skipped, "scaler": state.scaler, "settings": settings}
    note |= {} if state.notes is None else {"notes": state.notes}
    with tempfile.TemporaryDirectory(prefix=PARTIAL, suffix=".partial", dir=folder) as partial:
        plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.tensors.items()}
        try:
            save_file(plain, Path(partial) / FILE, metadata={"format": FORMAT, "state": json.dumps(note)})
        except (SafetensorError, OSError) as e:
            raise OSError(f"{target}: could not be written ({getattr(e, 'strerror', None) or e})") from e
        whole = Path(partial) / "whole"
        whole.mkdir()
        (Path(partial) / FILE).rename(whole / FILE)
        if target.exists():
            shutil.rmtree(target)
        whole.rename(target)
    if limit:
        for old in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    return target


def remove_partial(folder: Path) -> None:
    """Deletes what a killed process left half written. Raises OSError."""
    for path in folder.glob(f"{PARTIAL}*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def load(path: Path, settings: dict) -> TrainingState:
    """Reads a checkpoint. Raises CheckpointError when it is missing, damaged, or made with other settings, naming those."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path}: no checkpoint there ({FILE} is missing)")
    try:
        with safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{file}: not a checkpoint of this trainer")
        note = json.loads(metadata["state"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{file}: damaged ({type(e).__name__}); resume from another checkpoint") from e
    was = note["settings"]
    other = [f"{k} {was.get(k)} against {v}" for k, v in settings.items() if was.get(k) != v]
    if other:
        raise CheckpointError(f"{path}: made with other settings ({', '.join(other)}); give the same ones, or start again")
    return TrainingState(note["step"], tensors, note["skipped"], note["scaler"], note.get("notes"))


def choose(wanted: str | None, folder: Path, overwrite: bool) -> tuple[Path | None, list[str]]:
    """(checkpoint to resume from or None, notes) for --resume_from_checkpoint `wanted`: "latest", a path, or None.

    Starting from the beginning in a folder with checkpoints raises CheckpointError, or with `overwrite` deletes them.
    """
    present = list_checkpoints(folder)
    if wanted == "latest":
        return (present[-1], []) if present else (None, [f"no checkpoint in {folder}: starting from the beginning"])
    if wanted:
        return Path(wanted), []
    if present and not overwrite:
        raise CheckpointError(
            f"{folder}: holds checkpoints of an earlier run; --resume_from_checkpoint latest continues it, "
            "--overwrite starts again"
        )
    for path in present:
        shutil.rmtree(path)
    return None, []


def pack(model: torch.nn.Module, optimiser: torch.optim.Adam) -> dict[str, Tensor]:
    """The tensors of a checkpoint, not copied: the model's as PREFIX + name, Adam's as adam.<key>.<parameter>."""
    tensors = {f"{PREFIX}{k}": v for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value
    return tensors


def unpack_optimiser(tensors: dict[str, Tensor], model: torch.nn.Module, optimiser: torch.optim.Adam) -> None:
    """Loads Adam's state for the parameters in training; those without state in the checkpoint start without."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = {
            key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors
        }
        if state:
            moments = {k: v.to(parameter.device) for k, v in state.items() if k != "step"}
            optimiser.state[parameter] = {"step": state["step"].clone(), **moments}


def unpack_model(tensors: dict[str, Tensor], model: torch.nn.Module) -> None:
    """Loads the model's state dict. Raises RuntimeError where names or shapes do not match."""
    model.load_state_dict({k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)})
