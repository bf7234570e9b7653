"""Manifolds on disk: the folder models/shell_lcc, and the nodes that load from and save to it."""

import os
import re

import folder_paths
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.shell_lcc.manifold import load, save
from .shell_lcc_type import ShellLCCType, for_wire

FOLDER = "shell_lcc"
NO_FILES = "(no file in models/shell_lcc yet)"


def register_folder() -> None:
    """Makes models/shell_lcc known to ComfyUI, beside any folders that extra_model_paths.yaml gives for it."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    # A kind that ComfyUI does not know would list files of every suffix.
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.get_folder_paths(FOLDER), {".safetensors"})


class LoadShellLCC(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_LoadShellLCC",
            display_name="Load Shell-LCC Manifold",
            category="model/loaders",
            description=(
                "Loads a Shell-LCC manifold, which knows how the latents of real video are distributed, "
                "from the folder models/shell_lcc."
            ),
            search_aliases=["shell lcc", "load manifold", "intrinsic reward", "manifold loader"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER) or [NO_FILES],
                    tooltip=(
                        "A .safetensors file in models/shell_lcc, made by the Fit and Save nodes or by "
                        "`python -m trainers.shell_lcc`. Press R to refresh the list after adding one."
                    ),
                ),
            ],
            outputs=[ShellLCCType.Output(display_name="manifold", tooltip="For Shell-LCC Guidance, Score and Refine.")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        # Tensors made in the executor's inference mode could never take part in autograd.
        with torch.inference_mode(False):
            return io.NodeOutput(for_wire(load(path)))

    @classmethod
    def validate_inputs(cls, file):
        if file is None or folder_paths.get_full_path(FOLDER, file) is not None:
            return True
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        if file == NO_FILES:
            return f"there is no manifold in {folder}: fit one with the nodes Fit Shell-LCC and Save Shell-LCC Manifold"
        return f"there is no '{file}' in {folder}: put it there and refresh, or choose another file"

    @classmethod
    def fingerprint_inputs(cls, file):
        path = folder_paths.get_full_path(FOLDER, file)
        if path is None:
            return file
        status = os.stat(path)
        return [status.st_mtime_ns, status.st_size]


class SaveShellLCC(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_SaveShellLCC",
            display_name="Save Shell-LCC Manifold",
            category="model/loaders",
            description=(
                "Saves a Shell-LCC manifold as a .safetensors file in models/shell_lcc, where Load Shell-LCC Manifold "
                "finds it. A number is appended to the name; nothing is ever overwritten."
            ),
            search_aliases=["shell lcc", "save manifold", "intrinsic reward", "export manifold"],
            inputs=[
                ShellLCCType.Input("manifold", tooltip="The manifold to save, from Fit Shell-LCC."),
                io.String.Input(
                    "name",
                    default="my_manifold",
                    tooltip="File name without folder and suffix; characters other than letters, digits, . _ - become _.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name in models/shell_lcc.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, manifold, name) -> io.NodeOutput:
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        file = free_name(folder, name)
        path = os.path.join(folder, file)
        save(manifold.manifold, path)
        text = f"Saved {path}"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(file, ui=ui.PreviewText(text))


def free_name(folder: str, name: str) -> str:
    """<name>_<number>.safetensors with the next free number. Raises ValueError when nothing of the name is usable."""
    stem = re.sub(r"[^\w.-]+", "_", name).strip("._-")[:100]
    if not stem:
        raise ValueError(f"Save Shell-LCC Manifold, input 'name': found {name!r}, expected at least one letter or digit")
    taken = re.compile(re.escape(stem) + r"_(\d+)\.safetensors", re.IGNORECASE)
    present = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = [int(match[1]) for match in map(taken.fullmatch, present) if match]
    return f"{stem}_{max(numbers, default=0) + 1:05}.safetensors"


NODES = [LoadShellLCC, SaveShellLCC]
