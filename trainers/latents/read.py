"""Finished latents from disk: clips are listed from file headers, then read one at a time.

Three kinds of file are read, given as files, folders or glob patterns:

  .safetensors  files of kind "latents" (kernels.files.latents): normalised, with their latent space in the header
  .latent       ComfyUI's SaveLatent: raw [B, C, T, h, w]; the latent space follows from C unless it is given
  .pt, .pth     one tensor [T, C, h, w], [C, T, h, w] or [B, C, T, h, w], normalised unless stated otherwise; loaded with
                weights_only. Where T = C the channel axis is told by statistics (`latent_space.channel_axis_evidence`)

Noisy states of sampling runs and images of image-to-video pairs, which such files may hold as well, are left out. So are
other files of this pack in a folder, such as heads, manifolds and embedded prompts. What was left out is said once.
"""

import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels import latent_space
from ..kernels.files import latents as latents_file
from ..kernels.files.header import describe_foreign, other_kind, read_header
from ..kernels.files.latents import CLIP, IMAGE, STATE, UNKNOWN
from ..kernels.latent_space import NORMALISED, RAW, LatentSpace, LatentSpaceError
from ..running.inputs import InputError, expand

PT_SUFFIXES = (".pt", ".pth")
LATENT_SUFFIXES = (".safetensors", ".latent", *PT_SUFFIXES)
BY_CHANNELS = {16: latent_space.WAN21, 48: latent_space.WAN22}
# Order of the axes of .pt and .pth tensors; AUTO: by shape, and where that does not decide, by statistics.
AUTO, TIME_FIRST, CHANNELS_FIRST = "auto", "tchw", "cthw"
PT_AXES = (AUTO, TIME_FIRST, CHANNELS_FIRST)
# Nats. Noise without a clip reaches 2.5, and no clip or crop was told wrong by more than 0.6; clips have 3.4 to 14.
LEAST_EVIDENCE = 3.0
NO_TENSOR = ".pth files without a tensor of latents"
DESCRIPTIONS = {
    STATE: "noisy states of runs",
    IMAGE: "images of image-to-video pairs",
    UNKNOWN: "latents of `trainers.dpo cache --image_to_video` of an earlier version, which does not say which are images",
}


class LatentDataError(ValueError):
    """A file of latents cannot be used; the message names the file and the reason."""


class ObjectsError(LatentDataError):
    """A PyTorch file holds Python objects other than tensors, which are not loaded."""


@dataclass(frozen=True)
class ClipRef:
    """One clip on disk. key: tensor name in a shard, batch index in a .latent or a tensor of five axes, None for one of four;
    entry: of a shard's header."""

    clip_id: str
    path: Path
    space: LatentSpace
    key: str | int | None = None
    entry: dict | None = None


def list_clips(
    paths: Iterable[str | Path],
    space: LatentSpace | None = None,
    noisy_states: bool = False,
    say: Callable[[str], object] = logging.warning,
) -> list[ClipRef]:
    """Every clip in `paths`, in an order that depends on names only; no latents are read.

    space: that of .latent and .pt files, and the one that shards must have; None: shards have any, .latent files wan21 or
    wan22 by the channel count, .pt files wan21. noisy_states: whether these, and images of image-to-video pairs, are listed as
    well, as training data is read. say: called once with a sentence on what was left out, if anything was. Raises InputError,
    LatentDataError, FormatError or LatentSpaceError, each naming the file; LatentSpaceError also for mixed latent spaces.
    """
    paths = list(paths)
    # A file that is given by its name or by a pattern must hold clips, one that lies in a folder may be of another kind.
    files = expand([p for p in paths if not Path(p).is_dir()], LATENT_SUFFIXES, "latents")
    named = {path.resolve() for path in files.values()}
    refs: list[ClipRef] = []
    left_out: Counter[str] = Counter()
    for name, path in expand(paths, LATENT_SUFFIXES, "latents").items():
        suffix = path.suffix.lower()
        if suffix not in LATENT_SUFFIXES:
            raise InputError(f"{path}: latents come as {', '.join(LATENT_SUFFIXES)}")
        if path.resolve() not in named and (other := _other_kind(path)):
            left_out[other] += 1
        elif suffix == ".safetensors":
            refs += _list_shard(path, space, noisy_states, left_out, path.resolve() in named)
        else:
            refs += (_list_latent if suffix == ".latent" else _list_pt)(path, name, space)
    if left_out:
        say(left_out_text(left_out))
    if not refs:
        why = f" ({left_out_text(left_out)})" if left_out else ""
        raise LatentDataError(f"the files given hold no clips{why}")
    return _without_repeats(refs)


def left_out_kind(path: Path) -> str | None:
    """What a file in a folder of clips holds, such as "PRISM heads", if it is one that readers of finished clips leave out.

    None for clips, and for foreign and damaged files, which cannot be read and are named by who tries. Only a header is read.
    """
    if path.suffix.lower() not in (".safetensors", ".pth"):
        return None
    try:
        other = _other_kind(path)
        if other or path.suffix.lower() == ".pth":
            return other
        header = read_header(path, "latents")
    except (ValueError, OSError):
        return None
    kinds = {latents_file.holds(e, header.provenance) for e in header.config.get("clips", {}).values()}
    return DESCRIPTIONS.get(min(kinds)) if kinds and CLIP not in kinds else None


