"""Load and save Shell-LCC manifolds in the folder models/shell_lcc."""

import logging
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.latent_space import WAN21
from ..kernels.shell_lcc import released
from ..kernels.shell_lcc.calibration import Calibration
from ..kernels.shell_lcc.calibration import calibrate as calibrate_on
from ..kernels.shell_lcc.manifold import ShellManifold, load, save_unused
from ..kernels.shell_lcc.predictor import Predictor
from .latents import normalised_warning, read_raw
from .model_files import ModelFolder
from .output_names import MOST_BYTES
from .shell_lcc_type import ShellLCC, ShellLCCType, for_wire, load_to_device

RELEASED = ".pth"
FOLDER = ModelFolder(
    "shell_lcc", "manifold",
    "fit one on a folder of sharp clips with template 04 (nodes Fit Shell-LCC and Save Shell-LCC Manifold), in minutes",
    frozenset({".safetensors", RELEASED}),
)  # fmt: skip


def read(path: Path) -> ShellManifold:
    """A manifold's file, or a checkpoint in the released layout, which is for Wan 2.1's latents and not calibrated."""
    if path.suffix != RELEASED:
        return load(path)
    state, _ = released.read(path)
    return ShellManifold(Predictor.from_state(state), WAN21, name=path.stem)


def calibration_on(shell: ShellLCC, latent: dict) -> Calibration:
    """Radius and band of the clips of a LATENT. Raises ValueError or LatentSpaceError naming the input."""
    manifold, source = shell.manifold, "Load Shell-LCC Manifold, input 'calibrate'"
    samples = read_raw(latent, manifold.space, source)
    warning = normalised_warning(samples, manifold.space, source)
    if warning:
        logging.warning(warning)
    load_to_device(shell, samples[:1])
    maps = []
    for clip in samples.split(1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        maps.append(manifold.distance(manifold.space.normalise(clip.to(manifold.device, torch.float32)))[0])
    return calibrate_on(maps)


class LoadShellLCC(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_LoadShellLCC",
            display_name="Load Shell-LCC Manifold",
            category="model/loaders",
            description=(
                "Loads a Shell-LCC manifold, a model of how the latents of real video are distributed, "
                "from the folder models/shell_lcc."
            ),
            search_aliases=["shell lcc", "load manifold", "intrinsic reward", "manifold loader"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=FOLDER.options(),
                    tooltip=(
                        "A .safetensors file in models/shell_lcc, made by the Fit and Save nodes or by "
                        "`python -m trainers.shell_lcc`, or the released checkpoint (.pth). Press R to refresh the list after "
                        "adding one."
                    ),
                ),
                io.Latent.Input(
                    "calibrate",
                    optional=True,
                    tooltip=(
                        "Latents of real clips of your kind, from Encode Clips from Folder: radius and band are measured on "
                        "them. The released checkpoint has neither; for a fitted manifold they replace its own."
                    ),
                ),
            ],
            outputs=[ShellLCCType.Output(display_name="manifold", tooltip="For Shell-LCC Guidance, Score and Refine.")],
        )

    @classmethod
    def execute(cls, file, calibrate=None) -> io.NodeOutput:
        # Tensors made in the executor's inference mode cannot be used in autograd.
        with torch.inference_mode(False):
            shell = for_wire(read(Path(FOLDER.path(file))))
            if calibrate is not None:
                shell.manifold.calibration = calibration_on(shell, calibrate)
            return io.NodeOutput(shell)

    @classmethod
    def validate_inputs(cls, file):
        return FOLDER.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return FOLDER.fingerprint(file)


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
        folder = folder_paths.get_folder_paths(FOLDER.kind)[0]
        path = save_unused(manifold.manifold, free_paths(folder, name))
        text = f"Saved {path}"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(path.name, ui=ui.PreviewText(text))


def free_paths(folder: str, name: str) -> Iterator[Path]:
    """<name>_<number>.safetensors from the number after the largest one. Raises ValueError without a letter or digit."""
    stem = re.sub(r"[^\w.-]+", "_", name).strip("._-")[:100].encode()[:MOST_BYTES].decode(errors="ignore")
    if not stem:
        raise ValueError(f"Save Shell-LCC Manifold, input 'name': found {name!r}, expected at least one letter or digit")
    taken = re.compile(re.escape(stem) + r"_(\d+)\.safetensors", re.IGNORECASE)
    present = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = [int(match[1]) for match in map(taken.fullmatch, present) if match]
    for number in count(max(numbers, default=0) + 1):
        yield Path(folder) / f"{stem}_{number:05}.safetensors"


NODES = [LoadShellLCC, SaveShellLCC]
