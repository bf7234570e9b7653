"""What the geometry nodes share: clips of a batch, progress that can be interrupted, and a result in words and pictures."""

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

CATEGORY = "image/geometry estimation"
# Frames of the heat map that a node shows of itself.
SHOWN = 6


def split(images: torch.Tensor, clips: int, source: str) -> list[torch.Tensor]:
    """`clips` clips [T, H, W, 3] that stand one after another in an IMAGE batch. Raises ValueError naming `source`."""
    count = images.shape[0]
    if count % clips:
        raise ValueError(f"{source}: {count} frames are not {clips} clips of equal length; set 'clips' to how many there are")
    return list(images[..., :3].split(count // clips))


def progress(parts: int) -> Callable[[int], Callable[[float], None]]:
    """progress(n)(i) takes the share 0 to 1 of part i that is done, and raises where the user has interrupted."""
    bar = comfy.utils.ProgressBar(100 * parts)

    def of(part: int) -> Callable[[float], None]:
        def advance(share: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(int(100 * (part + share)))

        return advance

    return of


def score(clips: list[torch.Tensor], backend: str, source: str) -> list[Scored]:
    """Every clip scored without a model. Raises GeometryError naming `source` and the clip that cannot be scored."""
    advance, found = progress(len(clips)), []
    for i, clip in enumerate(clips):
        try:
            found.append(score_clip(clip, backend, advance(i)))
        except GeometryError as e:
            raise GeometryError(f"{source}, clip {i + 1} of {len(clips)}: {e}") from e
        advance(i)(1.0)
    return found


def heat_maps(clips: list[torch.Tensor], scored: list[Scored]) -> list[torch.Tensor]:
    """A heat map [T, H, W, 3] of each clip, on one scale."""
    full = full_error([s.error_map for s in scored], TRACKS)
    return [heat_map(c, s.error_map, s.record.frame_indices, full) for c, s in zip(clips, scored, strict=True)]


def report(scored: list[Scored]) -> str:
    """A few lines on each clip."""
    texts = [s.record.text() for s in scored]
    return texts[0] if len(texts) == 1 else "\n".join(f"Clip {i}: {text}" for i, text in enumerate(texts, 1))


def show(cls, text: str, pictures: torch.Tensor) -> dict:
    """What the node shows: the text, and some frames of the pictures [T, H, W, 3] from the first to the last."""
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    step = max(1, -(-pictures.shape[0] // SHOWN))
    return {**ui.PreviewImage(pictures[::step], cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}


def note(cls, node: str, scored: list[Scored]) -> None:
    """Puts scores, verdicts and figures into what this prompt saves."""
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
            "What follows the points. auto: OpenCV where it is installed, which is faster, else torch. Both give the same "
            "verdicts; compare scores of one backend."
        ),
    )
