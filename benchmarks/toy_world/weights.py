"""Saves and loads the toy world's models: fp16 files in the original Wan 2.1 layout, loaded as diffusers' models."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainers.kernels.files.atomic import write_atomic
from trainers.wan import dit as wan_dit
from trainers.wan import vae as wan_vae
from trainers.wan.dit_keys import of_text_to_video
from trainers.wan.vae_keys import to_original

FOLDER = Path(__file__).parent / "weights"
VAE, DIT, TEXT = "toy_wan_vae.safetensors", "toy_wan_t2v.safetensors", "toy_umt5.safetensors"
LATENTS = "toy_latents.safetensors"


def dit_config(layers: int = 12, heads: int = 1, text_dim: int = 256, ffn_dim: int = 512) -> dict:
    """WanTransformer3DModel's configuration. Heads are 128 wide, because ComfyUI's loader takes width / 128 heads."""
    return {
        "patch_size": (1, 2, 2), "num_attention_heads": heads, "attention_head_dim": 128, "in_channels": 16,
        "out_channels": 16, "text_dim": text_dim, "freq_dim": 256, "ffn_dim": ffn_dim, "num_layers": layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
    }  # fmt: skip


def save_vae(vae, path: str | Path, notes: dict[str, str]) -> None:
    """AutoencoderKLWan -> a file like wan_2.1_vae.safetensors, fp16. `notes` go into the header."""
    names = to_original(vae.state_dict())
    _save({names[k]: v for k, v in vae.state_dict().items()}, path, {"title": "Toy world VAE (Wan 2.1 layout)"} | notes)


def save_dit(dit, path: str | Path, notes: dict[str, str]) -> None:
    """WanTransformer3DModel -> a file like wan2.1_t2v_1.3B.safetensors, fp16.

    The header states the text's width, which ComfyUI otherwise assumes to be 4096.
    """
    names = of_text_to_video(dit.config.num_layers)
    override = json.dumps({"transformer": {"text_dim": dit.config.text_dim}})
    header = {"title": "Toy world text-to-video DiT (Wan 2.1 layout)", "config": override} | notes
    _save({names[k]: v for k, v in dit.state_dict().items()}, path, header)


def load_vae(path: str | Path):
    """A file that `save_vae` wrote -> AutoencoderKLWan, fp32, frozen."""
    return wan_vae.load(path).model


def load_dit(path: str | Path):
    """A file that `save_dit` wrote -> WanTransformer3DModel, fp32, frozen."""
    return wan_dit.load(path).model


def new_dit(config: dict):
    """An untrained WanTransformer3DModel whose first prediction is zero."""
    from diffusers import WanTransformer3DModel

    dit = WanTransformer3DModel(**config)
    torch.nn.init.zeros_(dit.proj_out.weight)
    torch.nn.init.zeros_(dit.proj_out.bias)
    return dit


def header(path: str | Path) -> dict[str, str]:
    """The notes in a file's header."""
    with safe_open(path, framework="pt") as f:
        return f.metadata() or {}


def write_torch(path: str | Path, state: dict) -> None:
    """torch.save under a temporary name, then rename, so that an interruption leaves the former checkpoint."""
    write_atomic(path, lambda partial: torch.save(state, partial))


def _save(state: dict, path: str | Path, notes: dict[str, str]) -> None:
    state = {k: v.detach().half().contiguous().clone() for k, v in state.items()}
    write_atomic(path, lambda partial: save_file(state, partial, metadata={"format": "pt"} | notes))
