"""Latent spaces: channel statistics of each VAE's latents, raw and normalised latents, and checks between them.

A *raw* latent is the output of a VAE's encoder and the content of a ComfyUI LATENT. A *normalised* latent is
(raw - mean[c]) / std[c], the space of a diffusion model's x0, in which all scores of this pack are defined. Scoring a
raw latent as normalised gives a plausible but meaningless number. So code that reads a latent states its kind, and
`require_state` raises an error if the latent's statistics contradict it.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

RAW = "raw"
NORMALISED = "normalised"
MOST_STRIDE = 128


class LatentSpaceError(ValueError):
    """A latent, file or model does not belong to the expected latent space."""


@dataclass(frozen=True)
class LatentSpace:
    """Latent space of one VAE.

    id: short name, for example `wan21`; channels: C; mean, std: C floats each, of raw latents, std > 0;
    spatial_stride: pixels per latent position; temporal_stride: video frames per latent frame, except the first latent
    frame, which encodes one video frame. Raises LatentSpaceError if mean or std do not have C finite values or a std is
    not > 0.
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
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise LatentSpaceError(f"latent space '{self.id}': every mean and std must be finite")

    def normalise(self, raw: Tensor, dim: int = 1) -> Tensor:
        """(raw - mean) / std along channel axis `dim`; same shape and dtype. Raises LatentSpaceError on wrong channels."""
        mean, std = self._constants(raw, dim)
        return (raw - mean) / std

    def denormalise(self, z: Tensor, dim: int = 1) -> Tensor:
        """z * std + mean along channel axis `dim`, the inverse of `normalise`. Raises LatentSpaceError on wrong channels."""
        mean, std = self._constants(z, dim)
        return z * std + mean

    def require_channels(self, x: Tensor, dim: int, source: str) -> None:
        """Raise LatentSpaceError that names `source` unless axis `dim` of x has this space's channel count."""
        if x.shape[dim] != self.channels:
            raise LatentSpaceError(
                f"{source}: expected {self.channels} channels (latent space '{self.id}') on axis {dim}, "
                f"found shape {list(x.shape)}; use a latent encoded by the VAE of '{self.id}'"
            )

    def require_video(self, x: Tensor, source: str) -> None:
        """Raise ValueError that names `source` unless x is a finite video latent [B, C, T, H, W], C = channels."""
        if x.ndim != 5:
            raise ValueError(
                f"{source}: expected a video latent [batch, channels, frames, height, width], found shape {list(x.shape)}; "
                "use a latent from a video VAE or an empty video latent"
            )
        self.require_channels(x, 1, source)
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{source}: found NaN or infinite values; check what made the latent (often fp16 overflow)")

    def same_as(self, other: "LatentSpace") -> bool:
        """True if both have the same channels, mean and std (to 1e-3); ids and strides are not compared."""
        return self.channels == other.channels and _close(self.mean, other.mean) and _close(self.std, other.std)

    def to_json(self) -> str:
        """JSON text of all fields, for a file's header."""
        return json.dumps(self.__dict__, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "LatentSpace":
        """Parse the text of `to_json`. Raises ValueError, KeyError, TypeError, OverflowError or RecursionError if it is not
        valid."""
        d = json.loads(text)
        space = cls(
            str(d["id"]),
            int(d["channels"]),
            tuple(float(v) for v in d["mean"]),
            tuple(float(v) for v in d["std"]),
            int(d.get("spatial_stride", 8)),
            int(d.get("temporal_stride", 4)),
        )
        # Pictures of latents are enlarged by these.
        if space.channels < 1 or not all(1 <= n <= MOST_STRIDE for n in (space.spatial_stride, space.temporal_stride)):
            raise LatentSpaceError(
                f"latent space '{space.id}': {space.channels} channels, strides {space.spatial_stride} and "
                f"{space.temporal_stride}; expected at least 1 channel, and strides of 1 to {MOST_STRIDE}"
            )
        known = KNOWN.get(space.id)
        if known is not None and not known.same_as(space):
            raise LatentSpaceError(f"latent space '{space.id}' is declared with other means or stds than the known space has")
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
    """Known latent space with this id. Raises LatentSpaceError that lists the known ids."""
    if space_id not in KNOWN:
        raise LatentSpaceError(f"unknown latent space '{space_id}': expected one of {', '.join(KNOWN)}")
    return KNOWN[space_id]


def identify(mean, std, spatial_stride: int = 8, temporal_stride: int = 4) -> LatentSpace:
    """Known latent space with these means and stds, else a custom one with an id hashed from them.

    mean, std: C floats each; the strides are used only for a custom space. Raises LatentSpaceError as LatentSpace does.
    """
    mean, std = tuple(float(v) for v in mean), tuple(float(v) for v in std)
    for space in KNOWN.values():
        if _close(mean, space.mean) and _close(std, space.std):
            return space
    digest = hashlib.sha256(json.dumps([[round(v, 4) for v in mean], [round(v, 4) for v in std]]).encode()).hexdigest()
    return LatentSpace(f"custom{len(mean)}-{digest[:8]}", len(mean), mean, std, spatial_stride, temporal_stride)


def from_comfy(latent_format) -> LatentSpace:
    """Latent space of a ComfyUI latent format (`model.get_model_object("latent_format")`).

    Mean and std are computed from three calls of `process_in`, so they do not depend on attribute names of the format.
    Raises LatentSpaceError if `process_in` is not affine per channel with a positive scale.
    """
    channels, name = latent_format.latent_channels, type(latent_format).__name__
    probe = torch.stack([torch.full((channels, 1, 1, 1), v) for v in (0.0, 1.0, 2.0)])
    try:
        zero, one, two = (latent_format.process_in(p[None])[0].flatten() for p in probe)
    except (RuntimeError, ValueError, TypeError) as e:
        raise LatentSpaceError(f"latent format {name} cannot process a video latent of {channels} channels: {e}") from e
    slope = one - zero
    affine = zero.numel() == channels and torch.allclose(two - one, slope, atol=1e-4)
    if not affine or not bool((slope > 0).all()):
        raise LatentSpaceError(f"latent format {name} is not a shift and positive scale per channel, so it is not supported")
    std = 1.0 / slope
    return identify(
        (-zero * std).tolist(),
        std.tolist(),
        getattr(latent_format, "spacial_downscale_ratio", 8),
        getattr(latent_format, "temporal_downscale_ratio", 1),
    )


def from_diffusers(config) -> LatentSpace:
    """Latent space of a diffusers VAE config with AutoencoderKLWan's entries `latents_mean` and `latents_std`.

    `scale_factor_spatial` and `scale_factor_temporal` are optional (8 and 4). Raises LatentSpaceError if either of the
    first two is missing.
    """
    missing = [k for k in ("latents_mean", "latents_std") if config.get(k) is None]
    if missing:
        raise LatentSpaceError(f"the VAE config has no {' and no '.join(missing)}, so its latents cannot be normalised")
    return identify(
        config["latents_mean"],
        config["latents_std"],
        config.get("scale_factor_spatial") or 8,
        config.get("scale_factor_temporal") or 4,
    )


def log_odds_raw(x: Tensor, space: LatentSpace, dim: int = 1) -> float:
    """Mean log likelihood ratio per value (nats) of "x is raw" against "x is normalised", from channel moments.

    Positive: channel means and variances are closer to the space's mean and std^2; negative: closer to 0 and 1.
    Raises LatentSpaceError if axis `dim` of x has another number of channels.
    """
    space.require_channels(x, dim, "latent")
    rows = x.detach().float().movedim(dim, 0).reshape(space.channels, -1)
    var, m = torch.var_mean(rows, dim=1, correction=0)
    mean, std = (torch.tensor(v, device=x.device) for v in (space.mean, space.std))
    as_normalised = -0.5 * (var + m.square())
    as_raw = -0.5 * (var + (m - mean).square()) / std.square() - std.log()
    return float((as_raw - as_normalised).mean())


def require_state(x: Tensor, space: LatentSpace, state: str, source: str, dim: int = 1) -> None:
    """Raise LatentSpaceError that names `source` if the statistics of x contradict its stated `state`.

    state: RAW or NORMALISED. The check is a heuristic on channel moments, so callers offer a way to skip it.
    """
    odds = log_odds_raw(x, space, dim)
    if state == NORMALISED and odds > 0:
        raise LatentSpaceError(
            f"{source}: stated to be normalised, but its channel means and variances look like those of raw "
            f"'{space.id}' VAE latents; normalise it first: (latent - mean) / std per channel"
        )
    if state == RAW and odds < 0:
        raise LatentSpaceError(
            f"{source}: stated to be raw, but its channel means and variances look like those of normalised "
            f"'{space.id}' latents; it would be normalised twice"
        )


def channel_axis_evidence(x: Tensor, axis: int, other: int) -> float:
    """Evidence (nats) that `axis` of a latent x is its channels and `other` its latent frames, rather than the reverse.

    The sum of two log ratios, of `axis` to `other`: mean squared difference of neighbouring slices (consecutive frames
    resemble each other, consecutive channels do not), and variance of the slices' means (channels have means of their own,
    frames share theirs). Both hold for raw and normalised latents, and neither depends on a clip's scale. The likelihood of
    the moments under the latent space is not used: 0 and 1 fit the frames of a normalised clip as well as its channels. 0 for
    a constant x; noise without a clip in it stays between -2.5 and 2.5.
    """
    x = x.detach().float()
    floor = 1e-6 * float(x.var(correction=0)) + 1e-12
    return _log_ratio(_step, x, axis, other, floor) + _log_ratio(_spread, x, axis, other, floor)


def _log_ratio(measure, x: Tensor, axis: int, other: int, floor: float) -> float:
    return math.log((measure(x, axis) + floor) / (measure(x, other) + floor))


def _step(x: Tensor, axis: int) -> float:
    return float(x.diff(dim=axis).square().mean()) if x.shape[axis] > 1 else 0.0


def _spread(x: Tensor, axis: int) -> float:
    return float(x.movedim(axis, 0).flatten(1).mean(1).var(correction=0))
