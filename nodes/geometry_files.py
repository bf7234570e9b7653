"""Save and load multi-view geometry (depth, cameras, frames) as .safetensors files, which the trainers read too."""

import os
from itertools import count
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.geometry.record import GeometryError
from ..kernels.geometry.view_files import load_views, save_views_unused
from ..kernels.geometry.views import require_usable
from . import geometry_clips as shared
from .geometry_type import DA3GeometryType, from_wire, to_wire
from .model_files import file_state
from .output_names import MOST_BYTES

FOLDER = "geometry"
NO_FILES = "(no file in output/geometry or input/geometry yet)"
LOAD, SAVE = "Load Geometry", "Save Geometry"


def list_files() -> list[str]:
    """The .safetensors files in output/geometry and input/geometry, with core's annotation [output] or [input]."""
    found = []
    for kind, root in (("output", folder_paths.get_output_directory()), ("input", folder_paths.get_input_directory())):
        names, _ = folder_paths.recursive_search(os.path.join(root, FOLDER), excluded_dir_names=[".git"])
        names = folder_paths.filter_files_extensions(names, [".safetensors"])
        found += [f"{FOLDER}/{name.replace(os.sep, '/')} [{kind}]" for name in sorted(names)]
    return found


def place_of(prefix: str) -> tuple[str, str, int, str]:
    """(folder, start of the file name, first number, the folder within the output directory) as core's save nodes choose them.

    Raises ValueError, naming the input, for a prefix that leads elsewhere or is no path, OSError where no folder can be made.
    """
    try:
        if "\0" in prefix or any(len(part.encode()) > MOST_BYTES for part in prefix.split("/")):
            raise ValueError(f"a NUL character, or more than {MOST_BYTES} bytes in one name")
        found = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    except OSError:
        raise
    except Exception as e:
        # Core raises the base class for a folder outside of the output directory.
        raise ValueError(
            f"{SAVE}, input 'filename_prefix': found {prefix[:200]!r} ({str(e).splitlines()[0]}); expected folders in the "
            "output directory and the start of a file name"
        ) from e
    return found[:4]


class SaveGeometry(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_SaveGeometry",
            display_name=SAVE,
            category=shared.CATEGORY,
            description=(
                "Saves depth, cameras and frames of multi-view geometry as a .safetensors file in the output directory, "
                "for Load Geometry and for `python -m trainers.geometry score --geometry`."
            ),
            search_aliases=["save depth", "save cameras", "export poses", "geometry", "da3", "intrinsic reward"],
            inputs=[
                DA3GeometryType.Input(
                    "da3_geometry",
                    tooltip=(
                        "From Geometry Consistency (DA3), which adds the frame numbers, or Run Depth Anything 3 in "
                        "multi-view mode."
                    ),
                ),
                io.String.Input(
                    "filename_prefix",
                    default=f"{FOLDER}/clip",
                    tooltip=(
                        "As in other save nodes: folders and the start of the file name; a number is appended. The trainers "
                        "match geometry and clip by name, and Load Geometry lists the folder geometry."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name within the output directory.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, da3_geometry, filename_prefix) -> io.NodeOutput:
        views = from_wire(da3_geometry, f"{SAVE}, input 'da3_geometry'")
        folder, name, counter, subfolder = place_of(filename_prefix)
        path = save_views_unused((Path(folder) / f"{name}_{number:05}_.safetensors" for number in count(counter)), views)
        saved = os.path.join(subfolder, path.name).replace(os.sep, "/")
        text = f"Saved output/{saved}: {len(views.frame_indices)} views of a clip of {views.frames} frames"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        return io.NodeOutput(saved, ui=ui.PreviewText(text))


class LoadGeometry(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_LoadGeometry",
            display_name=LOAD,
            category=shared.CATEGORY,
            description=(
                "Loads depth, cameras and frames written by Save Geometry or another tool, as multi-view geometry for "
                "Geometry Consistency (DA3) and core's Depth Anything 3 nodes."
            ),
            search_aliases=["load depth", "load cameras", "import poses", "geometry", "da3", "intrinsic reward"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files() or [NO_FILES],
                    tooltip=(
                        "A .safetensors file in the folder geometry of the output or the input directory. Press R to "
                        "refresh the list after adding one."
                    ),
                ),
            ],
            outputs=[
                DA3GeometryType.Output(
                    display_name="da3_geometry", tooltip="Multi-view geometry with its frame numbers."
                ),
                io.Image.Output(display_name="images", tooltip="The frames that the geometry was estimated from."),
            ],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        if file not in list_files():
            raise ValueError(f"{LOAD}, input 'file': {cls.validate_inputs(file)}")
        path = folder_paths.get_annotated_filepath(file)
        views = load_views(path)
        if views.images is None:
            raise GeometryError(f"{LOAD}: {path} holds geometry without images; save it with its images")
        require_usable(views, f"{LOAD}, {path}")
        return io.NodeOutput(to_wire(views), shared.on_wire(views.images))

    @classmethod
    def validate_inputs(cls, file):
        if file is None or file in list_files():
            return True
        folder = os.path.join(folder_paths.get_output_directory(), FOLDER)
        if file == NO_FILES:
            return f"there is no geometry in {folder}: save some with the node Save Geometry"
        return (
            f"there is no '{file}'; expected a .safetensors file in {folder} or in input/geometry: refresh the list"
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        if file not in list_files():
            return file
        return [file, *file_state(folder_paths.get_annotated_filepath(file))]


NODES = [SaveGeometry, LoadGeometry]
