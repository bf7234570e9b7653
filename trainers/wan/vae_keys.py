"""Names of Wan VAE weights: the original layout (which ComfyUI reads) <-> diffusers' AutoencoderKLWan.

Original, Wan 2.1: encoder.downsamples.N numbers residual blocks and resamplers together. Wan 2.2 nests them by stage,
encoder.downsamples.STAGE.downsamples.N. The decoder's stages have one residual block more than the encoder's.
"""

from collections.abc import Iterable

HEADS = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
PARTS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
SAME = ("resample", "time_conv", "to_qkv", "proj", "norm")
KINDS = ("weight", "bias", "gamma")
# Of Wan 2.1: residual blocks per encoder stage, and stages.
RES_BLOCKS, STAGES = 2, 4


def to_diffusers(name: str, res_blocks: int = RES_BLOCKS) -> str:
    """The diffusers name of an original name. Raises KeyError for a name that is not a Wan VAE's.

    res_blocks: residual blocks per encoder stage.
    """
    side, _, rest = name.partition(".")
    if side in HEADS:
        return f"{HEADS[side]}.{rest}"
    if side not in ("encoder", "decoder"):
        raise KeyError(name)
    for part, new in PARTS.items():
        if rest.startswith(part + "."):
            return f"{side}.{new}{rest[len(part) :]}"
    group, *numbers = rest.split(".")
    if group == "middle":
        return f"{side}.mid_block.{MIDDLE[numbers[0]]}.{_block(numbers[1:], name)}"
    if (side, group) not in (("encoder", "downsamples"), ("decoder", "upsamples")):
        raise KeyError(name)
    nested = numbers[1] == group
    blocks, samplers, per_stage = ("up_blocks", "upsampler", res_blocks + 1)
    if side == "encoder":
        blocks, samplers, per_stage = ("down_blocks", "downsampler", res_blocks)
    if nested:
        stage, index, tail = int(numbers[0]), int(numbers[2]), numbers[3:]
        inner = f"resnets.{index}" if index < per_stage else samplers
    elif side == "encoder":
        return f"encoder.down_blocks.{numbers[0]}.{_block(numbers[1:], name)}"
    else:
        stage, index = divmod(int(numbers[0]), per_stage + 1)
        tail = numbers[1:]
        inner = f"resnets.{index}" if index < per_stage else f"{samplers}s.0"
    return f"{side}.{blocks}.{stage}.{inner}.{_block(tail, name)}"


def to_original(names: Iterable[str]) -> dict[str, str]:
    """{diffusers name: original name} for `names` of a Wan 2.1 AutoencoderKLWan. Raises KeyError."""
    candidates = [f"{head}.{kind}" for head in HEADS for kind in KINDS]
    per_block = [f"{part}.{kind}" for part in (*BLOCK, "resample.1", *SAME[1:]) for kind in KINDS]
    for side, group, length in (("encoder", "downsamples", RES_BLOCKS + 1), ("decoder", "upsamples", RES_BLOCKS + 2)):
        candidates += [f"{side}.{part}.{kind}" for part in PARTS for kind in KINDS]
        candidates += [f"{side}.middle.{i}.{tail}" for i in MIDDLE for tail in per_block]
        candidates += [f"{side}.{group}.{i}.{tail}" for i in range(STAGES * length - 1) for tail in per_block]
    inverse = {to_diffusers(name, RES_BLOCKS): name for name in candidates}
    return {name: inverse[name] for name in names}


def _block(parts: list[str], name: str) -> str:
    tail = ".".join(parts)
    for old, new in BLOCK.items():
        if tail.startswith(old + "."):
            return new + tail[len(old) :]
    if parts and parts[0] in SAME:
        return tail
    raise KeyError(name)
