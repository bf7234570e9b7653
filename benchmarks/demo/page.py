"""The demo's page: one self-contained HTML file with its clips and images embedded, which opens offline."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

FPS = 16

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.prompt { display: grid; gap: .4rem .8rem; margin: 0 0 1.4rem; padding: .8rem; border: 1px solid var(--line); }
.prompt { grid-template-columns: repeat(var(--columns), 1fr); border-radius: 8px; }
.prompt h3 { grid-column: 1 / -1; margin: 0; font-size: 1rem; font-weight: 600; }
figure { margin: 0; }
figure img { width: 100%; display: block; image-rendering: pixelated; border-radius: 4px; }
figure img + img { margin-top: 4px; }
figcaption { font-size: .82rem; line-height: 1.35; padding-top: .3rem; }
figcaption b { display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: var(--soft); }
code { font-size: .9em; background: var(--soft); padding: .1em .3em; border-radius: 3px; }
.legend { display: inline-block; height: .8em; width: 9em; border-radius: 3px; vertical-align: baseline; }
footer { margin-top: 2.5rem; font-size: .85rem; opacity: .75; }
"""


@dataclass(frozen=True)
class Shown:
    """One clip on the page. frames: uint8 [T, 3, H, W]; heat: the same or None; notes: short lines below it."""

    title: str
    frames: Tensor
    heat: Tensor | None = None
    notes: Sequence[str] = ()


def webp(frames: Tensor, fps: int = FPS) -> str:
    """A looping animated WebP of frames uint8 [T, 3, H, W], as a data URI."""
    pictures = [Image.fromarray(f.permute(1, 2, 0).contiguous().numpy()) for f in frames]
    buffer = io.BytesIO()
    # The encoder may merge equal consecutive frames; the merged frame's duration is then their sum.
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure(shown: Shown) -> str:
    """A clip with its heat map and its notes below."""
    title = html.escape(shown.title)
    parts = [f'<figure><img src="{webp(shown.frames)}" alt="clip: {title}">']
    if shown.heat is not None:
        parts.append(f'<img src="{webp(shown.heat)}" alt="distance to the shell: {title}">')
    notes = "<br>".join(html.escape(n) for n in shown.notes)
    return "".join([*parts, f"<figcaption><b>{title}</b>{notes}</figcaption></figure>"])


def prompt_row(caption: str, clips: Sequence[Shown], columns: int | None = None) -> str:
    """All clips of one prompt in a row. columns: how many fill the page's width (None: all of them)."""
    head = f'<section class="prompt" style="--columns: {columns or len(clips)}"><h3>{html.escape(caption)}</h3>'
    return head + "\n".join(figure(c) for c in clips) + "</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are escaped, and the first column holds names."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def legend(colours: Sequence[Sequence[float]]) -> str:
    """A bar of the heat map's colours, which are RGB in 0..1."""
    stops = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * c for c in colour)) for colour in colours)
    return f'<span class="legend" style="background: linear-gradient(90deg, {stops})"></span>'


def page(title: str, *body: str) -> str:
    """The whole document; `body` is HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    return "\n".join(
        ["<!doctype html>", f'<html lang="en"><head>{head}<style>{STYLE}</style></head><body>', *body, "</body></html>", ""]
    )
