"""Shared parts of the geometry nodes: splitting a batch into clips, interruptible progress, reports and previews."""

from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.geometry.heat_map import full_error, heat_map
from ..kernels.geometry.record import TRACKS, GeometryError, Scored
from ..kernels.geometry.tracks import BACKENDS, score_clip
from . import saved_metadata
from .legend import with_legend

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


def show(cls, text: str, pictures: torch.Tensor, full: float, scorer: str = TRACKS) -> dict:
    """The node's preview: the text, and at most SHOWN evenly spaced frames of a heat map [T, H, W, 3] with its legend.

    full: the error at full colour; scorer: of the record, for the unit.
    """
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    step = max(1, -(-pictures.shape[0] // SHOWN))
    shown = with_legend(pictures[::step], full, scorer)
    return {**ui.PreviewImage(shown, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}


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
