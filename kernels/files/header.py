"""The header of all safetensors files of this pack: kind, version, latent space, configuration, metrics, provenance.

Trainers write it, nodes read it. Every value of a safetensors header is a string:

  format           "intrinsic_reward"
  format_version   "1"
  kind             "shell_lcc", "latents", ...
  latent_space     JSON of kernels.latent_space.LatentSpace, with its means and stds: the file explains itself
  config           JSON object: what the kind needs to be rebuilt (coder, sizes, ...)
  metrics          JSON object: the figures measured when the file was made
  provenance       JSON object: created_by, created, command, seed, data counts; no absolute paths
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..latent_space import LatentSpace
from .atomic import write_atomic, write_new

# What the text of a header's entry that is not the expected JSON raises, including nesting without end and huge numbers.
DAMAGED = (KeyError, TypeError, ValueError, OverflowError, RecursionError)

FORMAT = "intrinsic_reward"
FORMAT_VERSION = 1

KINDS = {
    "shell_lcc": ("a Shell-LCC manifold", "python -m trainers.shell_lcc fit"),
    "latents": ("a shard of encoded latents", "python -m trainers.encode"),
    "texts": ("embedded prompts", "python -m trainers.prism cache"),
    "prism_head": ("a PRISM head", "python -m trainers.prism train"),
}
# Safetensors files of this pack with another header: geometry of a clip; checkpoints, whose format begins with FORMAT; LoRAs
# and models, which have an entry that begins with FORMAT; best-<step>.safetensors of `trainers.shell_reward`, once without.
OTHERS = {
    "texts": "embedded prompts", "prism_head": "PRISM heads", "shell_lcc": "Shell-LCC manifolds",
    "geometry": "geometry of clips",
}  # fmt: skip
CHECKPOINT, MODEL = "checkpoints", "LoRAs or models"
BEST = re.compile(r"best-\d+\.safetensors")


class FormatError(ValueError):
    """A file is of another kind, version or format; the message names the file, what was found and what to do."""


@dataclass(frozen=True)
class Header:
    """The entries of a header; the module's docstring describes each."""

    kind: str
    latent_space: LatentSpace
    config: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def to_metadata(header: Header) -> dict[str, str]:
    """The header as safetensors metadata."""
    return {
        "format": FORMAT,
        "format_version": str(header.format_version),
        "kind": header.kind,
        "latent_space": header.latent_space.to_json(),
        **{k: json.dumps(getattr(header, k), sort_keys=True) for k in ("config", "metrics", "provenance")},
    }


def parse_metadata(metadata: dict[str, str] | None, kind: str, path: str | Path) -> Header:
    """Safetensors metadata -> Header. Raises FormatError unless the file is of `kind` and of a known version."""
    path, metadata = Path(path), metadata or {}
    wanted, maker = KINDS[kind]
    if metadata.get("format") != FORMAT:
        found = f"format '{metadata['format']}'" if "format" in metadata else "no format entry"
        raise FormatError(f"{path}: {found} in its header, so it is not {wanted}; make one with `{maker}`")
    try:
        version = int(metadata.get("format_version", ""))
    except ValueError:
        stated = metadata.get("format_version")
        raise FormatError(f"{path}: format_version '{stated}' is not a number; make the file again with `{maker}`") from None
    if version > FORMAT_VERSION:
        raise FormatError(f"{path}: written in version {version}, this pack reads up to {FORMAT_VERSION}; update the pack")
    if metadata.get("kind") != kind:
        found = KINDS.get(metadata.get("kind"), (f"of kind '{metadata.get('kind')}'",))[0]
        raise FormatError(f"{path}: found {found}, expected {wanted}; make one with `{maker}`")
    try:
        space = LatentSpace.from_json(metadata["latent_space"])
        config, metrics, provenance = (json.loads(metadata.get(k, "{}")) for k in ("config", "metrics", "provenance"))
    except DAMAGED as e:
        raise FormatError(f"{path}: its header is damaged ({type(e).__name__}: {e}); make it again with `{maker}`") from e
    for name, value in (("config", config), ("metrics", metrics), ("provenance", provenance)):
        if not isinstance(value, dict):
            raise FormatError(
                f"{path}: its header is damaged ({name} is a {type(value).__name__}, not an object); make it again with "
                f"`{maker}`"
            )
    return Header(kind, space, config, metrics, provenance, version)


