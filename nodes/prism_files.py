"""PRISM heads on disk: the folder models/prism, and the node that loads from it."""

import os

import folder_paths
import torch
from comfy_api.latest import io

from ..kernels.prism.files import load
from .prism_type import PrismType, for_wire

FOLDER = "prism"
NO_FILES = "(no file in models/prism yet)"


def register_folder() -> None:
    """Makes models/prism known to ComfyUI, beside any folders that extra_model_paths.yaml gives for it."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    # A kind that ComfyUI does not know would list files of every suffix.
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.get_folder_paths(FOLDER), {".safetensors"})


class LoadPrism(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_LoadPrism",
            display_name="Load PRISM Head",
            category="model/loaders",
            description=(
                "Loads a PRISM head, which scores noisy latents by what a video model's own blocks know of them, from the "
                "folder models/prism. A head belongs to one model: its file says which."
            ),
            search_aliases=["prism", "reward head", "intrinsic reward", "video preference", "best of n"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER) or [NO_FILES],
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
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        with torch.inference_mode(False):
            return io.NodeOutput(for_wire(load(path)))

    @classmethod
    def validate_inputs(cls, file):
        if file is None or folder_paths.get_full_path(FOLDER, file) is not None:
            return True
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        if file == NO_FILES:
            return f"there is no PRISM head in {folder}: train one with `python -m trainers.prism train`"
        return f"there is no '{file}' in {folder}: put it there and refresh, or choose another file"

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_full_path(FOLDER, file)
        if path is None:
            return file
        status = os.stat(path)
        return [status.st_mtime_ns, status.st_size]


NODES = [LoadPrism]
