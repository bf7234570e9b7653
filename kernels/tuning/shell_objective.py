"""Objectives of fine-tuning with the Shell-LCC distance (arXiv 2606.30248) of a predicted clean latent.

The generator sees pure noise, is called at noise level sigma, and its clean latent is predicted in one step,
x0 = x - sigma v. With d the distance of each token of x0 to the manifold:

  band       mean over tokens of max(0, d - high) + max(0, low - d): zero inside the band of held-out real tokens, and growing
             outside at the rate of d. A token that is too near to the skeleton is moved away from it
  distance   mean over tokens of d, published: it goes on pulling tokens through the shell to the skeleton
  mean_tau   |mean over tokens of d - tau|, published: holds the clip's mean only, so that some tokens collapse while others
             leave the shell
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shell_lcc.calibration import LEVELS, Calibration, calibrate
from ..shell_lcc.manifold import ShellManifold

BAND, DISTANCE, MEAN_TAU = "band", "distance", "mean_tau"
OBJECTIVES = (BAND, DISTANCE, MEAN_TAU)


@dataclass(frozen=True)
class ShellTarget:
    """Where the distances of B clips should lie: low, high: edges of the band, [B]; tau: the mean, [B]. fp32, unitless."""

    low: Tensor
    high: Tensor
    tau: Tensor

    def to(self, device: torch.device) -> "ShellTarget":
        return ShellTarget(self.low.to(device), self.high.to(device), self.tau.to(device))


def mean_distance(calibration: Calibration) -> float:
    """Mean of the calibration's token distances, by the trapezium rule over their quantiles: tau of a manifold's file."""
    q = calibration.token_quantiles.double()
    return float((q.sum() - 0.5 * (q[0] + q[-1])) / (LEVELS - 1))


def target_of(calibrations: Sequence[Calibration]) -> ShellTarget:
    """The target of clips with one calibration each, on the CPU."""
    edges = torch.tensor([[*c.band, mean_distance(c)] for c in calibrations], dtype=torch.float32)
    return ShellTarget(*edges.reshape(-1, 3).unbind(1))


def violation(distance: Tensor, target: ShellTarget) -> Tensor:
    """How far each token is outside the band: max(0, d - high) + max(0, low - d), of d [B, T, h, w]; same shape."""
    low, high = (v.view(-1, *[1] * (distance.ndim - 1)) for v in (target.low, target.high))
    return (distance - high).clamp(min=0) + (low - distance).clamp(min=0)


def of_distance(distance: Tensor, objective: str, target: ShellTarget | None) -> Tensor:
    """The loss [B], >= 0, of distances [B, T, h, w]; differentiable.

    target: on the same device; only DISTANCE does without. Raises ValueError for an objective that is not in OBJECTIVES.
    """
    if objective == DISTANCE:
        return distance.flatten(1).mean(dim=1)
    if objective == BAND:
        return violation(distance, target).flatten(1).mean(dim=1)
    if objective == MEAN_TAU:
        return (distance.flatten(1).mean(dim=1) - target.tau).abs()
    raise ValueError(f"objective '{objective}': is unknown; expected {', '.join(OBJECTIVES)}")


def shell_loss(
    manifold: ShellManifold, x0: Tensor, objective: str = BAND, target: ShellTarget | None = None
) -> tuple[Tensor, Tensor]:
    """(loss [B], distances [B, T, h, w] without a graph), fp32 on x0's device, of predicted clean latents x0 [B, C, T, h, w].

    x0: normalised, any float dtype and memory layout. target: None for the manifold's own calibration. Besides x0's own size
    one chunk of tokens is in memory: the gradient of d is computed in the forward pass. Raises ValueError for another shape
    or objective, UncalibratedError where the objective needs a calibration and the manifold has none.
    """
    if target is None and objective != DISTANCE:
        target = target_of([manifold.calibrated(f"the objective '{objective}'")] * x0.shape[0])
    distance = manifold.distance(x0)
    target = None if target is None else target.to(distance.device)
    return of_distance(distance, objective, target), distance.detach()


@dataclass(frozen=True)
class SigmaTargets:
    """Calibrations of a generator's predictions at noise levels. sigmas: [S], ascending; calibrations: one for each.

    A posterior mean is not a real token: predictions at high noise lie far outside the shell of clean latents, so a band
    measured on them asks for something else than the file's.
    """

    sigmas: tuple[float, ...]
    calibrations: tuple[Calibration, ...]

    @classmethod
    def measured(cls, sigmas: Sequence[float], distances: Sequence[Sequence[Tensor]]) -> "SigmaTargets":
        """Of distance maps [T, h, w] of predictions, some for each sigma. Raises ValueError where there are none."""
        return cls(tuple(map(float, sigmas)), tuple(calibrate(list(maps)) for maps in distances))

    def at(self, sigma: Tensor) -> ShellTarget:
        """The target of clips at noise levels sigma [B]: that of the nearest level of the table, on sigma's device."""
        table = torch.tensor(self.sigmas, device=sigma.device)
        nearest = (sigma.float()[:, None] - table).abs().argmin(dim=1).tolist()
        return target_of([self.calibrations[i] for i in nearest]).to(sigma.device)

    def to_json(self) -> list[dict]:
        """One object for each noise level: sigma, radius, quantiles of tokens and of frames."""
        return [
            {"sigma": s, "radius": c.radius, "token_quantiles": c.token_quantiles.tolist(),
             "frame_quantiles": c.frame_quantiles.tolist()}
            for s, c in zip(self.sigmas, self.calibrations, strict=True)
        ]  # fmt: skip

    @classmethod
    def from_json(cls, rows: Sequence[dict]) -> "SigmaTargets":
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for other rows."""
        tables = [[torch.tensor(r[k]) for k in ("token_quantiles", "frame_quantiles")] for r in rows]
        made = [Calibration(*table, float(r["radius"])) for table, r in zip(tables, rows, strict=True)]
        if not made or any(c.token_quantiles.shape != (LEVELS,) for c in made):
            raise ValueError(f"expected rows of {LEVELS} quantiles each")
        return cls(tuple(float(r["sigma"]) for r in rows), tuple(made))
