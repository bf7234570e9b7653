"""Where real latents lie: quantiles of the distance on held-out data, against which every score is read."""

from dataclasses import dataclass

import torch
from torch import Tensor

# One quantile a per cent, ends included.
LEVELS = 101
# The band holds this central share of held-out tokens.
BAND = (0.05, 0.95)


@dataclass(frozen=True)
class Calibration:
    """Quantiles [101] at 0, 1, ..., 100 % of the held-out distance, ascending.

    token_quantiles: of single tokens; frame_quantiles: of the mean distance of one latent frame.
    radius: the shell's, the root mean square of the token distances. Distances of real clips have a long tail, tokens
    with fine detail, and that radius alone leaves the energy of their residuals as it is: at the median, projection
    takes detail away from clips that had nothing wrong with them.
    """

    token_quantiles: Tensor
    frame_quantiles: Tensor
    radius: float

    @property
    def band(self) -> tuple[float, float]:
        """The 5 % and 95 % token quantiles."""
        return self.token_quantile(BAND[0]), self.token_quantile(BAND[1])

    def token_quantile(self, share: float) -> float:
        """The distance below which `share` (0 to 1, whole per cents) of held-out tokens lie."""
        return float(self.token_quantiles[round(share * (LEVELS - 1))])


def calibrate(distances: list[Tensor]) -> Calibration:
    """Calibration from per-clip distance maps [T, H, W] of held-out clips, every clip weighing by its tokens.

    Raises ValueError when there is none.
    """
    if not distances:
        raise ValueError("calibration needs at least one held-out clip, found none")
    tokens = torch.cat([d.flatten().float().cpu() for d in distances])
    frames = torch.cat([d.float().mean(dim=(1, 2)).cpu() for d in distances])
    return Calibration(quantiles(tokens), quantiles(frames), float(tokens.double().square().mean().sqrt()))


def quantiles(values: Tensor) -> Tensor:
    """[101] quantiles of any number of values; by sorting, since torch.quantile stops at 16 million."""
    ordered = values.flatten().sort().values
    place = torch.linspace(0, ordered.numel() - 1, LEVELS, dtype=torch.float64, device=ordered.device)
    low = place.floor().long()
    high = place.ceil().long()
    return torch.lerp(ordered[low].double(), ordered[high].double(), place - low).float()


def percentile(values: Tensor, table: Tensor) -> Tensor:
    """Share (0 to 1) of calibration data below each value, by interpolation in a quantile table [101]; same shape."""
    table = table.to(values)
    upper = torch.searchsorted(table, values.contiguous()).clamp(1, LEVELS - 1)
    left, right = table[upper - 1], table[upper]
    inside = ((values - left) / (right - left).clamp_min(1e-12)).clamp(0, 1)
    share = (upper - 1 + inside) / (LEVELS - 1)
    # Exactly at or beyond an end of the table there is nothing to interpolate, even where several quantiles coincide.
    return torch.where(values <= table[0], 0.0, torch.where(values >= table[-1], 1.0, share))
