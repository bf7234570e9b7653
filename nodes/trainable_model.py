"""What the training nodes need of a MODEL: that it can be trained on records, weights of its own, and its file's name."""

import hashlib
import json
from pathlib import Path

import torch

from ..kernels.prism.backbone import Backbone, of_wan_module
from .lora_adapters import attention_layers


def require_trainable(model, source: str) -> Backbone:
    """What the model's transformer is. Raises ValueError, naming `source`, for one that cannot be trained on records."""
    name = type(model.model).__name__
    network = model.model.diffusion_model
    if not attention_layers(network):
        raise ValueError(f"{source}: {name} has no attention layers of a Wan transformer; load Wan 2.1 or Wan 2.2")
    backbone, channels = of_wan_module(network), model.get_model_object("latent_format").latent_channels
    if backbone.channels != channels:
        raise ValueError(
            f"{source}: {name} is an image-to-video model, and records do not keep the image; load a text-to-video model, or "
            "use `python -m trainers.dpo`"
        )
    return backbone


def own_copy(model, source: str):
    """A clone with weights of its own, read from the file again, so that `model` is left as it is.

    Raises ValueError, naming `source`, for a model that no loader of ComfyUI's own made.
    """
    if getattr(model, "cached_patcher_init", None) is None:
        raise ValueError(
            f"{source}: its weights cannot be read again, since the loader that made it does not say from where; use Load "
            "Diffusion Model or Load Checkpoint"
        )
    copy = model.clone(force_deepcopy=True)
    copy.model.requires_grad_(False)
    # Hooks of LoRAs in bypass mode belong to the layers of `model`: loading the copy would put them there a second time.
    copy.injections = {}
    if copy.model.get_dtype_inference() == torch.float16:
        # Gradients overflow in fp16.
        copy.set_model_compute_dtype(torch.bfloat16)
    return copy


def core_training(title: str):
    """Core's module of training nodes. Raises ImportError, naming the node, for a ComfyUI that lacks what is needed."""
    try:
        from comfy_extras import nodes_train
    except ImportError as e:
        raise ImportError(f"{title}: this ComfyUI has no training nodes ({e}); update ComfyUI to 0.25.0 or later") from e
    missing = [name for name in ("TrainGuider", "patch", "unpatch") if not hasattr(nodes_train, name)]
    if missing:
        raise ImportError(f"{title}: ComfyUI's nodes_train.py has no {missing[0]}; update ComfyUI to 0.25.0 or later")
    return nodes_train


def identity(backbone: Backbone) -> str:
    """A line that is the same for the same weights: what a resumed training must have alike."""
    prints = json.dumps(backbone.fingerprint, sort_keys=True)
    return f"{backbone.architecture}, weights {hashlib.sha256(prints.encode()).hexdigest()[:8]}"


def source_name(model) -> str:
    """The file that a model was loaded from, without its folder; "MODEL.safetensors" where that is not known."""
    made = getattr(model, "cached_patcher_init", None)
    path = made[1][0] if made and made[1] else None
    return Path(path).name if isinstance(path, str) else "MODEL.safetensors"
