"""A tuned model with all its parameters as one file in the original layout, which ComfyUI loads as a diffusion model."""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..kernels.files.stream import write_streamed
from ..wan.dit_keys import to_original
from . import lora_files
from .backbone import TunableDit


def save(path: str | Path, dit: TunableDit, *, dtype: torch.dtype = torch.bfloat16, metadata: Mapping[str, object]) -> None:
    """Writes all weights atomically, tensor by tensor. metadata: the training record, JSON values without paths or prompts.

    Raises OSError when the file cannot be written.
    """
    state = {to_original(name): p for name, p in dit.model.state_dict().items()}
    version = "wan2.2" if dit.expert or dit.backbone.channels == 48 else "wan2.1"
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": version,
        "modelspec.title": f"{dit.name}, tuned",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        lora_files.RECORD: json.dumps(dict(metadata), sort_keys=True),
    }
    entries = {name: (dtype, tuple(p.shape)) for name, p in state.items()}
    write_streamed(Path(path), entries, lambda name: state[name].detach().to("cpu", dtype), header)
