"""Latents and frames of candidates: read from their files, or converted from one to the other by a Wan VAE."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..kernels.video.clips import DecodeOptions, SourceReport, VideoError
from ..kernels.video.sizes import nearest_bucket
from ..latents.read import AUTO, ClipRef, LatentDataError, list_clips, read_clip
from ..running.device import DTYPES, dtype_for, pick_device
from ..running.identity import weights_identity
from ..video.read import decode_clips
from ..wan import vae as wan_vae
from ..wan.vae import WanVae
from .groups import Candidate, Group

# What one clip that cannot be read may raise: it is skipped, the others are still processed.
BAD_CLIP = (VideoError, ValueError, OSError)


@dataclass(frozen=True)
class ClipOptions:
    """vae: file or folder, None where no clip needs one; vae_dtype: "auto" or a name of DTYPES; tiling: encode and decode in
    tiles; size: of kernels.video.sizes; fps, frames: at which, and of how many at most, videos are encoded; pt_axes: of
    latents.read.PT_AXES."""

    vae: str | None = None
    vae_dtype: str = "auto"
    tiling: bool = False
    size: str = "480p"
    fps: float = 16.0
    frames: int = 81
    device: str = "auto"
    pt_axes: str = AUTO


class ClipReader:
    """Reads candidates under one set of options. The VAE is loaded when it is first needed."""

    def __init__(self, options: ClipOptions):
        self.options = options

    @cached_property
    def vae(self) -> WanVae:
        """Raises VaeError or FileNotFoundError."""
        device = pick_device(self.options.device)
        dtype = DTYPES[dtype_for(self.options.vae_dtype, device)]
        return wan_vae.load(self.options.vae, dtype, device, self.options.tiling)

    def prepare(self, candidate: Candidate) -> None:
        """Loads the VAE if the candidate's latents need it. Raises VaeError, which concerns all clips, not this one."""
        if candidate.latents is None:
            _ = self.vae

    def latents(self, candidate: Candidate) -> tuple[Tensor, LatentSpace]:
        """(normalised z [C, T, h, w] float32 on the CPU, its LatentSpace). Raises some of BAD_CLIP, naming the file."""
        if candidate.latents is not None:
            ref = clip_of(candidate.latents)
            return self.read(ref), ref.space
        size = self.options.size
        decoding = DecodeOptions(lambda w, h: nearest_bucket(size, w, h), self.options.fps, self.options.frames)
        clip = next(decode_clips(candidate.video, decoding, SourceReport(candidate.name)))
        return self.vae.encode(clip.frames), self.vae.space

    def read(self, ref: ClipRef) -> Tensor:
        """As latents.read.read_clip under these options."""
        return read_clip(ref, pt_axes=self.options.pt_axes)

    def frames(self, latents: Path) -> Tensor:
        """uint8 [T, H, W, 3], decoded from a file's one clip. Raises LatentDataError, LatentSpaceError or VaeError."""
        ref = clip_of(latents)
        if not ref.space.same_as(self.vae.space):
            raise LatentSpaceError(
                f"{latents}: '{ref.space.id}' latents, but the VAE {self.vae.name} is of '{self.vae.space.id}'"
            )
        return decode(self.vae, self.read(ref))

    def described(self, groups: Sequence[Group]) -> dict:
        """What decides latents that are encoded or read here, for a digest of settings; empty where files alone decide."""
        o = self.options
        axes = {} if o.pt_axes == AUTO else {"pt_axes": o.pt_axes}
        if all(c.latents is not None for g in groups for c in g.candidates):
            return axes
        return axes | {
            "vae": weights_identity(o.vae), "vae_dtype": o.vae_dtype, "tiling": o.tiling, "size": o.size, "fps": o.fps,
            "frames": o.frames,
        }  # fmt: skip


@torch.no_grad()
def decode(vae: WanVae, z: Tensor) -> Tensor:
    """Normalised z [C, T, h, w] -> uint8 [4T-3, H, W, 3] on the CPU. Raises VaeError when the result is not finite."""
    weight = next(vae.model.parameters())
    raw = vae.space.denormalise(z[None].to(weight.device, torch.float32)).to(weight.dtype)
    video = vae.model.decode(raw).sample[0].float()
    if not torch.isfinite(video).all():
        raise wan_vae.VaeError(f"the VAE decoded to NaN or Inf in {weight.dtype}; try --vae_dtype float32")
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()


def clip_of(path: Path) -> ClipRef:
    """The only clip of a file of latents. Raises LatentDataError for another number, or what else makes it unreadable."""
    refs = list_clips([path])
    if len(refs) != 1:
        raise LatentDataError(f"{path}: holds {len(refs)} clips, expected one per file")
    return refs[0]
