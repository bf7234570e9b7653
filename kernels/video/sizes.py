"""Aspect-ratio buckets for clip sizes, and resizing of frames to them: scale to cover, then centre-crop."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# (width, height): 16:9, 9:16, 1:1, 4:3 and 3:4 of nearly the same area; 480p and 720p are the sizes that Wan is trained on.
BUCKETS: dict[str, tuple[tuple[int, int], ...]] = {
    "144p": ((256, 144), (144, 256), (192, 192), (208, 160), (160, 208)),
    "272p": ((480, 272), (272, 480), (352, 352), (416, 320), (320, 416)),
    "480p": ((832, 480), (480, 832), (624, 624), (704, 544), (544, 704)),
    "720p": ((1280, 720), (720, 1280), (960, 960), (1088, 832), (832, 1088)),
    "1080p": ((1920, 1088), (1088, 1920), (1440, 1440), (1664, 1248), (1248, 1664)),
}
MULTIPLE = 16


def nearest_bucket(size: str, width: float, height: float) -> tuple[int, int]:
    """(width, height) of the bucket of BUCKETS[size] whose aspect ratio is nearest to width / height, on a log scale."""
    aspect = math.log(width / height)
    return min(BUCKETS[size], key=lambda wh: abs(math.log(wh[0] / wh[1]) - aspect))


def nearest_lengths(frames: int) -> tuple[int, int]:
    """The largest 4n+1 not above `frames` and the one after it; (1, 5) below 5."""
    below = max(1, frames - (frames - 1) % 4)
    return below, below + 4


def cover_scale(source: tuple[float, float], target: tuple[int, int]) -> float:
    """The smallest factor at which source (width, height) covers target (width, height); above 1 it enlarges."""
    return max(target[0] / source[0], target[1] / source[1])


def cover_crop(image: Tensor, width: int, height: int, pixel_aspect: float = 1.0) -> Tensor:
    """image [C, h, w] in [0, 1] -> [C, height, width] in [0, 1]: scaled to cover (bicubic, antialiased), centre-cropped.

    pixel_aspect: width of a source pixel over its height, for anamorphic video.
    """
    h, w = image.shape[-2:]
    scale = cover_scale((w * pixel_aspect, h), (width, height))
    new_w, new_h = max(width, round(w * pixel_aspect * scale)), max(height, round(h * scale))
    if (new_h, new_w) != (h, w):
        image = F.interpolate(image[None], (new_h, new_w), mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (new_h - height) // 2, (new_w - width) // 2
    return torch.clamp(image[..., top : top + height, left : left + width], 0.0, 1.0)
