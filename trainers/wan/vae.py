"""Wan's VAEs (2.1 and 2.2), from ComfyUI's single file or from a diffusers folder; nothing is downloaded."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels import latent_space
from ..kernels.files.header import describe_foreign
from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..running.identity import file_digest
from .vae_keys import to_diffusers

SPACES = {16: latent_space.WAN21, 48: latent_space.WAN22}
PREFIXES = ("", "model.", "vae.", "first_stage_model.")


class VaeError(ValueError):
    """A file is not a VAE that videos can be encoded with, or encoding failed; the message names the file and the reason."""


@dataclass(frozen=True)
class WanVae:
    """model: diffusers' AutoencoderKLWan, frozen; name: file name; digest: of the weights, 16 hexadecimal digits."""

    model: torch.nn.Module
    space: LatentSpace
    name: str
    digest: str

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [T, 3, H, W] -> normalised latents float32 [C, 1 + (T - 1) / 4, H / stride, W / stride] on the CPU.

        The mean of the posterior, not a sample. T must be 4n+1. Memory grows with H x W, hardly with T: the encoder is
        causal and takes four frames at a time. Raises VaeError for another T or when the latents are not finite.
        """
        if frames.shape[0] % 4 != 1:
            raise VaeError(f"{frames.shape[0]} frames: a Wan VAE takes 4n+1")
        weight = next(self.model.parameters())
        video = frames.to(weight.device).movedim(0, 1)[None].to(weight.dtype).div_(127.5).sub_(1.0)
        with torch.no_grad():
            raw = self.model.encode(video).latent_dist.mode()
        z = self.space.normalise(raw.float(), dim=1)[0].cpu()
        if not torch.isfinite(z).all():
            raise VaeError(f"the VAE gave latents with NaN or Inf in {weight.dtype}; try --vae_dtype float32")
        return z


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", tiling: bool = False
) -> WanVae:
    """A Wan 2.1 or 2.2 VAE from a .safetensors file in the original layout, or from a diffusers folder.

    tiling: encode and decode in tiles of 256 pixels: less memory, other latents at seams. Raises VaeError, LatentSpaceError
    or FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        model, space, weights = _from_folder(path, dtype)
    elif path.is_file():
        model, space, weights = *_from_file(path, dtype), path
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; --vae takes wan_2.1_vae.safetensors or a diffusers folder")
    model = model.requires_grad_(False).train(False).to(device)
    if torch.device(device).type == "cpu":
        channels_last(model)
    if tiling:
        model.enable_tiling()
    return WanVae(model, space, weights.name if weights == path else path.name, file_digest(weights))


