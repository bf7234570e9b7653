"""The socket type of PRISM heads."""

from dataclasses import dataclass

from comfy_api.latest import io

from ..kernels.prism.backbone import Backbone, of_wan_module
from ..kernels.prism.files import LoadedHead
from .latents import require_model_space
from .whole_patcher import WholePatcher, whole_patcher

PrismType = io.Custom("INTRINSIC_REWARD_PRISM")


@dataclass(frozen=True)
class Prism:
    """The value of an INTRINSIC_REWARD_PRISM wire.

    loaded: the head. patcher: moves the head between devices, for set_additional_models.
    """

    loaded: LoadedHead
    patcher: WholePatcher

    def require_model(self, model) -> str | None:
        """A warning when the head was trained on other weights than the model's, else None.

        Raises BackboneError or LatentSpaceError when the head does not fit the model's architecture or latent space.
        """
        found = of_wan_module(model.model.diffusion_model)
        self.loaded.backbone.require_architecture(found, self.loaded.name)
        require_model_space(model, self.loaded.space, f"PRISM head '{self.loaded.name}'")
        if not self.loaded.backbone.comparable(found):
            return f"The model's weights are quantised and cannot be compared with those of head '{self.loaded.name}'."
        return None if self.loaded.backbone.same_weights(found) else other_weights(self.loaded.backbone, self.loaded.name)


def other_weights(backbone: Backbone, head: str) -> str:
    """The warning for a fine-tune or another release of the same architecture."""
    return f"The model's weights are not those head '{head}' was trained on ({backbone.architecture}): scores may mean less."


def for_wire(loaded: LoadedHead) -> Prism:
    """The head under ComfyUI's memory management."""
    return Prism(loaded, whole_patcher(loaded.head))
