"""LoRA files: the layouts that ComfyUI, diffusers and kohya's tools read, written and read back.

  comfy   diffusion_model.blocks.0.self_attn.q.lora_A.weight, .lora_B.weight, .alpha     original names; ComfyUI, diffusers
  kohya   lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha        original names; ComfyUI, kohya
  peft    transformer.blocks.0.attn1.to_q.lora_A.weight, .lora_B.weight                   diffusers' names; not ComfyUI

alpha is a scalar in fp32 for each module; peft's layout keeps it in the header. Headers follow modelspec 1.0 and kohya's ss_*.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.files.atomic import write_atomic
from ..kernels.files.header import describe_foreign
from ..wan.dit_keys import to_diffusers, to_original
from . import lora
from .backbone import TunableDit
from .lora import LoraOptions

FORMATS = ("comfy", "peft", "kohya")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Entry of the header with the training record, a JSON object.
RECORD = "intrinsic_reward.training"
ADAPTER_CONFIG = "lora_adapter_metadata"
COMFY, KOHYA, PEFT = "diffusion_model.", "lora_unet_", "transformer."
# Entries of a training record that also go where other tools look for them.
MODELSPEC = ("title", "author", "license", "description", "resolution", "tags")
KOHYA_NAMES = {"steps": "ss_steps", "epoch": "ss_epoch", "learning_rate": "ss_learning_rate", "seed": "ss_seed",
               "comment": "ss_training_comment"}  # fmt: skip
KOHYA_MODULE = re.compile(r"_?blocks_(\d+)_(?:(self_attn|cross_attn)_([qkvo]|k_img|v_img)|ffn_([02]))")
# Beginnings of the names of diffusers' modules that have weights to change.
MODULES = ("blocks.", "condition_embedder.", "proj_out")
SIDE = re.compile(r"(.+)\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight")


class LoraFileError(ValueError):
    """A file is not a LoRA of a Wan transformer that can be read; the message names it and the reason."""


class LoraFile(NamedTuple):
    """tensors: {name of `lora.parameters`: as stored}; rank; alpha: as in LoraOptions, the products' scale is alpha / rank."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float


def save(
    path: str | Path,
    model: torch.nn.Module,
    options: LoraOptions,
    dit: TunableDit,
    *,
    format: str = "comfy",
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Writes the adapter of `model` atomically, in one of FORMATS.

    metadata: the training record, JSON values without paths or prompts. It is written as a whole under RECORD; what
    MODELSPEC and KOHYA_NAMES name is written under their names as well. Raises OSError when the file cannot be written,
    LoraFileError for an unknown format.
    """
    if format not in FORMATS:
        raise LoraFileError(f"--format {format}: is unknown; expected {', '.join(FORMATS)}")
    tensors = {}
    for name, tensor in lora.state(model).items():
        module, side = name.removesuffix(".weight").rsplit(".", 1)
        tensors[_key(module, side, format)] = tensor.to(dtype).contiguous()
        if format != "peft":
            tensors[_key(module, "alpha", format)] = torch.tensor(float(options.alpha))
    header = header_of(options, dit, format, dict(metadata or {}))
    try:
        write_atomic(path, lambda partial: save_file(tensors, partial, metadata=header))
    except SafetensorError as e:
        raise OSError(f"{path}: could not be written ({e})") from e


def header_of(options: LoraOptions, dit: TunableDit, format: str, record: dict) -> dict[str, str]:
    """The header's entries, all strings: modelspec, kohya's, the adapter's configuration for peft, and the record."""
    version = "wan2.2" if dit.expert or dit.backbone.channels == 48 else "wan2.1"
    record = {
        "backbone": dit.name, "expert": dit.expert, "architecture": dit.backbone.architecture, "rank": options.rank,
        "alpha": options.alpha, "targets": list(options.targets), "dropout": options.dropout, **record,
    }  # fmt: skip
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{version}/lora",
        "modelspec.implementation": f"https://github.com/Wan-Video/Wan{version.removeprefix('wan')}",
        "modelspec.title": f"LoRA of {dit.name}",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": f"{options.alpha:g}",
        "ss_base_model_version": version,
    }
    header |= {f"modelspec.{k}": str(record[k]) for k in MODELSPEC if k in record}
    header |= {theirs: str(record[ours]) for ours, theirs in KOHYA_NAMES.items() if ours in record}
    if format == "peft":
        config = {
            "r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout, "bias": "none",
            "target_modules": lora.suffixes(options, dit.model.config.added_kv_proj_dim is not None),
        }  # fmt: skip
        header[ADAPTER_CONFIG] = json.dumps({PEFT + k: v for k, v in config.items()}, sort_keys=True)
    return header | {RECORD: json.dumps(record, sort_keys=True)}


