"""Reading the raw video latents of a LATENT wire."""

import torch

from ..kernels.latent_space import KNOWN, LatentSpace, LatentSpaceError, by_id, log_odds_raw

AUTO = "auto"


def choose_space(channels: int, choice: str, source: str) -> LatentSpace:
    """The space named by `choice`, or for AUTO the known one with that many channels. Raises LatentSpaceError."""
    if choice != AUTO:
        return by_id(choice)
    for space in KNOWN.values():
        if space.channels == channels:
            return space
    known = ", ".join(f"{s.channels} ({s.id})" for s in KNOWN.values())
    raise LatentSpaceError(f"{source}: found {channels} channels, expected {known}; use a Wan VAE")


def read_raw(latent: dict, space: LatentSpace, source: str) -> torch.Tensor:
    """The raw samples [B, C, T, H, W] of a LATENT. Raises ValueError naming `source` unless they are a finite video
    latent of the space."""
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError(f"{source}: expected a video latent, found a combined audio-video latent; connect its video part")
    space.require_video(samples, source)
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
