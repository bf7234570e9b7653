"""The socket type of Shell-LCC manifolds."""

from dataclasses import dataclass

import comfy.model_management
import torch
from comfy_api.latest import io

from ..kernels.shell_lcc.manifold import ShellManifold
from .whole_patcher import WholePatcher, whole_patcher

ShellLCCType = io.Custom("INTRINSIC_REWARD_SHELL_LCC")


@dataclass(frozen=True)
class ShellLCC:
    """The value of an INTRINSIC_REWARD_SHELL_LCC wire.

    manifold: scores and corrects normalised latents, on the device that its tensors are on.
    patcher: moves the manifold between devices, for load_models_gpu and set_additional_models.
    """

    manifold: ShellManifold
    patcher: WholePatcher


def for_wire(manifold: ShellManifold) -> ShellLCC:
    """The manifold under ComfyUI's memory management."""
    # A patcher assigns `device` to its module, but a manifold's `device` is a property: the list takes the assignment.
    return ShellLCC(manifold, whole_patcher(torch.nn.ModuleList([manifold])))


def load_to_device(shell: ShellLCC, latent: torch.Tensor) -> None:
    """Loads the manifold to the compute device, after making room there for scoring a latent [B, C, T, H, W]."""
    # Four fp32 copies (tokens, correction and two terms of it), and the coder's workspace.
    room = 16 * latent.numel() + (512 << 20)
    comfy.model_management.load_models_gpu([shell.patcher], memory_required=room)
