"""The demo: what a newcomer runs first. It fits, samples, scores and writes a page that needs nothing but itself."""

import base64
import contextlib
import html
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from PIL import Image

from benchmarks.demo import demo
from benchmarks.demo import page as demo_page
from benchmarks.toy_world.clips import scene_of
from trainers.kernels import colours

PROMPTS = 2
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(page, what was printed, folder, races) of one small demo."""
    folder = tmp_path_factory.mktemp("demo")
    said, raced = io.StringIO(), []
    race_all = demo.race_all

    def watched(*args):
        raced.extend(race_all(*args))
        return raced

    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "race_all", watched)
        demo.main(["--output_dir", str(folder), "--prompts", str(PROMPTS), "--shown", "1"])
    return (folder / "index.html").read_text(encoding="utf-8"), said.getvalue(), folder, raced


def pictures(page):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/webp;base64,([^\"]+)", page)]


def test_the_page_lies_where_the_demo_says(ran):
    _, said, folder, _ = ran
    assert f"The page is {folder.resolve() / 'index.html'}" in said
    assert {p.name for p in folder.iterdir()} == {"index.html", "manifold.safetensors"}


def test_the_page_asks_nothing_of_any_server(ran):
    page = ran[0]
    links = re.findall(r"(?:src|srcset|href|action|poster)\s*=\s*[\"']?([^\"'>\s]+)", page)
    assert links
    assert all(link.startswith("data:image/webp;base64,") for link in links)
    assert not re.findall(r"https?:|//\w|<script|<link|@import|url\(", re.sub(r"base64,[^\"]*", "", page))


def test_clips_and_heat_maps_move_as_long_as_the_video(ran):
    found = pictures(ran[0])
    # One prompt is shown: clips with heat maps, then the first seed's and the winner's.
    assert len(found) == 2 * (1 + len(demo.SETTINGS)) + 2
    for picture in found:
        assert picture.size == (64, 64)
        durations = []
        for i in range(picture.n_frames):
            picture.seek(i)
            picture.load()
            durations.append(picture.info["duration"])
        assert sum(durations) == 17 * (1000 // demo_page.FPS)


def test_the_table_says_what_was_measured(ran):
    page, said, _, _ = ran
    rows = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", html.unescape(page))
    assert [name for name, _ in rows] == [demo.REAL, *demo.SETTINGS]
    outside = {name: float(re.search(r"<td>([\d.]+)", cells).group(1)) for name, cells in rows}
    projected, unguided = outside["project (the node's default)"], outside["no guidance"]
    assert projected < 0.2 * unguided < outside["minimise (released objective)"]
    for name, _ in rows:
        assert name in said


def test_the_race_states_its_cost_and_its_gain(ran, toy_judge):
    page, said, _, raced = ran
    plain = html.unescape(page)
    share = float(re.search(r"This ran\s+([\d.]+)", plain)[1])
    assert 30 < share < 40
    # Below the clips of the first prompt: what the judge makes of these very frames.
    shown = [float(v) for v in re.findall(r"judge, overall ([\d.]+)", plain)]
    truth = [scene_of(demo.SPLIT, 0)[0].attributes] * 2
    judged = toy_judge.read(torch.stack([raced[0].first, raced[0].winner])).scores(truth)["overall"]
    assert shown == pytest.approx(judged.tolist(), abs=0.0051)
    assert abs(shown[0] - shown[1]) > 0.02, "figures this close do not tell the first seed from the winner"
    # In the terminal: means over all prompts.
    number = r"([+-]?[\d.]+) \+- [\d.]+"
    means = re.search(rf"first seed {number}, winner {number}, change {number}", said).groups()
    first, winner = torch.tensor([r.scores for r in raced]).mean(dim=0).tolist()
    assert [float(v) for v in means] == pytest.approx([first, winner, winner - first], abs=0.00051)
    assert means[2][0] in "+-"


def test_a_page_escapes_what_it_is_given():
    frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    row = demo_page.prompt_row("<b>&", [demo_page.Shown("a<i>", frames, notes=["1 < 2"])])
    page = demo_page.page("<t>", row, demo_page.table(["x<y"], [["<td>"]]))
    assert not re.findall(r"<b>&|<i>|1 < 2|x<y|<td><td>|<title><t>", page)


def test_the_legend_has_the_heat_maps_colours():
    legend = demo_page.legend(colours.HEAT_MAP)
    assert legend.count("rgb(") == len(colours.HEAT_MAP)
    assert "rgb(166 230 255)" in legend


@pytest.mark.parametrize("name", ["demo", "demo_clips"])
def test_outside_a_checkout_the_remedy_is_named(tmp_path, name):
    """A release has trainers/ without benchmarks/."""
    for folder in ("trainers", "kernels"):
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    found = subprocess.run([sys.executable, "-m", f"trainers.{name}"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 1
    assert "from the root of a checkout" in found.stderr


def test_one_prompt_gives_no_interval_and_is_refused():
    with pytest.raises(SystemExit, match="--prompts 1"):
        demo.main(["--prompts", "1"])
