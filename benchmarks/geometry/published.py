"""Epipolar-DPO's score as released: SIFT, Lowe's ratio, 8-point on all matches, mean square root of the Sampson distance.

It compares consecutive pairs of every 15th frame, at the clip's resolution, and gives -1 where no pair has enough matches.
OpenCV finds and matches the points.
"""

import cv2
import torch
from torch import Tensor

from trainers.kernels.geometry import fundamental

EVERY = 15
LOWE = 0.75
LEAST = 20


def epipolar_dpo(frames: Tensor) -> float:
    """Mean error over pairs in pixels, lower is better, or -1. frames: uint8 [T, H, W, 3]."""
    sift, matcher = cv2.SIFT_create(), cv2.BFMatcher()
    found = [sift.detectAndCompute(cv2.cvtColor(f.numpy(), cv2.COLOR_RGB2GRAY), None) for f in frames[::EVERY]]
    errors = []
    for (ka, da), (kb, db) in zip(found, found[1:], strict=False):
        if da is None or db is None or min(len(ka), len(kb)) < 8:
            continue
        pairs = [m for m in matcher.knnMatch(da, db, k=2) if len(m) == 2]
        good = [m for m, second in pairs if m.distance < LOWE * second.distance]
        if len(good) < LEAST:
            continue
        a = torch.tensor([ka[m.queryIdx].pt for m in good], dtype=torch.float64)
        b = torch.tensor([kb[m.trainIdx].pt for m in good], dtype=torch.float64)
        F = fundamental.fit(a, b, torch.ones(len(good), dtype=torch.float64))
        # The released code takes the square root of the squared distance plus 1e-8.
        errors.append(float((fundamental.sampson(F, a, b).square() + 1e-8).sqrt().mean()))
    return sum(errors) / len(errors) if errors else -1.0
