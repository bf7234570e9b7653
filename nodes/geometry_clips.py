"""Shared parts of the geometry nodes: splitting a batch into clips, interruptible progress, reports and previews."""

from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.geometry.heat_map import full_error, heat_map
from ..kernels.geometry.record import TRACKS, GeometryError, GeometryRecord, Scored
from ..kernels.geometry.tracks import BACKENDS, score_clip
from . import saved_metadata, sprite_sheet, timeline
from .legend import UNITS, with_legend, words

CATEGORY = "image/geometry estimation"
# Maximum number of heat map frames in a node's preview.
SHOWN = 6


def split(images: torch.Tensor, clips: int, source: str) -> list[torch.Tensor]:
    """Splits an IMAGE batch into `clips` clips [T, H, W, 3] of equal length. Raises ValueError naming `source`."""
    count = images.shape[0]
    if count % clips:
        raise ValueError(f"{source}: {count} frames are not {clips} clips of equal length; set 'clips' to the number of clips")
    return list(images[..., :3].split(count // clips))


def progress(parts: int) -> Callable[[int], Callable[[float], None]]:
    """progress(n)(i) is a function of the finished share (0 to 1) of part i; it raises if the user has interrupted."""
    bar = comfy.utils.ProgressBar(100 * parts)

    def of(part: int) -> Callable[[float], None]:
        def advance(share: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(int(100 * (part + share)))

        return advance

    return of


def score(clips: list[torch.Tensor], backend: str, source: str) -> list[Scored]:
    """Scores every clip without a model. Raises GeometryError naming `source` and the clip that cannot be scored."""
    advance, found = progress(len(clips)), []
    for i, clip in enumerate(clips):
        try:
            found.append(score_clip(clip, backend, advance(i)))
        except GeometryError as e:
            raise GeometryError(f"{source}, clip {i + 1} of {len(clips)}: {e}") from e
        advance(i)(1.0)
    return found


def heat_maps(clips: list[torch.Tensor], scored: list[Scored]) -> tuple[list[torch.Tensor], float]:
    """(a heat map [T, H, W, 3] of each clip, on one scale; the error at full colour)."""
    full = full_error([s.error_map for s in scored], TRACKS)
    return [drawn(clip, s, full) for clip, s in zip(clips, scored, strict=True)], full


def drawn(clip: torch.Tensor, scored: Scored, full: float) -> torch.Tensor:
    """The heat map [T, H, W, 3] of a clip. full: the error at full colour."""
    return heat_map(clip, scored.error_map, scored.record.frame_indices, full, scored.greys)


def report(scored: list[Scored]) -> str:
    """A few lines on each clip."""
    texts = [s.record.text() for s in scored]
    return texts[0] if len(texts) == 1 else "\n".join(f"Clip {i}: {text}" for i, text in enumerate(texts, 1))


def show(
    cls, text: str, clips: list[torch.Tensor], maps: list[torch.Tensor], records: list[GeometryRecord], full: float,
    names: list[str] | None = None,
) -> dict:  # fmt: skip
    """The node's preview: the text, at most SHOWN evenly spaced frames of the heat maps with their legend, and a timeline.

    clips, maps: frames [T, H, W, 3] of each clip and its heat map, of its size or smaller; full: the error at full colour;
    names: of the clips, by default their numbers.
    """
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    pictures = torch.cat(maps)
    step = max(1, -(-pictures.shape[0] // SHOWN))
    shown = with_legend(pictures[::step], full, records[0].scorer)
    names = names or [f"Clip {i}" for i in range(1, len(clips) + 1)]
    parts = [timeline_clip(*of, name) for *of, name in zip(clips, maps, records, names, strict=True)]
    low, high = words(full, records[0].scorer)
    panel = timeline.state(parts, UNITS[records[0].scorer], timeline.Legend(low, high), ("clip", "errors"))
    return {**ui.PreviewImage(shown, cls=cls).as_dict(), **ui.PreviewText(text).as_dict(), timeline.PANEL: [panel]}


def timeline_clip(clip: torch.Tensor, heat: torch.Tensor, record: GeometryRecord, name: str) -> timeline.TimelineClip:
    """A clip with its errors by frame, key frames and those between, and its heat map."""
    at = {**dict(zip(record.between_indices, record.between_errors, strict=True)),
          **dict(zip(record.frame_indices, record.frame_errors, strict=True))}  # fmt: skip
    series = [timeline.Series("error", sorted(at), [at[t] for t in sorted(at)])]
    # Pixels are left out here, which takes a tenth of the time of averaging: the panel's frames are small.
    step = max(1, clip.shape[1] // heat.shape[1])
    before = sprite_sheet.as_bytes(clip[:, ::step, ::step, :3])
    label = f"{name}: {record.verdict}, {record.score:.2f}"
    return timeline.TimelineClip(label, len(clip), series, before, sprite_sheet.as_bytes(heat), record.cuts)


def add_metadata(cls, node: str, scored: list[Scored]) -> None:
    """Adds scores, verdicts and measurements to the metadata of the files that this prompt saves."""
    clips = [
        {k: plain[k] for k in ("score", "verdict", "measurements", "cuts", "scorer", "version")}
        for plain in (s.record.to_json() for s in scored)
    ]
    saved_metadata.add(cls, {"node": node, "scores": [c["score"] for c in clips], "clips": clips})


def on_wire(images: torch.Tensor) -> torch.Tensor:
    return images.float().to(comfy.model_management.intermediate_device())


def backend_input() -> io.Input:
    return io.Combo.Input(
        "backend",
        options=list(BACKENDS),
        default=BACKENDS[0],
        tooltip=(
            "Point tracker. auto: OpenCV if installed, which is faster, else torch. Both give the same verdicts; compare "
            "only scores of the same backend."
        ),
    )
