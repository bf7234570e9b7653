"""Contact sheet of pairs: first, middle and last frame of the winner and of the loser, with their scores above."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..kernels.video.clips import SourceReport
from ..preferences.clips import BAD_CLIP, ClipReader
from ..preferences.groups import Candidate, Group
from ..reporting.strips import HEIGHT, drawable, stacked, strip
from ..scorers.scores import Scores
from ..video.frames import read_frames
from .ranking import Ranked

LINE, MARGIN = 14, 6
MAX_FRAMES = 81
FRAME = {"winner": (20, 130, 60), "loser": (190, 40, 40)}


def draw(pairs: Sequence[tuple[Group, Ranked]], scores: Scores, reader: ClipReader) -> Image.Image:
    """One row per pair. reader: decodes clips that have latents only, which needs a VAE."""
    rows = [_row(group, pair, scores, reader) for group, pair in pairs]
    return stacked(rows)


def _row(group: Group, pair: Ranked, scores: Scores, reader: ClipReader) -> Image.Image:
    by_name = {c.name: c for c in group.candidates}
    strips = [_strip(by_name[name], reader) for name in (pair.winner, pair.loser)]
    width = sum(s.width for s in strips) + 3 * MARGIN
    row = Image.new("RGB", (width, 3 * LINE + HEIGHT + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(row)
    pen.text((MARGIN, 1), drawable(f"{group.name}: {group.prompt}"), fill="black")
    left = MARGIN
    for (role, colour), name, shown in zip(FRAME.items(), (pair.winner, pair.loser), strips, strict=True):
        lines = (f"{role} {by_name[name].path.name}", _figures(name, scores))
        for i, line in enumerate(lines):
            pen.text((left, 1 + (i + 1) * LINE), drawable(line), fill=colour)
        row.paste(shown, (left, 3 * LINE + MARGIN))
        left += shown.width + MARGIN
    return row


def _strip(candidate: Candidate, reader: ClipReader) -> Image.Image:
    try:
        frames = _frames(candidate, reader)
    except BAD_CLIP:
        # Its score came with a record, or the file changed since: grey frames show that it could not be read.
        frames = torch.full((1, HEIGHT, HEIGHT, 3), 128, dtype=torch.uint8)
    return strip(frames, HEIGHT)


def _frames(candidate: Candidate, reader: ClipReader) -> Tensor:
    if candidate.video is not None:
        return read_frames(candidate.video, SourceReport(candidate.name), MAX_FRAMES)
    return reader.frames(candidate.latents)


def _figures(name: str, scores: Scores) -> str:
    figures = [f"{scorer} {values[name]:.3f}" for scorer, values in scores.values.items()]
    record = scores.records.get(name)
    if record is not None:
        measured = record.measurements
        figures += [f"{k} {measured[k]:.3g}" for k in ("error", "parallax", "motion", "lost", "mse") if k in measured]
    return "  ".join(figures)
