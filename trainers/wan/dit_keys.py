"""Names of Wan transformer weights: the original layout (which ComfyUI reads) <-> diffusers' WanTransformer3DModel."""

import re
from collections.abc import Iterable

# norm2 and norm3 are swapped: the original numbers them in the order of its code, diffusers in the order of use.
PARTS = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.k_img\.", ".add_k_proj."),
    (r"\.v_img\.", ".add_v_proj."),
    (r"\.norm_k_img\.", ".norm_added_k."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
)
# The way back. diffusers' norm1 and norm3 of a block have no weights, so its only ".norm2." is the original's norm3.
BACK = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"\.attn([12])\.to_([qkv])\.", r".attn\1.\2."),
    (r"\.attn([12])\.to_out\.0\.", r".attn\1.o."),
    (r"\.add_k_proj\.", ".k_img."),
    (r"\.add_v_proj\.", ".v_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)
BLOCK = (
    "modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias",
    *(f"{a}.{p}.{k}" for a in ("self_attn", "cross_attn") for p in "qkvo" for k in ("weight", "bias")),
    *(f"{a}.norm_{p}.weight" for a in ("self_attn", "cross_attn") for p in "qk"),
)  # fmt: skip
PLAIN = (
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1",
    "head.head",
)  # fmt: skip


def to_diffusers(name: str) -> str:
    """The diffusers name of an original name; a name that no pattern matches is returned unchanged."""
    for pattern, new in PARTS:
        name = re.sub(pattern, new, name)
    return name


def to_original(name: str) -> str:
    """The original name of a diffusers name; a name that no pattern matches is returned unchanged."""
    for pattern, new in BACK:
        name = re.sub(pattern, new, name)
    return name


def of_text_to_video(layers: int) -> dict[str, str]:
    """{diffusers name: original name} of all weights of a text-to-video transformer with `layers` blocks."""
    names = [f"{p}.{k}" for p in PLAIN for k in ("weight", "bias")] + ["head.modulation"]
    names += [f"blocks.{i}.{part}" for i in range(layers) for part in BLOCK]
    return {to_diffusers(n): n for n in names}


def without_blocks_after(names: Iterable[str], last: int) -> list[str]:
    """The original names without those of the blocks after block `last`."""
    return [n for n in names if not (n.startswith("blocks.") and int(n.split(".")[1]) > last)]
