"""Geometry records: the result of a geometry scorer for one clip, with verdict, measurements and the scorer's version.

Both scorers return this record: tracks.score_clip (no network) and dense.score_views (from depth and poses). Nodes, trainers
and preference records store it as JSON.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

TRACKS, DENSE = "tracks", "dense"
# Increment when a scorer's numbers change for the same clip. Scores of different versions are not comparable.
VERSIONS = {TRACKS: 2, DENSE: 2}

CONSISTENT, INCONSISTENT, UNDETERMINED = "consistent", "inconsistent", "undetermined"

# All possible measurements of a record with their units. Pixels refer to an image scaled to 480 lines.
UNITS = {
    "error": "value by which clips are compared, lower is better. tracks: residual normalised by parallax, plus what "
    "moves by itself and lost, missing and replaced points; dense: photometric error normalised by camera translation, "
    "infinite if the verdict is undetermined",
    "rest_error": "the part of the error that is the residual's: without lost points and what moves by itself",
    "residual": "px at 480 lines: mean distance from the best-fitting rigid scene that neighbouring tracks share, without "
    "tracks that move by themselves",
    "worst_residual": "px at 480 lines: the same in the worst region of the image, all tracks",
    "smooth_residual": "px at 480 lines: mean distance of the tracks of regions without corners, beyond 1.5 pixels",
    "between_residual": "px at 480 lines: mean distance in the frames between key frames; a missing point counts as 3 px",
    "moving": "share of the tracks that move by themselves, 0 to 1",
    "flowing": "share of the tracks that lie in regions without corners and move by themselves, 0 to 1",
    "unstable": "share of the tracks in places where tracks are lost again and again (boiling texture), 0 to 1",
    "replaced": "largest share of the tracks whose surroundings change at once between two key frames, 0 to 1",
    "exchanged": "tracks lost within a third of the clip beyond what is usual in it, as a share; about 1 in a dissolve",
    "sudden": "share of the tracks lost in the worst step, beyond what is usual in the clip",
    "static": "share of the textured image that does not move, 0 to 1; logos and subtitles included",
    "plain": "share of the frames between key frames in which nothing can be found (flashes, smears), 0 to 1",
    "parallax": "px at 480 lines: what remains of `unexplained` without the residuals",
    "unexplained": "px at 480 lines: mean truncated displacement that no homography explains: no turn, no zoom, no flat scene",
    "layers": "px at 480 lines: mean truncated displacement that no two homographies explain",
    "sampson": "px at 480 lines: mean truncated Sampson distance between key frames half a clip apart",
    "motion": "% of the image diagonal: median displacement of tracks between neighbouring key frames",
    "lost": "share of tracks lost between neighbouring key frames while inside the image, 0 to 1",
    "tracks": "number of tracks",
    "mse": "mean squared error of colours in [0, 1]: points of other views against the frame where they land",
    "dssim": "(1 - SSIM) / 2 of the same comparison, 0 to 1",
    "lpips": "LPIPS (VGG) of frames rendered from the points of all views, including their own",
    "3dcs": "VideoGPA's score as published, lower is better: MSE + LPIPS",
    "mvcs": "VideoGPA's multi-view consistency score as published, 0 to 1, higher is better; changes with the scene's unit",
    "depth_error": "mean relative depth error between neighbouring views, truncated at 0.2, over pixels visible in both",
    "coverage": "share of the image that tracks cover (tracks), or that points of other views reach (dense), 0 to 1",
    "kept": "share of pixels that were compared: reached, not occluded, not of low confidence and not at an edge of the depth",
    "noise": "px at 480 lines. tracks: root mean square of what neighbouring tracks do not share; dense: mean displacement of "
    "points between views by the corrections of depth and cameras, an estimate of what the depth model errs",
    "translation": "largest distance between two cameras divided by the median depth",
    "rotation": "degrees: mean camera rotation between neighbouring views",
    "field_of_view_change": "degrees: largest minus smallest horizontal field of view",
}


@dataclass(frozen=True)
class GeometryRecord:
    """Result of a geometry scorer for one clip.

    scorer: TRACKS or DENSE; version: the scorer's version; score: 0 to 1, higher is better, see score_of; verdict: CONSISTENT,
    INCONSISTENT or UNDETERMINED; reason: one sentence that explains the verdict; measurements: name -> value, for names and
    units see UNITS; frames: number of frames of the clip; frame_indices: indices of the measured frames; frame_errors: one
    error per measured frame, in the unit of `residual` (tracks) or of mse + dssim (dense); cuts: indices of the first frames
    of new shots; notes: remarks for the user (the backend used, excluded pixels, missing weights, ...); between_indices,
    between_errors: frames between the measured ones that were looked at, with their errors in the same unit, NaN where nothing
    can be found in a frame (tracks only).
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
    between_indices: list[int] = field(default_factory=list)
    between_errors: list[float] = field(default_factory=list)

    def to_json(self) -> dict:
        """The record as a JSON-compatible dict; measurements and errors that are not finite become None (null)."""
        plain = asdict(self)
        plain["measurements"] = {k: _finite(v) for k, v in self.measurements.items()}
        for name in ("frame_errors", "between_errors"):
            plain[name] = [_finite(v) for v in plain[name]]
        return plain

    @classmethod
    def from_json(cls, plain: dict) -> "GeometryRecord":
        """Inverse of to_json; null becomes NaN. Raises KeyError, TypeError, ValueError, OverflowError or AttributeError for
        other input."""
        plain = dict(plain)
        plain["measurements"] = {k: _number(v) for k, v in plain["measurements"].items()}
        for name in ("frame_errors", "between_errors"):
            plain[name] = [_number(v) for v in plain.get(name, [])]
        record = cls(**plain)
        texts = (record.scorer, record.verdict, record.reason, *record.notes)
        numbers = (record.version, record.frames, *record.frame_indices, *record.cuts, *record.between_indices)
        if not all(isinstance(t, str) for t in texts) or not all(type(n) is int for n in numbers):
            raise TypeError("entries of other types than a geometry record's")
        if not math.isfinite(record.score):
            raise ValueError(f"a score {record.score}")
        return record

    @property
    def error(self) -> float:
        """The measurement "error", by which clips are compared; lower is better, infinite if missing or not finite."""
        value = self.measurements.get("error", math.inf)
        return value if math.isfinite(value) else math.inf

    def text(self) -> str:
        """Human-readable summary: one line of plain words; the notes; the finite measurements."""
        figures = ", ".join(f"{k} {v:.4g}" for k, v in self.measurements.items() if math.isfinite(v))
        return "\n".join(line for line in (self.line(), *self.notes, figures) if line)

    def line(self) -> str:
        """What was measured, whether it can be judged, how good it is and which way is better, in one line."""
        if self.verdict == UNDETERMINED:
            return f"3D consistency cannot be judged (undetermined, score 0): {self.reason}"
        high = "higher is better; 0.5 and more: consistent"
        return f"3D consistency: {self.verdict}, score {self.score:.2f} of 1 ({high}): {self.reason}"

    def dumps(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)


