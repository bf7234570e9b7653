"""`python -m trainers.compare`: matching, paired differences, alarms, what is left out, output and continuing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from PIL import Image

from benchmarks.geometry import room
from benchmarks.toy_world import weights
from trainers.compare import alarms, cli, differences, html_page, pictures, shown, sides
from trainers.kernels.files.latents import write_latents
from trainers.kernels.geometry.record import CONSISTENT, TRACKS, UNDETERMINED, VERSIONS, GeometryRecord
from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism import files
from trainers.kernels.prism.head import HeadConfig, PrismHead
from trainers.kernels.shell_lcc.anchors import Anchors
from trainers.kernels.shell_lcc.diagnostics import blur
from trainers.kernels.shell_lcc.manifold import ShellManifold, save
from trainers.preferences.groups import Candidate, Group
from trainers.reporting.intervals import Interval
from trainers.scorers import geometry_files, shell_lcc
from trainers.scorers.scores import SCORERS, Scores
from trainers.video import detail
from trainers.wan import dit as wan_dit

from .test_encode import vae_file  # noqa: F401 (a fixture)
from .test_wan_dit import CONFIG
from .video_clips import moving, write_clip

ROOT = Path(__file__).resolve().parents[1]
TEXT = weights.FOLDER / weights.TEXT
COMMON = ("--jobs", 1, "--backend", "torch", "--device", "cpu", "--frames", 9)


def compare(a, b, output, *more):
    return cli.main([str(v) for v in ("--a", a, "--b", b, "--output", output, *COMMON, *more)])


def report_of(output):
    return json.loads((output / "comparison.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rooms():
    """Four rigid clips, uint8 [9, 96, 160, 3]."""
    return [clip.frames for clip in rendered()]


def rendered():
    return [room.render(room.draw_scene(i, "arc", frames=9, width=160, height=96)) for i in (1, 2, 3, 5)]


@pytest.fixture
def quick(monkeypatch):
    """Geometry that takes no time: an error by the size of the file; the names of the clips that were scored."""
    scored = []

    def score_file(task):
        scored.append(task.name)
        error = 0.01 + task.path.stat().st_size / 1e7
        found = GeometryRecord(TRACKS, VERSIONS[TRACKS], 0.5, CONSISTENT, "", {"error": error, "motion": 1.0}, 9, [0], [error])
        return {"video": task.name, "record": found.to_json()}

    monkeypatch.setattr(geometry_files, "score_file", score_file)
    return scored


@pytest.fixture(scope="module")
def base(rooms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "base"
    return folder_of(folder, rooms)


def folder_of(folder, clips, fps=16):
    (folder / "sub").mkdir(parents=True)
    for i, clip in enumerate(clips):
        write_clip(folder / "sub" / f"clip{i}.mkv", clip.numpy() if isinstance(clip, torch.Tensor) else clip, fps)
    return folder


def edited(rooms, edit):
    return [edit(clip.float(), i).round().clamp(0, 255).to(torch.uint8) for i, clip in enumerate(rooms)]


def blurred(clip, _=0):
    return blur(clip.movedim(-1, 1)).movedim(1, -1)


def gridded(clip, i):
    """A grid of 6 pixels, as a VAE leaves it in latents that were optimised too far."""
    wave = 14 * torch.cos(2 * math.pi * torch.arange(clip.shape[2]) / 6 + i)
    return 0.8 * (clip - 128) + 128 + wave[:, None]


class TestRun:
    def test_blurred_copies_lose_detail(self, base, rooms, quick, tmp_path, capsys):
        tuned = folder_of(tmp_path / "tuned", edited(rooms, blurred))
        out = tmp_path / "out"
        assert compare(base, tuned, out, "--names", "base", "soft", "--shown", 2) == 0
        said = capsys.readouterr().out
        report = report_of(out)
        found = report["comparisons"]["soft"]
        ratios = found["details"]["ratios"]
        assert ratios["laplacian"]["high"] < 0.8
        assert ratios["high_frequency"]["high"] < 1
        assert abs(ratios["brightness"]["mean"] - 1) < 0.01
        assert 0 < found["details"]["change"]["mean"] < 0.5
        assert [a for a in found["alarms"] if a.startswith("soft has lost fine detail (blurred): Laplacian variance is 0.")]
        assert not [a for a in found["alarms"] if "over-optimised" in a or "exposed" in a]
        assert found["rewards"]["geometry"]["difference"]["n"] == 4
        assert "alarm: soft has lost fine detail" in said
        assert "geometry" in said
        assert report["left_out"]["rewards"].keys() == {"flow_residual", "prompt_gap", "prism", "shell_lcc"}
        assert report["left_out"]["rewards"]["shell_lcc"] == "needs --manifold"
        # Every clip's own figures, and the pictures to look at.
        clip = report["clips"]["sub/clip0"]["sides"]
        assert clip["soft"]["figures"]["laplacian"] < clip["base"]["figures"]["laplacian"]
        assert clip["base"]["scores"]["geometry"] == pytest.approx(
            found["rewards"]["geometry"]["base"]["mean"] * 4 - sum(
                report["clips"][f"sub/clip{i}"]["sides"]["base"]["scores"]["geometry"] for i in (1, 2, 3)
            )
        )  # fmt: skip
        assert sorted(p.name for p in out.iterdir()) == [
            "clips.jsonl", "comparison.json", "index.html", "montage.png", "side_by_side",
        ]  # fmt: skip
        assert [p.stem for p in sorted((out / "side_by_side").iterdir())] == ["sub__clip1", "sub__clip3"]
        with Image.open(out / "montage.png") as montage:
            assert montage.size == (2 * 3 * 160 + 3 * 6, 4 * (96 + 2 * 14 + 2 * 6))

    def test_a_grid_is_over_optimised(self, base, rooms, quick, tmp_path):
        tuned = folder_of(tmp_path / "tuned", edited(rooms, gridded))
        assert compare(base, tuned, tmp_path / "out", "--shown", 0, "--montage_pairs", 0) == 0
        found = report_of(tmp_path / "out")["comparisons"]["tuned"]
        assert found["details"]["high_frequency_ratio_over_laplacian_ratio"]["low"] > alarms.HIGH_OVER_LAPLACIAN
        assert found["alarms"][0].startswith("over-optimised: tuned's high-frequency share is ")
        assert not (tmp_path / "out" / "montage.png").exists()
        assert "over-optimised" in (tmp_path / "out" / "index.html").read_text()

    def test_identical_folders_show_no_difference(self, base, rooms, quick, tmp_path, capsys):
        same = folder_of(tmp_path / "same", rooms)
        assert compare(base, same, tmp_path / "out", "--shown", 0) == 0
        report = report_of(tmp_path / "out")
        found = report["comparisons"]["tuned"]
        assert found["alarms"] == []
        assert found["details"]["change"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}
        geometry = found["rewards"]["geometry"]
        assert geometry["verdict"] == "no difference shown"
        assert geometry["line"] == "no difference shown (0 [0, 0], n=4)"
        assert geometry["wins"]["mean"] == 0.5
        assert report["summary"] == "tuned against base, 4 pairs: no difference shown by geometry; no alarm."
        assert "The clips are the same." in (tmp_path / "out" / "index.html").read_text()

    def test_real_geometry_of_three_sides(self, rooms, tmp_path):
        """Warped copies are lower; stills, whose error is almost 0, are not the best of all but left out, and that is said."""
        first = folder_of(tmp_path / "first", rooms[:2])
        warped = folder_of(tmp_path / "warped", [room.warp(c, 8.0, 1)[0].frames for c in rendered()[:2]])
        still = folder_of(tmp_path / "still", [clip[[0] * 9] for clip in rooms[:2]])
        out = tmp_path / "out"
        assert compare(first, warped, out, "--more", f"still={still}", "--names", "first", "warped", "--shown", 1,
                       "--backend", "auto") == 0  # fmt: skip
        found = report_of(out)["comparisons"]
        assert found["warped"]["rewards"]["geometry"]["verdict"] == "lower"
        assert found["warped"]["rewards"]["geometry"]["line"].startswith("warped is lower (-")
        geometry, said = found["still"]["rewards"]["geometry"], found["still"]["alarms"]
        assert geometry["undetermined"] == [0, 2]
        assert geometry["left_out"] == {"undetermined": 2}
        assert geometry["line"] == "no pair has a score on both sides"
        assert report_of(out)["clips"]["sub/clip0"]["sides"]["still"]["scores"] == {}
        assert any("geometry cannot judge 2 clips of still, against 0 of first" in a for a in said)
        assert any("still moves less" in a for a in said)
        tree = Page((out / "index.html").read_text())
        assert tree.labels == ["first", "warped", "still"]
        assert "lower by geometry" in tree.summary

    def test_bright_copies_are_over_exposed(self, base, rooms, quick, tmp_path):
        bright = folder_of(tmp_path / "bright", edited(rooms, lambda c, _: 1.6 * c + 90))
        assert compare(base, bright, tmp_path / "out", "--shown", 0) == 0
        said = " ".join(report_of(tmp_path / "out")["comparisons"]["tuned"]["alarms"])
        assert "over-exposed" in said
        assert "brightness shifted by 0." in said

    def test_what_cannot_be_compared_is_left_out_with_its_reason(self, base, rooms, quick, tmp_path, capsys):
        tuned = folder_of(tmp_path / "tuned", rooms)
        (tuned / "sub" / "clip0.mkv").write_bytes(b"no video")
        write_clip(tuned / "sub" / "clip1.mkv", rooms[1][:, :64].numpy())
        write_clip(tuned / "sub" / "clip2.mkv", rooms[2][:7].numpy())
        write_clip(tuned / "extra.mkv", rooms[0].numpy())
        assert compare(base, tuned, tmp_path / "out", "--shown", 0) == 0
        left = report_of(tmp_path / "out")["left_out"]
        assert left["pairs"].keys() == {"sub/clip0", "sub/clip1", "sub/clip2"}
        assert "clip0.mkv" in left["pairs"]["sub/clip0"]
        assert "damaged or not a video" in left["pairs"]["sub/clip0"]
        assert left["pairs"]["sub/clip1"] == "sub/clip1: different sizes, 160x96 against 160x64"
        assert left["pairs"]["sub/clip2"].startswith("sub/clip2: different lengths, 9 against 7 frames; --frames")
        assert left["unmatched"] == {"tuned": ["extra"]}
        said = capsys.readouterr().out
        assert "1 pairs compared, 3 left out" in said
        assert "1 clips are only in tuned: extra" in said
        # One pair has no interval, and nothing is claimed from it.
        assert report_of(tmp_path / "out")["comparisons"]["tuned"]["rewards"]["geometry"]["verdict"] == "too few pairs"
        (tuned / "sub" / "clip3.mkv").unlink()
        assert compare(base, tuned, tmp_path / "out", "--shown", 0) == 1
        assert "none of the 3 pairs can be compared; the first:" in capsys.readouterr().out
        # The first five frames of both are of equal length.
        assert compare(base, tuned, tmp_path / "out", "--shown", 0, "--frames", 5) == 0

    def test_other_frame_rates_are_said(self, base, rooms, quick, tmp_path):
        fast = folder_of(tmp_path / "fast", rooms, fps=24)
        assert compare(base, fast, tmp_path / "out", "--shown", 0) == 0
        assert "(16 against 24 frames per second)" in report_of(tmp_path / "out")["notes"][0]

    def test_a_second_run_scores_nothing_again(self, base, rooms, quick, tmp_path, monkeypatch):
        tuned = folder_of(tmp_path / "tuned", edited(rooms, blurred))
        out = tmp_path / "out"
        assert compare(base, tuned, out, "--shown", 1) == 0
        first, scores = report_of(out), sorted((out / "clips.jsonl").read_text().splitlines())
        monkeypatch.setattr(detail, "figures", lambda frames: pytest.fail("measured again"))
        assert compare(base, tuned, out, "--shown", 2) == 0
        assert sorted((out / "clips.jsonl").read_text().splitlines()) == scores
        assert report_of(out)["comparisons"] == first["comparisons"]
        assert len(list((out / "side_by_side").iterdir())) == 2
        assert len(quick) == 8
        with pytest.raises(pytest.fail.Exception):
            compare(base, tuned, out, "--overwrite")
        # A file that changed is measured again.
        os.utime(tuned / "sub" / "clip1.mkv", ns=(1, 1))
        with pytest.raises(pytest.fail.Exception):
            compare(base, tuned, out)


def test_a_killed_run_goes_on(tmp_path):
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        for i in range(4):
            write_clip(tmp_path / side / f"{i}.mkv", moving(9, 96, 160, seed=i))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainers.compare", "--a", tmp_path / "a", "--b", tmp_path / "b", "--output", out]
    process = subprocess.Popen(
        list(map(str, [*command, *COMMON])), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    try:
        log, until = out / "clips.jsonl", time.monotonic() + 60
        while not (log.is_file() and log.stat().st_size) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = log.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1].splitlines()
    assert 1 <= len(kept) < 16
    assert not (out / "comparison.json").exists()
    assert compare(tmp_path / "a", tmp_path / "b", out) == 0
    assert set(kept) <= set(log.read_bytes().splitlines())
    assert len(lines(log)) == 16


class Page(HTMLParser):
    """The labels of the clips and the summary of a page."""

    def __init__(self, text):
        super().__init__()
        self.labels, self.summary, self.inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "video":
            self.labels.append(found["aria-label"])
            assert found["src"].startswith("data:video/")
        self.inside = found.get("class") == "summary"

    def handle_data(self, data):
        if self.inside:
            self.summary += data


@pytest.fixture
def models(tmp_path):
    """A tiny backbone, a head on it, and a manifold of noise."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    WanTransformer3DModel(**(CONFIG | {"text_dim": 256})).save_pretrained(tmp_path / "dit")
    dit = wan_dit.load(tmp_path / "dit", 1)
    head = PrismHead(HeadConfig(dit.backbone.width, dim=32, heads=4, layers=2, taps=(1,), dimensions=("look",)))
    files.save(files.LoadedHead(head, dit.backbone, WAN21, (0.0, 1.0)), tmp_path / "head.safetensors")
    anchors = Anchors(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)), torch.ones(16, 16))
    save(ShellManifold(anchors, WAN21), tmp_path / "shell.safetensors")
    return tmp_path


