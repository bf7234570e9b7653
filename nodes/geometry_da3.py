"""Geometry Consistency (DA3): reprojection error between frames, from depth and cameras (3DCS of VideoGPA)."""

from dataclasses import replace

import comfy.model_management
import torch
from comfy_api.latest import io

from ..kernels.geometry.dense import score_views
from ..kernels.geometry.heat_map import full_error, heat_map
from ..kernels.geometry.lpips import Lpips, load_lpips
from ..kernels.geometry.record import GeometryError
from ..kernels.geometry.views import MAX_VIEWS, Views
from . import geometry_clips as shared
from .geometry_type import DA3GeometryType, DA3ModelType, from_wire, run_da3
from .model_files import ModelFolder

TITLE = "Geometry Consistency (DA3)"
FOLDER = ModelFolder(
    "lpips", "LPIPS file", "put one there and refresh", frozenset({".safetensors", ".pth", ".pt"})
)
NONE = "none"


def geometry_of(da3_geometry, images, da3_model, views: int, resolution: int, pose_method: str) -> tuple[dict, str]:
    """(DA3_GEOMETRY, the socket it comes from). Raises ValueError when the wrong inputs are connected."""
    if da3_geometry is not None:
        if images is not None or da3_model is not None:
            raise ValueError(
                f"{TITLE}: da3_geometry is connected together with images or da3_model; connect either da3_geometry, or "
                "images and da3_model"
            )
        return da3_geometry, f"{TITLE}, input 'da3_geometry'"
    if images is None or da3_model is None:
        missing = "images" if da3_model is not None else "da3_model" if images is not None else "da3_geometry"
        raise ValueError(
            f"{TITLE}: nothing is connected to {missing}; connect da3_geometry, or images together with da3_model "
            "(from Load Depth Anything 3)"
        )
    source = f"{TITLE}, input 'images'"
    if images.shape[0] < 2:
        raise GeometryError(f"{source}: 1 frame; expected a clip of at least 2 frames, better 10 or more")
    if not bool(torch.isfinite(images).all()):
        raise GeometryError(f"{source}: found NaN or infinite values; check what made the images (often fp16 overflow)")
    return run_da3(da3_model, images[..., :3], views, resolution, pose_method), source


def load_network(perceptual: str, vgg: str, device: torch.device) -> Lpips | None:
    """LPIPS from one or two files in models/lpips, None if none is chosen. Raises ValueError for `vgg` alone."""
    names = [name for name in (perceptual, vgg) if name != NONE]
    if not names:
        return None
    if perceptual == NONE:
        raise ValueError(f"{TITLE}, input 'vgg': VGG16 alone is not LPIPS; choose an LPIPS file in 'perceptual' as well")
    return load_lpips(*(FOLDER.path(name) for name in names)).to(device)


def memory_needed(views: Views) -> int:
    """Bytes to reserve for scoring the views: all of them are stored on the device, at most MAX_VIEWS are measured."""
    stored = sum(t.numel() * t.element_size() for t in (views.images, views.depth, views.confidence) if t is not None)
    # Points and their colours of the measured views, splatted into one view at a time.
    work = 200 * min(len(views.depth), MAX_VIEWS) * views.depth[0].numel()
    return stored + work + (512 << 20)


