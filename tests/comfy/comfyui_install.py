"""Where the ComfyUI under test is, whether this Python can run it, and the base directory it works in."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

PACK_ROOT = Path(__file__).resolve().parents[2]
PACK_NAME = "ComfyUI-IntrinsicReward"
SHIM_ROOT = Path(__file__).resolve().parent / "tiny_umt5_shim"
DEFAULT_COMFYUI = Path("~/comfy/ComfyUI")

# A sample of requirements.txt by import name: enough to tell ComfyUI's own Python from any other.
REQUIRED_MODULES = (
    "aiohttp", "alembic", "av", "comfy_aimdo", "comfy_kitchen", "einops", "psutil", "safetensors", "sentencepiece", "torch",
    "torchsde", "transformers", "yaml",
)


def find_comfyui():
    """ComfyUI's folder, or None when there is none; a COMFYUI_PATH that leads nowhere is an error."""
    configured = os.environ.get("COMFYUI_PATH")
    path = Path(configured or DEFAULT_COMFYUI).expanduser().resolve()
    if (path / "main.py").is_file() and (path / "comfy").is_dir():
        return path
    if configured:
        raise FileNotFoundError(f"COMFYUI_PATH is {configured}, which holds no ComfyUI (no main.py and comfy/)")
    return None


def reason_to_skip():
    """Why the tests that need ComfyUI cannot run, or None when they can."""
    path = find_comfyui()
    if path is None:
        return f"needs ComfyUI: set COMFYUI_PATH to its folder (there is none at {DEFAULT_COMFYUI})"
    missing = [name for name in REQUIRED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} lacks what ComfyUI at {path} requires ({', '.join(missing)}): "
            "run these tests with ComfyUI's own Python, python -m pytest tests/comfy"
        )
    return None


def make_base_directory(base):
    """Lay out a ComfyUI base directory with this pack and the test-only shim installed."""
    for folder in ("models", "custom_nodes", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    _install(PACK_ROOT, base / "custom_nodes" / PACK_NAME)
    _install(SHIM_ROOT, base / "custom_nodes" / SHIM_ROOT.name)
    return base


def _install(source, target):
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:
        # Windows reserves symbolic links for administrators and developer mode.
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
