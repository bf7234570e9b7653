"""Load PRISM heads from the folder models/prism."""

import torch
from comfy_api.latest import io

from ..kernels.prism.files import load
from .model_files import ModelFolder
from .prism_type import PrismType, for_wire

FOLDER = ModelFolder(
    "prism", "PRISM head",
    "train one on clips that you have compared (templates 08 and 11, or `python -m trainers.prism train`); template 02 ranks "
    "seeds without any file",
)  # fmt: skip


class LoadPrism(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_LoadPrism",
            display_name="Load PRISM Head",
            category="model/loaders",
            description=(
                "Loads a PRISM head from the folder models/prism. The head scores noisy latents from the hidden states of a "
                "video model. A head belongs to one model, which its file names."
            ),
            search_aliases=["prism", "reward head", "intrinsic reward", "video preference", "best of n"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=FOLDER.options(),
                    tooltip=(
                        "A .safetensors file in models/prism, made by `python -m trainers.prism train`. Press R to refresh "
                        "the list after adding one."
                    ),
                ),
            ],
            outputs=[PrismType.Output(display_name="head", tooltip="For PRISM Score.")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        # Tensors made in the executor's inference mode cannot be used in autograd.
        with torch.inference_mode(False):
            return io.NodeOutput(for_wire(load(FOLDER.path(file))))

    @classmethod
    def validate_inputs(cls, file):
        return FOLDER.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return FOLDER.fingerprint(file)


NODES = [LoadPrism]
