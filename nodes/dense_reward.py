"""Consistency with one rigid scene by Depth Anything 3's depth and cameras, as a reward of decoded frames."""

import torch

from ..kernels.geometry.dense import score_views
from ..kernels.rewards.reward import FINISHED, FRAMES, ClipView, RewardError, RewardInfo, SingleFigure
from .geometry_da3 import to_compute_device
from .geometry_type import from_wire, run_da3


class DenseGeometryReward(SingleFigure):
    """The score of the dense geometry record, 0 to 1.

    model: a DA3_MODEL; views, resolution: as on the node Geometry Consistency (DA3).
    """

    def __init__(self, model, views: int, resolution: int):
        self.model, self.views, self.resolution = model, views, resolution
        self.info = RewardInfo(
            name="geometry (Depth Anything 3)",
            reads=FRAMES,
            meaning=(
                "consistency with one rigid scene by depth and cameras, 0 to 1; above 0.5 consistent, below inconsistent, 0 "
                "where the camera moves too little to judge"
            ),
            sigmas=(FINISHED, FINISHED),
            decodes=1,
            typical=(0.5, 1.0),
        )

    def measure(self, view: ClipView) -> torch.Tensor:
        """Figures [B, 1]."""
        return torch.tensor([[self._score(frames)] for frames in view.frames()])

    def _score(self, frames: torch.Tensor) -> float:
        if frames.shape[0] < 2:
            raise RewardError("the clip has one frame; its geometry needs at least 2, better 10 or more")
        geometry = run_da3(self.model, frames, self.views, self.resolution, "cam_dec")
        return score_views(to_compute_device(from_wire(geometry, "Geometry Reward"))).record.score