def clip_files(files: Iterable[Path], say: Callable[[str], object] = logging.warning) -> list[Path]:
    """The files of a folder without those that `left_out_kind` names. say: as for `list_clips`."""
    found = {path: left_out_kind(path) for path in files}
    if left_out := Counter(filter(None, found.values())):
        say(left_out_text(left_out))
    return [path for path, other in found.items() if other is None]


def left_out_text(counts: Counter[str]) -> str:
    """A sentence on what a reader has left out. counts: by what it is, see `left_out_kind`."""
    return "left out, no clips: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))


def shape_of(ref: ClipRef) -> tuple[int, ...]:
    """(C, T, h, w) of a clip in a shard, from the file's header only. Raises LatentDataError for a damaged file."""
    with _open(ref.path) as f:
        return tuple(f.get_slice(ref.key).get_shape())


def read_clip(ref: ClipRef, pt_state: str = NORMALISED, trust_state: bool = False, pt_axes: str = AUTO) -> Tensor:
    """The clip as normalised latents, float32 [C, T, h, w] on the CPU.

    pt_state: whether .pt and .pth files hold NORMALISED or RAW latents; trust_state: do not check this, nor that .latent files
    are raw, against the latents' statistics; pt_axes: one of PT_AXES. Raises LatentDataError or LatentSpaceError naming the
    file.
    """
    source = str(ref.path) if ref.key is None else f"{ref.path} ({ref.key})"
    suffix = ref.path.suffix.lower()
    if suffix in PT_SUFFIXES:
        z, state = _read_pt(ref, pt_axes), pt_state
    else:
        with _open(ref.path) as f:
            z = f.get_tensor(ref.key) if suffix == ".safetensors" else f.get_slice("latent_tensor")[ref.key]
        state = NORMALISED if suffix == ".safetensors" else RAW
    if z.ndim != 4 or 0 in z.shape:
        raise LatentDataError(f"{source}: expected latents [C, T, h, w], found shape {list(z.shape)}")
    ref.space.require_channels(z, 0, source)
    z = z.float()
    _require_finite(z, source)
    if suffix != ".safetensors" and not trust_state:
        try:
            latent_space.require_state(z, ref.space, state, source, dim=0)
        except LatentSpaceError as e:
            raise LatentSpaceError(f"{e}. If the state is correct, give --trust_state") from e
    return ref.space.normalise(z, dim=0) if state == RAW else z


def digest_of(ref: ClipRef, read: Callable[[ClipRef], Tensor] = read_clip) -> str:
    """The digest of a clip's content (`kernels.files.latents.digest`): from the header where that has it, else of the tensor.

    Raises what `read` raises.
    """
    return (ref.entry or {}).get("digest") or latents_file.digest(read(ref))


def related(ref: ClipRef, read: Callable[[ClipRef], Tensor] = read_clip) -> list[tuple]:
    """Keys that a clip shares with those that belong on its side of a split (`kernels.held_out.linked`).

    They are the video that it was cut from, that video's content, its file name in the clip's folder, and the digest of the
    latent itself, for which a clip whose header lacks it is read. Raises what `read` raises.
    """
    entry = ref.entry or {}
    found = [("video", entry.get("video")), ("content", entry.get("content"))]
    if entry.get("source") is not None:
        found.append(("source", ref.path.parent.resolve(), entry["source"]))
    return [key for key in found if key[1] is not None] + [("digest", digest_of(ref, read))]


def _other_kind(path: Path) -> str | None:
    """What a file is if it holds no latents and readers of a folder leave it out."""
    if path.suffix.lower() == ".safetensors":
        return other_kind(path)
    if path.suffix.lower() != ".pth":
        return None
    try:
        return None if isinstance(_load_pt(path, "meta"), Tensor) else NO_TENSOR
    except ObjectsError:
        return NO_TENSOR


def _list_shard(
    path: Path, space: LatentSpace | None, noisy_states: bool, left_out: Counter[str], named: bool
) -> list[ClipRef]:
    header = read_header(path, "latents")
    if header.config.get("state") != NORMALISED:
        raise LatentDataError(f"{path}: the header does not state that its latents are normalised; create the file again")
    if space is not None and not space.same_as(header.latent_space):
        raise LatentSpaceError(f"{path}: holds '{header.latent_space.id}' latents, expected '{space.id}'")
    entries = header.config.get("clips", {})
    with _open(path) as f:
        keys = sorted(f.keys())
    refs = [ClipRef(key, path, header.latent_space, key, entries.get(key)) for key in keys]
    if noisy_states:
        return refs
    what = {ref.clip_id: latents_file.holds(ref.entry, header.provenance) for ref in refs}
    others = Counter(DESCRIPTIONS.get(w, f"latents of the unknown kind '{w}'") for w in what.values() if w != CLIP)
    if others and len(refs) == others.total() and named:
        raise LatentDataError(
            f"{path}: holds {', '.join(sorted(others))}, {others.total()} in all, and no finished clip; give finished ones, "
            "such as those of `python -m trainers.encode`"
        )
    left_out.update(others)
    return [ref for ref in refs if what[ref.clip_id] == CLIP]


