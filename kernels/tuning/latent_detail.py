"""Detail of latents, and the sign that a reward was raised by noise: high-frequency share far above Laplacian variance.

The ratios of a tuned generator's clips to the base's, of the same prompts and noise (arXiv 2606.30248, released code, there on
frames): both above 1 is a gain of detail. The share of high frequencies knows no scale and the Laplacian variance does, so a
share that grows alone is a whitened, flattened spectrum: noise, no detail.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shell_lcc.diagnostics import high_frequency_share

# Ratio of high-frequency share over ratio of Laplacian variance, and the former itself; both must be passed.
HIGH_OVER_LAPLACIAN, HIGH_FREQUENCY = 1.25, 1.1
# Laplacian variance of clips that have lost their detail, as a share of the base's.
DETAIL = 0.8


@dataclass(frozen=True)
class Detail:
    """laplacian: variance of the 4-neighbour Laplacian in space, over all channels and frames, in squared units of the latent;
    high_frequency: share of the spatial spectrum's energy above a quarter of Nyquist, 0 to 1.
    """

    laplacian: float
    high_frequency: float


def detail_of(z: Tensor) -> Detail:
    """Of one clip's latent [C, T, h, w], normalised. Its height and width must be 3 or more, else ValueError."""
    if min(z.shape[-2:]) < 3:
        raise ValueError(f"detail needs latents of height and width 3 or more, found shape {list(z.shape)}")
    return Detail(laplacian_variance(z), high_frequency_share(z))


def laplacian_variance(z: Tensor) -> float:
    """Variance of the 4-neighbour Laplacian of z [..., h, w] over the positions that have four neighbours."""
    z = z.float()
    around = z[..., :-2, 1:-1] + z[..., 2:, 1:-1] + z[..., 1:-1, :-2] + z[..., 1:-1, 2:]
    return float(torch.var(around - 4 * z[..., 1:-1, 1:-1], correction=0))


def alarm(laplacian_ratio: float, high_frequency_ratio: float) -> str | None:
    """A sentence without a full stop where the ratios to the base's clips show over-optimisation, else None."""
    lap, high = laplacian_ratio, high_frequency_ratio
    if high > HIGH_FREQUENCY and high > HIGH_OVER_LAPLACIAN * lap:
        return (
            f"the clips' high-frequency share is {high:.3g} times the base's, their Laplacian variance {lap:.3g} times: what "
            "is added is noise, not detail"
        )
    if lap < DETAIL:
        return f"the clips' Laplacian variance is {lap:.3g} times the base's: they lose fine detail"
    return None
