"""A ModelPatcher for small networks of plain torch layers, which ComfyUI must not split between devices."""

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher


class WholePatcher(ModelPatcher):
    """Loads and unloads the network only as a whole.

    When memory is short, ModelPatcher leaves some layers on the offload device. ComfyUI's own layers cast their weights in
    the forward; plain torch layers fail there, with weights and activations on different devices.
    """

    # Arguments that are not used here are passed on, since ComfyUI adds some from version to version.

    def load(self, *args, **kwargs):
        super().load(*args, **(kwargs | {"full_load": True}))

    def partially_load(self, device_to, extra_memory=0, **kwargs):
        # A negative value asks for a partial unload while the network is about to be used.
        return super().partially_load(device_to, max(0, extra_memory), **kwargs)

    def partially_unload(self, device_to, *_, **__):
        freed = self.loaded_size()
        self.unpatch_model(device_to)
        return freed


def whole_patcher(module: torch.nn.Module) -> WholePatcher:
    """The module under ComfyUI's memory management, loaded to the compute device when used."""
    return WholePatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
