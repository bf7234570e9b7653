"""Consistency with one rigid scene as a reward of decoded frames, by point tracks (see kernels.geometry.tracks)."""

from torch import Tensor, tensor

from ..geometry import tracks
from .reward import FINISHED, FRAMES, ClipView, RewardInfo, SingleFigure


class GeometryReward(SingleFigure):
    """The score of the geometry record, 0 to 1. backend: of the tracker, "auto", "torch" or "opencv"."""

    def __init__(self, backend: str = "auto"):
        self.backend = backend
        self.info = RewardInfo(
            name="geometry (point tracks)",
            reads=FRAMES,
            meaning=(
                "consistency with one rigid scene, 0 to 1; above 0.5 consistent, below inconsistent, 0 where the clip cannot "
                "be judged"
            ),
            sigmas=(FINISHED, FINISHED),
            decodes=1,
            typical=(0.5, 1.0),
        )

    def measure(self, view: ClipView) -> Tensor:
        """Figures [B, 1]."""
        records = [tracks.score_clip(frames, self.backend, pictures=False).record for frames in view.frames()]
        return tensor([[r.score] for r in records])
