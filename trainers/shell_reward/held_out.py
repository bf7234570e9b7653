"""Held-out figures: distances, band and detail of clips of prompts and noises that the training does not see.

A clip is a short sampling run from pure noise, or with the criterion "predictions" a one-step prediction at a fixed noise
level, which is cheaper and nearer to what is trained, so it says less about clips. The figure that decides is the violation:
the mean amount by which the distances of tokens are outside the band. The detail of a clip is compared with the base's of the
same prompt and noise.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from ..kernels.shell_lcc.manifold import ShellManifold
from ..kernels.tuning import shell_objective as shell
from ..kernels.tuning.latent_detail import detail_of
from ..kernels.tuning.preference_loss import motion
from ..kernels.tuning.shell_objective import ShellTarget

SAMPLES, PREDICTIONS = "samples", "predictions"
CRITERIA = (SAMPLES, PREDICTIONS)


def figures_of(name: str, z: Tensor, manifold: ShellManifold, target: ShellTarget) -> dict:
    """A row of one clip z [C, T, h, w], normalised: name, violation, outside and below (shares of tokens outside the band, and
    nearer to the skeleton than it), distance (mean), rms, laplacian, high_frequency, motion. target: of one clip.
    """
    d = manifold.distance(z[None].to(manifold.device))
    target = target.to(d.device)
    below, above = float((d < target.low).float().mean()), float((d > target.high).float().mean())
    return {
        "name": name, "violation": float(shell.violation(d, target).mean()), "outside": below + above, "below": below,
        "distance": float(d.mean()), "rms": float(d.double().square().mean().sqrt()), **asdict(detail_of(z)),
        "motion": float(motion(z[None].float())),
    }  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Means over the clips of a measurement; ratios: geometric means of clip / base's clip. figure: what decides."""

    violation: float
    outside: float
    below: float
    distance: float
    rms: float
    laplacian_ratio: float
    high_frequency_ratio: float
    motion_ratio: float
    clips: int

    @property
    def figure(self) -> float:
        return self.violation

    def to_json(self) -> dict:
        """NaN becomes None."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}


def summary(rows: Sequence[dict], base: Sequence[dict]) -> Summary:
    """Of rows of `figures_of` and those of the base's clips with the same names."""
    before = {r["name"]: r for r in base}
    means = {k: sum(r[k] for r in rows) / len(rows) for k in ("violation", "outside", "below", "distance", "rms")}
    ratios = {
        f"{k}_ratio": _geometric([_over(r[k], before[r["name"]][k]) for r in rows])
        for k in ("laplacian", "high_frequency", "motion")
    }
    return Summary(**means, **ratios, clips=len(rows))


def _over(value: float, base: float) -> float:
    return value / base if base > 0 and value > 0 else math.nan


def _geometric(values: Sequence[float]) -> float:
    known = [math.log(v) for v in values if math.isfinite(v)]
    return math.exp(sum(known) / len(known)) if known else math.nan