def read_header(path: str | Path, kind: str) -> Header:
    """The header; no tensor is read. Raises FormatError or FileNotFoundError."""
    with _open(path) as f:
        return parse_metadata(f.metadata(), kind, path)


def read(path: str | Path, kind: str, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], Header]:
    """All tensors and the header of a file of `kind`. Raises FormatError or FileNotFoundError."""
    with _open(path, device) as f:
        header = parse_metadata(f.metadata(), kind, path)
        return {k: f.get_tensor(k) for k in f.keys()}, header  # noqa: SIM118 (not a mapping)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with values that are NaN, infinite in fp32 or complex; None where there is none.

    Tensors of any type: for 8-bit floats torch has no isfinite.
    """
    return next((name for name, t in tensors.items() if not _is_finite(t)), None)


def require_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raises ValueError unless the tensors have exactly these names and shapes."""
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [f"{what} {', '.join(names)[:200]}" for what, names in (("missing", missing), ("unexpected", unknown)) if names]
    wrong += [
        f"{name} has shape {list(t.shape)} instead of {list(expected[name])}"
        for name, t in tensors.items() if name in expected and t.shape != expected[name]
    ]  # fmt: skip
    if wrong:
        raise ValueError("; ".join(wrong[:3]))


def is_plain(value: object) -> bool:
    """Whether a value of a checkpoint is a tensor all of whose numbers are in the file, and real.

    Others can have any shape in a few bytes: without data, sparse, or one number repeated.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_complex())
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def other_kind(path: str | Path) -> str | None:
    """What a safetensors file of this pack holds if that is not latents, such as "PRISM heads", from its header.

    None for latents, and for files of other programs and damaged ones, which a reader of latents refuses itself.
    """
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError):
        return None
    stated, kind = metadata.get("format", ""), metadata.get("kind")
    if stated == FORMAT:
        return None if kind in ("latents", None) else OTHERS.get(kind, f"files of kind '{kind}'")
    if stated.startswith(f"{FORMAT}_") or (not metadata and BEST.fullmatch(Path(path).name)):
        return CHECKPOINT
    return MODEL if any(key.startswith(f"{FORMAT}.") for key in metadata) else None


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Writes a file atomically: under a temporary name in the same folder, then renamed.

    Raises OSError (naming the file) when the folder cannot be written or the disk is full.
    """
    plain = _plain(tensors)
    try:
        write_atomic(path, lambda partial: save_file(plain, partial, metadata=to_metadata(header)))
    except SafetensorError as e:
        raise OSError(f"{path}: could not be written ({e})") from e


def write_unused(names: Iterable[Path], tensors: Mapping[str, Tensor], header: Header) -> Path:
    """Writes a file under the first of `names` that no file has, as `atomic.write_new` does, and returns that name.

    Raises FileExistsError where all are taken, OSError when the folder cannot be written or the disk is full.
    """
    plain = _plain(tensors)
    try:
        return write_new(names, lambda partial: save_file(plain, partial, metadata=to_metadata(header)))
    except SafetensorError as e:
        raise OSError(f"a file of kind '{header.kind}' could not be written ({e})") from e


def describe_foreign(path: str | Path) -> str:
    """A short description of a file that is not safetensors, or not a whole one, from its first bytes."""
    with open(path, "rb") as f:
        head = f.read(64)
        size = f.seek(0, 2)
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, whose file was not downloaded (git lfs pull)"
    if head[:4] == b"GGUF":
        return "a GGUF file, whose quantisation is not read here"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page that was saved under this name"
    if head[:2] == b"PK":
        return "a zip archive, perhaps a PyTorch .pth or .pt checkpoint"
    if head[:1] == b"\x80":
        return "an old PyTorch checkpoint"
    if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3":
        return "a video file"
    if not head:
        return "an empty file"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and size > 8:
        return f"a truncated or damaged safetensors file ({size} bytes; its header alone has {length})"
    return "not a safetensors file, or a truncated one"


def _open(path: str | Path, device: str | torch.device = "cpu"):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        return safe_open(path, framework="pt", device=str(device))
    except SafetensorError as e:
        found = describe_foreign(path)
        raise FormatError(f"{path}: {found} ({e}); expected a complete safetensors file: copy or make it again") from e


def _is_finite(t: Tensor) -> bool:
    return not t.is_complex() and (not t.is_floating_point() or bool(torch.isfinite(t.float()).all()))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
