"""Shell-LCC calibration: quantiles and RMS of the distance d (arXiv 2606.30248) on held-out clips.

Scores are reported as percentiles of these quantiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Quantiles at 0, 1, ..., 100 %.
LEVELS = 101
# Quantile levels of the band: it contains the central 90 % of held-out tokens.
BAND = (0.05, 0.95)


@dataclass(frozen=True)
class Calibration:
    """Quantiles [101] at 0, 1, ..., 100 % of held-out distances (unitless, ascending), and the shell's radius.

    token_quantiles: of single tokens; frame_quantiles: of the mean distance of each latent frame.
    radius: root mean square (RMS) of the token distances. RMS, not the median: projecting onto it preserves the mean
    residual energy. Distances have a long tail (tokens with fine detail), so the median would take detail from clean
    clips.
    """

    token_quantiles: Tensor
    frame_quantiles: Tensor
    radius: float

    @property
    def band(self) -> tuple[float, float]:
        """The 5 % and 95 % token quantiles."""
        return self.token_quantile(BAND[0]), self.token_quantile(BAND[1])

    def token_quantile(self, share: float) -> float:
        """Distance below which `share` (0 to 1, rounded to whole per cents) of the held-out tokens lie."""
        return float(self.token_quantiles[round(share * (LEVELS - 1))])


def calibrate(distances: list[Tensor]) -> Calibration:
    """Calibration from distance maps [T, H, W], one per held-out clip; every token has the same weight.

    Raises ValueError if the list is empty.
    """
    if not distances:
        raise ValueError("calibration needs at least one held-out clip, found none")
    tokens = torch.cat([d.flatten().float().cpu() for d in distances])
    frames = torch.cat([d.float().mean(dim=(1, 2)).cpu() for d in distances])
    return Calibration(quantiles(tokens), quantiles(frames), float(tokens.double().square().mean().sqrt()))


def quantiles(values: Tensor) -> Tensor:
    """Quantiles [101] (fp32) of `values` of any shape, by sorting: torch.quantile accepts at most 16 million values."""
    ordered = values.flatten().sort().values
    place = torch.linspace(0, ordered.numel() - 1, LEVELS, dtype=torch.float64, device=ordered.device)
    low = place.floor().long()
    high = place.ceil().long()
    return torch.lerp(ordered[low].double(), ordered[high].double(), place - low).float()


def percentile(values: Tensor, table: Tensor) -> Tensor:
    """Share (0 to 1) of calibration data below each value, interpolated in a quantile table [101]; same shape as values."""
    table = table.to(values)
    upper = torch.searchsorted(table, values.contiguous()).clamp(1, LEVELS - 1)
    left, right = table[upper - 1], table[upper]
    inside = ((values - left) / (right - left).clamp_min(1e-12)).clamp(0, 1)
    share = (upper - 1 + inside) / (LEVELS - 1)
    # At or beyond the table's ends the share is exactly 0 or 1, even if several quantiles coincide there.
    return torch.where(values <= table[0], 0.0, torch.where(values >= table[-1], 1.0, share))
