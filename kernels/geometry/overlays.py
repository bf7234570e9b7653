"""Bars and static overlays: parts of the picture that do not belong to the filmed scene (letterbox, logos, subtitles)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .corners import gradients
from .point_tracks import widened

# Largest standard deviation of a bar's grey levels, over its pixels and over time, and largest share of the side that all bars
# of one direction take.
PLAIN, MOST_BARS = 4.0, 0.6
# A pixel is static if its grey level varies over time by less than STILL times the gradient of the clip's mean picture: it has
# moved by less than STILL pixels. Only gradients of at least EDGE grey levels per pixel show this.
STILL, EDGE = 0.5, 6.0
# Share of the static pixels among those with gradients, in a neighbourhood of REACH pixels, from which it is an overlay.
DENSE, REACH = 0.5, 6
# Fewer static pixels than this in a neighbourhood are chance.
LEAST = 4
# Static areas of a larger share of the textured picture, or of the whole picture, are no overlay: the camera stands.
MOST_STATIC, MOST_AREA = 0.5, 0.2
# Share of the picture from which an overlay is mentioned.
MENTIONED = 0.005


@dataclass(frozen=True)
class Overlays:
    """left_out: bool [h, w], bars and overlays; bars: (top, bottom, left, right) in pixels; static: share of the textured
    picture that does not move, 0 to 1, overlays included; overlay: share of the picture that overlays cover; stands: whether
    so much stands still that the camera does."""

    left_out: Tensor
    bars: tuple[int, int, int, int]
    static: float
    overlay: float
    stands: bool


def find_overlays(grey: Tensor) -> Overlays:
    """Bars and static overlays of a clip. grey: [K, h, w], grey levels 0 to 255 of its key frames.

    If too much stands still for an overlay, nothing but bars is left out.
    """
    height, width = grey.shape[1:]
    # Grey levels are integers, of which float32 squares are exact; torch.std_mean takes fifteen times as long.
    mean = grey.mean(dim=0)
    deviation = ((grey * grey).mean(dim=0) - mean * mean).clamp_(min=0).sqrt_()
    top, bottom = _bars(deviation, mean)
    left, right = _bars(deviation.T, mean.T)
    left_out = torch.ones(height, width, dtype=torch.bool, device=grey.device)
    left_out[top : height - bottom, left : width - right] = False
    x, y = gradients(mean[None, None])
    steep = (x * x + y * y).sqrt()[0, 0]
    still = (steep >= EDGE) & (deviation < STILL * steep) & ~left_out
    # Texture as it is in one frame: the mean picture of a moving scene has none.
    x, y = gradients(grey[len(grey) // 2][None, None])
    textured = ((x * x + y * y).sqrt()[0, 0] >= EDGE) & ~left_out
    # Gradients next to a bar are the bar's.
    rim = widened(left_out, 2)
    still, textured = still & ~rim, (textured | still) & ~rim
    counts = _counts(torch.stack([still, textured]).float(), REACH)
    dense = still & (counts[0] >= DENSE * counts[1]) & (counts[0] >= LEAST)
    overlay = widened(dense, REACH)
    share = float(overlay.sum() / widened(textured, REACH).sum().clamp(min=1))
    area = float(overlay.float().mean())
    stands = share > MOST_STATIC or area > MOST_AREA
    if not stands:
        left_out = left_out | overlay
    return Overlays(left_out, (top, bottom, left, right), share, 0.0 if stands else area, stands)


def describe(overlays: Overlays, scale: float) -> list[str]:
    """Sentences on what is left out. scale: from the clip's pixels to those of the overlays."""
    notes = []
    if any(overlays.bars):
        sides = zip(("top", "bottom", "left", "right"), overlays.bars, strict=True)
        widths = ", ".join(f"{name} {round(width / scale)}" for name, width in sides if width)
        notes.append(f"bars left out: {widths} pixels")
    if overlays.overlay >= MENTIONED:
        notes.append(f"static overlay left out (logo, subtitles?): {overlays.overlay:.1%} of the picture")
    return notes


def _bars(deviation: Tensor, mean: Tensor) -> tuple[int, int]:
    """Widths of the plain bars before and behind the lines of [h, w] statistics over time."""
    lines = deviation.shape[0]
    plain, level = ((deviation.square().mean(1) + mean.var(dim=1)).sqrt() < PLAIN).cpu(), mean.mean(1).cpu()
    widths = []
    for p, v in ((plain, level), (plain.flip(0), level.flip(0))):
        # A plain wall next to the bar has another grey level.
        widths.append(int((p & ((v - v[0]).abs() < PLAIN)).long().cumprod(0).sum()))
    # A picture without texture is no bar.
    return (0, 0) if sum(widths) > MOST_BARS * lines else tuple(widths)


def _counts(planes: Tensor, reach: int) -> Tensor:
    """Sums over windows of 2 * reach + 1 pixels in x and in y, zero-padded, by cumulative sums: [C, H, W]."""
    for dim in (1, 2):
        pad = [0, 0, reach + 1, reach] if dim == 1 else [reach + 1, reach]
        total = F.pad(planes, pad).cumsum(dim)
        size = planes.shape[dim]
        planes = total.narrow(dim, 2 * reach + 1, size) - total.narrow(dim, 0, size)
    return planes
