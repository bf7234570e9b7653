"""Fixtures for tests that run inside a real ComfyUI.

ComfyUI is taken from COMFYUI_PATH, else from ~/comfy/ComfyUI, and must be importable by the Python that runs pytest.
Without it every test of this folder is skipped. Test modules import ComfyUI's packages inside their functions, never at the
top: before the fixture `comfy` has run, those imports would fail or read the wrong arguments.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from .comfyui_in_process import load_comfyui
from .comfyui_install import find_comfyui, make_base_directory, reason_to_skip
from .comfyui_server import ComfyUIServer
from .tiny_wan import write_models

HERE = Path(__file__).resolve().parent


class LoadedToy(NamedTuple):
    """MODEL, CLIP and VAE of the toy world."""

    model: object
    clip: object
    vae: object


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.resolve().parents]
    if not here:
        return
    for item in here:
        if "server" in item.fixturenames:
            # With --dist loadgroup one process has the server, and the others need not start one.
            item.add_marker(pytest.mark.xdist_group("server"))
    try:
        reason = reason_to_skip()
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from None
    if reason is not None:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def comfyui_path():
    """The folder of the ComfyUI under test."""
    return find_comfyui()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """ComfyUI's base directory for this session: models, custom_nodes, input, output; ComfyUI's own tree is never written."""
    return make_base_directory(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture(scope="session")
def models_dir(base_dir):
    """The models folder with the tiny Wan2.1 files; what a test adds is seen by `comfy` and `server` at once."""
    write_models(base_dir / "models")
    return base_dir / "models"


@pytest.fixture(scope="session")
def comfy(comfyui_path, base_dir, models_dir):
    """ComfyUI imported into this process with the pack loaded: an InProcessComfyUI."""
    return load_comfyui(comfyui_path, base_dir)


@pytest.fixture(scope="session")
def server(comfyui_path, base_dir, models_dir):
    """A running ComfyUI server with the pack installed: a ComfyUIServer."""
    with ComfyUIServer(comfyui_path, base_dir) as running:
        yield running


@pytest.fixture(scope="session")
def toy_files(models_dir):
    """The toy world's files and PRISM heads, where ComfyUI looks for them."""
    from benchmarks.toy_world import export

    return export.to_comfyui(models_dir)


@pytest.fixture(scope="session")
def toy(comfy, toy_files):
    """The toy world through ComfyUI's loaders: a LoadedToy."""
    from benchmarks.toy_world import weights

    (model,) = comfy.run("UNETLoader", unet_name=weights.DIT, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=weights.TEXT, type="wan")
    (vae,) = comfy.run("VAELoader", vae_name=weights.VAE)
    return LoadedToy(model, clip, vae)


@pytest.fixture(scope="session")
def toy_backbone():
    """What a PRISM head's file says about the toy world's transformer, read from its file."""
    from safetensors.torch import load_file

    from benchmarks.toy_world import weights
    from trainers.kernels.prism.backbone import of_wan

    return of_wan(load_file(weights.FOLDER / weights.DIT))
