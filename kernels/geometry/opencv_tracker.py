"""Pyramidal Lucas-Kanade by OpenCV (optional): the algorithm of lucas_kanade.py, several times as fast on a CPU."""

import cv2
import numpy as np
import torch
from torch import Tensor

from . import lucas_kanade


class OpenCVTracker:
    """Tracker on key frames [K, H, W], grey levels 0 to 255, on the CPU; for the arguments of a call see point_tracks.py."""

    def __init__(self, grey: Tensor):
        side = 2 * lucas_kanade.RADIUS + 1
        self.window = (side, side)
        self.pictures = grey.clamp(0, 255).to("cpu", torch.uint8).numpy()

    def __call__(self, i: int, j: int, points: Tensor, guess: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        if not len(points):
            return points.clone(), points[:, 0].clone()
        at, near = (p.detach().to("cpu", torch.float32).numpy()[:, None].copy() for p in (points, guess))
        criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_COUNT, lucas_kanade.ITERATIONS, lucas_kanade.STEP)
        there, found, left = cv2.calcOpticalFlowPyrLK(
            self.pictures[i], self.pictures[j], at, near, winSize=self.window, maxLevel=levels - 1, criteria=criteria,
            flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
        )  # fmt: skip
        # OpenCV leaves the difference of a point that it did not find unwritten: whatever the memory held before.
        left[found == 0] = np.inf
        return torch.from_numpy(there[:, 0]).to(points), torch.from_numpy(left[:, 0]).to(points)
