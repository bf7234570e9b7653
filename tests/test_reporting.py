"""The self-contained page: well-formed, escaped, without anything from outside; curves, clips and intervals in it."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from trainers.reporting import curves, embed, intervals
from trainers.reporting.curves import Series, number
from trainers.reporting.intervals import Interval
from trainers.reporting.page import Clip, Page
from trainers.reporting.strips import drawable, stacked, strip

VOID = {"meta", "img", "br"}
EVIL = "<script>alert(1)</script> & \"quotes\" 'too' http://example.org"


class Tree(HTMLParser):
    """Checks that every element is closed in order; keeps elements and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        assert len({k for k, _ in attributes}) == len(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def of(self, tag):
        return [a for t, a in self.found if t == tag]

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())


def frames(count=12, height=48, width=64):
    x = torch.arange(width)[None, None, :] + 4 * torch.arange(count)[:, None, None] + torch.zeros(count, height, width)
    return torch.stack([x, 255 - x, 128 + 0 * x], dim=-1).clamp(0, 255).to(torch.uint8)


def whole_page():
    page = Page(EVIL, EVIL)
    page.note(EVIL, warning=True)
    page.heading(EVIL)
    page.text(EVIL)
    page.table((EVIL, "n"), [(EVIL, 3), ("x" * 80, Interval(0.5, 0.25, math.nan, 2)), (None, math.nan), (True, 0.25)], EVIL)
    page.curves(EVIL, [Series(EVIL, [0, 1, 2], [1.0, math.nan, 2.0])], EVIL, EVIL, lines=((EVIL, 1.5),), caption=EVIL)
    page.clips(EVIL, [Clip(EVIL, embed.video(frames(), 16), EVIL), Clip("b", embed.video(frames(), 16))], EVIL)
    page.images(EVIL, [Clip(EVIL, embed.picture(Image.new("RGB", (8, 6), "red")), EVIL)])
    page.details(EVIL, {EVIL: [EVIL, math.pi]})
    return page