def latents_of(folder, count, scale, prompts=True):
    folder.mkdir()
    for i in range(count):
        z = scale * torch.randn(16, 2, 6, 8, generator=torch.Generator().manual_seed(i))
        write_latents(folder / f"{i}.safetensors", {"z": z}, WAN21, {"z": {}})
        if prompts:
            (folder / f"{i}.txt").write_text(f"a room with {i} balls\n")
    return folder


class TestLatents:
    def test_every_reward_by_what_was_given(self, models, vae_file, tmp_path):  # noqa: F811
        a, b = latents_of(tmp_path / "a", 3, 1.0), latents_of(tmp_path / "b", 3, 2.5)
        out = tmp_path / "out"
        more = ["--manifold", models / "shell.safetensors", "--head", models / "head.safetensors", "--backbone",
                models / "dit", "--text_encoder", TEXT, "--draws", 1, "--vae", vae_file, "--frames", 5]  # fmt: skip
        assert compare(a, b, out, *more) == 0
        report = report_of(out)
        found = report["comparisons"]["tuned"]["rewards"]
        assert set(found) == set(SCORERS)
        assert report["left_out"]["rewards"] == {}
        assert found["shell_lcc"]["verdict"] == "lower"
        assert {name: d["difference"]["n"] for name, d in found.items() if name != "geometry"} == {
            "flow_residual": 3, "prompt_gap": 3, "prism": 3, "shell_lcc": 3,
        }  # fmt: skip
        assert "With 5 rewards and no real difference, one or more shows one in about 23 %" in (out / "index.html").read_text()
        assert report["clips"]["0"]["prompt"] == "a room with 0 balls"
        assert report["comparisons"]["tuned"]["details"] is not None

    def test_without_a_vae_there_are_rewards_and_no_pictures(self, models, tmp_path, capsys):
        a, b = latents_of(tmp_path / "a", 3, 1.0, False), latents_of(tmp_path / "b", 3, 1.0, False)
        out = tmp_path / "out"
        assert compare(a, b, out) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: nothing can be compared: geometry: ")
        assert "give --vae to decode them" in said
        more = ("--manifold", models / "shell.safetensors", "--backbone", models / "dit", "--text_encoder", TEXT)
        assert compare(a, b, out, *more) == 0
        report = report_of(out)
        assert list(report["comparisons"]["tuned"]["rewards"]) == ["shell_lcc"]
        assert report["comparisons"]["tuned"]["details"] is None
        assert report["left_out"]["rewards"]["flow_residual"].startswith("no prompt is known: put NAME.txt")
        assert not (out / "montage.png").exists()
        write_latents(b / "1.safetensors", {"z": torch.zeros(16, 3, 6, 8)}, WAN21, {"z": {}})
        assert compare(a, b, out, *more) == 0
        assert report_of(out)["left_out"]["pairs"]["1"].startswith("1: different lengths, 2 against 3 frames")

    def test_a_reward_that_fails_on_every_clip_stops_only_when_it_was_asked_for(self, models, tmp_path, monkeypatch, capsys):
        a, b = latents_of(tmp_path / "a", 2, 1.0), latents_of(tmp_path / "b", 2, 1.0)
        broken = models / "shell.safetensors"

        def fails(shell, z):
            raise ValueError("does not work")

        monkeypatch.setattr(shell_lcc, "distance_to_shell", fails)
        more = ("--manifold", broken, "--backbone", models / "dit", "--text_encoder", TEXT, "--draws", 1)
        assert compare(a, b, tmp_path / "out", *more, "--by", "shell_lcc") == 2
        assert "none of 4 clips could be scored; the first: base/0: does not work" in capsys.readouterr().err
        assert compare(a, b, tmp_path / "out", *more) == 0
        assert "none of 4 clips" in report_of(tmp_path / "out")["left_out"]["rewards"]["shell_lcc"]


