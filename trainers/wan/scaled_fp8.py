"""ComfyUI's scaled fp8 files: a weight is stored in 8 bits, with a scale that it must be multiplied by.

A frozen linear layer can keep its weight in that form; it is then scaled in every pass, forward and backward, so that no
graph holds it in more bits.
"""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import linear

# Suffixes of the scale's name, which begins with the weight's name without ".weight".
SCALES = (".scale_weight", ".weight_scale")
# Entries that describe how weights are stored and are no weights themselves.
STORAGE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def read(file, key: str, keys: Collection[str]) -> Tensor:
    """Tensor `key` of an open safetensors file: fp32 and scaled where it has a scale, else as stored. keys: of the file."""
    tensor, scale = read_stored(file, key, keys)
    return tensor if scale is None else tensor.float() * scale


def read_stored(file, key: str, keys: Collection[str]) -> tuple[Tensor, Tensor | None]:
    """(tensor `key` as stored, its scale in fp32 or None) of an open safetensors file. keys: of the file.

    The scale is a scalar, or [out, 1] with one for each row. Raises ValueError for a scale of another shape.
    """
    tensor = file.get_tensor(key)
    for suffix in SCALES:
        name = key.removesuffix(".weight") + suffix
        if key.endswith(".weight") and name in keys:
            scale = file.get_tensor(name).float()
            if scale.numel() not in (1, tensor.shape[0]):
                raise ValueError(f"{name}: is {list(scale.shape)}, expected one scale or one for each of {len(tensor)} rows")
            return tensor, scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
    return tensor, None


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
