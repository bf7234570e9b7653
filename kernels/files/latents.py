"""Files of kind "latents": video latents, one tensor each, which trainers read as training data.

A safetensors file with the header of `header.py`. Tensors: {clip id: [C, T, h, w]}, normalised, of any float dtype. The
header's config holds

  state     "normalised"
  settings  object: what decides the numbers, such as size, dtype and the digest of the VAE; files with other settings do not
            belong in one folder
  clips     {clip id: {holds, digest, source, video, frames, ...}}
              holds    "clip": a finished latent; "state": an intermediate one of a sampling run, with noise; "image": a first
                       frame's latent followed by grey, which image-to-video models are given. Files of earlier versions lack
                       it: there a latent with a "sigma" above 0 is a state, and any other one is taken for a clip
              digest   of the latent's values, see `digest`: equal latents are one clip, whatever their ids
              source   name of the file or run that the clip was made from; content: digest of that file
              video    clips of one video stay on one side of a train/validation split
              frames   frames of the decoded clip
            The writer may add window, start_frame, start_s, fps, width, height, caption, run, prompt, sigma, seed
  videos    {video id: {source, clips, max_clips}} for each video that this file finishes; empty where nothing is continued
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..latent_space import NORMALISED, LatentSpace
from . import header

KIND = "latents"
CLIP, STATE, IMAGE = "clip", "state", "image"
# Also in an entry's place: an earlier `dpo cache --image_to_video` did not say which of its latents are images.
UNKNOWN = "unknown"


def write_latents(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    space: LatentSpace,
    clips: Mapping[str, dict],
    *,
    settings: Mapping | None = None,
    videos: Mapping[str, dict] | None = None,
    provenance: Mapping | None = None,
) -> None:
    """Writes normalised latents {clip id: [C, T, h, w]} and the entries of their clips, see the module's docstring.

    "holds" and "digest" are added to entries that lack them. The file is complete or absent. Raises OSError, naming the file,
    when it cannot be written.
    """
    described = {"settings": settings, "videos": videos, "provenance": provenance}
    header.write(path, tensors, _header(tensors, space, clips, **described))


def write_unused_latents(
    names: Iterable[Path], tensors: Mapping[str, Tensor], space: LatentSpace, clips: Mapping[str, dict], **described
) -> Path:
    """`write_latents`, with its other arguments, to the first of `names` that no file has; no file is ever replaced.

    Returns that name. Raises FileExistsError where all names are taken, OSError when the file cannot be written.
    """
    return header.write_unused(names, tensors, _header(tensors, space, clips, **described))


def holds(entry: Mapping | None, provenance: Mapping | None = None) -> str:
    """CLIP, STATE, IMAGE or UNKNOWN: what a latent is by its entry in the header, and for earlier files by the provenance."""
    entry = entry or {}
    if "holds" in entry:
        return str(entry["holds"])
    if entry.get("sigma"):
        return STATE
    command = str((provenance or {}).get("command", ""))
    return UNKNOWN if "trainers.dpo" in command and "--image" in command else CLIP


def digest(z: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a latent's shape and its values in fp16: equal for one latent that
    was stored as fp16 and as fp32."""
    plain = z.detach().to("cpu", torch.float16).contiguous()
    found = hashlib.sha256(str(tuple(plain.shape)).encode())
    found.update(plain.numpy().data if plain.numel() else b"")
    return found.hexdigest()[:16]


def describe_one(path: str | Path) -> tuple[LatentSpace, tuple[int, ...]]:
    """(latent space, shape [C, T, h, w]) of a file with one finished clip, from its header only.

    Raises FormatError or FileNotFoundError naming the file.
    """
    found = header.read_header(path, KIND)
    with safe_open(path, framework="pt") as f:
        keys = list(f.keys())
        if len(keys) != 1 or found.config.get("state") != NORMALISED:
            raise header.FormatError(f"{path}: holds {len(keys)} clips, expected the one normalised clip of a candidate")
        _require_finished(path, found, keys[0])
        shape = tuple(f.get_slice(keys[0]).get_shape())
    _require_clip(path, found, shape)
    return found.latent_space, shape


def read_one(path: str | Path) -> Tensor:
    """The normalised latents [C, T, h, w], fp32, on the CPU, of a file with one finished clip.

    Raises FormatError naming the file.
    """
    tensors, found = header.read(path, KIND)
    if len(tensors) != 1:
        raise header.FormatError(f"{path}: holds {len(tensors)} clips, expected the one of a candidate; record the clip again")
    ((key, z),) = tensors.items()
    _require_finished(path, found, key)
    _require_clip(path, found, tuple(z.shape))
    if header.not_finite(tensors):
        raise header.FormatError(f"{path}: contains NaN or infinite values; create the clip again, or remove its record")
    return z.float()


def digest_of_one(path: str | Path) -> str:
    """The `digest` of a file with one clip, from its header where that has it. Raises FormatError or FileNotFoundError."""
    entries = list(_entries(path, header.read_header(path, KIND)).values())
    stated = str(entries[0].get("digest") or "") if len(entries) == 1 else ""
    return stated or digest(read_one(path))


def _header(tensors, space, clips, settings=None, videos=None, provenance=None) -> header.Header:
    entries = {
        key: {"holds": STATE if entry.get("sigma") else CLIP, "digest": digest(tensors[key])} | entry
        for key, entry in clips.items()
    }
    config = {"state": NORMALISED, "settings": dict(settings or {}), "clips": entries, "videos": dict(videos or {})}
    return header.Header(KIND, space, config, {}, dict(provenance or {}))


def _require_finished(path: str | Path, found: header.Header, key: str) -> None:
    what = holds(_entries(path, found).get(key), found.provenance)
    if what != CLIP:
        raise header.FormatError(f"{path}: holds a latent of kind '{what}', expected a finished clip; record the clip again")


def _require_clip(path: str | Path, found: header.Header, shape: tuple[int, ...]) -> None:
    channels = found.latent_space.channels
    if len(shape) != 4 or 0 in shape or shape[0] != channels:
        raise header.FormatError(
            f"{path}: holds a tensor of shape {list(shape)}, expected a clip [{channels}, frames, height, width]; record the "
            "clip again"
        )


def _entries(path: str | Path, found: header.Header) -> dict[str, dict]:
    """The header's entries of clips."""
    entries = found.config.get("clips", {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise header.FormatError(f"{path}: its header is damaged (clips are not objects by name); record the clip again")
    return entries
