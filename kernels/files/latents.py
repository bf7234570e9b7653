"""Files of kind "latents": video latents of clips, one tensor a clip, which trainers read as training data.

A safetensors file with the header of `header.py`. Tensors: {clip id: [C, T, h, w]}, normalised, of any float dtype. The
header's config holds

  state     "normalised"
  settings  object: what decides the numbers, such as size, dtype and the digest of the VAE; files with other settings do not
            belong in one folder
  clips     {clip id: {source, video, frames, ...}}: source: name of the file or run that the clip was made from; video: clips
            of one video stay on one side of a train/validation split; frames: frames of the decoded clip; the writer may add
            window, start_frame, start_s, fps, width, height, caption, run, prompt, sigma, seed
  videos    {video id: {source, clips, max_clips}} for each video that this file finishes; empty where nothing is continued
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..latent_space import NORMALISED, LatentSpace
from . import header

KIND = "latents"


def write_latents(
    path: str | Path,
    tensors: dict[str, Tensor],
    space: LatentSpace,
    clips: Mapping[str, dict],
    *,
    settings: Mapping | None = None,
    videos: Mapping[str, dict] | None = None,
    provenance: Mapping | None = None,
) -> None:
    """Writes normalised latents {clip id: [C, T, h, w]} and the entries of their clips, see the module's docstring.

    The file is complete or absent. Raises OSError, naming the file, when it cannot be written.
    """
    config = {"state": NORMALISED, "settings": dict(settings or {}), "clips": dict(clips), "videos": dict(videos or {})}
    header.write(path, tensors, header.Header(KIND, space, config, {}, dict(provenance or {})))


def describe_one(path: str | Path) -> tuple[LatentSpace, tuple[int, ...]]:
    """(latent space, shape [C, T, h, w]) of a file with one clip, from its header only.

    Raises FormatError or FileNotFoundError naming the file.
    """
    found = header.read_header(path, KIND)
    with safe_open(path, framework="pt") as f:
        keys = list(f.keys())
        if len(keys) != 1 or found.config.get("state") != NORMALISED:
            raise header.FormatError(f"{path}: holds {len(keys)} clips, expected the one normalised clip of a candidate")
        return found.latent_space, tuple(f.get_slice(keys[0]).get_shape())


def read_one(path: str | Path) -> Tensor:
    """The normalised latents [C, T, h, w], fp32, on the CPU, of a file with one clip. Raises FormatError naming the file."""
    tensors, _ = header.read(path, KIND)
    (z,) = tensors.values()
    if not bool(z.isfinite().all()):
        raise header.FormatError(f"{path}: contains NaN or infinite values; create the clip again, or remove its record")
    return z.float()
