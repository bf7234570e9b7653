"""Writing of a safetensors file tensor by tensor, so that a checkpoint larger than the memory can be made.

The format (github.com/huggingface/safetensors): the header's length as a little-endian 64-bit integer, the header as JSON with
each tensor's dtype, shape and place, then the tensors' bytes without gaps.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .atomic import write_atomic

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ALIGNMENT = 8


def write_streamed(
    path: str | Path,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the tensors `entries`, {name: (dtype, shape)}, atomically; read(name) is called once for each.

    Raises ValueError when a tensor is not of the announced dtype and shape, OSError when the disk is full.
    """
    # Wide elements first, as safetensors does, so that every tensor is aligned.
    names = sorted(entries, key=lambda n: (-entries[n][0].itemsize, n))
    header, place = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in names:
        dtype, shape = entries[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)

    def write(partial: str) -> None:
        with open(partial, "wb") as f:
            f.write(len(text).to_bytes(8, "little"))
            f.write(text)
            for name in names:
                f.write(_bytes(name, read(name), *entries[name]))

    write_atomic(path, write)


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> memoryview:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: is {tensor.dtype} {list(tensor.shape)}, announced as {dtype} {list(shape)}")
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
