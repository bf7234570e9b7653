"""Hard cut detection: a frame difference that is large, and much larger than the median of its neighbours."""

import torch
from torch import Tensor

CELLS = 12
AROUND = 6
LEAST = 8.0
TIMES = 4.0


def find_cuts(frames: Tensor) -> list[int]:
    """Indices of the first frames of new shots, ascending. frames: [T, H, W, 3], uint8 or float in [0, 1].

    The difference of two frames is the mean absolute difference of their colours, averaged over CELLS x CELLS cells, where one
    gain for all of the picture does not count. A cut
    has a difference of at least LEAST grey levels and TIMES the median of the differences up to AROUND frames away. A flash
    is not a cut: the frames before and after it are alike.
    """
    # A subset of the pixels of a large image is enough for the mean of a cell.
    every = max(1, min(frames.shape[1:3]) // 120)
    thin = frames[:, ::every, ::every].permute(0, 3, 1, 2).float()
    coarse = torch.nn.functional.interpolate(thin, (CELLS, CELLS), mode="area")
    if frames.dtype != torch.uint8:
        coarse = 255 * coarse
    change = _difference(coarse[:-1], coarse[1:]).tolist()
    cuts = []
    for t, value in enumerate(change):
        around = [c for i, c in enumerate(change) if i != t and abs(i - t) <= AROUND]
        usual = sorted(around)[len(around) // 2] if around else 0.0
        if value < max(LEAST, TIMES * usual):
            continue
        before, after = coarse[max(t - 1, 0)], coarse[min(t + 2, len(coarse) - 1)]
        if float(_difference(before[None], after[None])) >= 0.5 * value:
            cuts.append(t + 1)
    return cuts


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference [T] of coarse frames [T, 3, h, w], as they are or at equal brightness, the smaller of both:
    flicker is no cut."""
    gain = a.mean(dim=(1, 2, 3), keepdim=True) / b.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1.0)
    return torch.minimum(*((scale * b - a).abs().mean(dim=(1, 2, 3)) for scale in (1.0, gain)))


def longest_shot(cuts: list[int], frames: int) -> tuple[int, int]:
    """The longest shot as (first frame, end), end exclusive. cuts: from `find_cuts`; frames: number of frames of the clip."""
    borders = [0, *cuts, frames]
    return max(zip(borders, borders[1:], strict=False), key=lambda shot: shot[1] - shot[0])
