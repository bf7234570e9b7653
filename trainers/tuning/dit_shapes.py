"""The shapes of a Wan transformer that decide what its training takes: of a loaded model, or read from headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.files.stream import DTYPES
from ..wan import stored_weights
from ..wan.dit import ORIGINAL, PREFIXES, WHAT, DitError, read_config, read_folder_config, transformer_folder
from ..wan.dit_keys import to_diffusers
from ..wan.weight_files import OpenWeights, shards_of
from .backbone import expert_folder

# {tensor: (shape, dtype)}, read from headers.
Entries = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class DitShapes:
    """What a plan needs of a transformer. width, ffn, layers: of its blocks; channels: of the latent; patch: (T, H, W);
    image_keys: whether it has keys of an image; parameters: their number; stored_bytes: in memory as loaded; compute_bytes:
    of an activation; quantised: whether layers stay in fp8.
    """

    width: int
    ffn: int
    layers: int
    channels: int
    patch: tuple[int, int, int]
    image_keys: bool
    parameters: int
    stored_bytes: int
    compute_bytes: int
    quantised: bool = False


def shapes_of(model: torch.nn.Module) -> DitShapes:
    """The shapes of a loaded transformer, an adapter in it left out."""
    own = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
    sizes = {n: (p.numel(), p.element_size()) for n, p in own.items()}
    quantised = any(p.dtype in stored_weights.FP8 for p in own.values())
    return _shapes(dict(model.config), sizes, model.patch_embedding.weight.element_size(), quantised)


def read_shapes(path: str | Path, dtype: torch.dtype | None = None, expert: str | None = None) -> DitShapes:
    """The shapes of what `backbone.load(path, dtype, expert=expert)` would load; no tensor is read.

    Raises WeightFileError or FileNotFoundError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        folder = expert_folder(path, expert)
        folder = transformer_folder(folder)
        config = read_folder_config(folder)
        stored = _read_entries(shards_of(folder))
        if config["_class_name"] == ORIGINAL:
            config, stored = _of_original(stored, folder)
    elif path.is_file():
        config, stored = _of_original(_read_entries([path]), path)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; give a Wan .safetensors or a diffusers folder")
    return _as_loaded(config, stored, dtype, path)


def _of_original(entries: Entries, source: Path) -> tuple[dict, Entries]:
    """(configuration, entries by diffusers names) of Wan's own names."""
    prefix = next((p for p in PREFIXES if f"{p}patch_embedding.weight" in entries), None)
    if prefix is None:
        raise DitError(f"{source}: has no patch_embedding.weight, so it is not a Wan transformer")
    own = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
    own = {k: v for k, v in own.items() if not k.endswith(stored_weights.STORAGE)}
    return read_config({k: shape for k, (shape, _) in own.items()}, source), {to_diffusers(k): v for k, v in own.items()}


def _read_entries(files: list[Path]) -> Entries:
    with OpenWeights(files, WHAT) as f:
        slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
        return {k: (tuple(s.get_shape()), DTYPES.get(s.get_dtype(), torch.uint8)) for k, s in slices.items()}


def _as_loaded(config: Mapping, stored: Entries, dtype: torch.dtype | None, source: Path) -> DitShapes:
    from diffusers import WanTransformer3DModel

    packed = [k for k, (_, own) in stored.items() if own == torch.int8]
    if packed and dtype is None:
        raise DitError(f"{source}: '{packed[0]}' is stored as int8, on which no LoRA is trained; {stored_weights.EXPAND}")
    kept = WanTransformer3DModel._keep_in_fp32_modules
    numbers = {k: torch.Size(shape).numel() for k, (shape, _) in stored.items()}
    elements: dict[torch.dtype, int] = {}
    for k, (_, own) in stored.items():
        if own.is_floating_point and own not in stored_weights.FP8:
            elements[own] = elements.get(own, 0) + numbers[k]
    compute = dtype or (max(elements, key=elements.get) if elements else torch.bfloat16)
    sizes, quantised = {}, False
    for k, (shape, own) in stored.items():
        # Older files have float8 as plain bytes.
        if dtype is None and own in (*stored_weights.FP8, torch.uint8) and k.startswith("blocks.") and len(shape) == 2:
            sizes[k], quantised = (numbers[k], 1), True
        else:
            sizes[k] = (numbers[k], 4 if any(part in k for part in kept) else compute.itemsize)
    return _shapes(config, sizes, compute.itemsize, quantised)


def _shapes(config: Mapping, sizes: Mapping[str, tuple[int, int]], compute_bytes: int, quantised: bool) -> DitShapes:
    return DitShapes(
        config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"], config["num_layers"],
        config["out_channels"], tuple(config["patch_size"]), config.get("added_kv_proj_dim") is not None,
        sum(n for n, _ in sizes.values()), sum(n * size for n, size in sizes.values()), compute_bytes, quantised,
    )  # fmt: skip