def to_compute_device(views: Views) -> Views:
    """The views on ComfyUI's compute device, after making room there for scoring them."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(memory_needed(views), device)
    names = ("images", "depth", "K", "world_to_camera", "confidence")
    return replace(views, **{k: None if getattr(views, k) is None else getattr(views, k).to(device) for k in names})


class GeometryDA3(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_GeometryDA3",
            display_name=TITLE,
            category=shared.CATEGORY,
            description=(
                "Scores how well a clip shows one rigid scene, from the depth and cameras that Depth Anything 3 estimates: "
                "every view is rendered from the points of the others and compared. Clips whose camera hardly moves are "
                "'undetermined' and score 0."
            ),
            search_aliases=[
                "geometry consistency", "3d consistency", "3dcs", "videogpa", "depth anything 3", "reprojection", "lpips",
                "heat map", "intrinsic reward",
            ],
            inputs=[
                io.Int.Input(
                    "views",
                    default=MAX_VIEWS,
                    min=2,
                    max=MAX_VIEWS,
                    tooltip="Number of frames given to the model, evenly spaced from the first to the last. 10 in the paper.",
                ),
                io.Int.Input(
                    "resolution",
                    default=504,
                    min=140,
                    max=2520,
                    step=14,
                    tooltip="Longest side in pixels that the model runs at. Less is faster and needs less memory.",
                ),
                io.Combo.Input(
                    "pose_method",
                    options=["cam_dec", "ray_pose"],
                    default="cam_dec",
                    advanced=True,
                    tooltip="How the model estimates the cameras. cam_dec: learned decoder; ray_pose: from its rays.",
                ),
                io.Combo.Input(
                    "perceptual",
                    options=[NONE, *FOLDER.files()],
                    default=NONE,
                    tooltip=(
                        "An LPIPS (VGG) file in models/lpips adds VideoGPA's 3DCS to the measurements. none: mean squared "
                        "error and DSSIM, which need no file."
                    ),
                ),
                io.Combo.Input(
                    "vgg",
                    options=[NONE, *FOLDER.files()],
                    default=NONE,
                    advanced=True,
                    tooltip="A VGG16 file in models/lpips, needed when the LPIPS file holds only the linear heads.",
                ),
                DA3GeometryType.Input(
                    "da3_geometry",
                    optional=True,
                    tooltip=(
                        "From Run Depth Anything 3 with mode 'multiview', or from Load Geometry. Or connect images and "
                        "da3_model."
                    ),
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The frames of one clip; with da3_model, instead of da3_geometry.",
                ),
                DA3ModelType.Input(
                    "da3_model",
                    optional=True,
                    tooltip="From Load Depth Anything 3: a Small or Base model, since only these estimate cameras.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="0 to 1, higher is better; 0 if undetermined."),
                io.String.Output(display_name="verdict", tooltip="consistent, inconsistent or undetermined."),
                io.Float.Output(
                    display_name="frame_errors",
                    is_output_list=True,
                    tooltip="Error of each view rendered from the others (mean squared error + DSSIM), lower is better.",
                ),
                io.Image.Output(
                    display_name="heat_map",
                    tooltip=(
                        "Errors as colours over the dimmed frames: all frames of images, or the views of the geometry."
                    ),
                ),
                io.Image.Output(display_name="reprojection", tooltip="Each view rendered from the points of the others."),
                io.String.Output(
                    display_name="record", tooltip="All measurements as JSON, for Record Preference (one for each clip)."
                ),
                io.String.Output(display_name="report", tooltip="All results as text."),
                DA3GeometryType.Output(
                    display_name="da3_geometry", tooltip="The scored geometry, for Save Geometry or core's nodes."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, views, resolution, pose_method, perceptual, vgg, da3_geometry=None, images=None, da3_model=None
    ) -> io.NodeOutput:  # fmt: skip
        geometry, source = geometry_of(da3_geometry, images, da3_model, views, resolution, pose_method)
        found = from_wire(geometry, source)
        placed = to_compute_device(found)
        scored = score_views(placed, load_network(perceptual, vgg, placed.depth.device), shared.progress(1)(0))
        record, text = scored.record, scored.record.text()
        frames, places = images, record.frame_indices
        if images is None:
            # There are no frames but the views.
            frames, places = found.images, [found.frame_indices.index(i) for i in record.frame_indices]
        errors = scored.error_map.cpu()
        full = full_error([errors], record.scorer)
        drawn = heat_map(frames.cpu(), errors, places, full)
        heat = shared.on_wire(drawn)
        shared.add_metadata(cls, TITLE, [scored])
        return io.NodeOutput(
            record.score,
            record.verdict,
            record.frame_errors,
            heat,
            shared.on_wire(scored.preview),
            record.dumps(),
            text,
            geometry,
            ui=shared.show(cls, text, [frames], [drawn], [replace(record, frame_indices=places)], full),
        )


NODES = [GeometryDA3]
