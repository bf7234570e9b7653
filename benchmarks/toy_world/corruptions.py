"""Controlled defects of toy world clips, each with a strength from 0 (none) to 1 (obvious), determined by a seed.

PIXELS change frames; SCENES change the scene before it is rendered, so that the geometry is wrong and the image quality is
not; `wrong_caption` changes the caption only.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .captions import caption, other_than
from .clips import Labelled
from .renderer import SIZE, Scene, render

DEFECTS = (
    "blur", "noise", "over_smoothing", "jitter", "rubber_sheet", "drifting_object", "breathing_walls", "texture_morph",
    "freeze", "wrong_caption",
)  # fmt: skip


def corrupt(clip: Labelled, defect: str, strength: float = 1.0, seed: int = 0) -> Labelled:
    """The clip with a defect. Raises KeyError for an unknown one, ValueError for a strength outside 0..1."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength}: expected 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    if defect in PIXELS:
        return replace(clip, frames=PIXELS[defect](clip.frames.float(), strength, generator).round().clamp(0, 255).byte())
    if defect in SCENES:
        scene = SCENES[defect](clip.scene, strength, generator)
        return replace(clip, scene=scene, frames=render(scene))
    if defect == "wrong_caption":
        return replace(clip, caption=wrong_caption(clip, strength, generator))
    raise KeyError(f"unknown defect '{defect}': known are {', '.join(DEFECTS)}")


def blur(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of up to 2 pixels. x: float [T, 3, H, W] in 0..255, as for all defects of frames."""
    return _gaussian(x, 2.0 * strength)


def noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """White noise of up to 30 grey levels, independent in every frame."""
    return x + 30.0 * strength * torch.randn(x.shape, generator=generator)


def over_smoothing(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Removes fine detail and keeps strong edges: blends in the median of 5x5 pixels."""
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    around = padded.unfold(2, 5, 1).unfold(3, 5, 1).flatten(4)
    return x + strength * (around.median(dim=-1).values - x)


def jitter(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Shifts every frame independently by up to 3 pixels, like a shaking camera."""
    shift = 3.0 * strength * (2 * torch.rand(x.shape[0], 2, generator=generator) - 1)
    return _sample(x, shift[:, None, None].expand(-1, SIZE, SIZE, -1))


def rubber_sheet(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Warps frames by a smooth displacement field of up to about 4 pixels that changes over the clip."""
    coarse = torch.randn(1, 2, 5, 4, 4, generator=generator)
    field = F.interpolate(coarse, (x.shape[0], SIZE, SIZE), mode="trilinear", align_corners=True)[0]
    return _sample(x, 2.5 * strength * field.permute(1, 2, 3, 0))


def freeze(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Freezes the clip: its last frames, up to all but the first, repeat the frame before them."""
    last = round((1 - strength) * (x.shape[0] - 1))
    return x[torch.arange(x.shape[0]).clamp(max=last)]


def drifting_object(scene: Scene, strength: float, generator: torch.Generator) -> Scene:
    """The object slides over the floor by up to 1 m."""
    angle = float(torch.rand((), generator=generator)) * 6.2832
    x, z = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    return replace(scene, drift=(float(x) * strength / 16, float(z) * strength / 16))


def breathing_walls(scene: Scene, strength: float, generator: torch.Generator) -> Scene:
    """The walls swing by up to 0.7 m."""
    return replace(scene, breathing=0.7 * strength)


def texture_morph(scene: Scene, strength: float, generator: torch.Generator) -> Scene:
    """The patterns on walls and floor flow."""
    return replace(scene, morph=strength)


def wrong_caption(clip: Labelled, strength: float, generator: torch.Generator) -> str:
    """A caption with one wrong attribute, or with two from strength 0.5 on."""
    a = clip.scene.attributes
    if strength == 0:
        return clip.caption
    names = [name for name, _ in a.items()]
    for i in torch.randperm(len(names), generator=generator)[: 1 if strength < 0.5 else 2].tolist():
        a = other_than(a, names[i], generator)
    return caption(a, generator)


PIXELS = {f.__name__: f for f in (blur, noise, over_smoothing, jitter, rubber_sheet, freeze)}
SCENES = {f.__name__: f for f in (drifting_object, breathing_walls, texture_morph)}


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    if sigma < 0.05:
        return x
    at = torch.arange(-6, 7, dtype=x.dtype)
    kernel = (-at.square() / (2 * sigma * sigma)).exp()
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (6, 6, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, 6, 6), mode="replicate"), kernel.transpose(2, 3), groups=3)


def _sample(x: Tensor, shift: Tensor) -> Tensor:
    """Frames resampled at pixel + shift. shift: [T, H, W, 2] in pixels, (x, y)."""
    at = torch.arange(SIZE) + 0.5
    grid = torch.stack([at.expand(SIZE, SIZE), at[:, None].expand(SIZE, SIZE)], dim=-1)
    return F.grid_sample(x, (grid + shift) * (2 / SIZE) - 1, mode="bilinear", padding_mode="border", align_corners=False)