def test_a_page_is_well_formed_escaped_and_needs_nothing_from_outside(tmp_path):
    pytest.importorskip("av")
    whole_page().write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    tree = Tree(text)
    # The page's own script only, and all the text that was given is text.
    assert len(tree.of("script")) == 1
    assert tree.said.count("alert(1)") >= 14
    assert tree.of("img")[0]["alt"] == EVIL
    sources = [a[k] for _, a in tree.found for k in ("src", "href", "srcset", "poster", "action", "data") if k in a]
    assert len(sources) == 3
    assert all(s.startswith("data:") for s in sources)
    assert not re.search(r"url\(|@import", text)
    (policy,) = [a["content"] for a in tree.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme" in text
    assert any(a.get("name") == "viewport" for a in tree.of("meta"))
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_cells():
    page = Page("t", "s")
    alone = Interval(1.0, math.nan, math.nan, 1)
    page.table(("a", "b"), [(Interval(1.23456, 1.0, 2.0, 9), 0.123456), (alone, math.nan), (False, None)])
    said = Tree(page.html()).said
    assert "1.23 [1, 2] 0.1235 1 [-, -] - no -" in said
    with pytest.raises(ValueError, match="a table of 2 columns has a row of 1 cells"):
        page.table(("a", "b"), [("x",)])


def test_embedded_clips_decode_to_what_was_given(tmp_path):
    av = pytest.importorskip("av")
    page = Page("t", "s")
    page.clips("row", [Clip("a", embed.video(frames(), 8.0))])
    (video,) = Tree(page.html()).of("video")
    assert "controls" in video
    assert "playsinline" in video
    kind, _, data = video["src"].partition(";base64,")
    assert kind in ("data:video/mp4", "data:video/webm")
    with av.open(io.BytesIO(base64.b64decode(data))) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 8.0
        found = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    assert len(found) == 12
    difference = torch.from_numpy(found[5]).float() - frames()[5].float()
    assert difference.abs().mean() < 6


@pytest.mark.parametrize("name", [e[0] for e in embed.ENCODERS])
def test_every_encoder_and_none(name, monkeypatch):
    av = pytest.importorskip("av")
    if name not in av.codecs_available:
        pytest.skip(f"PyAV has no {name} here")
    monkeypatch.setattr(embed, "ENCODERS", [e for e in embed.ENCODERS if e[0] == name])
    made = embed.video(frames(5), 16)
    assert (made.is_video, made.width, made.height) == (True, 64, 48)
    with av.open(io.BytesIO(made.data)) as container:
        assert len(list(container.decode(video=0))) == 5
    monkeypatch.setattr(embed, "ENCODERS", [])
    # WebP joins frames that are nearly alike.
    noise = torch.randint(0, 256, (5, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = embed.video(noise, 16)
    assert (made.mime, made.is_video, made.suffix) == ("image/webp", False, ".webp")
    with Image.open(io.BytesIO(made.data)) as picture:
        assert picture.n_frames == 5


def test_clips_are_scaled_and_kept_small():
    pytest.importorskip("av")
    noise = torch.randint(0, 256, (8, 150, 301, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (embed.video(noise, 16, 100).width, embed.video(noise, 16, 100).height) == (100, 50)
    # Odd sides are rounded to even ones, as 4:2:0 needs.
    assert embed.video(noise, 16, 4096).width == 300
    free = embed.video(noise, 16, 4096, None)
    small = embed.video(noise, 16, 4096, len(free.data) // 4)
    assert len(small.data) <= len(free.data) // 4
    for wrong in (noise.float(), noise[0], noise[:0]):
        with pytest.raises(ValueError, match=r"must be uint8 \[T, H, W, 3\]"):
            embed.video(wrong, 16)
    with pytest.raises(ValueError, match="frame rate must be above 0, got nan"):
        embed.video(noise, math.nan)


class TestCurves:
    def test_nan_leaves_a_gap_and_lone_values_a_dot(self):
        drawn = curves.svg([Series("a", range(6), [1, 2, math.nan, 5, math.inf, 3])], "step", "loss")
        (path,) = re.findall(r'class="line s0" d="([^"]*)"', drawn)
        assert path.count("M") == 3
        assert path.count("L") == 1
        assert drawn.count("<circle") == 2
        Tree(drawn)

    def test_axes_legend_and_titles(self):
        two = [Series("train", [0, 100], [1.0, 0.5]), Series("held out", [0, 100], [1.5, 0.75], [1.0, 0.5], [2.0, 1.0])]
        tree = Tree(curves.svg(two, "step", "loss (nats)", lines=[("limit", 1.2)]))
        for text in ("step", "loss (nats)", "train", "held out", "limit", "step 100 train: 0.5000 held out: 0.7500", "1.5"):
            assert text in tree.said
        assert len(tree.of("polygon")) == 1

    def test_places_are_linear_or_logarithmic(self):
        def heights(log):
            drawn = curves.svg([Series("a", [0, 1, 2, 3], [1.0, 10.0, 100.0, -1.0], points=True)], "x", "y", log)
            return [float(y) for y in re.findall(r'<circle class="f0" cx="[^"]*" cy="([^"]*)"', drawn)]

        a, b, c = heights(True)
        assert a - b == pytest.approx(b - c, abs=0.21)
        a, b, c, d = heights(False)
        assert b - c == pytest.approx(10 * (a - b), abs=1.1)
        assert d > a

    @pytest.mark.parametrize("y", [[], [math.nan, math.nan]])
    def test_nothing_to_plot(self, y):
        assert "No finite value" in curves.svg([Series("a", range(len(y)), y)], "x", "y")

    @pytest.mark.parametrize("y", [[3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [-1e12, 1e12]])
    def test_flat_tiny_and_huge(self, y):
        drawn = curves.svg([Series("a", [0, 1], y)], "x", "y")
        assert "nan" not in drawn
        assert drawn.count('class="grid"') >= 2

    def test_long_runs_are_thinned_without_losing_extremes_or_gaps(self):
        y = [math.sin(i / 50) for i in range(20_000)]
        y[7777], y[12_345] = 9.0, math.nan
        points = [(float(i), None if math.isnan(v) else v, None, None) for i, v in enumerate(y)]
        kept = curves.thinned(points)
        assert len(kept) < 1.6 * curves.POINTS
        assert (7777.0, 9.0, None, None) in kept
        assert any(p[1] is None for p in kept)
        assert kept == sorted(kept, key=lambda p: p[0])
        assert len(curves.svg([Series("a", range(20_000), y)], "x", "y")) < 60_000

    def test_lengths_differ(self):
        with pytest.raises(ValueError, match="series 'a': x, y, low and high must have the same length"):
            curves.svg([Series("a", [0, 1], [1.0])], "x", "y")

    def test_numbers(self):
        shown = [number(v) for v in (0, 1, 2.0, 0.123456, 123.456, 1234567.0, 1.5e-6, math.nan, math.inf, None, -0.5)]
        assert shown == ["0", "1", "2", "0.1235", "123.5", "1.235e+06", "1.500e-06", "-", "-", "-", "-0.5000"]
        assert number(0.98765, 2) == "0.99"


class TestIntervals:
    def test_student(self):
        """Quantiles as in tables."""
        for freedom, expected in ((1, 12.7062), (9, 2.2622), (20, 2.0860), (21, 2.0796), (30, 2.0423), (120, 1.9799)):
            assert intervals.student(freedom) == pytest.approx(expected, abs=1e-4)

    def test_means_and_differences(self):
        found = intervals.mean([1.0, 2.0, 4.0])
        # mean 7/3, standard deviation 1.5275, t(2) 4.3027
        assert (found.mean, found.low, found.high) == pytest.approx((2.3333, -1.4613, 6.1279), abs=1e-3)
        base = [float(i * i) for i in range(8)]
        shifted = intervals.paired_difference([v + 0.5 for v in base], base)
        assert (shifted.mean, shifted.low, shifted.high, shifted.above_zero) == (0.5, 0.5, 0.5, True)
        same = intervals.paired_difference(base, base)
        assert not same.above_zero
        assert not same.below_zero
        assert intervals.mean([3.0]).to_json() == {"mean": 3.0, "low": None, "high": None, "n": 1}
        assert intervals.mean([]).n == 0
        assert not intervals.mean([3.0]).above_zero
        with pytest.raises(ValueError):
            intervals.paired_difference([1.0], [1.0, 2.0])

    def test_ratios_are_symmetric(self):
        a, b = [1.0, 2.0, 5.0], [2.0, 3.0, 11.0]
        up, down = intervals.paired_ratio(b, a), intervals.paired_ratio(a, b)
        assert (up.mean, up.low, up.high) == pytest.approx((1 / down.mean, 1 / down.high, 1 / down.low))
        assert up.low > 1

    def test_wilson(self):
        found = intervals.share(3, 10)
        assert (found.low, found.high) == pytest.approx((0.1078, 0.6032), abs=1e-4)
        assert intervals.share(10, 10).high == pytest.approx(1.0)
        assert intervals.share(10, 10).low == pytest.approx(0.7225, abs=1e-4)
        assert math.isnan(intervals.share(0, 0).mean)

    def test_coverage(self):
        """Of normal samples of 5, 95 % of the intervals hold the mean."""
        draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        held = [i.low < 0 < i.high for i in map(intervals.mean, draws.tolist())]
        assert sum(held) / len(held) == pytest.approx(0.95, abs=0.012)


def test_strips():
    made = strip(frames(), 24)
    assert made.size == (3 * 32, 24)
    assert stacked([made, made.crop((0, 0, 10, 24))]).size == (96, 48)
    assert drawable("caf\u00e9 \u2013") == "caf? ?"


def test_details_hold_what_json_cannot():
    page = Page("t", "s")
    page.details("d", {"path": torch.float32, "values": [1]})
    said = Tree(page.html()).said
    assert "torch.float32" in said
    assert json.dumps("path") in said
