"""The legend of an error heat map: a strip with the colours and the values that they stand for."""

import numpy
import torch
from PIL import Image, ImageDraw

from ..kernels.colours import heat_map_colour
from ..kernels.geometry.record import DENSE, TRACKS

HEIGHT, MARGIN = 20, 6
UNITS = {TRACKS: "px at 480 lines", DENSE: "error of a view"}
TEXT = (225, 225, 230)


def words(full: float, scorer: str) -> tuple[str, str]:
    """What the two ends of the colours stand for. Arguments as of `legend`."""
    return "no error", f"{full:.2g} {UNITS[scorer]} or more"


def legend(width: int, full: float, scorer: str) -> torch.Tensor:
    """[HEIGHT, width, 3] in [0, 1], on the CPU. full: the error at full colour; scorer: of the record, for the unit."""
    strip = Image.new("RGB", (width, HEIGHT), (24, 24, 28))
    draw = ImageDraw.Draw(strip)
    low, high = words(full, scorer)
    left, right = (MARGIN + draw.textlength(low) + MARGIN, width - MARGIN - draw.textlength(high) - MARGIN)
    draw.text((MARGIN, 5), low, fill=TEXT)
    if right - left >= 2 * MARGIN:
        draw.text((right + MARGIN, 5), high, fill=TEXT)
        colours = heat_map_colour(torch.linspace(0, 1, int(right - left)))
        bar = Image.fromarray((colours * 255).round().to(torch.uint8)[None].expand(HEIGHT - 10, -1, -1).contiguous().numpy())
        strip.paste(bar, (int(left), 5))
    return torch.from_numpy(numpy.array(strip)).float() / 255


def with_legend(pictures: torch.Tensor, full: float, scorer: str) -> torch.Tensor:
    """Pictures [T, H, W, 3] with the legend below each, on the CPU."""
    strip = legend(pictures.shape[2], full, scorer)
    return torch.cat([pictures.cpu(), strip.expand(len(pictures), -1, -1, -1)], dim=1)