class TestSides:
    def touch(self, folder, *names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        return folder

    def test_folders_by_name(self, tmp_path):
        a = self.touch(tmp_path / "a", "x/1.mp4", "x/1.safetensors", "2.mp4", ".3.mp4", "notes.md")
        b = self.touch(tmp_path / "b", "x/1.webm", "4.mp4")
        (a / "x" / "prompt.txt").write_text("\ufeffa fox\n in snow", encoding="utf-8")
        found = sides.read({"base": a, "tuned": b})
        (group,) = found.groups
        assert (group.name, group.prompt, found.by) == ("x/1", "a fox in snow", "name")
        assert [c.name for c in group.candidates] == ["base/x/1", "tuned/x/1"]
        assert group.candidates[0].latents == a / "x" / "1.safetensors"
        assert found.unmatched == {"base": ["2"], "tuned": ["4"]}

    def test_a_clips_own_prompt_comes_first_and_must_agree(self, tmp_path):
        a, b = self.touch(tmp_path / "a", "1.mp4"), self.touch(tmp_path / "b", "1.mp4")
        (a / "1.txt").write_text("a fox")
        (a / "prompt.txt").write_text("all")
        assert sides.read({"a": a, "b": b}).groups[0].prompt == "a fox"
        (b / "1.txt").write_text("a hare")
        with pytest.raises(sides.SideError, match="'1' has different prompts in the folders .*a fox.*a hare"):
            sides.read({"a": a, "b": b})

    def test_jsonl_by_prompt_and_seed(self, tmp_path):
        def table(name, *rows):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
            return path

        a = table("a", {"file": "a/x.mp4", "prompt": "p", "seed": 1}, {"file": "a/y.latent", "prompt": "p", "seed": 2})
        b = table("b", {"file": "b/k.mp4", "prompt": "p", "seed": 2}, {"file": "b/l.mp4", "prompt": "q", "seed": 1})
        found = sides.read({"a": a, "b": b})
        (group,) = found.groups
        assert (group.name, group.prompt, found.by) == ("a/y", "p", "prompt and seed")
        assert [c.path for c in group.candidates] == [tmp_path / "a" / "y.latent", tmp_path / "b" / "k.mp4"]
        assert [c.seed for c in group.candidates] == [2, 2]
        twice = table("c", {"file": "a.mp4", "prompt": "p", "seed": 1}, {"file": "b.mp4", "prompt": "p", "seed": 1})
        with pytest.raises(sides.SideError, match="c.jsonl: two clips of seed 1 and the prompt 'p'"):
            sides.read({"a": a, "c": twice})
        for row, message in (
            ({"file": "x.txt"}, 'line 1: expected an object with "file", a video or latents'),
            ({"prompt": "x"}, 'line 1: expected an object with "file"'),
            ({"file": "x.mp4", "seed": "1"}, '"seed" a whole number'),
        ):
            with pytest.raises(sides.SideError, match=message):
                sides.read({"a": a, "d": table("d", row)})
        (tmp_path / "e.jsonl").write_text("{")
        with pytest.raises(sides.SideError, match="e.jsonl, line 1: not JSON"):
            sides.read({"a": a, "e": tmp_path / "e.jsonl"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--a", "absent"), "absent: no such folder of clips, nor a .jsonl file"),
        (("--a", "absent.jsonl"), "absent.jsonl: no such file of clips"),
        (("--b", "empty"), "empty: no clips in this folder"),
        (("--b", "other"), "no clip has the same name in all of the folders"),
        (("--b", "a"), "a: is given twice as a side"),
        (("--names", "x", "x"), "--names x x: expected two different names"),
        (("--names", "x/y", "z"), "must not contain '/'"),
        (("--more", "b"), "--more b: expected NAME=DIR"),
        (("--more", "base=empty"), "--more base=empty: expected NAME=DIR with a name that no other side has"),
        (("--output", "a/out"), "--output a/out: lies in a, whose clips are compared; give a folder outside it"),
        (("--by", "prism"), "--by prism needs --head and --backbone"),
        (("--by", "shell_lcc", "--manifold", "m"), "a video; --by shell_lcc reads latents, so give --vae"),
        (("--by", "flow_residual", "--backbone", "m", "--texts", "t", "--vae", "v"), "no prompt is known"),
        (("--frames", "4"), "--frames 4 is not 4n+1"),
        (("--shown", "-1"), "--shown and --montage_pairs must be 0 or more"),
    ],
)
def test_bad_inputs_in_one_sentence(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.mp4", "b/1.mp4", "other/2.mp4", "empty/readme.md"):
        Path(name).parent.mkdir()
        Path(name).write_bytes(b"")
    assert cli.main([*map(str, ("--a", "a", "--b", "b", "--output", "out", *COMMON)), *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not Path("out").exists()


def test_ctrl_c_and_a_full_memory_have_exit_codes(base, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "measure", stopped)
    assert compare(base, ROOT / "absent", tmp_path / "out") == 2
    (tmp_path / "b").mkdir()
    write_clip(tmp_path / "b" / "clip.mkv", moving(5))
    (tmp_path / "a").mkdir()
    write_clip(tmp_path / "a" / "clip.mkv", moving(5))
    assert compare(tmp_path / "a", tmp_path / "b", tmp_path / "out") == 130
    assert "interrupted: run the same command again to go on" in capsys.readouterr().err


class TestDifferences:
    def groups(self, count):
        return [
            Group(f"g{i}", "", [Candidate(f"{s}/g{i}", Path("x.mp4"), None) for s in ("a", "b")]) for i in range(count)
        ]

    def scores(self, a, b, records=None):
        every = {f"{s}/g{i}": v for s, side in (("a", a), ("b", b)) for i, v in enumerate(side)}
        values = {name: v for name, v in every.items() if v is not None}
        missing = {name: "undetermined: still" for name, v in every.items() if v is None}
        return Scores({"geometry": values}, {"geometry": missing}, records or {})

    def test_pairs_that_one_side_lacks_do_not_count(self):
        scores = self.scores([0.0, 1.0, 2.0, None, 4.0], [0.5, 1.75, 2.5, 9.0, None])
        found = differences.of_reward("geometry", self.groups(5), 1, scores)
        assert found.each == {"g0": 0.5, "g1": 0.75, "g2": 0.5}
        assert found.change.mean == pytest.approx(7 / 12)
        assert (found.verdict, found.undetermined, found.left_out) == ("higher", (1, 1), {"undetermined": 2})
        assert found.line("lora").startswith("lora is higher (+0.583 [")
        assert found.wins.mean == 1.0

    def test_noise_is_no_difference(self):
        found = differences.of_reward("geometry", self.groups(4), 1, self.scores([0.0] * 4, [1.0, -1.0, 0.5, 0.0]))
        assert found.verdict == "no difference shown"
        assert found.wins.mean == (2 + 0.5) / 4

    def test_values_that_are_not_finite_are_left_out(self):
        scores = self.scores([0.0, 0.0, 0.0], [1.0, math.nan, 1.0])
        assert differences.of_reward("geometry", self.groups(3), 1, scores).left_out == {"not finite": 1}

    def test_motion_is_a_ratio_of_records(self):
        def record(motion):
            return GeometryRecord(TRACKS, VERSIONS[TRACKS], 0.5, CONSISTENT, "", {"motion": motion}, 9, [0], [0.0])

        records = {"a/g0": record(2.0), "b/g0": record(1.0), "a/g1": record(4.0), "b/g1": record(2.0), "a/g2": record(1.0)}
        records["b/g2"] = replace(record(math.nan), verdict=UNDETERMINED)
        found = differences.of_motion(self.groups(3), 1, self.scores([], [], records))
        assert (found.mean, found.n) == (pytest.approx(0.5), 2)

    def test_alarms_need_the_interval_past_the_limit(self):
        groups = self.groups(3)
        plain = dict.fromkeys(detail.FIGURES, 1.0)

        def raised(*laplacian):
            found = pictures.Pictures(groups)
            for g, v in zip(groups, laplacian, strict=True):
                a, b = g.candidates
                found.figures |= {a.name: plain | {"laplacian": 100.0}, b.name: plain | {"laplacian": v}}
            return alarms.of_details(differences.of_details(groups, 1, found), Interval(1.0, 1.0, 1.0, 0), "lora", "base")

        assert raised(99.0, 100.0, 101.0) == []
        assert raised(20.0, 100.0, 101.0) == []
        (said,) = raised(40.0, 50.0, 45.0)
        assert "lora has lost fine detail" in said
        (said,) = raised(240.0, 250.0, 245.0)
        assert "far more fine detail" in said

    def test_frames_that_differ_less_are_no_alarm_where_the_tracks_move_as_before(self):
        groups, plain = self.groups(3), dict.fromkeys(detail.FIGURES, 1.0)
        found = pictures.Pictures(groups)
        for g in groups:
            a, b = g.candidates
            found.figures |= {a.name: plain | {"dynamics": 4.0}, b.name: plain | {"dynamics": 2.0}}
        details = differences.of_details(groups, 1, found)
        for motion, alarm in (
            (Interval(math.nan, math.nan, math.nan, 0), "lora moves less, and a still clip raises many rewards: mean frame"),
            (Interval(1.0, 0.9, 1.1, 3), None),
            (Interval(0.5, 0.4, 0.6, 3), "lora moves less, and a still clip raises many rewards: motion of point tracks"),
        ):
            said = alarms.of_details(details, motion, "lora", "base")
            assert len(said) == (alarm is not None)
            assert all(text.startswith(alarm) for text in said)

    def test_the_summary_names_every_outcome(self):
        groups = self.groups(3)
        up = differences.of_reward("geometry", groups, 1, self.scores([0.0] * 3, [1.0, 1.1, 0.9]))
        unsure = replace(up, reward="prism", change=replace(up.change, low=-1.0))
        results = [html_page.Result("x", [up, unsure], None, up.base)]
        results += [html_page.Result("y", [], None, up.base, ["one", "two"])]
        assert html_page.summary("base", results, 3) == (
            "x against base, 3 pairs: higher by geometry; no difference shown by prism; no alarm. "
            "y against base, 3 pairs: no reward could be measured; 2 alarms."
        )


class TestFigures:
    def test_of_known_pictures(self):
        frames = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
        frames[..., 0] = 255
        found = detail.figures(frames)
        assert found["saturation"] == pytest.approx(1.0)
        assert found["brightness"] == pytest.approx(0.299, abs=1e-4)
        assert (found["laplacian"], found["dynamics"], found["exposed"]) == (0.0, 0.0, 0.0)
        frames = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
        frames[1] = 255
        found = detail.figures(frames)
        assert found["dynamics"] == pytest.approx(255, abs=0.1)
        assert found["exposed"] == pytest.approx(1 / 3)
        checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2
        frames = (255 * checks)[None, ..., None].expand(1, -1, -1, 3).to(torch.uint8)
        found = detail.figures(frames)
        assert found["high_frequency"] == pytest.approx(1.0)
        assert found["laplacian"] == pytest.approx((4 * 255) ** 2, rel=1e-3)
        assert found["contrast"] == pytest.approx(0.5, abs=0.01)
        with pytest.raises(ValueError, match="a clip of 2x16 pixels is too small"):
            detail.figures(frames[:, :, :2])

    def test_change(self):
        a = torch.from_numpy(np.stack(moving(3)))
        assert detail.relative_change(a, a) == 0
        shuffled = a.flatten(1, 2)[:, torch.randperm(48 * 64, generator=torch.Generator().manual_seed(0))].view(a.shape)
        assert detail.relative_change(shuffled, a) == pytest.approx(2**0.5, abs=0.05)
        assert detail.relative_change(a + 0, torch.zeros_like(a)) > 10


def test_shown_pairs_are_spread():
    names = list(range(10))
    assert shown.spread(names, 3) == [1, 5, 8]
    assert shown.spread(names, 20) == names
    assert shown.spread(names, 0) == []
    assert shown.file_name("a/b c:d") == "a__b_c_d"
