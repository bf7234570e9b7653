"""What travels on a Shell-LCC wire."""

from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from comfy_api.latest import io

from ..kernels.shell_lcc.manifold import ShellManifold

ShellLCCType = io.Custom("INTRINSIC_REWARD_SHELL_LCC")


@dataclass(frozen=True)
class ShellLCC:
    """The value of an INTRINSIC_REWARD_SHELL_LCC wire.

    manifold: scores and corrects normalised latents on whichever device it stands;
    patcher: moves it there, for load_models_gpu and set_additional_models.
    """

    manifold: ShellManifold
    patcher: ModelPatcher


def for_wire(manifold: ShellManifold) -> ShellLCC:
    """The manifold under ComfyUI's memory management."""
    # A patcher assigns `device` to the module that it manages; a manifold derives its own from its tensors.
    patcher = ModelPatcher(
        torch.nn.ModuleList([manifold]),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.add_callback(CallbacksMP.ON_LOAD, _move_whole)
    return ShellLCC(manifold, patcher)


def load_to_device(shell: ShellLCC, latent: torch.Tensor) -> None:
    """Moves the manifold to the compute device, with room for the work on a latent [B, C, T, H, W]."""
    # Tokens, their correction and two of its terms in fp32, and the coder's workspace.
    room = 16 * latent.numel() + (512 << 20)
    comfy.model_management.load_models_gpu([shell.patcher], memory_required=room)


def _move_whole(patcher, device, *_):
    # When memory is short a patcher moves only some layers; a manifold is a few MiB and computes on one device.
    patcher.model.to(device)
    patcher.model.model_loaded_weight_memory = patcher.model_size()
