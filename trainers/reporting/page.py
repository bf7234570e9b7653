"""One self-contained HTML page: it needs no network and no other file, and reads well on a phone, in light and in dark.

    page = Page("DPO run", "Held-out accuracy rose from .50 to .71.")
    page.note("stopped at step 400: the winners' error passed its limit", warning=True)
    page.heading("Rewards")
    page.table(("reward", "difference"), [("geometry", Interval(0.3, 0.1, 0.5, 24))])
    page.curves("Loss", [Series("train", steps, losses)], "step", "loss")
    page.clips("prompt 1, seed 7", [Clip("base", video(frames, 16)), Clip("tuned", video(others, 16))])
    page.details("settings", {"beta": 0.1})
    page.write("run/index.html")

All text is escaped, and the page forbids the browser to load anything from elsewhere (Content-Security-Policy).
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from . import curves
from .curves import Series, number
from .embed import Media
from .intervals import Interval
from .style import SCRIPT, STYLE

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

LONG = 24

# What a table's cell may be. A number has four significant digits, an Interval three; NaN and None are shown as "-".
Cell = str | int | float | bool | Interval | None


@dataclass(frozen=True)
class Clip:
    """A clip of a row, or a picture of a gallery. label: above it, such as "base"; caption: below it, such as its scores."""

    label: str
    media: Media
    caption: str = ""


class Page:
    """title: also the window's; summary: one plain sentence that says the result, the first thing on the page."""

    def __init__(self, title: str, summary: str):
        self.title, self.summary = title, summary
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def note(self, text: str, warning: bool = False) -> None:
        """A remark in a box; warning: with the word "Warning" and in the colour of one."""
        said = "<strong>Warning:</strong> " if warning else ""
        self._parts.append(f'<p class="note{" warning" if warning else ""}">{said}{escape(text)}</p>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        """Rows of cells; an Interval is shown as "mean [low, high]". Raises ValueError for a row of another length."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"a table of {len(columns)} columns has a row of {len(row)} cells: {row}")
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        # Above the box that scrolls, so that a narrow screen does not cut it.
        title = f'<p class="caption">{escape(caption)}</p>' if caption else ""
        self._parts.append(
            f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def curves(
        self, title: str, series: Sequence[Series], x_label: str, y_label: str, log_y: bool = False,
        lines: Sequence[tuple[str, float]] = (), caption: str = "",
    ) -> None:  # fmt: skip
        """A plot of one or several series. x_label, y_label: with units; lines: (name, y) of horizontal reference lines.

        Raises ValueError for a series whose lists differ in length.
        """
        plot = curves.svg(series, x_label, y_label, log_y, lines)
        self._parts.append(f'<figure class="plot"><h3>{escape(title)}</h3>{plot}{_caption(caption)}</figure>')

    def clips(self, title: str, clips: Sequence[Clip], caption: str = "") -> None:
        """Clips side by side, which play together."""
        self._row("row together", title, clips, caption)

    def images(self, title: str, images: Sequence[Clip], caption: str = "") -> None:
        """Pictures side by side."""
        self._row("row", title, images, caption)

    def details(self, title: str, data: object) -> None:
        """Anything that JSON can hold, behind a line that opens it."""
        text = json.dumps(data, indent=1, default=str)
        self._parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def html(self) -> str:
        """The whole page."""
        title = escape(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{title}</title><style>{STYLE}</style></head>\n"
            f'<body><main><h1>{title}</h1><p class="summary">{escape(self.summary)}</p>\n'
            + "\n".join(self._parts)
            + f"\n</main><script>{SCRIPT}</script></body></html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Writes the page under a temporary name and renames it. Raises OSError."""
        text = self.html()
        write_atomic(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))

    def _row(self, kind: str, title: str, clips: Sequence[Clip], caption: str) -> None:
        shown = "".join(map(_figure, clips))
        self._parts.append(f'<section class="{kind}"><h3>{escape(title)}</h3><div>{shown}</div>{_caption(caption)}</section>')


def _figure(clip: Clip) -> str:
    m = clip.media
    source = f'src="data:{m.mime};base64,{base64.b64encode(m.data).decode()}" width="{m.width}" height="{m.height}"'
    label = escape(clip.label)
    if m.is_video:
        shown = f'<video {source} aria-label="{label}" controls loop muted playsinline preload="auto"></video>'
    else:
        shown = f'<img {source} alt="{label}">'
    return f"<figure><h4>{label}</h4>{shown}{_caption(clip.caption)}</figure>"


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _cell(value: Cell) -> str:
    if isinstance(value, Interval):
        if math.isnan(value.mean):
            return '<td class="number">-</td>'
        mean, low, high = (number(v, 3) for v in (value.mean, value.low, value.high))
        return f'<td class="number">{mean} <small>[{low}, {high}]</small></td>'
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if value is None or isinstance(value, (int, float)):
        return f'<td class="number">{number(value)}</td>'
    # A narrow screen would break long text into a column of single words.
    return f"<td{' class=long' if len(value) > LONG else ''}>{escape(value)}</td>"
