"""The state of an interrupted or finished training, in output/intrinsic_reward_training/<name>, as one safetensors file.

It holds the parameters, the optimiser's moments and figures of all steps; in its header the step, the settings, and what else
a node keeps as JSON. What a step draws follows from (seed, step), so nothing else is needed: a resumed training ends with the
tensors of one that was never interrupted. The file is replaced by a rename, so it is never half written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..kernels.files.atomic import write_atomic
from ..kernels.files.header import DAMAGED
from .output_names import in_output

FOLDER = "intrinsic_reward_training"
FORMAT = "intrinsic_reward_training_state"


class StateError(ValueError):
    """A training cannot be resumed; the message says why and what to do."""


@dataclass(frozen=True)
class State:
    """step: optimiser steps done; tensors: by name; notes: JSON values."""

    step: int
    tensors: dict[str, torch.Tensor]
    notes: dict


def path_of(name: str) -> Path:
    """The state file of the training called `name`."""
    return Path(in_output(FOLDER, name, "state.safetensors"))


def save(path: Path, state: State, settings: Mapping) -> None:
    """Replaces the file. settings: JSON values that a resumed training must have alike. Raises OSError naming the file."""
    note = json.dumps({"step": state.step, "notes": state.notes, "settings": dict(settings)})
    write_tensors(path, state.tensors, {"format": FORMAT, "state": note})


def load(path: Path, settings: Mapping) -> State | None:
    """The state in a file, None where there is none. Raises StateError for a damaged one, and one of other settings."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
        note = json.loads(metadata["state"])
        step, notes, was = note["step"], note["notes"], note["settings"]
        if type(step) is not int or not isinstance(notes, dict) or not isinstance(was, dict):
            raise TypeError("step, notes and settings")
    except (SafetensorError, *DAMAGED) as e:
        raise StateError(f"{path}: damaged ({type(e).__name__}); turn 'resume' off, which replaces it") from e
    other = [f"{k} {was.get(k)} against {v}" for k, v in settings.items() if was.get(k) != v]
    if other:
        raise StateError(
            f"{path}: of a training with other settings ({', '.join(other)}); give them again, give another 'name', or turn "
            "'resume' off, which starts again and replaces it"
        )
    return State(step, tensors, notes)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically. Raises OSError naming the file; what was there before is kept then."""
    plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    try:
        write_atomic(path, lambda partial: save_file(plain, partial, metadata=metadata))
    except (SafetensorError, OSError) as e:
        raise OSError(f"{path}: could not be written ({e}); free some space, or check the folder's permissions") from e


def pack_adam(optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Adam's moments and steps as adam.<key>.<parameter>."""
    return {f"adam.{k}.{n}": v for n, p in parameters.items() for k, v in optimiser.state.get(p, {}).items()}


def unpack_adam(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of `pack_adam`, for an optimiser of the same parameters; those without moments in the file have none.

    Raises StateError for moments that are not those of the parameters.
    """
    for name, parameter in parameters.items():
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        found = {k: tensors[f"adam.{k}.{name}"] for k in shapes if f"adam.{k}.{name}" in tensors}
        if not found:
            continue
        if any(k not in found or found[k].shape != shape for k, shape in shapes.items()) or not float(found["step"]) >= 0:
            raise StateError(f"the saved training is damaged (moments of {name}); turn 'resume' off, which replaces it")
        # Adam keeps its step on the CPU.
        optimiser.state[parameter] = {
            k: v.to(torch.float32, copy=True) if k == "step" else v.to(parameter.device, parameter.dtype, copy=True)
            for k, v in found.items()
        }
