"""A whole Wan transformer to be tuned: frozen, in the dtype of its file, with gradients through its velocity.

Rectified flow (arXiv 2209.03003): x = sigma * noise + (1 - sigma) * x0, and the model called with time 1000 * sigma predicts
the velocity noise - x0. sigma is the noise level after the schedule's shift.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.prism.backbone import Backbone
from ..wan import stored_weights
from ..wan.dit import DitError, build, read_file, read_folder, reader
from ..wan.dit_keys import to_diffusers
from ..wan.text_padding import LENGTH, use_bias

# The experts of Wan 2.2 A14B, and their folders in a diffusers pipeline.
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}


class TuningError(ValueError):
    """A model cannot be tuned as asked; the message says why and what to do."""


@dataclass(frozen=True)
class TunableDit:
    """model: diffusers' WanTransformer3DModel with all blocks, frozen, train(False); backbone: identifies it.

    name: of the file or folder, without the folders above; image_to_video: whether it takes extra input channels;
    expert: a key of EXPERTS, None where the model has one transformer only.
    """

    model: torch.nn.Module
    backbone: Backbone
    name: str
    image_to_video: bool
    expert: str | None = None


@dataclass(frozen=True)
class ImageCondition:
    """What an image-to-video model is given in addition to the noisy latent.

    channels: [B, extra, T, H, W], the mask and the image's latent as the model was trained with, normalised; embedding:
    CLIP's hidden states [B, 257, image width] for models that take them ([2 B, 257, image width] for first and last frame).
    """

    channels: Tensor
    embedding: Tensor | None = None


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", expert: str | None = None
) -> TunableDit:
    """The whole transformer from ComfyUI's single file or a diffusers folder.

    dtype: None keeps the file's: the one in which most weights lie; linear layers of blocks in fp8 stay in fp8. A dtype is
    used for all weights, and fp8 is expanded. What diffusers keeps in fp32 is in fp32 either way. expert: a key of EXPERTS,
    for a folder with two. Raises WeightFileError or FileNotFoundError naming the file.
    """
    path = Path(path)
    scales: dict[str, Tensor] = {}
    read = reader(dtype) if dtype else _stored_reader(scales)
    if path.is_dir():
        folder = expert_folder(path, expert)
        config, state, identity = read_folder(folder, None, read)
    elif path.is_file():
        folder = path
        config, state, identity = read_file(path, None, read)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; give a Wan .safetensors or a diffusers folder")
    model = build(config, state, dtype or _common_dtype(state), folder, scales)
    image_to_video = model.config.in_channels != model.config.out_channels
    return TunableDit(model.to(device), identity, name_of(path), image_to_video, expert)


def expert_folder(path: Path, expert: str | None) -> Path:
    """The folder to read of a diffusers folder: that of `expert` where there are two, else `path`. Raises DitError."""
    if expert is not None and expert not in EXPERTS:
        raise DitError(f"--expert {expert}: is unknown; expected {' or '.join(EXPERTS)}")
    if not (path / "transformer_2").is_dir():
        if expert is not None and (path / "transformer").is_dir():
            raise DitError(f"{path}: has one transformer (no folder transformer_2), so leave out --expert {expert}")
        return path
    if expert is None:
        raise DitError(f"{path}: has two experts (Wan 2.2 A14B); name the one to tune: --expert {' or '.join(EXPERTS)}")
    return path / EXPERTS[expert]


def name_of(path: Path) -> str:
    """The name of a model's file without its suffix, or of its folder (the pipeline's, for a transformer in one)."""
    path = path.resolve() if path.is_dir() else path
    return path.parent.name if path.is_dir() and path.name in EXPERTS.values() else path.name.removesuffix(".safetensors")


def velocity(
    model: torch.nn.Module,
    x: Tensor,
    sigma: Tensor,
    text: Tensor,
    bias: Tensor | None = None,
    image: ImageCondition | None = None,
) -> Tensor:
    """The predicted velocity noise - x0, [B, C, T, H, W] in fp32, differentiable.

    x: noisy latents [B, C, T, H, W], normalised, any dtype; sigma: [B] in [0, 1]; text: [B, L, text width], padded with zeros
    to 512 tokens, or text and `bias` of `text_padding.fold_padding`; image: for image-to-video models. Inputs may be on any
    device. Raises TuningError when the image condition is missing, not wanted, or of another size.
    """
    inner = getattr(model, "module", model)
    weight = inner.patch_embedding.weight
    x, text = x.to(weight.device, weight.dtype), text.to(weight.device, weight.dtype)
    embedding = None
    extra = inner.config.in_channels - x.shape[1]
    if extra or image is not None:
        _require_image(image, extra, x)
        x = torch.cat([x, image.channels.to(x)], dim=1)
        embedding = None if image.embedding is None else image.embedding.to(x)
    if inner.config.added_kv_proj_dim is not None:
        if embedding is None:
            raise TuningError("the model takes CLIP's embedding of the first image, and the image condition has none")
        if bias is not None:
            # diffusers finds the image's tokens by counting 512 from the end: folded padding becomes zeros again.
            text, bias = torch.nn.functional.pad(text, (0, 0, 0, max(0, LENGTH - text.shape[1])))[:, :LENGTH], None
        if text.shape[1] != LENGTH:
            raise TuningError(f"the model takes texts of {LENGTH} tokens, padded with zeros; got {text.shape[1]}")
    use_bias(inner, None if bias is None else bias.to(weight.device))
    time = 1000.0 * sigma.to(weight.device, torch.float32)
    return model(x, time, text, encoder_hidden_states_image=embedding, return_dict=False)[0].float()


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Keeps only the blocks' inputs for the backward pass and computes each block again there (arXiv 1604.06174)."""

    def run(block: torch.nn.Module, *inputs):
        processor = block.attn2.processor

        def forward(*values):
            # The backward pass may come after a later call of `velocity` with another bias.
            latest = block.attn2.processor
            block.attn2.set_processor(processor)
            try:
                return block(*values)
            finally:
                block.attn2.set_processor(latest)

        return checkpoint(forward, *inputs, use_reentrant=False)

    model.enable_gradient_checkpointing(run)


