"""Wan's diffusion transformer (arXiv 2503.20314) up to a given block, for its features: from ComfyUI's single file, from a
diffusers folder, or from one in the layout of Wan's authors.

Sizes are read from the tensors' shapes; nothing is downloaded. Only the blocks that are needed are read from disk.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.prism.backbone import FINGERPRINT_TENSORS, Backbone, of_wan
from . import stored_weights
from .dit_keys import of_text_to_video, to_diffusers, without_blocks_after
from .text_padding import use_bias
from .weight_files import OpenWeights, WeightFileError, read_json, require_listed, shards_of

# (open safetensors file, key, all its keys, the key's original name) -> the tensor.
Reader = Callable[[object, str, Collection[str], str], Tensor]
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")


# Classes that a folder's config.json names.
DIFFUSERS, ORIGINAL = "WanTransformer3DModel", "WanModel"
WHAT = "a Wan transformer"


class DitError(WeightFileError):
    """A file is not a Wan transformer that features can be read from; the message names it and the reason."""


@dataclass(frozen=True)
class WanDit:
    """model: diffusers' WanTransformer3DModel with its first blocks only, frozen; backbone: identifies the whole model."""

    model: torch.nn.Module
    backbone: Backbone
    name: str

    @torch.no_grad()
    def features(
        self, x: Tensor, sigma: Tensor, text: Tensor, taps: Sequence[int], bias: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """A PRISM head's inputs: (visual tokens [B, N, width] after each block of `taps`, embedded text [B, L, width]).

        x: noisy latents [B, C, T, H, W], normalised; sigma: [B] in [0, 1]; text: the encoder's output [B, L, text width],
        padded with zeros to 512 as Wan expects, or the text and `bias` that `text_padding.fold_padding` returns.
        """
        m = self.model
        use_bias(m, bias)
        rotary = m.rope(x)
        hidden = m.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        _, projection, words, _ = m.condition_embedder(1000.0 * sigma, text, None)
        projection = projection.unflatten(1, (6, -1))
        seen = []
        for i in range(max(taps) + 1):
            hidden = m.blocks[i](hidden, words, projection, rotary)
            if i in taps:
                seen.append(hidden)
        return seen, words


def load(
    path: str | Path, last_block: int | None = None, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> WanDit:
    """The text-to-video transformer up to and including block `last_block` (None: all).

    Raises WeightFileError or FileNotFoundError naming the file.
    """
    path = Path(path)
    if path.is_dir():
        config, state, backbone = read_folder(path, last_block, reader(dtype))
    elif path.is_file():
        config, state, backbone = read_file(path, last_block, reader(dtype))
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; give a Wan .safetensors or a diffusers folder")
    if config["in_channels"] != config.get("out_channels", config["in_channels"]) or config.get("image_dim"):
        raise DitError(
            f"{path}: an image-to-video transformer ({config['in_channels']} input channels for a latent of "
            f"{config['out_channels']}), and clips are kept without their image; give the text-to-video model that made them"
        )
    return WanDit(build(config, state, dtype, path).to(device), backbone, path.stem)


def read_config(shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> dict:
    """WanTransformer3DModel's configuration from the shapes of an original-layout state dict. Raises DitError."""
    try:
        width, channels, *patch = shapes["patch_embedding.weight"]
        layers = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("blocks."))
        config = {
            "patch_size": tuple(patch), "num_attention_heads": width // 128, "attention_head_dim": 128,
            "in_channels": channels, "out_channels": shapes["head.head.weight"][0] // (patch[0] * patch[1] * patch[2]),
            "text_dim": shapes["text_embedding.0.weight"][1], "freq_dim": shapes["time_embedding.0.weight"][1],
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0], "num_layers": layers,
            "cross_attn_norm": "blocks.0.norm3.weight" in shapes, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
            "rope_max_seq_len": 1024,
        }  # fmt: skip
    except (KeyError, ValueError) as e:
        raise DitError(f"{source}: not a complete Wan transformer in the original layout ({type(e).__name__}: {e})") from e
    if width % 128:
        raise DitError(f"{source}: width {width} is not a multiple of the head size 128; give its diffusers folder")
    if "img_emb.proj.1.weight" in shapes:
        config |= {"image_dim": shapes["img_emb.proj.1.weight"][1], "added_kv_proj_dim": width}
        if "img_emb.emb_pos" in shapes:
            config["pos_embed_seq_len"] = shapes["img_emb.emb_pos"][1]
    return config


def read_file(path: Path, last_block: int | None, read: Reader) -> tuple[dict, dict[str, Tensor], Backbone]:
    """(configuration, tensors by diffusers names, identity) of a single file, up to block `last_block`.

    Raises WeightFileError.
    """
    return read_original([path], path, last_block, read)


def read_original(
    files: list[Path], source: Path, last_block: int | None, read: Reader
) -> tuple[dict, dict[str, Tensor], Backbone]:
    """`read_file` of one file, or of the shards of a folder, with Wan's own names of the tensors. source: for messages."""
    with OpenWeights(files, WHAT) as f:
        keys = f.keys()
        prefix = next((p for p in PREFIXES if f"{p}patch_embedding.weight" in keys), None)
        if prefix is None:
            raise DitError(f"{source}: has no patch_embedding.weight, so it is not a Wan transformer")
        names = [k.removeprefix(prefix) for k in keys if k.startswith(prefix) and not k.endswith(stored_weights.STORAGE)]
        shapes = {n: tuple(f.get_slice(prefix + n).get_shape()) for n in names}
        config = read_config(shapes, source)
        last = _last(config["num_layers"], last_block, source)
        known = set(keys)
        try:
            state = {n: read(f, prefix + n, known, n) for n in without_blocks_after(names, last)}
        except stored_weights.StorageError as e:
            raise DitError(f"{source}: {e}") from e
    whole = {n: torch.empty(s, device="meta") for n, s in shapes.items()} | state
    backbone = of_wan(whole)
    return config | {"num_layers": last + 1}, {to_diffusers(n): t for n, t in state.items()}, backbone


def read_folder(path: Path, last_block: int | None, read: Reader) -> tuple[dict, dict[str, Tensor], Backbone]:
    """(configuration, tensors by diffusers names, identity) of a folder, up to block `last_block`: of diffusers, or as Wan's
    authors publish it. Raises WeightFileError.
    """
    if (path / "transformer_2").is_dir():
        raise DitError(
            f"{path}: has two experts (Wan 2.2 A14B), and a head belongs to one: give {path / 'transformer'} for high noise "
            f"or {path / 'transformer_2'} for low noise, and give `train` the --levels of that expert"
        )
    folder = transformer_folder(path)
    config, files = read_folder_config(folder), shards_of(folder)
    if config["_class_name"] == ORIGINAL:
        found = read_original(files, folder, last_block, read)
        _require_same_sizes(config, found[0], folder)
        return found
    depth = config["num_layers"]
    last = _last(depth, last_block, folder)
    original = of_text_to_video(depth)
    state, named = {}, {}
    with OpenWeights(files, WHAT) as f:
        require_listed(folder, f.keys())
        for key in f.keys():  # noqa: SIM118 (not a mapping)
            beyond = key.startswith("blocks.") and int(key.split(".")[1]) > last
            name = original.get(key, key)
            if not beyond:
                state[key] = f.get_tensor(key)
                if not state[key].is_floating_point():
                    stored = str(state[key].dtype).removeprefix("torch.")
                    raise DitError(f"{folder}: '{key}' is stored as {stored}; {stored_weights.INSTEAD}")
            needed = not beyond and name in (*FINGERPRINT_TENSORS, "text_embedding.0.weight")
            named[name] = state[key] if needed else torch.empty(f.get_slice(key).get_shape(), device="meta")
    known = {k: v for k, v in config.items() if not k.startswith("_")}
    return known | {"num_layers": last + 1}, state, of_wan(named)


def transformer_folder(path: Path) -> Path:
    """The folder with the transformer's weights: `path`, or its folder "transformer"."""
    return path / "transformer" if (path / "transformer").is_dir() else path


def read_folder_config(folder: Path) -> dict:
    """config.json of a folder of diffusers' or of Wan's own layout, with its _class_name. Raises WeightFileError."""
    config = read_json(folder / "config.json", "a diffusers transformer folder")
    if config.get("_class_name") not in (DIFFUSERS, ORIGINAL):
        raise DitError(f"{folder}: a {config.get('_class_name')}, expected a {DIFFUSERS}, or Wan's own {ORIGINAL}")
    if config["_class_name"] == DIFFUSERS and not isinstance(config.get("num_layers"), int):
        raise DitError(f"{folder}: config.json states no num_layers; download it again")
    return config


def _require_same_sizes(stated: dict, found: dict, folder: Path) -> None:
    """Raises DitError where config.json of Wan's own layout contradicts the tensors."""
    sizes = {
        "dim": found["num_attention_heads"] * found["attention_head_dim"], "ffn_dim": found["ffn_dim"],
        "in_dim": found["in_channels"], "out_dim": found["out_channels"],
    }  # fmt: skip
    for name, size in sizes.items():
        if stated.get(name, size) != size:
            raise DitError(
                f"{folder}: config.json states {name} {stated[name]}, and the tensors have {size}; download it again"
            )


def build(
    config: dict, state: dict[str, Tensor], dtype: torch.dtype, source: Path, scales: Mapping[str, Tensor] | None = None
) -> torch.nn.Module:
    """A frozen WanTransformer3DModel with these tensors in `dtype`, but for those that diffusers keeps in fp32.

    scales: {name of a linear layer's weight in fp8: its scale}; these stay in fp8 and are scaled in every forward pass.
    Raises DitError for a missing or an unexpected tensor.
    """
    from diffusers import WanTransformer3DModel

    scales = scales or {}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    kept = model._keep_in_fp32_modules or []
    state = {
        k: v if k in scales else v.to(torch.float32 if any(part in k for part in kept) else dtype) for k, v in state.items()
    }
    for name, scale in scales.items():
        stored_weights.replace_linear(model, name.removesuffix(".weight"), scale)
        state[f"{name}_scale"] = scale
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        problem = f"missing tensor {missing[0]}" if missing else f"unexpected tensor {unexpected[0]}"
        raise DitError(f"{source}: {problem}; this variant of Wan is not supported")
    # Not part of a state dict, so still on the meta device.
    model.rope = type(model.rope)(config["attention_head_dim"], tuple(config["patch_size"]), config["rope_max_seq_len"])
    return model.train(False).requires_grad_(False)


def reader(dtype: torch.dtype) -> Reader:
    """Reads tensors with their fp8 scales applied, those of blocks in `dtype`."""

    def read(f, key: str, keys: Collection[str], name: str) -> Tensor:
        tensor = stored_weights.read(f, key, keys)
        # Blocks are cast as they are read, so that the whole model is never in fp32; the fingerprint's tensors stay exact.
        rounded = tensor.dtype == torch.float32 and ".blocks." in f".{key}" and not key.endswith(FINGERPRINT_TENSORS)
        return tensor.to(dtype) if rounded else tensor

    return read


def _last(depth: int, wanted: int | None, source: Path) -> int:
    if wanted is None:
        return depth - 1
    if not 0 <= wanted < depth:
        raise DitError(f"{source}: has blocks 0 to {depth - 1}, so block {wanted} cannot be tapped")
    return wanted
