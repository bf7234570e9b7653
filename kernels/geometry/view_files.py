"""Geometry files: views with depth and cameras in one safetensors file.

Header (safetensors metadata, as in kernels.files.header); every value is a string:

  format           "intrinsic_reward"
  format_version   "1"
  kind             "geometry"
  frame_indices    JSON list: index of each view's frame in the clip
  frames           number of frames of the clip
  notes            JSON list of strings
  provenance       JSON object: created_by and entries added by the writer; no absolute paths

Tensors: depth [S, H, W], K [S, 3, 3], world_to_camera [S, 4, 4]; optional: confidence [S, H, W], images uint8 [S, H, W, 3].
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files.atomic import write_atomic, write_new
from ..files.header import DAMAGED, FORMAT, FORMAT_VERSION, describe_foreign
from ..version import CREATED_BY
from .record import GeometryError
from .views import Views

KIND = "geometry"
MAKER = "make one with the Save Geometry node"
REQUIRED = ("depth", "K", "world_to_camera")


def save_views(path: str | Path, views: Views, provenance: dict | None = None) -> None:
    """Save views to a file, written atomically; images, if any, are stored in 8 bits.

    provenance: JSON-compatible entries for the header. Raises OSError if the file cannot be written.
    """
    tensors, metadata = _stored(views, provenance)
    try:
        write_atomic(path, lambda partial: save_file(tensors, partial, metadata=metadata))
    except SafetensorError as e:
        raise OSError(f"{path}: could not be written ({e})") from e


def save_views_unused(names: Iterable[Path], views: Views) -> Path:
    """The same under the first of `names` that no file has, which is returned. Raises OSError."""
    tensors, metadata = _stored(views, None)
    try:
        return write_new(names, lambda partial: save_file(tensors, partial, metadata=metadata))
    except SafetensorError as e:
        raise OSError(f"the geometry could not be written ({e})") from e


def load_views(path: str | Path) -> Views:
    """Load views written by save_views. Images are floats in [0, 1], or None if the file has none.

    Raises FileNotFoundError, and GeometryError for a file of another kind or a damaged one. Does not check whether the
    geometry can be scored; see views.require_usable.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            _require_geometry(metadata, path)
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as e:
        raise GeometryError(f"{path}: {describe_foreign(path)} ({e}); expected a file of geometry: {MAKER}") from e
    missing = [name for name in REQUIRED if name not in tensors]
    if missing:
        raise GeometryError(f"{path}: no {', no '.join(missing)} in it; expected {', '.join(REQUIRED)}: {MAKER}")
    shape = list(tensors["depth"].shape)
    if len(shape) != 3 or 0 in shape:
        raise GeometryError(f"{path}: depth of shape {shape}; expected [views, height, width]: {MAKER}")
    odd = [name for name, t in tensors.items() if t.is_complex()]
    if odd:
        raise GeometryError(f"{path}: {odd[0]} has complex numbers; expected real ones: {MAKER}")
    count = shape[0]
    try:
        indices = [int(i) for i in json.loads(metadata.get("frame_indices", json.dumps(list(range(count)))))]
        frames = int(metadata.get("frames", count))
        notes = [str(n) for n in json.loads(metadata.get("notes", "[]"))]
    except DAMAGED as e:
        raise GeometryError(f"{path}: its header is damaged ({type(e).__name__}: {e}); {MAKER}") from e
    images = tensors.get("images")
    if images is not None:
        images = images.float() / 255.0 if images.dtype == torch.uint8 else _real(images)
    found = {name: _real(t) for name, t in tensors.items() if name != "images"}
    return Views(images, *(found[name] for name in REQUIRED), found.get("confidence"), indices, frames, notes)


def _real(t: torch.Tensor) -> torch.Tensor:
    """In fp32 where it is in a type with which torch cannot compute all, such as 8-bit floats."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _require_geometry(metadata: dict[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT or metadata.get("kind") != KIND:
        kind = metadata.get("kind")
        found = f"a file of kind '{kind}'" if kind else "safetensors without this pack's header"
        raise GeometryError(f"{path}: {found}; expected a file of geometry: {MAKER}")
    version = metadata.get("format_version", "")
    if not re.fullmatch("[0-9]{1,9}", version):
        raise GeometryError(f"{path}: format_version '{version[:40]}' is not a number; {MAKER}")
    if int(version) > FORMAT_VERSION:
        raise GeometryError(f"{path}: written in version {version}, this pack reads up to {FORMAT_VERSION}; update the pack")


def _stored(views: Views, provenance: dict | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header's entries of a file."""
    tensors = {name: getattr(views, name) for name in (*REQUIRED, "confidence") if getattr(views, name) is not None}
    # Copies, since safetensors refuses tensors that share memory.
    tensors = {name: t.detach().float().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    if views.images is not None:
        tensors["images"] = (views.images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": KIND,
        "frame_indices": json.dumps(views.frame_indices),
        "frames": str(views.frames),
        "notes": json.dumps(views.notes),
        "provenance": json.dumps({"created_by": CREATED_BY, **(provenance or {})}, sort_keys=True),
    }
    return tensors, metadata
