"""The timeline's data: figures by frame of a few clips, with the frames before and after as sprite sheets.

web/js/timeline.js draws it in a node: a curve over time, the frame under the cursor, and a divider between before and after.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.latent_formats
import torch

from ..kernels.colours import heat_map_colour
from ..kernels.latent_space import LatentSpace
from . import sprite_sheet
from .latent_thumbnail import rgb_frames

VERSION = 1
# Key of the state among the results that ComfyUI sends to the browser.
PANEL = "intrinsic_reward_timeline"
# Clips that are shown, and the width of their frames.
MOST_CLIPS, WIDTH = 8, 320
LEGEND_COLOURS = 9
FORMATS = {"wan21": comfy.latent_formats.Wan21, "wan22": comfy.latent_formats.Wan22}


@dataclass(frozen=True)
class Legend:
    """Colours of heat maps, from `low` to `high` in words. diverging: from -1 to 1 of the colour map, else from 0."""

    low: str
    high: str
    diverging: bool = False

    def to_json(self) -> dict:
        colours = (heat_map_colour(torch.linspace(-1.0 if self.diverging else 0.0, 1, LEGEND_COLOURS)) * 255).round().int()
        return {"low": self.low, "high": self.high, "colours": ["#{:02x}{:02x}{:02x}".format(*c) for c in colours.tolist()]}


@dataclass(frozen=True)
class Series:
    """A curve. frames: indices, ascending; values: one each, not finite where nothing was measured."""

    label: str
    frames: Sequence[int]
    values: Sequence[float]

    def to_json(self) -> dict:
        points = [[f, round(v, 5) if math.isfinite(v) else None] for f, v in zip(self.frames, self.values, strict=True)]
        return {"label": self.label, "points": points}


@dataclass(frozen=True)
class TimelineClip:
    """One clip. before, after: uint8 [T, H, W, 3], after None where there is one picture only; frames: the number of frames
    that the curves are over; cuts: first frames of new shots."""

    label: str
    frames: int
    series: list[Series]
    before: torch.Tensor
    after: torch.Tensor | None = None
    cuts: Sequence[int] = ()


def state(
    clips: Sequence[TimelineClip], unit: str, legend: Legend | None = None, names: tuple[str, str] = ("before", "after"),
    typical: tuple[float, float] | None = None,
) -> dict:  # fmt: skip
    """The state as JSON values; sheets are written. unit: of the values; names: of the two pictures; typical: range of values
    of real clips, drawn behind the curves."""
    name, shown = sprite_sheet.new_name(), []
    for i, clip in enumerate(clips[:MOST_CLIPS]):
        # Both pictures have one size; those of latents are small and are not enlarged here.
        width = min(WIDTH, max(frames.shape[2] for frames in (clip.before, clip.after) if frames is not None))
        sheets = {
            key: None if frames is None else sprite_sheet.save(frames, f"{name}_{i}_{key}", width)
            for key, frames in (("before", clip.before), ("after", clip.after))
        }
        shown.append({
            "label": clip.label, "frames": clip.frames, "series": [s.to_json() for s in clip.series], "cuts": list(clip.cuts),
            **sheets,
        })  # fmt: skip
    return {
        "version": VERSION, "unit": unit, "legend": None if legend is None else legend.to_json(), "names": list(names),
        "typical": None if typical is None else [round(v, 5) for v in typical], "clips": shown,
        "left_out": len(clips) - len(shown),
    }  # fmt: skip


def pictures(z: torch.Tensor, space: LatentSpace) -> torch.Tensor:
    """uint8 [T, h, w, 3] of normalised latents [1, C, T, h, w], without a VAE; grey for an unknown space."""
    known = FORMATS.get(space.id)
    return rgb_frames(z, None if known is None else known())
