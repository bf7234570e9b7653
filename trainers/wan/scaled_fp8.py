"""ComfyUI's scaled fp8 files: a matrix is kept in eight bits, beside a factor that it is to be multiplied by."""

from collections.abc import Collection

from torch import Tensor

# What the factor is called, after the weight's own name.
SCALES = (".scale_weight", ".weight_scale")
# Entries that say how a file is stored and hold no weights of the network.
STORAGE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def read(file, key: str, keys: Collection[str]) -> Tensor:
    """Tensor `key` of an open safetensors file as stored, or fp32 and multiplied where it has a factor. keys: the file's."""
    tensor = file.get_tensor(key)
    for suffix in SCALES:
        scale = key.removesuffix(".weight") + suffix
        if key.endswith(".weight") and scale in keys:
            return tensor.float() * file.get_tensor(scale).float()
    return tensor