def full_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """All parameters by name, sorted, made trainable.

    Load the model with dtype float32 for this: bf16 rounds an update of 1e-5 of a weight away. Raises TuningError for a base
    in fp8.
    """
    if is_quantised(model):
        raise TuningError(
            "the backbone is stored in fp8, and only a LoRA can be trained on it; to train all parameters give a bf16, fp16 "
            "or fp32 file, or a dtype to expand it to"
        )
    return dict(sorted((n, p.requires_grad_(True)) for n, p in model.named_parameters()))


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether any layer keeps its weight in fp8."""
    return any(isinstance(m, stored_weights.ScaledLinear) for m in model.modules())


def _stored_reader(scales: dict[str, Tensor]):
    """Reads tensors as stored, and fills `scales`, {diffusers name: scale}, for the weights that stay in fp8."""

    def read(f, key: str, keys: Collection[str], name: str) -> Tensor:
        tensor, scale = stored_weights.read_stored(f, key, keys)
        if not tensor.is_floating_point():
            message = f"'{key}' is stored as int8, on which no LoRA is trained; {stored_weights.EXPAND}"
            raise stored_weights.StorageError(message)
        if tensor.dtype in stored_weights.FP8 and name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            scales[to_diffusers(name)] = torch.ones(()) if scale is None else scale
            return tensor
        if tensor.dtype in stored_weights.FP8:
            return tensor.float() if scale is None else tensor.float() * scale
        return tensor if scale is None else tensor.float() * scale

    return read


def _common_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """The dtype in which most elements lie, of those in 16 bits or more."""
    counts = Counter()
    for tensor in state.values():
        if tensor.dtype not in stored_weights.FP8:
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


def _require_image(image: ImageCondition | None, extra: int, x: Tensor) -> None:
    if image is None:
        raise TuningError(
            f"the model takes {extra} input channels besides the latent's {x.shape[1]}, so it is an image-to-video model: it "
            "needs an image condition"
        )
    wanted = (x.shape[0], extra, *x.shape[2:])
    if tuple(image.channels.shape) != wanted:
        raise TuningError(f"the image condition is {list(image.channels.shape)}, expected {list(wanted)} for this model")
