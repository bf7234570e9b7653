"""Checkpoints of a predictor fit: safetensors all through, so that reading one back runs no code.

`<folder>/checkpoint-<step>/state.safetensors` holds the coder, Adam's moments of the stage at hand and, in its header,
the step, the settings and a digest of the tokens. With batches drawn from (seed, step) that is all of the state: a
resumed run ends with the very tensors of an unbroken one.
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


class CheckpointError(ValueError):
    """A checkpoint cannot be used to go on; the message says why."""


@dataclass
class State:
    """step: optimiser steps done, both stages together; tensors: by name; skipped: non-finite steps; scaler: fp16's."""

    step: int
    tensors: dict[str, Tensor]
    skipped: int = 0
    scaler: dict | None = None


def digest(tokens: Tensor) -> str:
    """Sixteen hexadecimal digits that tell one set of tokens, in its order, from another."""
    return hashlib.sha256(tokens.contiguous().numpy().data).hexdigest()[:16]


def found(folder: Path) -> list[Path]:
    """The folder's complete checkpoints by step."""
    paths = [p for p in folder.glob("checkpoint-*") if NAME.fullmatch(p.name) and (p / FILE).is_file()]
    return sorted(paths, key=lambda p: int(NAME.fullmatch(p.name)[1]))


def save(folder: Path, state: State, settings: dict, limit: int | None) -> Path:
    """Writes checkpoint-<step>, whole or not at all, then deletes the oldest beyond `limit`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"checkpoint-{state.step}"
    note = {"step": state.step, "skipped": state.skipped, "scaler": state.scaler, "settings": settings}
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", suffix=".partial", dir=folder) as partial:
        plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.tensors.items()}
        save_file(plain, Path(partial) / FILE, metadata={"format": FORMAT, "state": json.dumps(note)})
        whole = Path(partial) / "whole"
        whole.mkdir()
        (Path(partial) / FILE).rename(whole / FILE)
        if target.exists():
            shutil.rmtree(target)
        whole.rename(target)
    if limit:
        for old in found(folder)[:-limit]:
            shutil.rmtree(old)
    return target


def load(path: Path, settings: dict) -> State:
    """Reads a checkpoint. Raises CheckpointError when it is damaged or was made with other settings, naming those."""
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
        raise CheckpointError(f"{path}: made with other settings ({', '.join(other)}); give the same ones, or start afresh")
    return State(note["step"], tensors, note["skipped"], note["scaler"])


def choose(wanted: str | None, folder: Path, overwrite: bool) -> tuple[Path | None, list[str]]:
    """(checkpoint to resume from or None, notes) for --resume_from_checkpoint `wanted`: "latest", a path, or None.

    A fresh start in a folder with checkpoints is refused without `overwrite`, and removes them with it.
    """
    present = found(folder)
    if wanted == "latest":
        return (present[-1], []) if present else (None, [f"no checkpoint in {folder}: starting from the beginning"])
    if wanted:
        return Path(wanted), []
    if present and not overwrite:
        raise CheckpointError(
            f"{folder}: holds checkpoints of an earlier run; --resume_from_checkpoint latest goes on with it, "
            "--overwrite starts afresh"
        )
    for path in present:
        shutil.rmtree(path)
    return None, []


def pack(coder: torch.nn.Module, optimiser: torch.optim.Adam) -> dict[str, Tensor]:
    """The coder's tensors and Adam's, by name; no copies."""
    tensors = {f"coder.{k}": v for k, v in coder.state_dict().items()}
    for name, parameter in coder.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value
    return tensors


def unpack_optimiser(tensors: dict[str, Tensor], coder: torch.nn.Module, optimiser: torch.optim.Adam) -> None:
    """Adam's state for the parameters of the stage at hand, as far as the checkpoint has it: at a stage's start, none."""
    for name, parameter in coder.named_parameters():
        if not parameter.requires_grad:
            continue
        state = {
            key: tensors[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors
        }
        if state:
            moments = {k: v.to(parameter.device) for k, v in state.items() if k != "step"}
            optimiser.state[parameter] = {"step": state["step"].clone(), **moments}


def unpack_coder(tensors: dict[str, Tensor], coder: torch.nn.Module) -> None:
    coder.load_state_dict({k.removeprefix("coder."): v for k, v in tensors.items() if k.startswith("coder.")})
