"""Colour maps: a diverging one for heat maps and a linear one for drawn tracks."""

import torch
from torch import Tensor

# Diverging colour map: RGB in [0, 1] at -1, -0.5, 0, 0.5 and 1, linear in between. Errors use the half from 0 to 1.
HEAT_MAP = ((0.65, 0.90, 1.00), (0.10, 0.30, 0.80), (0.07, 0.07, 0.08), (0.80, 0.15, 0.10), (1.00, 0.85, 0.45))
# RGB in [0, 1] of a track without error, of one with the largest error (linear in between), and of the position expected
# in a rigid scene.
GOOD_TRACK, BAD_TRACK, EXPECTED_POSITION = (0.2, 0.9, 0.3), (1.0, 0.15, 0.1), (1.0, 0.9, 0.2)


def heat_map_colour(position: Tensor) -> Tensor:
    """HEAT_MAP colours, RGB [..., 3] in [0, 1], of positions [...] in [-1, 1]; same device."""
    table = torch.tensor(HEAT_MAP, device=position.device)
    along = (position + 1) / 2 * (len(HEAT_MAP) - 1)
    left = along.floor().clamp(max=len(HEAT_MAP) - 2).long()
    return torch.lerp(table[left], table[left + 1], (along - left)[..., None])


def track_colour(share: Tensor) -> Tensor:
    """Track colours, RGB [..., 3] in [0, 1], of errors [...] as shares of the largest error, 0 to 1; same device."""
    good, bad = (torch.tensor(colour, device=share.device) for colour in (GOOD_TRACK, BAD_TRACK))
    return good + (bad - good) * share[..., None]