def load(path: str | Path) -> LoraFile:
    """A LoRA in any of FORMATS, with the names of `lora.parameters`.

    A file without alpha has alpha = rank. Raises LoraFileError or FileNotFoundError naming the file.
    """
    modules, _ = read_modules(path)
    ranks = {a.shape[0] for a, _, _ in modules.values()}
    if len(ranks) > 1:
        raise LoraFileError(f"{path}: has modules of rank {min(ranks)} to {max(ranks)}; expected one rank for all")
    rank, scales = ranks.pop(), {scale for _, _, scale in modules.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    tensors = {}
    for module, (a, b, own) in modules.items():
        tensors[f"{module}.lora_A.weight"] = a
        tensors[f"{module}.lora_B.weight"] = b if own == scale else b.float() * (own / scale)
    return LoraFile(dict(sorted(tensors.items())), rank, scale * rank)


def attach(model: torch.nn.Module, loaded: LoraFile) -> None:
    """Adds a LoRA of this shape to the model, with the file's weights. Raises TuningError where the model lacks its layers."""
    modules = {n.removesuffix(".lora_A.weight").split(".", 2)[2] for n in loaded.tensors if n.endswith(".lora_A.weight")}
    targets = tuple(t for t, ends in lora.TARGETS.items() if any(m.endswith(ends) for m in modules))
    lora.add(model, LoraOptions(loaded.rank, loaded.alpha, targets), 0)
    lora.load_state(model, loaded.tensors)


def read_modules(path: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor, float]], dict[str, str]]:
    """({diffusers module name: (A [r, in], B [out, r], scale)}, the header's entries) of a LoRA in any of FORMATS.

    Raises LoraFileError or FileNotFoundError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a LoRA as .safetensors")
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            stored = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError:
        raise LoraFileError(f"{path}: {describe_foreign(path)}; expected a LoRA as .safetensors") from None
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        module, part = _part(key)
        if part is None:
            raise LoraFileError(f"{path}: {key} is not part of a LoRA of Wan's linear layers")
        found.setdefault(module, {})[part] = tensor
    if not found:
        raise LoraFileError(f"{path}: holds no tensor; expected a LoRA of a Wan transformer")
    common = _alpha_of(header, path)
    modules = {}
    for module, parts in found.items():
        if not {"A", "B"} <= parts.keys():
            raise LoraFileError(f"{path}: {module} has {' and '.join(sorted(parts))} only; a LoRA needs both A and B")
        a, b = parts["A"], parts["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise LoraFileError(f"{path}: A {list(a.shape)} and B {list(b.shape)} of {module} do not fit together")
        alpha = float(parts["alpha"]) if "alpha" in parts else common
        modules[module] = (a, b, 1.0 if alpha is None else alpha / a.shape[0])
    return modules, header


def _key(module: str, side: str, format: str) -> str:
    if format == "peft":
        return f"{PEFT}{module}.{side}.weight"
    original = to_original(f"{module}.").removesuffix(".")
    if format == "comfy":
        return f"{COMFY}{original}.{side}" + ("" if side == "alpha" else ".weight")
    sides = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "alpha": "alpha"}
    return f"{KOHYA}{original.replace('.', '_')}.{sides[side]}"


def _part(key: str) -> tuple[str, str | None]:
    """(diffusers module name, "A", "B" or "alpha") of a key; (key, None) for one that belongs to no LoRA of Wan."""
    if match := SIDE.fullmatch(key):
        module, part = match[1], "A" if match[2] else "B"
    elif key.endswith(".alpha"):
        module, part = key.removesuffix(".alpha"), "alpha"
    else:
        return key, None
    if module.startswith(KOHYA):
        match = KOHYA_MODULE.fullmatch(module.removeprefix(KOHYA))
        if match is None:
            return key, None
        block, attention, projection, ffn = match.groups()
        module = f"blocks.{block}." + (f"{attention}.{projection}" if attention else f"ffn.{ffn}")
    else:
        for prefix in (COMFY, PEFT, "base_model.model."):
            module = module.removeprefix(prefix)
    module = to_diffusers(f"{module}.").removesuffix(".")
    return (module, part) if module.startswith(MODULES) else (key, None)


def _alpha_of(header: dict[str, str], path: Path) -> float | None:
    try:
        config = json.loads(header.get(ADAPTER_CONFIG, "{}"))
        alpha = config.get(PEFT + "lora_alpha", config.get("lora_alpha"))
        return None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError) as e:
        raise LoraFileError(f"{path}: {ADAPTER_CONFIG} in its header is damaged ({type(e).__name__})") from e
