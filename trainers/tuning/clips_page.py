"""Validation clips on the page of a run: a table of their scores, and clips of one prompt and seed side by side."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..reporting.embed import Media
from ..reporting.page import Clip, Page

# Clips on the page; the others are in the run's folder.
MOST_CLIPS = 24
# Of a clip whose row has no size, pixels.
SIZE = (480, 270)


def add(page: Page, folder: Path, clips: Sequence[dict], steps: Collection[int], label: Callable[[dict], str]) -> None:
    """Adds those of `steps`. folder: the Validator's; clips: rows that its `run` returned; label: row -> caption."""
    groups = defaultdict(list)
    for clip in clips:
        if clip["step"] in steps:
            groups[clip["prompt"], clip["seed"]].append(clip)
    names = sorted({n for c in clips for n in c["scores"]})
    rows = [
        (c["prompt"], c["seed"], c["step"], c["strength"], *(c["scores"].get(n) for n in names))
        for g in groups.values() for c in g
    ]  # fmt: skip
    columns = ("prompt", "seed", "step", "strength", *names)
    page.table(columns, rows, "Scores: higher is better, except motion and high_frequency")
    shown = 0
    for (prompt, seed), group in groups.items():
        media = [(c, _media(folder / f"step-{c['step']}", c)) for c in group]
        media = [(c, m) for c, m in media if m is not None]
        if media and shown < MOST_CLIPS:
            page.clips(f"{prompt}, seed {seed}", [Clip(label(c), m) for c, m in media])
            shown += len(media)


def _media(folder: Path, clip: dict) -> Media | None:
    for suffix, mime in ((".mp4", "video/mp4"), (".webm", "video/webm"), (".webp", "image/webp")):
        path = folder / Path(clip["file"]).with_suffix(suffix)
        if path.is_file():
            return Media(path.read_bytes(), mime, *(clip.get("size") or SIZE))
    return None
