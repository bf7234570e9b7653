"""Tone mapping of HDR video (BT.2100 PQ and HLG) to BT.709: pure functions on RGB tensors.

The chain is display-referred: code values -> light in nits (EOTF) -> one scale per pixel that brings its brightest
component below SDR white (EETF of ITU-R BT.2390, a Hermite knee in PQ space; hue is kept) -> BT.709 primaries ->
code values by the inverse of BT.1886 (gamma 2.4). SDR white is 203 nits, the HDR reference white of BT.2408, so a picture
whose highlights are below the knee keeps its brightness.
"""

import torch
from torch import Tensor

# In nits; PEAK is the brightest light that HDR videos are assumed to be graded for.
REFERENCE_WHITE, PEAK = 203.0, 1000.0
GAMMA = 2.4

PQ_M1, PQ_M2 = 2610 / 16384, 2523 / 4096 * 128
PQ_C1, PQ_C2, PQ_C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
HLG_GAMMA = 1.2

BT2020_LUMA = (0.2627, 0.6780, 0.0593)
BT2020_TO_BT709 = (
    (1.660491, -0.587641, -0.072850),
    (-0.124550, 1.132900, -0.008349),
    (-0.018151, -0.100579, 1.118730),
)


def pq_to_nits(code: Tensor) -> Tensor:
    """SMPTE ST 2084 EOTF: code values in [0, 1] -> 0 to 10000 nits."""
    e = code.clamp(0.0, 1.0) ** (1 / PQ_M2)
    return 10000.0 * ((e - PQ_C1).clamp(min=0.0) / (PQ_C2 - PQ_C3 * e)) ** (1 / PQ_M1)


def nits_to_pq(nits: Tensor) -> Tensor:
    """Inverse of pq_to_nits: 0 to 10000 nits -> code values in [0, 1]."""
    y = (nits.clamp(min=0.0) / 10000.0) ** PQ_M1
    return ((PQ_C1 + PQ_C2 * y) / (1.0 + PQ_C3 * y)) ** PQ_M2


def hlg_to_nits(code: Tensor) -> Tensor:
    """ARIB STD-B67 code values to light on a display of PEAK nits (BT.2100 inverse OETF and OOTF).

    code: [3, ...] in [0, 1], BT.2020 primaries. The OOTF's gamma is 1.2 at 1000 nits. Returns nits [3, ...].
    """
    e = code.clamp(0.0, 1.0)
    scene = torch.where(e <= 0.5, e.square() / 3.0, (((e - HLG_C) / HLG_A).exp() + HLG_B) / 12.0)
    luma = torch.einsum("c,c...->...", scene.new_tensor(BT2020_LUMA), scene)
    return PEAK * luma.clamp(min=1e-9) ** (HLG_GAMMA - 1.0) * scene


def compress(nits: Tensor) -> Tensor:
    """ITU-R BT.2390 EETF of the brightest component: light [3, ...] up to PEAK nits -> up to REFERENCE_WHITE nits."""
    top = nits.amax(dim=0).clamp(1e-6, PEAK)
    source, target = (float(nits_to_pq(torch.tensor(v, dtype=torch.float64))) for v in (PEAK, REFERENCE_WHITE))
    limit = target / source
    knee = 1.5 * limit - 0.5
    e = nits_to_pq(top) / source
    t = ((e - knee) / (1.0 - knee)).clamp(0.0, 1.0)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1.0 - knee)
        + (-2 * t**3 + 3 * t**2) * limit
    )  # fmt: skip
    mapped = pq_to_nits(torch.where(e < knee, e, spline) * source)
    return nits * (mapped / nits.amax(dim=0).clamp(min=1e-6))


def bt2020_to_bt709(light: Tensor) -> Tensor:
    """Linear light [3, ...], BT.2020 -> BT.709 primaries; negative values (out of gamut) are clipped to zero."""
    return torch.einsum("ij,j...->i...", light.new_tensor(BT2020_TO_BT709), light).clamp(min=0.0)


def to_bt709(code: Tensor, transfer: str) -> Tensor:
    """RGB code values [3, ...] in [0, 1] with BT.2020 primaries -> BT.709 code values in [0, 1].

    transfer: "pq", "hlg", or "sdr" for wide-gamut video without high dynamic range.
    """
    if transfer == "sdr":
        light = code.clamp(0.0, 1.0) ** GAMMA
    else:
        nits = pq_to_nits(code) if transfer == "pq" else hlg_to_nits(code)
        light = compress(nits) / REFERENCE_WHITE
    return bt2020_to_bt709(light).clamp(max=1.0) ** (1 / GAMMA)
