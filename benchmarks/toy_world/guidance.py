"""Shell-LCC guidance as a hook on the toy world's sampling, in all variants that the report compares."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.latent_space import WAN21, LatentSpace
from trainers.kernels.shell_lcc.calibration import LEVELS, Calibration, calibrate
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import BAND_MARGIN, ShellManifold
from trainers.kernels.shell_lcc.naive import limit_change
from trainers.kernels.shell_lcc.pull import descend, project

from .pipeline import SHIFT, Hook

TRUST = 0.2
# Beyond the node's methods: "random", the control, moves tokens as far as `project` in a random direction; "quantile" moves
# each token to the held-out quantile of its rank within the clip, which keeps the order of the distances.
METHODS = ("project", "band", "gradient", "minimise", "random", "quantile")
# Source of each step's target: real latents, or the model's own predictions for real latents noised to that sigma.
TARGETS = ("latents", "predictions")


@dataclass(frozen=True)
class Guidance:
    """One setting under test. start, end: shares of the noise schedule, as on the node.

    patch: side of the squares of positions that form a token, 1 as in the paper; the manifold must be one of such tokens.
    """

    method: str = "project"
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    target: str = "latents"
    trust: float = TRUST
    patch: int = 1

    def window(self, shift: float) -> tuple[float, float]:
        """(lowest, highest) sigma at which guidance is active."""
        return _shifted(1.0 - self.end, shift), _shifted(1.0 - self.start, shift)

    def hook(self, manifold: ShellManifold, table: "SigmaTable | None", seed: int, shift: float = SHIFT) -> Hook:
        """A hook that corrects x0 at the steps of the window. seed: of the random directions."""
        low, high = self.window(shift)
        generator = torch.Generator().manual_seed(seed)

        def correct(x0: Tensor, sigma: float, step: int) -> Tensor:
            if not low - 1e-6 <= sigma <= high + 1e-6:
                return x0
            calibration = manifold.calibration if self.target == "latents" else table.nearest(sigma)
            z = patches(x0, self.patch)
            tokens = z.movedim(1, -1).reshape(-1, z.shape[1])
            moved = self.move(manifold, tokens, calibration, len(z), generator)
            moved = moved.view(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)
            return merge(moved, self.patch).contiguous()

        return correct

    def move(self, manifold: ShellManifold, z: Tensor, c: Calibration, clips: int, generator: torch.Generator) -> Tensor:
        """Tokens [N, C] of `clips` clips, corrected towards calibration `c`."""
        coder, low, high = manifold.coder, *_inner(c.band)
        match self.method:
            case "project":
                return project(coder, z, c.radius, c.radius, self.strength, self.trust)
            case "band":
                return project(coder, z, low, high, self.strength, self.trust)
            case "gradient":
                return descend(coder, z, low, high, self.strength, self.trust)
            case "minimise":
                return descend(coder, z, 0.0, 0.0, self.strength, self.trust)
            case "random":
                length = (project(coder, z, c.radius, c.radius, self.strength, self.trust) - z).norm(dim=1, keepdim=True)
                direction = torch.randn(z.shape, generator=generator)
                return z + length * direction / direction.norm(dim=1, keepdim=True)
            case "quantile":
                return match_quantiles(coder, z, c, clips, self.strength, self.trust)
        raise ValueError(f"unknown method '{self.method}': expected one of {', '.join(METHODS)}")


def patches(z: Tensor, side: int) -> Tensor:
    """Latents [B, C, T, H, W] -> [B, C side^2, T, H - side + 1, W - side + 1]: one token per (overlapping) square."""
    if side == 1:
        return z
    b, c, t, h, w = z.shape
    out = F.unfold(z.transpose(1, 2).reshape(b * t, c, h, w), side)
    return out.view(b, t, c * side * side, h - side + 1, w - side + 1).transpose(1, 2)


def merge(x: Tensor, side: int) -> Tensor:
    """The inverse of `patches`: each position is the mean over the squares that contain it."""
    if side == 1:
        return x
    b, d, t, h, w = x.shape
    flat = x.transpose(1, 2).reshape(b * t, d, h * w)
    size = (h + side - 1, w + side - 1)
    out = F.fold(flat, size, side) / F.fold(torch.ones_like(flat), size, side)
    return out.view(b, t, -1, *size).transpose(1, 2)


def patch_space(side: int) -> LatentSpace:
    """The latent space of `patches` of Wan 2.1 latents."""
    channels = WAN21.channels * side * side
    return replace(WAN21, id=f"wan21_{side}x{side}", channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)


def fit_patch_manifold(fitted: Tensor, held_out: Tensor, side: int, anchors: int, seed: int = 0) -> ShellManifold:
    """A manifold of side x side squares, fitted on latents [N, C, T, H, W] and calibrated on others."""
    tokens = patches(fitted, side).movedim(1, -1).flatten(0, -2)
    manifold = ShellManifold(fit_anchors(tokens, anchors, seed=seed), patch_space(side), name=f"{side}x{side} patches")
    manifold.calibration = calibrate(list(manifold.distance(patches(held_out, side))))
    return manifold


def match_quantiles(coder, z: Tensor, c: Calibration, clips: int, strength: float, trust: float) -> Tensor:
    """Tokens [N, C] moved radially so that the distances of each clip's N / clips tokens are distributed as held-out ones."""
    skeleton, thickness, _ = coder.code(z)
    offset = z - skeleton
    d = (offset / thickness).norm(dim=1)
    rank = d.view(clips, -1).argsort(dim=1).argsort(dim=1).flatten()
    level = (rank + 0.5) / (len(z) // clips) * (LEVELS - 1)
    below = level.floor().long().clamp(max=LEVELS - 2)
    target = torch.lerp(c.token_quantiles[below], c.token_quantiles[below + 1], level - below)
    return limit_change(z, z + offset * (strength * (target / d.clamp_min(1e-6) - 1))[:, None], trust)


@dataclass(frozen=True)
class SigmaTable:
    """Calibrations of the model's own predictions, one per noise level. sigmas: [S]."""

    sigmas: Tensor
    calibrations: list[Calibration]

    def nearest(self, sigma: float) -> Calibration:
        return self.calibrations[int((self.sigmas - sigma).abs().argmin())]

    def save(self, path: str | Path) -> None:
        state = {
            "sigmas": self.sigmas,
            "token_quantiles": torch.stack([c.token_quantiles for c in self.calibrations]),
            "frame_quantiles": torch.stack([c.frame_quantiles for c in self.calibrations]),
            "radius": torch.tensor([c.radius for c in self.calibrations]),
        }
        write_atomic(path, lambda partial: save_file(state, partial))

    @classmethod
    def load(cls, path: str | Path) -> "SigmaTable":
        state = load_file(path)
        rows = zip(state["token_quantiles"], state["frame_quantiles"], state["radius"].tolist(), strict=True)
        return cls(state["sigmas"], [Calibration(*row) for row in rows])

    @classmethod
    def of_distances(cls, sigmas: Tensor, distances: Tensor) -> "SigmaTable":
        """Calibrates on distance maps [S, N, T, H, W] of predictions for N clips at each sigma."""
        return cls(sigmas, [calibrate(list(one)) for one in distances])


def _inner(band: tuple[float, float]) -> tuple[float, float]:
    low, high = band
    return low + BAND_MARGIN * (high - low), high - BAND_MARGIN * (high - low)


def _shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)
