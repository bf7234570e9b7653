"""Latents from disk: clips are listed from file headers, then read one at a time.

Three kinds of file are read, given as files, folders or glob patterns:

  .safetensors  shards of `python -m trainers.encode`: normalised, with their latent space in the header
  .latent       ComfyUI's SaveLatent: raw [B, C, T, h, w]; the latent space follows from C unless it is given
  .pt, .pth     one tensor [T, C, h, w], [C, T, h, w] or [1, C, T, h, w], normalised unless stated otherwise; loaded with
                weights_only

Noisy states of runs, which `trainers.prism collect` keeps for training, are no clips. In a folder, other files of this pack
(embedded prompts, heads, manifolds, LoRAs, checkpoints) are left out, with a warning that counts them.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels import latent_space
from ..kernels.files.header import FORMAT, describe_foreign, read_header
from ..kernels.latent_space import NORMALISED, RAW, LatentSpace, LatentSpaceError
from ..running.inputs import InputError, expand

LATENT_SUFFIXES = (".safetensors", ".latent", ".pt", ".pth")
# Entries of a header by which other files of this pack are known: kinds of kernels.files.header, and what trainers write.
OTHER_KINDS = {"texts": "embedded prompts", "prism_head": "PRISM heads", "shell_lcc": "Shell-LCC manifolds"}
OTHER_FILES = {"state": "checkpoints", "intrinsic_reward.training": "LoRAs", "modelspec.architecture": "LoRAs or models"}
# Neighbouring frames of a latent correlate by .95 or more, neighbouring channels by .1 to .2 (one real clip of Wan2.1).
LEAST_DIFFERENCE = 0.3
# Orders of the axes of a .pt file.
TCHW, CTHW = "tchw", "cthw"
AXES = ("auto", TCHW, CTHW)
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


def list_clips(
    paths: Iterable[str | Path], space: LatentSpace | None = None, noisy_states: bool = False
) -> list[ClipRef]:
    """Every clip in `paths`, in an order that depends on names only; no latents are read.

    space: that of .latent and .pt files, and the one that shards must have; None: shards have any, .latent files wan21 or
    wan22 by the channel count, .pt files wan21; noisy_states: whether the noisy states of runs are listed as well. Raises
    InputError, LatentDataError, FormatError or LatentSpaceError, each naming the file; LatentSpaceError also where latent
    spaces are mixed.
    """
    paths = list(paths)
    named = {Path(p).resolve() for p in paths if Path(p).is_file()}
    refs: list[ClipRef] = []
    left_out: Counter = Counter()
    for name, path in expand(paths, LATENT_SUFFIXES, "latents").items():
        suffix = path.suffix.lower()
        if suffix not in LATENT_SUFFIXES:
            raise InputError(f"{path}: latents come as {', '.join(LATENT_SUFFIXES)}")
        other = _kind_of_other(path) if suffix == ".safetensors" and path.resolve() not in named else None
        if other is not None:
            left_out[other] += 1
            continue
        refs += LISTERS[suffix](path, name, space)
    if not noisy_states:
        states = [ref for ref in refs if (ref.entry or {}).get("sigma") is not None]
        left_out["noisy states of runs"] += len(states)
        if states and len(states) == len(refs):
            raise LatentDataError(
                f"{states[0].path}: holds noisy states of runs, which `python -m trainers.prism collect` keeps for training, "
                "and no finished clip; give encoded videos or finished latents"
            )
        refs = [ref for ref in refs if (ref.entry or {}).get("sigma") is None]
    counts = [f"{count} {what}" for what, count in sorted(left_out.items()) if count]
    if not refs:
        raise LatentDataError(f"the files given hold no clips{' (left out: ' + ', '.join(counts) + ')' if counts else ''}")
    if counts:
        logging.warning("left out, no clips: %s", ", ".join(counts))
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


def read_clip(ref: ClipRef, pt_state: str = NORMALISED, trust_state: bool = False, pt_axes: str = "auto") -> Tensor:
    """The clip as normalised latents, float32 [C, T, h, w] on the CPU.

    pt_state: whether .pt files hold NORMALISED or RAW latents; trust_state: do not check this, nor that .latent files are
    raw, against the latents' statistics; pt_axes: one of AXES, the order of a .pt file's axes. Raises LatentDataError or
    LatentSpaceError naming the file.
    """
    source = str(ref.path) if ref.key is None else f"{ref.path} ({ref.key})"
    suffix = ref.path.suffix.lower()
    if suffix in (".pt", ".pth"):
        z, state = _read_pt(ref.path, ref.space, pt_axes), pt_state
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


def _kind_of_other(path: Path) -> str | None:
    """What a safetensors file of this pack is that holds no latents; None for latents and for foreign files."""
    with _open(path) as f:
        header = f.metadata() or {}
    if header.get("format") == FORMAT:
        return OTHER_KINDS.get(header.get("kind"))
    return next((what for entry, what in OTHER_FILES.items() if entry in header), None)


def _list_pt(path: Path, name: str, space: LatentSpace | None) -> list[ClipRef]:
    return [ClipRef(name, path, space or latent_space.WAN21)]


def _read_pt(path: Path, space: LatentSpace, axes: str) -> Tensor:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many unrelated types
        if "weights_only" in str(e) or "Weights only" in str(e):
            raise LatentDataError(f"{path}: holds Python objects other than tensors; none of its code was executed") from e
        raise LatentDataError(f"{path}: damaged or not a PyTorch file ({type(e).__name__}: {_short(e)})") from e
    if not isinstance(data, Tensor):
        raise LatentDataError(f"{path}: holds a {type(data).__name__}, expected one tensor [T, C, h, w]")
    expected = "expected floats [T, C, h, w], [C, T, h, w] or [1, C, T, h, w]"
    if data.ndim not in (4, 5) or not data.is_floating_point():
        raise LatentDataError(f"{path}: a {data.dtype} tensor of shape {list(data.shape)}, {expected}")
    if data.ndim == 5:
        if len(data) != 1:
            raise LatentDataError(f"{path}: a tensor of shape {list(data.shape)}, {len(data)} clips; save one clip a file")
        space.require_channels(data, 1, str(path))
        return data[0]
    if axes == "auto":
        axes = _axes_of(data, space, path)
    space.require_channels(data, 0 if axes == CTHW else 1, str(path))
    return data if axes == CTHW else data.movedim(1, 0)


def _axes_of(data: Tensor, space: LatentSpace, path: Path) -> str:
    """The order of the axes of a clip of 4 dimensions: by the number of channels, or where there are as many frames, by which
    axis' neighbours look alike."""
    fits = [size == space.channels for size in data.shape[:2]]
    if fits != [True, True]:
        return CTHW if fits == [True, False] else TCHW
    alike = [_likeness(data.float(), dim) for dim in (0, 1)]
    if abs(alike[0] - alike[1]) < LEAST_DIFFERENCE:
        raise LatentDataError(
            f"{path}: of shape {list(data.shape)}, and neither size nor content tells frames from channels (neighbours "
            f"correlate by {alike[0]:.2f} along the first axis and {alike[1]:.2f} along the second); give --pt_axes"
        )
    return TCHW if alike[0] > alike[1] else CTHW


def _likeness(data: Tensor, dim: int) -> float:
    """Mean correlation of neighbouring slices along a dimension, -1 to 1."""
    slices = data.movedim(dim, 0).flatten(1)
    slices = torch.nn.functional.normalize(slices - slices.mean(dim=1, keepdim=True), dim=1)
    return float((slices[1:] * slices[:-1]).sum(dim=1).mean())


LISTERS = {".safetensors": _list_shard, ".latent": _list_latent, ".pt": _list_pt, ".pth": _list_pt}


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise LatentDataError(f"{path}: {describe_foreign(path)} ({_short(e)}); create or copy the file again") from e


def _short(e: Exception) -> str:
    return " ".join(str(e).split())[:160]
