"""Latents from disk: clips are listed from file headers, then read one at a time.

Three kinds of file are read, given as files, folders or glob patterns:

  .safetensors  shards of `python -m trainers.encode`: normalised, with their latent space in the header
  .latent       ComfyUI's SaveLatent: raw [B, C, T, h, w]; the latent space follows from C unless it is given
  .pt           one tensor [T, C, h, w], normalised unless stated otherwise; loaded with weights_only
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels import latent_space
from ..kernels.files.header import describe_foreign, read_header
from ..kernels.latent_space import NORMALISED, RAW, LatentSpace, LatentSpaceError
from ..running.inputs import InputError, expand

LATENT_SUFFIXES = (".safetensors", ".latent", ".pt")
BY_CHANNELS = {16: latent_space.WAN21, 48: latent_space.WAN22}


class LatentDataError(ValueError):
    """A file of latents cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class ClipRef:
    """One clip on disk. key: tensor name in a shard, batch index in a .latent, None for a .pt; entry: of a shard's header."""

    clip_id: str
    path: Path
    space: LatentSpace
    key: str | int | None = None
    entry: dict | None = None


def list_clips(paths: Iterable[str | Path], space: LatentSpace | None = None) -> list[ClipRef]:
    """Every clip in `paths`, in an order that depends on names only; no latents are read.

    space: that of .latent and .pt files, and the one that shards must have; None: shards have any, .latent files wan21 or
    wan22 by the channel count, .pt files wan21. Raises InputError, LatentDataError, FormatError or LatentSpaceError, each
    naming the file; LatentSpaceError also where latent spaces are mixed.
    """
    refs: list[ClipRef] = []
    for name, path in expand(paths, LATENT_SUFFIXES, "latents").items():
        if path.suffix.lower() not in LATENT_SUFFIXES:
            raise InputError(f"{path}: latents come as {', '.join(LATENT_SUFFIXES)}")
        refs += {".safetensors": _list_shard, ".latent": _list_latent, ".pt": _list_pt}[path.suffix.lower()](path, name, space)
    if not refs:
        raise LatentDataError("the files given hold no clips")
    known: dict[str, ClipRef] = {}
    for ref in refs:
        if not ref.space.same_as(refs[0].space):
            raise LatentSpaceError(
                f"{refs[0].path} holds '{refs[0].space.id}' latents and {ref.path} '{ref.space.id}' latents; give one kind"
            )
        other = known.setdefault(ref.clip_id, ref)
        if other is not ref:
            raise LatentDataError(f"{other.path} and {ref.path} both hold the clip '{ref.clip_id}'; leave one of them out")
    return refs


def shape_of(ref: ClipRef) -> tuple[int, ...]:
    """(C, T, h, w) of a clip in a shard, from the file's header only. Raises LatentDataError for a damaged file."""
    with _open(ref.path) as f:
        return tuple(f.get_slice(ref.key).get_shape())


def read_clip(ref: ClipRef, pt_state: str = NORMALISED, trust_state: bool = False) -> Tensor:
    """The clip as normalised latents, float32 [C, T, h, w] on the CPU.

    pt_state: whether .pt files hold NORMALISED or RAW latents; trust_state: do not check this, nor that .latent files are
    raw, against the latents' statistics. Raises LatentDataError or LatentSpaceError naming the file.
    """
    source = str(ref.path) if ref.key is None else f"{ref.path} ({ref.key})"
    suffix = ref.path.suffix.lower()
    if suffix == ".pt":
        z, state = _read_pt(ref.path, ref.space), pt_state
    else:
        with _open(ref.path) as f:
            z = f.get_tensor(ref.key) if suffix == ".safetensors" else f.get_slice("latent_tensor")[ref.key]
        state = NORMALISED if suffix == ".safetensors" else RAW
    if z.ndim != 4 or 0 in z.shape:
        raise LatentDataError(f"{source}: expected latents [C, T, h, w], found shape {list(z.shape)}")
    ref.space.require_channels(z, 0, source)
    z = z.float()
    if not torch.isfinite(z).all():
        raise LatentDataError(f"{source}: contains NaN or Inf; create the file again")
    if suffix != ".safetensors" and not trust_state:
        try:
            latent_space.require_state(z, ref.space, state, source, dim=0)
        except LatentSpaceError as e:
            raise LatentSpaceError(f"{e}. If the state is correct, give --trust_state") from e
    return ref.space.normalise(z, dim=0) if state == RAW else z


def _list_shard(path: Path, name: str, space: LatentSpace | None) -> list[ClipRef]:
    header = read_header(path, "latents")
    if header.config.get("state") != NORMALISED:
        raise LatentDataError(f"{path}: the header does not state that its latents are normalised; create the file again")
    if space is not None and not space.same_as(header.latent_space):
        raise LatentSpaceError(f"{path}: holds '{header.latent_space.id}' latents, expected '{space.id}'")
    entries = header.config.get("clips", {})
    with _open(path) as f:
        keys = sorted(f.keys())
    return [ClipRef(key, path, header.latent_space, key, entries.get(key)) for key in keys]


def _list_latent(path: Path, name: str, space: LatentSpace | None) -> list[ClipRef]:
    with _open(path) as f:
        keys = set(f.keys())
        if "latent_tensor" not in keys:
            raise LatentDataError(f"{path}: no tensor 'latent_tensor' in it, so it is no latent saved by ComfyUI's SaveLatent")
        shape = f.get_slice("latent_tensor").get_shape()
    if "latent_format_version_0" not in keys:
        raise LatentDataError(
            f"{path}: no 'latent_format_version_0' in it, so it is a scaled image latent of an early ComfyUI, no video latent"
        )
    if len(shape) != 5:
        what = "an image latent" if len(shape) == 4 else "not a video latent"
        raise LatentDataError(f"{path}: {what} of shape {list(shape)}, expected [B, C, T, h, w]")
    space = space or BY_CHANNELS.get(shape[1])
    if space is None:
        raise LatentSpaceError(f"{path}: {shape[1]} channels; wan21 has 16 and wan22 has 48: choose one with --latent_space")
    if space.channels != shape[1]:
        raise LatentSpaceError(f"{path}: {shape[1]} channels, but latent space '{space.id}' has {space.channels}")
    return [ClipRef(name if shape[0] == 1 else f"{name}#{b}", path, space, b) for b in range(shape[0])]


def _list_pt(path: Path, name: str, space: LatentSpace | None) -> list[ClipRef]:
    return [ClipRef(name, path, space or latent_space.WAN21)]


def _read_pt(path: Path, space: LatentSpace) -> Tensor:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many unrelated types
        if "weights_only" in str(e) or "Weights only" in str(e):
            raise LatentDataError(f"{path}: holds Python objects other than tensors; none of its code was executed") from e
        raise LatentDataError(f"{path}: damaged or not a PyTorch file ({type(e).__name__}: {_short(e)})") from e
    if not isinstance(data, Tensor):
        raise LatentDataError(f"{path}: holds a {type(data).__name__}, expected one tensor [T, C, h, w]")
    if data.ndim != 4 or not data.is_floating_point():
        raise LatentDataError(f"{path}: a {data.dtype} tensor of shape {list(data.shape)}, expected floats [T, C, h, w]")
    space.require_channels(data, 1, str(path))
    return data.movedim(1, 0)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise LatentDataError(f"{path}: {describe_foreign(path)} ({_short(e)}); create or copy the file again") from e


def _short(e: Exception) -> str:
    return " ".join(str(e).split())[:160]
