"""Latent spaces of LATENT and MODEL inputs: read raw samples, and check that model and latent belong to one VAE."""

import torch

from ..kernels.latent_space import KNOWN, LatentSpace, LatentSpaceError, by_id, from_comfy, log_odds_raw

AUTO = "auto"
# Entry of a LATENT that Encode Clips from Folder made: the file of each of its clips, in their order.
SOURCES = "intrinsic_reward_sources"


def choose_space(channels: int, choice: str, source: str) -> LatentSpace:
    """The space with id `choice`; for AUTO the known space with that many channels. Raises LatentSpaceError."""
    if choice != AUTO:
        return by_id(choice)
    for space in KNOWN.values():
        if space.channels == channels:
            return space
    known = ", ".join(f"{s.channels} ({s.id})" for s in KNOWN.values())
    raise LatentSpaceError(f"{source}: found {channels} channels, expected {known}; use a Wan VAE")


def require_model_space(model, space: LatentSpace, source: str) -> None:
    """Raises LatentSpaceError unless the model (a ModelPatcher) works in `space`. source: what the space belongs to."""
    found = from_comfy(model.get_model_object("latent_format"))
    if not found.same_as(space):
        raise LatentSpaceError(
            f"{source} belongs to latent space '{space.id}', model {type(model.model).__name__} works in '{found.id}'; "
            f"load one for '{found.id}', or another model"
        )


def read_raw(latent: dict, space: LatentSpace, source: str) -> torch.Tensor:
    """The raw samples [B, C, T, H, W] of a LATENT.

    Raises ValueError (LatentSpaceError for another channel count) naming `source` unless they are a finite video latent of
    the space.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError(f"{source}: expected a video latent, found a combined audio-video latent; connect its video part")
    space.require_video(samples, source)
    return samples


def normalised_warning(samples: torch.Tensor, space: LatentSpace, source: str) -> str | None:
    """A warning when samples look already normalised, so that they would be normalised twice; else None.

    Not an error, because a flat or dark clip has small channel variances too.
    """
    if log_odds_raw(samples, space) >= 0:
        return None
    return (
        f"{source} looks normalised already (or is empty or very flat), but a LATENT should be raw VAE output; "
        "the scores are wrong if it comes from a node pack that normalises its latents."
    )
