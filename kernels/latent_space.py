"""Latent spaces: which VAE a latent belongs to, and whether it is raw or normalised.

A *raw* latent is what a VAE's encoder returns and what a ComfyUI LATENT wire carries. A *normalised* latent is
(raw - mean[c]) / std[c], the space in which a diffusion model's x0 lives and in which every score of this pack is
defined. Scoring a raw latent as if it were normalised gives a plausible number that means nothing, so whoever reads a
latent states which of the two it is, and `require_state` contradicts a statement that the statistics do not bear out.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

RAW = "raw"
NORMALISED = "normalised"


class LatentSpaceError(ValueError):
    """A latent, file or model belongs to another latent space than the one at hand."""


@dataclass(frozen=True)
class LatentSpace:
    """One VAE's latent space.

    id: short name, for example `wan21`; channels: C; mean, std: C floats each, of raw latents;
    spatial_stride, temporal_stride: pixels (frames) per latent position; the first frame has a position of its own.
    """

    id: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    spatial_stride: int = 8
    temporal_stride: int = 4

    def __post_init__(self):
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise LatentSpaceError(
                f"latent space '{self.id}': expected {self.channels} means and stds, "
                f"found {len(self.mean)} and {len(self.std)}"
            )
        if not all(s > 0 for s in self.std):
            raise LatentSpaceError(f"latent space '{self.id}': every std must be positive")

    def normalise(self, raw: Tensor, dim: int = 1) -> Tensor:
        """(raw - mean) / std along channel axis `dim`, same shape and dtype. Raises LatentSpaceError on wrong channels."""
        mean, std = self._constants(raw, dim)
        return (raw - mean) / std

    def denormalise(self, z: Tensor, dim: int = 1) -> Tensor:
        """z * std + mean along channel axis `dim`: the inverse of `normalise`."""
        mean, std = self._constants(z, dim)
        return z * std + mean

    def require_channels(self, x: Tensor, dim: int, source: str) -> None:
        """Raises LatentSpaceError naming `source` unless axis `dim` of x has this space's channel count."""
        if x.shape[dim] != self.channels:
            raise LatentSpaceError(
                f"{source}: expected {self.channels} channels (latent space '{self.id}') on axis {dim}, "
                f"found shape {list(x.shape)}; use a latent made by the VAE of '{self.id}'"
            )

    def require_video(self, x: Tensor, source: str) -> None:
        """Raises ValueError naming `source` unless x is a finite video latent [B, C, T, H, W] of this space's channels."""
        if x.ndim != 5:
            raise ValueError(
                f"{source}: expected a video latent [batch, channels, frames, height, width], found shape {list(x.shape)}; "
                "use one that a video VAE made, or an empty video latent"
            )
        self.require_channels(x, 1, source)
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{source}: found NaN or infinite values; look at what made the latent (often fp16 overflow)")

    def same_as(self, other: "LatentSpace") -> bool:
        """True when both normalise alike, whatever they are called."""
        return self.channels == other.channels and _close(self.mean, other.mean) and _close(self.std, other.std)

    def to_json(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "LatentSpace":
        """Raises ValueError, KeyError or TypeError when the text is not such a description."""
        d = json.loads(text)
        space = cls(
            str(d["id"]),
            int(d["channels"]),
            tuple(float(v) for v in d["mean"]),
            tuple(float(v) for v in d["std"]),
            int(d.get("spatial_stride", 8)),
            int(d.get("temporal_stride", 4)),
        )
        known = KNOWN.get(space.id)
        if known is not None and not known.same_as(space):
            raise LatentSpaceError(f"latent space '{space.id}' is declared with other means or stds than its own")
        return space

    def _constants(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        self.require_channels(x, dim, "latent")
        shape = [1] * x.ndim
        shape[dim] = self.channels
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return (torch.tensor(v, dtype=dtype, device=x.device).view(shape) for v in (self.mean, self.std))


def _close(a, b) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= 1e-3 * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


WAN21 = LatentSpace(
    "wan21",
    16,
    (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
     3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)  # fmt: skip

WAN22 = LatentSpace(
    "wan22",
    48,
    (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
     -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
     -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
     -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
     -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
     0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
     0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
     0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
     0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
     0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
     0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    spatial_stride=16,
)  # fmt: skip

KNOWN: dict[str, LatentSpace] = {s.id: s for s in (WAN21, WAN22)}


def by_id(space_id: str) -> LatentSpace:
    """A known space by its id. Raises LatentSpaceError listing the known ids."""
    if space_id not in KNOWN:
        raise LatentSpaceError(f"unknown latent space '{space_id}': known are {', '.join(KNOWN)}")
    return KNOWN[space_id]


def identify(mean, std, spatial_stride: int = 8, temporal_stride: int = 4) -> LatentSpace:
    """The known space with these constants, else a custom one whose id is derived from them."""
    mean, std = tuple(float(v) for v in mean), tuple(float(v) for v in std)
    for space in KNOWN.values():
        if _close(mean, space.mean) and _close(std, space.std):
            return space
    digest = hashlib.sha256(json.dumps([[round(v, 4) for v in mean], [round(v, 4) for v in std]]).encode()).hexdigest()
    return LatentSpace(f"custom{len(mean)}-{digest[:8]}", len(mean), mean, std, spatial_stride, temporal_stride)


def from_comfy(latent_format) -> LatentSpace:
    """The space of a ComfyUI latent format (`model.get_model_object("latent_format")`).

    The constants are read off `process_in` itself, which is affine per channel, so that a format needs no attribute of
    a particular name. Raises LatentSpaceError when the format is not affine per channel.
    """
    channels, name = latent_format.latent_channels, type(latent_format).__name__
    probe = torch.stack([torch.full((channels, 1, 1, 1), v) for v in (0.0, 1.0, 2.0)])
    try:
        zero, one, two = (latent_format.process_in(p[None])[0].flatten() for p in probe)
    except (RuntimeError, ValueError, TypeError) as e:
        raise LatentSpaceError(f"latent format {name} does not take a video latent of {channels} channels: {e}") from e
    slope = one - zero
    affine = zero.numel() == channels and torch.allclose(two - one, slope, atol=1e-4)
    if not affine or not bool((slope > 0).all()):
        raise LatentSpaceError(f"latent format {name} is no shift and scale per channel: no latent space can be read off it")
    std = 1.0 / slope
    return identify(
        (-zero * std).tolist(),
        std.tolist(),
        getattr(latent_format, "spacial_downscale_ratio", 8),
        getattr(latent_format, "temporal_downscale_ratio", 1),
    )


def from_diffusers(config) -> LatentSpace:
    """The space of a diffusers VAE config (`z_dim`, `latents_mean`, `latents_std`; AutoencoderKLWan's own names).

    Raises LatentSpaceError when the config lacks them.
    """
    missing = [k for k in ("latents_mean", "latents_std") if config.get(k) is None]
    if missing:
        raise LatentSpaceError(f"the VAE's config has no {' and no '.join(missing)}: its latents cannot be normalised")
    return identify(
        config["latents_mean"],
        config["latents_std"],
        config.get("scale_factor_spatial") or 8,
        config.get("scale_factor_temporal") or 4,
    )


def log_odds_raw(x: Tensor, space: LatentSpace, dim: int = 1) -> float:
    """Mean log likelihood ratio per value (nats) of "x is raw" against "x is normalised", from channel moments.

    Positive: the channel means and variances look like the space's own constants; negative: like 0 and 1.
    """
    space.require_channels(x, dim, "latent")
    rows = x.detach().float().movedim(dim, 0).reshape(space.channels, -1)
    var, m = torch.var_mean(rows, dim=1, correction=0)
    mean, std = (torch.tensor(v, device=x.device) for v in (space.mean, space.std))
    as_normalised = -0.5 * (var + m.square())
    as_raw = -0.5 * (var + (m - mean).square()) / std.square() - std.log()
    return float((as_raw - as_normalised).mean())


def require_state(x: Tensor, space: LatentSpace, state: str, source: str, dim: int = 1) -> None:
    """Raises LatentSpaceError, naming `source`, when x is stated to be `state` and its statistics say the other.

    state: RAW or NORMALISED. A heuristic on channel moments: callers offer the user a way to overrule it.
    """
    odds = log_odds_raw(x, space, dim)
    if state == NORMALISED and odds > 0:
        raise LatentSpaceError(
            f"{source}: stated to be normalised, but its channel means and variances are those of raw "
            f"'{space.id}' VAE latents; normalise it first: (latent - mean) / std per channel"
        )
    if state == RAW and odds < 0:
        raise LatentSpaceError(
            f"{source}: stated to be raw, but its channel means and variances are those of normalised "
            f"'{space.id}' latents; it would be normalised twice"
        )
