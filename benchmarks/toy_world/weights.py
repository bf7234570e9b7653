"""Weights of the toy world's models: fp16 files in the original Wan 2.1 layout, and diffusers' models made from them."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainers import wan_vae
from trainers.kernels.atomic import write_atomic
from trainers.wan_vae_keys import to_original

FOLDER = Path(__file__).parent / "weights"
VAE, DIT, TEXT = "toy_wan_vae.safetensors", "toy_wan_t2v.safetensors", "toy_umt5.safetensors"
LATENTS = "toy_latents.safetensors"

# Original names (what ComfyUI reads) -> diffusers' WanTransformer3DModel. norm2 and norm3 change places.
DIT_PARTS = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)
BLOCK = (
    "modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias",
    *(f"{a}.{p}.{k}" for a in ("self_attn", "cross_attn") for p in "qkvo" for k in ("weight", "bias")),
    *(f"{a}.norm_{p}.weight" for a in ("self_attn", "cross_attn") for p in "qk"),
)  # fmt: skip


def dit_config(layers: int = 12, heads: int = 1, text_dim: int = 256, ffn_dim: int = 512) -> dict:
    """WanTransformer3DModel's configuration. Heads are 128 wide: ComfyUI's loader takes as many as the width holds."""
    return {
        "patch_size": (1, 2, 2), "num_attention_heads": heads, "attention_head_dim": 128, "in_channels": 16,
        "out_channels": 16, "text_dim": text_dim, "freq_dim": 256, "ffn_dim": ffn_dim, "num_layers": layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
    }  # fmt: skip


def dit_to_diffusers(name: str) -> str:
    """An original name as WanTransformer3DModel calls it."""
    for pattern, new in DIT_PARTS:
        name = re.sub(pattern, new, name)
    return name


def dit_names(layers: int) -> dict[str, str]:
    """{diffusers name: original name} of all weights of a text-to-video DiT."""
    plain = ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
             "time_projection.1", "head.head")  # fmt: skip
    names = [f"{p}.{k}" for p in plain for k in ("weight", "bias")] + ["head.modulation"]
    names += [f"blocks.{i}.{part}" for i in range(layers) for part in BLOCK]
    return {dit_to_diffusers(n): n for n in names}


def save_vae(vae, path: str | Path, notes: dict[str, str]) -> None:
    """AutoencoderKLWan -> a file like wan_2.1_vae.safetensors, fp16. `notes` go into the header."""
    names = to_original(vae.state_dict())
    _save({names[k]: v for k, v in vae.state_dict().items()}, path, {"title": "Toy world VAE (Wan 2.1 layout)"} | notes)


def save_dit(dit, path: str | Path, notes: dict[str, str]) -> None:
    """WanTransformer3DModel -> a file like wan2.1_t2v_1.3B.safetensors, fp16.

    ComfyUI takes 4096 for the text's width unless the header says otherwise, which this one does.
    """
    names = dit_names(dit.config.num_layers)
    override = json.dumps({"transformer": {"text_dim": dit.config.text_dim}})
    header = {"title": "Toy world text-to-video DiT (Wan 2.1 layout)", "config": override} | notes
    _save({names[k]: v for k, v in dit.state_dict().items()}, path, header)


def load_vae(path: str | Path):
    """A file that `save_vae` wrote -> AutoencoderKLWan, fp32, frozen."""
    return wan_vae.load(path).model


def load_dit(path: str | Path):
    """A file that `save_dit` wrote -> WanTransformer3DModel, fp32, frozen."""
    state = load_file(path)
    layers = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    width, text_dim = state["text_embedding.0.weight"].shape
    dit = new_dit(dit_config(layers, width // 128, text_dim, state["blocks.0.ffn.0.bias"].shape[0]))
    dit.load_state_dict({dit_to_diffusers(k): v.float() for k, v in state.items()})
    return dit.train(False).requires_grad_(False)


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
    """torch.save by way of a temporary name, so that a checkpoint is whole or the former one."""
    write_atomic(path, lambda partial: torch.save(state, partial))


def _save(state: dict, path: str | Path, notes: dict[str, str]) -> None:
    state = {k: v.detach().half().contiguous().clone() for k, v in state.items()}
    write_atomic(path, lambda partial: save_file(state, partial, metadata={"format": "pt"} | notes))
