"""What travels on a PRISM wire."""

from dataclasses import dataclass

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels.latent_space import LatentSpaceError, from_comfy
from ..kernels.prism.backbone import Backbone, of_wan
from ..kernels.prism.files import LoadedHead

PrismType = io.Custom("INTRINSIC_REWARD_PRISM")


@dataclass(frozen=True)
class Prism:
    """The value of an INTRINSIC_REWARD_PRISM wire. loaded: the head; patcher: moves it, for set_additional_models."""

    loaded: LoadedHead
    patcher: ModelPatcher

    def require_model(self, model) -> str | None:
        """A sentence when the model's weights are not those the head was trained on, else None.

        Raises BackboneError or LatentSpaceError, naming both, when the head cannot read the model at all.
        """
        found = of_wan(model.model.diffusion_model.state_dict())
        self.loaded.backbone.require_architecture(found, self.loaded.name)
        space = from_comfy(model.get_model_object("latent_format"))
        if not space.same_as(self.loaded.space):
            raise LatentSpaceError(
                f"PRISM head '{self.loaded.name}' reads latents of '{self.loaded.space.id}', the model works in '{space.id}'"
            )
        return None if self.loaded.backbone.same_weights(found) else other_weights(self.loaded.backbone, self.loaded.name)


def other_weights(backbone: Backbone, head: str) -> str:
    """What is said of a fine-tune or another release of the same architecture."""
    return f"The model's weights are not those head '{head}' was trained on ({backbone.architecture}): scores may mean less."


def for_wire(loaded: LoadedHead) -> Prism:
    """The head under ComfyUI's memory management."""
    patcher = ModelPatcher(
        loaded.head,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return Prism(loaded, patcher)
