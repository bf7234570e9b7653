"""Stored weights of ComfyUI's files: 8 bits with a scale that a weight must be multiplied by, as the file's metadata say.

A layer's format is in a tensor `<layer>.comfy_quant` (JSON), in the header's `_quantization_metadata`, or, in older files,
implied by a scale beside an fp8 weight. Scaled float8 and plain int8 are read; every other format is refused by name: its
values would be wrong, not merely rounded.

A frozen linear layer can keep its weight in fp8; it is then scaled in every pass, forward and backward, so that no graph holds
it in more bits.
"""

import json
from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

# Suffixes of the scale's name, which begins with the weight's name without ".weight".
SCALES = (".scale_weight", ".weight_scale")
DESCRIPTION = ".comfy_quant"
# Entries that describe how weights are stored and are no weights themselves.
STORAGE = (
    *SCALES, ".scale_input", ".input_scale", ".weight_scale_2", ".pre_quant_scale", DESCRIPTION, "scaled_fp8",
)  # fmt: skip
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Format -> the dtype of its weights. Each needs a scale.
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
EXPAND = "expand it with --base_dtype bf16, or give a bf16, fp16, fp32 or scaled fp8 file"
INSTEAD = "give a bf16, fp16, fp32, scaled fp8 or plain int8 file of the same model"


class StorageError(ValueError):
    """A weight is stored in a form that is not read; the message names it and what to give instead."""


def read(file, key: str, keys: Collection[str]) -> Tensor:
    """Tensor `key` of an open safetensors file: fp32 and scaled where it has a scale, else as stored. keys: of the file.

    Raises StorageError.
    """
    tensor, scale = read_stored(file, key, keys)
    return tensor if scale is None else tensor.float() * scale


def read_stored(file, key: str, keys: Collection[str]) -> tuple[Tensor, Tensor | None]:
    """(tensor `key` as stored, its scale in fp32 or None) of an open safetensors file. keys: of the file.

    The scale is a scalar, or [out, 1] with one for each row. Raises StorageError for a format that is not read, and for a
    scale of another shape.
    """
    tensor, layer = file.get_tensor(key), key.removesuffix(".weight")
    found = describe(file, key, keys)
    if found is not None:
        tensor = _as_described(tensor, key, found)
    elif tensor.dtype not in FP8 and not (tensor.is_floating_point() and tensor.element_size() > 1):
        raise StorageError(f"'{key}' is stored as {_name(tensor.dtype)} without a description of its format; {INSTEAD}")
    for suffix in SCALES:
        name = layer + suffix
        if key.endswith(".weight") and name in keys:
            scale = file.get_tensor(name).float()
            if scale.numel() not in (1, tensor.shape[0]):
                raise StorageError(
                    f"'{name}' is {list(scale.shape)}, scales of blocks; expected one, or one for each of {len(tensor)} "
                    f"rows: {INSTEAD}"
                )
            return tensor, scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
    if found is not None:
        raise StorageError(f"'{key}' is stored as {found.get('format')} and its scale is missing; make the file again")
    return tensor, None


def describe(file, key: str, keys: Collection[str]) -> dict | None:
    """The description of a weight's format, {"format": name, ...}, None where the file has none. Raises StorageError."""
    if not key.endswith(".weight"):
        return None
    layer = key.removesuffix(".weight")
    if layer + DESCRIPTION in keys:
        return _parse(bytes(file.get_tensor(layer + DESCRIPTION).flatten().tolist()), layer + DESCRIPTION)
    layers = _layers((file.metadata() or {}).get("_quantization_metadata"))
    return layers.get(layer, layers.get(layer.rpartition("diffusion_model.")[2]))


def _as_described(tensor: Tensor, key: str, found: dict) -> Tensor:
    name, parameters = found.get("format"), found.get("params")
    rotated = found.get("convrot") or (isinstance(parameters, dict) and parameters.get("convrot"))
    if name not in FORMATS or rotated:
        shown = f"{name} with rotated channels (ConvRot)" if rotated and name in FORMATS else str(name)
        raise StorageError(f"'{key}' is stored as {shown}, which is not read here; {INSTEAD}")
    dtype = FORMATS[name]
    # Older files have float8 as plain bytes.
    tensor = tensor.view(dtype) if tensor.dtype == torch.uint8 and dtype in FP8 else tensor
    if tensor.dtype != dtype:
        raise StorageError(f"'{key}' is {_name(tensor.dtype)}, and the file says that it is {name}; make the file again")
    return tensor


@lru_cache(maxsize=8)
def _layers(text: str | None) -> dict[str, dict]:
    if text is None:
        return {}
    layers = _parse(text, "_quantization_metadata").get("layers")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise StorageError("'_quantization_metadata' has no \"layers\"; make the file again")
    return layers


def _parse(text: str | bytes, source: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise StorageError(f"'{source}' is not JSON; make the file again") from e
    if not isinstance(found, dict):
        raise StorageError(f"'{source}' is not a JSON object; make the file again")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def replace_linear(model: torch.nn.Module, name: str, scale: Tensor) -> None:
    """Puts a ScaledLinear for a scale of this shape in the place of the linear layer `name`, on the meta device."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    new = ScaledLinear(old.in_features, old.out_features, old.bias is not None, device="meta")
    new.weight_scale = torch.empty_like(scale, device="meta")
    setattr(model.get_submodule(parent), child, new)


class ScaledLinear(torch.nn.Linear):
    """A frozen linear layer whose weight [out, in] is kept in fp8 with `weight_scale`, a scalar or [out, 1], in fp32.

    Computes in the input's dtype. The gradient reaches the input, not the weight. A subclass of torch's layer, so that peft
    puts its LoRA around it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None):
        super().__init__(in_features, out_features, bias, device=device)
        self.weight.requires_grad_(False)
        self.register_buffer("weight_scale", torch.ones((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        return _ScaledProduct.apply(x, self.weight, self.weight_scale, self.bias)


class _ScaledProduct(torch.autograd.Function):
    """x @ (weight * scale)^T + bias; saves the weight as stored and scales it again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return linear(x, _scaled(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, scale = ctx.saved_tensors
        return gradient @ _scaled(weight, scale, gradient.dtype), None, None, None


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # In place: of a large layer, one copy in fp32 is enough.
    return weight.to(torch.float32, copy=True).mul_(scale).to(dtype)