def _without_repeats(refs: Sequence[ClipRef]) -> list[ClipRef]:
    """The clips, all of one latent space, each id once.

    Two processes that encoded one video into one folder leave equal clips under one id, of which the first is taken. Raises
    LatentSpaceError or LatentDataError.
    """
    known: dict[str, ClipRef] = {}
    for ref in refs:
        if not ref.space.same_as(refs[0].space):
            raise LatentSpaceError(
                f"{refs[0].path} holds '{refs[0].space.id}' latents and {ref.path} '{ref.space.id}' latents; give one kind"
            )
        other = known.setdefault(ref.clip_id, ref)
        repeated = other.path.parent == ref.path.parent and "digest" in (ref.entry or {}) and other.entry == ref.entry
        if other is not ref and not repeated:
            raise LatentDataError(f"{other.path} and {ref.path} both hold the clip '{ref.clip_id}'; leave one of them out")
    return list(known.values())


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
    space = space or latent_space.WAN21
    shape = _pt_tensor(path, "meta").shape
    if len(shape) == 4:
        return [ClipRef(name, path, space)]
    if shape[0] == 0:
        raise LatentDataError(f"{path}: expected latents, found shape {list(shape)}")
    return [ClipRef(name if shape[0] == 1 else f"{name}#{b}", path, space, b) for b in range(shape[0])]


def _read_pt(ref: ClipRef, axes: str) -> Tensor:
    """[C, T, h, w] of any float dtype."""
    data = _pt_tensor(ref.path, "cpu")
    # Axes as the file counts them: a batch has one before those of its clips.
    first = 0 if ref.key is None else 1
    z = data if ref.key is None else data[ref.key]
    given = {TIME_FIRST: (1,), CHANNELS_FIRST: (0,), AUTO: (0, 1)}[axes]
    fitting = [axis for axis in given if z.shape[axis] == ref.space.channels]
    if not fitting:
        allowed = " or ".join(f"on axis {first + axis}" for axis in given)
        raise LatentSpaceError(
            f"{ref.path}: expected {ref.space.channels} channels (latent space '{ref.space.id}') {allowed}, "
            f"found shape {list(data.shape)}; use a latent encoded by the VAE of '{ref.space.id}'"
        )
    if len(fitting) == 2:
        fitting = [_channel_axis(z, ref.path, list(data.shape))]
    return z.movedim(fitting[0], 0)


def _channel_axis(z: Tensor, path: Path, shape: list[int]) -> int:
    """Which of the first two axes of a clip holds the channels, 0 or 1, by its statistics."""
    _require_finite(z, str(path))
    evidence = latent_space.channel_axis_evidence(z, 0, 1)
    if abs(evidence) < LEAST_EVIDENCE:
        raise LatentDataError(
            f"{path}: of shape {shape}, which is that of [T, C, h, w] and of [C, T, h, w], and neither size nor content tells "
            f"which it is; give --pt_axes {TIME_FIRST} or {CHANNELS_FIRST}"
        )
    return 0 if evidence > 0 else 1


def _pt_tensor(path: Path, device: str) -> Tensor:
    """The float tensor of four or five axes in a file."""
    data = _load_pt(path, device)
    if not isinstance(data, Tensor):
        raise LatentDataError(f"{path}: holds a {type(data).__name__}, expected one tensor [T, C, h, w] or [B, C, T, h, w]")
    if data.ndim not in (4, 5) or not data.is_floating_point():
        raise LatentDataError(
            f"{path}: a {data.dtype} tensor of shape {list(data.shape)}, expected floats [T, C, h, w], [C, T, h, w] or "
            "[B, C, T, h, w]"
        )
    return data


def _load_pt(path: Path, device: str):
    """What a .pt or .pth file holds; "meta" as the device reads no values."""
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=device == "cpu" and zipfile.is_zipfile(path))
    except Exception as e:  # torch.load raises many unrelated types
        if "weights_only" in str(e) or "Weights only" in str(e):
            raise ObjectsError(f"{path}: holds Python objects other than tensors; none of its code was executed") from e
        raise LatentDataError(f"{path}: damaged or not a PyTorch file ({type(e).__name__}: {_short(e)})") from e


def _require_finite(z: Tensor, source: str) -> None:
    if not torch.isfinite(z).all():
        raise LatentDataError(f"{source}: contains NaN or Inf; create the file again")


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise LatentDataError(f"{path}: {describe_foreign(path)} ({_short(e)}); create or copy the file again") from e


def _short(e: Exception) -> str:
    return " ".join(str(e).split())[:160]