def read_config(shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> dict:
    """AutoencoderKLWan's configuration from the shapes of an original-layout state dict. Raises VaeError."""
    nested = "encoder.downsamples.0.downsamples.0.residual.2.weight" in shapes
    try:
        base, in_channels = shapes["encoder.conv1.weight"][:2]
        z_dim = shapes["conv2.weight"][0]
        widths, temporal, blocks = _encoder_stages(shapes, nested)
        config = {
            "base_dim": base,
            "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
            "z_dim": z_dim,
            "dim_mult": [w // base for w in widths],
            "num_res_blocks": blocks,
            "attn_scales": [],
            "temperal_downsample": temporal,
            "is_residual": nested,
            "in_channels": in_channels,
            "out_channels": shapes["decoder.head.2.weight"][0],
            "patch_size": 2 if nested else None,
            "scale_factor_spatial": 2 ** (len(widths) - 1) * (2 if nested else 1),
            "scale_factor_temporal": 2 ** sum(temporal),
        }
    except (KeyError, IndexError, ValueError) as e:
        raise VaeError(f"{source}: not a complete Wan VAE in the original layout ({type(e).__name__}: {e})") from e
    space = SPACES.get(z_dim)
    if space is None or (config["scale_factor_spatial"], config["scale_factor_temporal"]) != (
        space.spatial_stride,
        space.temporal_stride,
    ):
        raise VaeError(
            f"{source}: a VAE with {z_dim} latent channels and a stride of {config['scale_factor_spatial']}, "
            "neither Wan 2.1 (16, 8) nor Wan 2.2 (48, 16): its means and stds are not known; give its diffusers folder"
        )
    if in_channels != (12 if nested else 3):
        raise VaeError(f"{source}: its encoder takes {in_channels} channels, not RGB video")
    return config | {"latents_mean": list(space.mean), "latents_std": list(space.std)}


def channels_last(model: torch.nn.Module) -> None:
    """Stores 3-D convolution weights channels-last: the same results up to rounding, a third faster on CPUs."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)


def describe(names) -> str:
    """For error messages: what a state dict with these names seems to be, if not a Wan VAE in the original layout."""
    names = set(names)
    if any(re.search(r"(^|\.)(blocks|double_blocks|transformer_blocks|single_transformer_blocks)\.0\.", n) for n in names):
        return "a diffusion model (DiT), not a VAE"
    others = ("model.diffusion_model.", "text_model.", "shared.", "encoder.block.", "encoder.layers.")
    if any(n.startswith(others) for n in names):
        return "a diffusion model, checkpoint or text encoder, not a VAE"
    if any("lora" in n for n in names):
        return "a LoRA, not a VAE"
    if "quant_conv.weight" in names and any(n.startswith("encoder.down_blocks.") for n in names):
        return "a VAE in diffusers' layout: give the folder that holds it and its config.json"
    if any(n.startswith(("decoder", "taesd_decoder")) for n in names) and not any(n.startswith("encoder") for n in names):
        return "a decoder without an encoder, such as TAESD's: it cannot encode"
    if any(re.match(r"(encoder|taesd_encoder|0)\.?\d*\.", n) for n in names) or "encoder.down.0.block.0.conv1.weight" in names:
        return "another kind of VAE (perhaps an image or a tiny autoencoder)"
    return "none of the known kinds of model"


def _from_file(path: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, LatentSpace]:
    try:
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
            prefix = next((p for p in PREFIXES if f"{p}encoder.conv1.weight" in names), None)
            if prefix is None or f"{prefix}decoder.middle.0.residual.0.gamma" not in names:
                raise VaeError(f"{path}: {describe(names)}; expected a Wan VAE such as wan_2.1_vae.safetensors")
            shapes = {n.removeprefix(prefix): tuple(f.get_slice(n).get_shape()) for n in names if n.startswith(prefix)}
            config = read_config(shapes, path)
            state = _renamed({n: f.get_tensor(prefix + n) for n in shapes}, config["num_res_blocks"], path)
    except SafetensorError as e:
        found = describe_foreign(path)
        raise VaeError(f"{path}: {found} ({e}); expected a Wan VAE as a complete .safetensors file") from e
    with torch.device("meta"):
        model = _autoencoder().from_config(config)
    try:
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    except RuntimeError as e:
        raise VaeError(f"{path}: its tensors do not fit together as a Wan VAE ({' '.join(str(e).split())[:300]})") from e
    return model, SPACES[config["z_dim"]]


def _from_folder(path: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, LatentSpace, Path]:
    folder = next((p for p in (path, path / "vae") if (p / "config.json").is_file()), None)
    if folder is None:
        raise VaeError(f"{path}: neither config.json nor vae/config.json in this folder, so it is not a diffusers VAE")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("_class_name")
    except (ValueError, AttributeError) as e:
        raise VaeError(f"{folder / 'config.json'}: not a configuration ({e})") from e
    if kind != "AutoencoderKLWan":
        raise VaeError(f"{folder}: a {kind}, expected an AutoencoderKLWan")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise VaeError(f"{folder}: no .safetensors file with the VAE's weights in this folder")
    space = latent_space.from_diffusers(config)
    if config.get("z_dim", 16) != space.channels:
        raise LatentSpaceError(f"{folder}: z_dim {config.get('z_dim')} and {space.channels} means in config.json do not match")
    try:
        model = _autoencoder().from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as e:
        raise VaeError(f"{folder}: could not be loaded as an AutoencoderKLWan ({' '.join(str(e).split())[:300]})") from e
    return model, space, weights[0]


def _autoencoder():
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as e:
        raise ImportError('encoding needs diffusers: pip install "intrinsic-reward[train]"') from e
    return AutoencoderKLWan


def _encoder_stages(shapes: Mapping[str, tuple[int, ...]], nested: bool) -> tuple[list[int], list[bool], int]:
    pattern = r"encoder\.downsamples\.(\d+)\.(?:downsamples\.(\d+)\.)?(residual\.6|resample\.1|time_conv)\.weight"
    layers: dict[tuple[int, int], dict[str, int]] = {}
    for name, shape in shapes.items():
        if found := re.fullmatch(pattern, name):
            layers.setdefault((int(found[1]), int(found[2] or 0)), {})[found[3]] = shape[0]
    widths, temporal, counts = [], [], [0]
    for _, parts in sorted(layers.items()):
        if "residual.6" in parts:
            width = parts["residual.6"]
            counts[-1] += 1
        else:
            widths.append(width)
            temporal.append("time_conv" in parts)
            counts.append(0)
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"uneven stages of {counts} residual blocks")
    return [*widths, width], temporal, counts[0]


def _renamed(state: dict[str, Tensor], res_blocks: int, path: Path) -> dict[str, Tensor]:
    try:
        return {to_diffusers(name, res_blocks): tensor for name, tensor in state.items()}
    except (KeyError, IndexError, ValueError) as e:
        raise VaeError(f"{path}: tensor {e} does not belong to a Wan VAE") from e
