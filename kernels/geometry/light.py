"""Local normalisation of brightness and contrast, so that light that changes is not taken for motion.

Lucas-Kanade assumes that a point keeps its grey level: a flicker of 4 % moves points by a few tenths of a pixel. Differences
of gain and bias that are smooth over the picture (flicker, fades, exposure, vignettes) cancel in (I - mean) / standard
deviation over a neighbourhood, as in normalised cross-correlation (Lewis 1995)."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Side of the neighbourhood as a share of the shorter side, and the step at which its mean and deviation are computed.
SHARE, STEP = 1 / 10, 8
# Grey level of the local mean, and grey levels per standard deviation.
MIDDLE, CONTRAST = 128.0, 40.0
# Added to the local standard deviation, as a share of the picture's median one, so that noise of plain regions is not blown
# up.
FLOOR = 0.5


def even_light(grey: Tensor, left_out: Tensor | None = None, share: float = SHARE) -> Tensor:
    """Grey levels [K, H, W], rounded to 0 to 255, with local mean MIDDLE and local standard deviation up to CONTRAST.

    grey: [K, H, W], any range; left_out: bool [H, W], pixels that do not count for the statistics and become MIDDLE, None for
    none, which saves two passes over every picture; share: side of the neighbourhood as a share of the shorter side.
    Multiplying a picture by a positive gain and adding a bias does not change the result, save for rounding."""
    size = grey.shape[1:]
    step = max(1, min(STEP, min(size) // 8))
    small = [max(1, side // step) for side in size]
    reach = max(1, round(share * min(size) / step / 2))
    kept = torch.ones_like(grey[:1]) if left_out is None else (~left_out)[None].to(grey.dtype)
    weight = _pooled(kept, small, reach).clamp_(min=1e-3)
    out = torch.empty_like(grey)
    for k, picture in enumerate(grey):
        # One by one: the planes in between take several times the memory of the picture.
        used = picture if left_out is None else picture * kept[0]
        mean, square = _pooled(torch.stack([used, used * picture]), small, reach) / weight
        deviation = (square - mean * mean).clamp_(min=0).sqrt_()
        gain = CONTRAST / (deviation + FLOOR * deviation.median()).clamp_(min=1e-3)
        # Gain and bias are interpolated, so that one pass over the picture applies both.
        lines = torch.stack([gain, MIDDLE - mean * gain])[None]
        gain, bias = F.interpolate(lines, size, mode="bilinear", align_corners=False)[0]
        torch.addcmul(bias, used, gain, out=out[k])
        if left_out is not None:
            out[k].masked_fill_(left_out, MIDDLE)
        out[k].round_().clamp_(0, 255)
    return out


def _pooled(planes: Tensor, small: list[int], reach: int) -> Tensor:
    """Means over boxes of 2 * reach + 1 coarse pixels, [C, *small]; boxes end at the border."""
    low = F.interpolate(planes[:, None], small, mode="area")
    side = 2 * reach + 1
    for window, pad in (((1, side), (0, reach)), ((side, 1), (reach, 0))):
        low = F.avg_pool2d(low, window, 1, pad, count_include_pad=False)
    return low[:, 0]
