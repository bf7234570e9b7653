"""A candidate's latents and frames, whichever of them it has; a Wan VAE makes the one of the other."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..latents import read as latent_data
from ..video.read import DecodeOptions, SourceReport, VideoError, decode_clips
from ..video.sizes import nearest_bucket
from ..wan import vae as wan_vae
from ..wan.vae import WanVae
from .groups import Candidate


@dataclass(frozen=True)
class Encoding:
    """How videos are encoded, as in trainers.encode. size: of trainers.video.sizes."""

    size: str = "480p"
    fps: float = 16.0
    frames: int = 81


def latents_of(candidate: Candidate, vae: WanVae | None, encoding: Encoding) -> tuple[Tensor, LatentSpace]:
    """(normalised z [C, T, h, w] float32 on the CPU, its LatentSpace). Raises some of BAD_CLIP, naming the file."""
    if candidate.latents is not None:
        ref = clip_of(candidate.latents)
        return latent_data.read_clip(ref), ref.space
    reading = DecodeOptions(lambda w, h: nearest_bucket(encoding.size, w, h), encoding.fps, encoding.frames)
    window = next(decode_clips(candidate.video, reading, SourceReport(candidate.name)))
    return vae.encode(window.frames), vae.space


def frames_of(latents: Path, vae: WanVae) -> Tensor:
    """uint8 [T, H, W, 3] that a VAE decodes a file's one clip to. Raises LatentDataError, LatentSpaceError or VaeError."""
    ref = clip_of(latents)
    if not ref.space.same_as(vae.space):
        raise LatentSpaceError(f"{latents}: '{ref.space.id}' latents, but the VAE {vae.name} is of '{vae.space.id}'")
    return decode(vae, latent_data.read_clip(ref))


@torch.no_grad()
def decode(vae: WanVae, z: Tensor) -> Tensor:
    """Normalised z [C, T, h, w] -> uint8 [4T-3, H, W, 3] on the CPU. Raises VaeError when the result is not finite."""
    weight = next(vae.model.parameters())
    raw = vae.space.denormalise(z[None].to(weight.device, torch.float32)).to(weight.dtype)
    video = vae.model.decode(raw).sample[0].float()
    if not torch.isfinite(video).all():
        raise wan_vae.VaeError(f"the VAE gave frames with NaN or Inf in {weight.dtype}; try --vae_dtype float32")
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()


def clip_of(path: Path) -> latent_data.ClipRef:
    """The one clip of a file of latents. Raises LatentDataError for another number, or what else makes it unreadable."""
    refs = latent_data.list_clips([path])
    if len(refs) != 1:
        raise latent_data.LatentDataError(f"{path}: holds {len(refs)} clips, expected one a file")
    return refs[0]


# What a single bad clip may raise: it is left out, the others go on.
BAD_CLIP = (VideoError, ValueError, OSError)