@dataclass(frozen=True)
class Scored:
    """A record with one error map and one preview for each of record.frame_indices.

    error_map: [F, H, W] float32, errors per pixel in the unit of the record's frame_errors, NaN where nothing was measured;
    preview: [F, H, W, 3] in [0, 1], reprojected points (dense) or tracks with their expected positions (tracks); greys: index
    of a frame -> [h, w], its grey levels 0 to 255 in a smaller size, of the frames for which the scorer made them.
    """

    record: GeometryRecord
    error_map: Tensor
    preview: Tensor
    greys: Mapping[int, Tensor] = field(default_factory=dict)


class GeometryError(ValueError):
    """Raised if a clip or its geometry cannot be scored. The message says what was found, what was expected, what to do."""


def score_of(verdict: str, error: float, border: float) -> float:
    """Score from verdict and error, 0 to 1, higher is better.

    With h = 0.5 * border / (border + error): 0.5 + h for consistent clips, h for inconsistent ones, 0 for undetermined ones; h
    is 0 if the error is not finite. border: decision threshold of the error, in the same unit.
    """
    if verdict == UNDETERMINED:
        return 0.0
    half = 0.5 * border / (border + error) if math.isfinite(error) else 0.0
    return 0.5 + half if verdict == CONSISTENT else half


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
