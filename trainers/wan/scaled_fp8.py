"""ComfyUI's scaled fp8 files: a weight is stored in 8 bits, with a scale that it must be multiplied by."""

from collections.abc import Collection

from torch import Tensor

# Suffixes of the scale's name, which begins with the weight's name without ".weight".
SCALES = (".scale_weight", ".weight_scale")
# Entries that describe how weights are stored and are no weights themselves.
STORAGE = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def read(file, key: str, keys: Collection[str]) -> Tensor:
    """Tensor `key` of an open safetensors file: fp32 and scaled where it has a scale, else as stored. keys: of the file."""
    tensor = file.get_tensor(key)
    for suffix in SCALES:
        scale = key.removesuffix(".weight") + suffix
        if key.endswith(".weight") and scale in keys:
            return tensor.float() * file.get_tensor(scale).float()
    return tensor
