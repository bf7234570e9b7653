"""Reading the raw video latents of a LATENT wire."""

import torch

from ..kernels.latent_space import LatentSpace, log_odds_raw


def read_raw(latent: dict, space: LatentSpace, source: str) -> torch.Tensor:
    """The raw samples [B, C, T, H, W] of a LATENT. Raises ValueError naming `source` unless they are a finite video
    latent of the space."""
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError(f"{source}: expected a video latent, found a combined audio-video latent; connect its video part")
    if samples.ndim != 5:
        raise ValueError(
            f"{source}: expected a video latent [batch, channels, frames, height, width], found shape {list(samples.shape)}; "
            "connect a latent made with a Wan VAE or an empty video latent"
        )
    space.require_channels(samples, 1, source)
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"{source}: found NaN or infinite values; look for the node that made them (often fp16 overflow)")
    return samples


def normalised_warning(samples: torch.Tensor, space: LatentSpace, source: str) -> str | None:
    """A sentence when raw samples look like normalised ones, which would be normalised twice.

    Only a warning: a flat or dark clip has small channel variances too.
    """
    if log_odds_raw(samples, space) >= 0:
        return None
    return (
        f"{source} looks normalised already (or is empty or very flat), while a LATENT is raw VAE output; "
        "the scores are wrong if it comes from a node pack with latents of its own."
    )
