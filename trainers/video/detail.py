"""Figures of a clip's pictures: detail, motion, light and colour, and how much one clip differs from another.

Laplacian variance and high-frequency share are those that Shell-LCC's authors watch while they tune a generator (arXiv
2606.30248): both above the base's with a modest change is a gain; a high-frequency share that grows far beyond the Laplacian
variance is noise or a grid, the mark of a reward that is optimised too far.
"""

import torch
from torch import Tensor

from ..kernels.shell_lcc.diagnostics import high_frequency_share
from ..kernels.tuning.latent_detail import laplacian_variance

# Luma of BT.601, and the level from which a pixel counts as over-exposed.
LUMA = (0.299, 0.587, 0.114)
EXPOSED = 250.0

# Figure -> (what it is, with its unit; what is added before a ratio is taken, so that a plain clip does not divide by zero).
FIGURES = {
    "laplacian": ("variance of the 4-neighbour Laplacian of luma, squared grey levels", 1.0),
    "high_frequency": ("share of luma's spectrum above a quarter of Nyquist, 0 to 1", 1e-4),
    "dynamics": ("mean difference of neighbouring frames, grey levels", 0.05),
    "brightness": ("mean luma, 0 to 1", 1e-3),
    "contrast": ("standard deviation of luma within a frame, 0 to 1", 1e-3),
    "saturation": ("largest minus smallest of red, green and blue, mean, 0 to 1", 1e-3),
    "exposed": ("share of the pixels with luma of 250 or more, 0 to 1", 1e-3),
}


def luma(frame: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., H, W], 0 to 255."""
    return (frame.float() * torch.tensor(LUMA)).sum(dim=-1)


def figures(frames: Tensor) -> dict[str, float]:
    """{name of FIGURES: mean over the frames} of a clip uint8 [T, H, W, 3]; dynamics is 0 for a single frame.

    Raises ValueError for frames of fewer than 3 x 3 pixels.
    """
    if min(frames.shape[1:3]) < 3:
        raise ValueError(f"a clip of {frames.shape[2]}x{frames.shape[1]} pixels is too small to be measured")
    sums = dict.fromkeys(FIGURES, 0.0)
    before = None
    # Frame by frame: a whole clip in fp32 would need several times its memory.
    for frame in frames:
        y = luma(frame)
        sums["laplacian"] += laplacian_variance(y)
        sums["high_frequency"] += high_frequency_share(y)
        sums["dynamics"] += float((y - before).abs().mean()) if before is not None else 0.0
        sums["brightness"] += float(y.mean()) / 255
        sums["contrast"] += float(y.std()) / 255
        sums["saturation"] += float((frame.amax(dim=-1) - frame.amin(dim=-1)).float().mean()) / 255
        sums["exposed"] += float((y >= EXPOSED).float().mean())
        before = y
    steps = {"dynamics": max(1, len(frames) - 1)}
    return {name: total / steps.get(name, len(frames)) for name, total in sums.items()}


def relative_change(frames: Tensor, base: Tensor) -> float:
    """Root mean square difference of luma of two clips uint8 [T, H, W, 3], over the standard deviation of the base's luma
    within its frames: 0 for equal clips, about 1.4 for clips that have nothing in common."""
    difference = spread = 0.0
    for a, b in zip(frames, base, strict=True):
        y = luma(b)
        difference += float((luma(a) - y).square().mean())
        spread += float(y.var(correction=0))
    return (difference / max(spread, len(base) * 1.0)) ** 0.5
