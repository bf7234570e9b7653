"""Numbered random clips of the toy world: clip i of a split depends on i and the split only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import caption, draw
from .renderer import Scene, draw_scene, render

# Splits share no clip. "unseen" has only combinations of attributes that no training caption has.
SPLITS = {"train": 0, "test": 1, "unseen": 2, "judge": 3, "judge_test": 4}


@dataclass(frozen=True)
class Labelled:
    """frames: uint8 [17, 3, 64, 64]."""

    frames: Tensor
    scene: Scene
    caption: str


def scene_of(split: str, index: int) -> tuple[Scene, str]:
    """Scene and caption of clip `index` of a split."""
    generator = torch.Generator().manual_seed(SPLITS[split] * 10_000_000 + index + 1)
    attributes = draw(generator, held_out=split == "unseen")
    text = caption(attributes, generator)
    return draw_scene(attributes, generator), text


def clip(split: str, index: int) -> Labelled:
    """Clip `index` of a split."""
    scene, text = scene_of(split, index)
    return Labelled(render(scene), scene, text)


def sibling(split: str, index: int, which: int) -> Labelled:
    """Another scene with the attributes and the caption of clip `index`; `which` from 0 to 99."""
    scene, text = scene_of(split, index)
    generator = torch.Generator().manual_seed(SPLITS[split] * 10_000_000 + 5_000_000 + 100 * index + which)
    scene = draw_scene(scene.attributes, generator)
    return Labelled(render(scene), scene, text)


def clips(split: str, count: int, start: int = 0) -> list[Labelled]:
    """Clips start, start + 1, ... of a split."""
    return [clip(split, i) for i in range(start, start + count)]


def as_video(frames: Tensor) -> Tensor:
    """uint8 [..., T, 3, H, W] -> float32 [..., 3, T, H, W] in [-1, 1], as a Wan VAE takes it."""
    return frames.transpose(-4, -3).float() / 127.5 - 1.0


def as_frames(video: Tensor) -> Tensor:
    """The inverse of `as_video`, clamped and rounded."""
    return ((video.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8).transpose(-4, -3).contiguous()
