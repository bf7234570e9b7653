"""What a geometry scorer says of one clip: one record, with units, a verdict and the scorer's version.

Both scorers (tracks.score_clip without weights, dense.score_views from depth and poses) give this record, and nodes,
trainers and preference records carry it as JSON.
"""

import json
import math
from dataclasses import asdict, dataclass, field

from torch import Tensor

TRACKS, DENSE = "tracks", "dense"
# Raised whenever a scorer gives other numbers for the same clip: scores of different versions are not compared.
VERSIONS = {TRACKS: 1, DENSE: 1}

CONSISTENT, INCONSISTENT, UNDETERMINED = "consistent", "inconsistent", "undetermined"

# Every measurement that a record may hold, with its unit. Pixels are those of a picture of 480 lines.
UNITS = {
    "error": "the figure clips are compared by, lower is better: residual, and 3 px for each lost track, over parallax "
    "(tracks); photometric error over motion (dense); infinite where the dense verdict is undetermined",
    "residual": "px at 480 lines: mean truncated distance of tracks from the rigid scene that explains them best",
    "worst_residual": "px at 480 lines: the same in the worst region of the picture",
    "parallax": "px at 480 lines: mean truncated displacement that no rotation and zoom of the camera explains",
    "sampson": "px at 480 lines: mean truncated Sampson distance between neighbouring key frames",
    "motion": "% of the picture's diagonal that tracks move from key frame to key frame, median",
    "lost": "share of tracks lost from key frame to key frame though they stay in the picture, 0 to 1",
    "tracks": "number of tracks",
    "mse": "mean squared error of colours in [0, 1]: other views' points against the frame where they land",
    "dssim": "(1 - SSIM) / 2 of the same, 0 to 1",
    "lpips": "LPIPS (VGG) of frames drawn from all views' points, their own among them",
    "3dcs": "VideoGPA's score as published, lower is better: MSE + LPIPS",
    "mvcs": "VideoGPA's multi-view consistency score as published, 0 to 1, higher is better; changes with the scene's unit",
    "depth_error": "relative depth error between views, truncated at 0.2, over pixels that both see",
    "coverage": "share of pixels that other views' points reach, 0 to 1",
    "translation": "largest distance between two cameras over the median depth",
    "rotation": "degrees between neighbouring views, mean",
    "field_of_view_change": "degrees between the widest and the narrowest view",
}


@dataclass(frozen=True)
class GeometryRecord:
    """One clip's result.

    scorer: TRACKS or DENSE; version: of that scorer; score: 0 to 1, higher is better: see score_of; verdict: CONSISTENT,
    INCONSISTENT or UNDETERMINED; reason: one sentence on the verdict; measurements: name -> value, names and units in UNITS;
    frames: of the clip; frame_indices: the frames that were measured; frame_errors: one for each of these, in the unit of
    `residual` (tracks) or of mse + dssim (dense); cuts: first frames of new shots; notes: what a reader should know (a file
    that was not there, a backend, ...).
    """

    scorer: str
    version: int
    score: float
    verdict: str
    reason: str
    measurements: dict[str, float]
    frames: int
    frame_indices: list[int]
    frame_errors: list[float]
    cuts: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict:
        """A plain object; figures that do not exist are null."""
        plain = asdict(self)
        plain["measurements"] = {k: _finite(v) for k, v in self.measurements.items()}
        plain["frame_errors"] = [_finite(v) for v in self.frame_errors]
        return plain

    @classmethod
    def from_json(cls, plain: dict) -> "GeometryRecord":
        """What to_json gave. Raises TypeError or ValueError for anything else."""
        plain = dict(plain)
        plain["measurements"] = {k: _number(v) for k, v in plain["measurements"].items()}
        plain["frame_errors"] = [_number(v) for v in plain["frame_errors"]]
        return cls(**plain)

    @property
    def error(self) -> float:
        """The figure clips are compared by, lower is better; infinite where there is none."""
        value = self.measurements.get("error", math.inf)
        return value if math.isfinite(value) else math.inf

    def text(self) -> str:
        """A few lines for people."""
        figures = ", ".join(f"{k} {v:.4g}" for k, v in self.measurements.items() if math.isfinite(v))
        lines = [f"{self.verdict}, score {self.score:.3f}: {self.reason}", figures, *self.notes]
        return "\n".join(line for line in lines if line)

    def dumps(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)


@dataclass(frozen=True)
class Scored:
    """A record with its pictures, one for each of record.frame_indices.

    error_map: [F, H, W] float32, the record's frame_errors pixel by pixel, NaN where nothing was measured; preview:
    [F, H, W, 3] in [0, 1], the frames as the scorer explains them (reprojected points, or tracks with where they should
    be).
    """

    record: GeometryRecord
    error_map: Tensor
    preview: Tensor


class GeometryError(ValueError):
    """A clip or its geometry cannot be scored; the message says what was found, what was expected and what to do."""


def score_of(verdict: str, error: float, border: float) -> float:
    """0 to 1, higher is better: consistent clips above 0.5, inconsistent ones up to 0.5, by error (lower is better) within
    each; undetermined ones 0. border: an error that is neither good nor bad."""
    if verdict == UNDETERMINED:
        return 0.0
    half = 0.5 * border / (border + error) if math.isfinite(error) else 0.0
    return 0.5 + half if verdict == CONSISTENT else half


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
