"""`python -m trainers.pairs build`: groups to winners and losers, each filter's reason, and the way into the trainers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainers.latents.read import read_clip
from trainers.running.identity import digest_of
from trainers.scorers import geometry_files
from trainers.scorers.geometry import usable_records, value_of
from trainers.scorers.geometry_files import GeometrySettings
from trainers.scorers.scores import Scores

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from PIL import Image

from benchmarks.geometry import room
from benchmarks.toy_world import weights
from trainers.kernels.files import atomic, preference_records
from trainers.kernels.files import header as formats
from trainers.kernels.files.latents import write_latents
from trainers.kernels.geometry import tracks
from trainers.kernels.geometry.record import CONSISTENT, DENSE, INCONSISTENT, TRACKS, UNDETERMINED, VERSIONS, GeometryRecord
from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism import files
from trainers.kernels.prism.head import HeadConfig, PrismHead
from trainers.kernels.shell_lcc import evaluation
from trainers.kernels.shell_lcc.anchors import Anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold, save
from trainers.kernels.shell_lcc.manifold import load as load_manifold
from trainers.kernels.video.sizes import BUCKETS
from trainers.pairs import cli as pairs
from trainers.pairs import filters, ranking
from trainers.pairs.choose import choose
from trainers.pairs.filters import Limits
from trainers.pairs.ranking import Ranked
from trainers.preferences import clips, groups, manifest, tables
from trainers.preferences.groups import Candidate, Group, GroupError
from trainers.prism import cli as prism
from trainers.prism import data as prism_data
from trainers.prism import train_loop as prism_train
from trainers.prism.accuracy_by_sigma import differences
from trainers.wan import dit as wan_dit
from trainers.wan import vae as wan_vae

from .preference_material import append_record
from .test_encode import vae_file  # noqa: F401 (a fixture)
from .test_wan_dit import CONFIG
from .video_clips import moving, write_clip

ROOT = Path(__file__).resolve().parents[1]
TEXT = weights.FOLDER / weights.TEXT


def record(error, verdict=CONSISTENT, motion=1.0, parallax=5.0, lost=0.0, scorer=TRACKS, moving=0.0):
    measured = {"error": error, "motion": motion, "parallax": parallax, "lost": lost, "moving": moving}
    score = 0.0 if verdict == UNDETERMINED else 0.2 / (0.2 + error)
    return GeometryRecord(scorer, VERSIONS[scorer], score, verdict, "why", measured, 9, [0, 4], [error, error])


def build(groups, output, *more):
    argv = ["build", "--groups", groups, "--output", output, "--jobs", 1, "--backend", "torch", "--device", "cpu", *more]
    return pairs.main([str(a) for a in argv])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestRanking:
    def test_scores_are_standardised_within_their_group(self):
        found = ranking.standardise([1.0, 2.0, 6.0])
        assert sum(found) == pytest.approx(0)
        assert sum(v * v for v in found) == pytest.approx(3)
        assert ranking.standardise([0.1 + 0.2, 0.3]) == [0.0, 0.0]
        assert ranking.standardise([0.0, 0.0]) == [0.0, 0.0]

    def test_weights_are_shares_and_units_do_not_matter(self):
        scores = {"g": {"x": 1.0, "y": 2.0, "z": 3.0}, "p": {"x": 500.0, "y": 0.0, "z": 100.0}}
        found = ranking.combine(scores, {"g": 1.0, "p": 0.5})
        g, p = (ranking.standardise(list(scores[k].values())) for k in "gp")
        assert list(found.values()) == pytest.approx([(a + 0.5 * b) / 1.5 for a, b in zip(g, p, strict=True)])
        flipped = ranking.combine({"p": scores["p"]}, {"p": -2.0})
        assert min(flipped, key=flipped.get) == "x"

    def test_pairs_that_differ_most_come_first_and_ties_are_none(self):
        found = ranking.pairs({"a": 0.0, "b": 1.0, "c": -1.0, "d": 1.0})
        assert [(r.winner, r.loser) for r in found] == [("b", "c"), ("d", "c"), ("a", "c"), ("b", "a"), ("d", "a")]
        assert [r.margin for r in found] == [2, 2, 1, 1, 1]


class TestFilters:
    @pytest.mark.parametrize(
        ("found", "name", "reason"),
        [
            (record(0.1, UNDETERMINED), "gate", "undetermined: why"),
            (record(0.1, lost=0.21), "lost tracks", "21% of tracks lost, at most 20%"),
            (record(0.1, lost=0.2), None, None),
            (record(0.9, INCONSISTENT), None, None),
            (record(0.1, moving=0.9), None, None),
        ],
    )
    def test_clips(self, found, name, reason):
        why = filters.of_candidate(found, Limits())
        assert why == (name and (name, reason))

    @pytest.mark.parametrize(
        ("winner", "loser", "name"),
        [
            (record(0.1), record(0.2), None),
            (record(0.1, motion=0.5), record(0.2), None),
            (record(0.1, motion=0.49), record(0.2), "matched motion"),
            (record(0.1, motion=2.01), record(0.2), "matched motion"),
            (record(0.1, motion=0.0), record(0.2, motion=0.0), None),
            (record(0.1, parallax=3.5), record(0.2), None),
            (record(0.1, parallax=3.4), record(0.2), "parallax"),
            (record(0.1, parallax=3.4), record(0.2, moving=0.6), None),
            (record(0.08), record(0.1), None),
            (record(0.0801), record(0.1), "relative gap"),
            (record(0.3), record(0.1), "relative gap"),
            (record(0.3, INCONSISTENT), record(0.9), "winner's error"),
        ],
    )
    def test_pairs(self, winner, loser, name):
        why = filters.of_pair(winner, loser, Limits())
        assert (why and why.filter) == name

    def test_clips_in_which_much_moves_by_itself_can_be_left_out(self):
        few = Limits(moving=0.1)
        assert filters.of_candidate(record(0.1, moving=0.1), few) is None
        why = filters.of_candidate(record(0.1, moving=0.3), few)
        assert why == ("moving", "30% of the tracks move by themselves, at most 10%")

    def test_each_can_be_switched_off(self):
        off = Limits(False, (0.0, float("inf")), 0.0, 0.0, float("inf"), 1.0)
        worst = record(0.3, UNDETERMINED, motion=0.01, parallax=0.1, lost=0.99)
        assert filters.of_candidate(worst, off) is None
        assert filters.of_pair(worst, record(0.2), off) is None
        assert filters.of_pair(record(0.3), record(0.5), Limits(max_error=0.29)).reason.endswith("is 0.3, at most 0.29")

    def test_dense_records_have_no_tracks_and_move_by_translation(self):
        def dense(translation):
            return replace(record(0.1, scorer=DENSE), measurements={"error": 0.1, "translation": translation})

        assert filters.of_candidate(dense(0.1), Limits()) is None
        assert (
            filters.of_pair(dense(0.1), replace(dense(0.1), measurements={"error": 1.0, "translation": 0.1}), Limits())
            is None
        )
        assert filters.of_pair(dense(0.5), dense(0.1), Limits()).filter == "matched motion"


def chosen(records, limits=Limits(), most=1):  # noqa: B008 (frozen)
    group = Group("g", "p", [Candidate(name, Path(name), None) for name in records])
    values = {n: value_of(r) for n, r in records.items()}
    skipped = {n: "undetermined: why" for n, v in values.items() if v is None}
    scores = Scores({"geometry": {n: v for n, v in values.items() if v is not None}}, {"geometry": skipped}, dict(records))
    return choose(group, scores, {"geometry": 1.0}, limits, most)


class TestChoice:
    def test_the_next_best_pair_is_taken_where_the_best_is_refused(self):
        """The worst clip moves too fast; the still one cannot be judged."""
        records = {"best": record(0.05), "good": record(0.1), "bad": record(0.4, INCONSISTENT),
                   "worst": record(0.9, INCONSISTENT, motion=9.0), "still": record(0.001, UNDETERMINED)}  # fmt: skip
        found = chosen(records)
        assert [(r.winner, r.loser) for r in found.taken] == [("best", "bad")]
        assert [(r.winner, r.loser, why.filter) for r, why in found.tried] == [
            ("best", "worst", "matched motion"),
            ("good", "worst", "matched motion"),
        ]
        assert found.rejected["still"].filter == "gate"
        assert found.reason is None
        assert [(r.winner, r.loser) for r in chosen(records, most=3).taken] == [
            ("best", "bad"),
            ("good", "bad"),
            ("best", "good"),
        ]

    def test_why_a_group_gives_no_pair(self):
        assert chosen({"a": record(0.1)}).reason.filter == "too few candidates"
        assert chosen({"a": record(0.1), "b": record(0.1)}).reason.filter == "ties"
        assert chosen({"a": record(0.1), "b": record(0.11)}).reason.filter == "relative gap"
        assert chosen({"a": record(0.5, INCONSISTENT), "b": record(0.9, INCONSISTENT)}).reason.filter == "winner's error"
        nothing = replace(record(0.1, UNDETERMINED), measurements={})
        found = chosen({"a": nothing, "b": record(0.1)}, Limits(gate=False))
        assert found.rejected["a"] == ("no geometry score", "undetermined: why")


def latents(count=2, seed=0, shape=(16, 3, 6, 8)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def records(tmp_path):
    """Four records of three candidates: a plain one, one whose best is undetermined, one without a gap, one preferred."""
    folder = tmp_path / "records"
    rows = [
        ("a red ball", [record(0.5, INCONSISTENT), record(0.05), record(0.1)], None),
        ("a blue cube", [record(0.01, UNDETERMINED), record(0.3, INCONSISTENT), record(0.1)], None),
        ("a green cone", [record(0.1), record(0.11), record(0.1)], None),
        ("a red cone", [record(0.15), record(0.05), record(0.3, INCONSISTENT)], (2, 0)),
    ]
    for i, (prompt, geometry, preference) in enumerate(rows):
        append_record(
            folder, prompt, latents(3, i), WAN21, model="wan", seeds=[10 * i, 10 * i + 1, None],
            scores={"look": [0.1, 0.2, 0.9]}, geometry=geometry, preference=preference,
        )  # fmt: skip
    return folder


def test_records_become_a_manifest(records, tmp_path, capsys):
    out = tmp_path / "out"
    assert build(records, out) == 0
    said = capsys.readouterr().out
    assert "3 of 4 groups gave 3 pairs" in said
    assert "left out: " in said
    assert not (out / "contact_sheet.png").exists()
    rows = lines(out / "pairs.jsonl")
    assert [(r["prompt"], r["a"][-7:-12:-1], r["seed_a"], r["seed_b"]) for r in rows] == [
        (p, rows[i]["a"][-7:-12:-1], *seeds)
        for i, (p, seeds) in enumerate((("a red ball", (1, 0)), ("a blue cube", (None, 11)), ("a red cone", (31, None))))
    ]
    assert all(r["preference"] == "a" and r["a"].startswith("../records/latents/") for r in rows)
    assert rows[0]["gap"] == pytest.approx(0.9)
    groups = lines(out / "groups.jsonl")
    assert [g["rejected"] and g["rejected"]["filter"] for g in groups] == [None, None, "relative gap", None]
    undetermined = groups[1]["candidates"][0]
    assert undetermined["rejected"] == {"filter": "gate", "reason": "undetermined: why"}
    assert (undetermined["motion"], undetermined["seed"]) == (1.0, 10)
    report = json.loads((out / "report.json").read_text())
    assert report["groups"] == {"all": 4, "with a pair": 3, "reasons": {"relative gap": 1}}
    assert report["candidates"] == {"all": 12, "reasons": {"gate": 1}}
    assert report["agreement"] == {"geometry": 1.0}
    assert report["quantiles"]["gap"] == pytest.approx([2 / 3, 0.75, 5 / 6, 13 / 15, 0.9])


def test_a_weighted_combination_and_each_scorers_own_preference(records, tmp_path, capsys):
    out = tmp_path / "out"
    off = ("--min_gap", 0, "--max_error", "inf", "--min_parallax_ratio", 0)
    assert build(records, out, "--by", "geometry=1", "stored:look=3", "--per_scorer", *off) == 0
    rows = lines(out / "pairs.jsonl")
    assert rows[0]["preference"] == {"overall": "a", "geometry": "a", "stored:look": "a"}
    assert [r["seed_a"] for r in rows] == [None] * 4
    assert rows[3]["preference"] == {"overall": "a", "geometry": "b", "stored:look": "a"}
    assert json.loads((out / "report.json").read_text())["agreement"]["stored:look"] == 1.0
    assert build(records, out, "--by", "stored:look=-1", *off) == 0
    assert [r["seed_b"] for r in lines(out / "pairs.jsonl")] == [None] * 4
    assert build(records, out, "--by", "stored:beauty") == 2
    assert "no candidate has a stored score 'beauty'; stored scores: look" in capsys.readouterr().err


def test_the_manifest_is_what_the_trainers_read(records, tmp_path):
    out = tmp_path / "out"
    assert build(records, out) == 0
    read = tables.read(out / "pairs.jsonl")
    assert [p.outcome for p in read] == [{"overall": 1}] * 3
    assert tables.with_files(read, "manifest", tables.TableNotes()) == read
    found = manifest.read(out / "pairs.jsonl")
    originals = {r.prompt: r for r in preference_records.read(records)}
    assert [(p.prompt, p.winner.resolve(), p.loser.resolve()) for p in found] == [
        (prompt, originals[prompt].candidates[w].latent.resolve(), originals[prompt].candidates[l].latent.resolve())
        for prompt, w, l in (("a red ball", 1, 0), ("a blue cube", 2, 1), ("a red cone", 1, 2))
    ]
    assert found[0].scores["winner"]["geometry"] > found[0].scores["loser"]["geometry"]
    argv = ["cache", "--pairs", out / "pairs.jsonl", "--output", tmp_path / "data", "--text_encoder", TEXT, "--device", "cpu",
            "--latent_dtype", "float32"]  # fmt: skip
    assert prism.main([str(a) for a in argv]) == 0
    data = prism_data.load(tmp_path / "data")
    assert [r.outcome for r in data.rows] == [{"overall": 1}] * 3
    assert torch.equal(data.state(data.rows[0].a, None), latents(3, 0)[1])
    assert torch.equal(data.state(data.rows[0].b, None), latents(3, 0)[0])


def test_pairs_and_comparisons_never_replace_each_other(records, tmp_path, capsys):
    """`pairs build` and `prism cache` write into one folder only by mistake; each refuses the other's."""
    out, data = tmp_path / "out", tmp_path / "data"
    assert build(records, out) == 0
    before = (out / "pairs.jsonl").read_bytes()

    def cache(output, *more):
        argv = ["cache", "--pairs", out / "pairs.jsonl", "--output", output, "--text_encoder", TEXT, "--device", "cpu", *more]
        return prism.main([str(a) for a in argv])

    for more in ((), ("--overwrite",)):
        assert cache(out, *more) == 2
        assert f"{out / 'pairs.jsonl'}: a manifest of `python -m trainers.pairs build`; encode" in capsys.readouterr().err
    assert prism.main(["label", "--data", str(out), "--scores", str(tmp_path / "none.jsonl")]) == 2
    assert "a manifest of `python -m trainers.pairs build`" in capsys.readouterr().err
    assert (out / "pairs.jsonl").read_bytes() == before
    assert cache(data) == 0
    rows = prism_data.load(data).rows
    for name in ("comparisons.jsonl", "pairs.jsonl"):
        # The second is the name that earlier versions gave to the same file.
        (data / "comparisons.jsonl").rename(data / name)
        assert prism_data.load(data).rows == rows
        capsys.readouterr()
        assert build(records, data) == 2
        said = capsys.readouterr().err
        assert f"{data / name}: comparisons of runs, written by `python -m trainers.prism`; give another" in said
        if name == "pairs.jsonl":
            # A new version of the folder leaves no file of the earlier name that could be read instead.
            prism_data.write_rows(data, rows[:1])
            assert not (data / "pairs.jsonl").exists()
            assert prism_data.load(data).rows == rows[:1]


def test_runs_that_are_not_compared_yet_are_not_mixed_with_pairs(records, tmp_path, capsys):
    """`collect` writes latents first; a manifest in their folder would stop `label`."""
    out, runs = tmp_path / "out", tmp_path / "runs"
    runs.mkdir()
    shard = runs / "latents-0.safetensors"
    write_latents(shard, {"r": latents(1)[0]}, WAN21, {"r": {"run": "r", "prompt": "p", "sigma": None}})
    assert build(records, runs) == 2
    assert f"{shard}: latents of runs, written by `python -m trainers.prism`; give another" in capsys.readouterr().err
    assert [p.name for p in runs.iterdir()] == [shard.name]
    assert build(records, out) == 0
    capsys.readouterr()
    before = sorted(p.name for p in out.iterdir())
    argv = ["collect", "--backbone", "none", "--texts", "none", "--output", out]
    assert prism.main([str(a) for a in argv]) == 2
    assert "a manifest of `python -m trainers.pairs build`" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == before


def test_scores_of_an_earlier_version_are_current(records):
    """Digests of settings are part of candidates.jsonl: another digest would score every clip again."""
    fixed = {"versions": {"tracks": 1, "dense": 1}, "vae": [None, "auto", False]}
    assert digest_of(GeometrySettings(81, None, "auto").described() | fixed) == "3cab7b37947cbc89"
    reader = clips.ClipReader(clips.ClipOptions())
    videos = [Group("g", "p", [Candidate("g/a", Path("a.mp4"), None)])]
    assert digest_of({"manifold": "x"} | reader.described(videos)) == "de518cd87c37b90e"
    assert digest_of({"manifold": "x"} | reader.described(groups.read([records]))) == "f46eec0aa2a41ede"


def test_records_themselves_are_a_table_of_preferences(records, tmp_path):
    for table in (records, records / "records.jsonl"):
        read = tables.read(table)
        assert len(read) == 12
        assert [p.outcome for p in read[9:]] == [{"look": -1}, {"look": -1, "overall": -1}, {"look": -1}]
        assert [p.outcome for p in tables.read(table, dimensions=["overall"])] == [{"overall": -1}]
    (pair,) = manifest.read(records)
    originals = preference_records.read(records)[3].candidates
    assert (pair.winner, pair.loser) == (originals[2].latent, originals[0].latent)
    assert pair.scores == {"winner": {"look": 0.9}, "loser": {"look": 0.1}}
    assert len(manifest.read(records, dimension="look")) == 12
    argv = ["cache", "--pairs", records, "--dimensions", "overall", "--output", tmp_path / "data", "--text_encoder", TEXT,
            "--device", "cpu"]  # fmt: skip
    assert prism.main([str(a) for a in argv]) == 0
    data = prism_data.load(tmp_path / "data")
    assert sorted(data.runs) == sorted(f"latents/{p.name}" for p in (pair.winner, pair.loser))


@pytest.fixture(scope="module")
def world():
    """A rigid clip, its twin on a rubber sheet and a still, at a size at which the first two can be told apart."""
    clip = room.render(room.draw_scene(1, "arc", frames=9, width=160, height=96))
    frames = clip.frames.numpy()
    return {"rigid": frames, "warped": room.warp(clip, 8.0, 1)[0].frames.numpy(), "still": frames[[0] * 9]}


@pytest.fixture
def candidates(world, tmp_path):
    """Two groups: one that gives a pair, one of a broken file and a still."""
    for group, names in (("arc", ("rigid", "warped", "still")), ("none", ("still",))):
        (tmp_path / "groups" / group).mkdir(parents=True)
        for name in names:
            write_clip(tmp_path / "groups" / group / f"{name}.mkv", world[name])
    (tmp_path / "groups" / "none" / "broken.mkv").write_bytes(b"no video")
    (tmp_path / "groups" / "arc" / "prompt.txt").write_text("a camera on an arc\n")
    return tmp_path / "groups"


def test_videos_are_scored_by_their_geometry(candidates, world, tmp_path, vae_file, monkeypatch, capsys):  # noqa: F811
    out, mild = tmp_path / "out", ("--max_error", "inf")
    assert build(candidates, out, *mild) == 0
    (row,) = lines(out / "pairs.jsonl")
    assert (row["prompt"], row["a"], row["b"]) == ("a camera on an arc", "../groups/arc/rigid.mkv", "../groups/arc/warped.mkv")
    arc, none = lines(out / "groups.jsonl")
    assert none["rejected"] == {"filter": "too few candidates", "reason": "0 of 2 candidates are usable"}
    assert {c["candidate"]: c["rejected"] and c["rejected"]["filter"] for c in arc["candidates"] + none["candidates"]} == {
        "arc/rigid": None, "arc/still": "gate", "arc/warped": None, "none/broken": "no geometry score", "none/still": "gate",
    }  # fmt: skip
    assert "damaged or not a video" in none["candidates"][0]["rejected"]["reason"]
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (2 * 3 * 160 + 3 * 6, 96 + 3 * 14 + 2 * 6)
        shown = torch.from_numpy(np.array(sheet.crop((6, 48, 166, 144))))
    assert torch.equal(shown, torch.from_numpy(world["rigid"][0]))
    # Other filters cost no scoring, and a run without a pair leaves no manifest of an earlier one.
    before, again, plain = (out / "candidates.jsonl").read_bytes(), [], geometry_files.score_file
    monkeypatch.setattr(geometry_files, "score_file", lambda task: again.append(task.name) or plain(task))
    assert build(candidates, out, *mild, "--min_gap", 0.99) == 1
    assert not (out / "pairs.jsonl").exists()
    assert not (out / "contact_sheet.png").exists()
    assert "relative gap" in capsys.readouterr().out
    assert again == ["none/broken"]
    assert (out / "candidates.jsonl").read_bytes() == before
    assert build(candidates, out, *mild) == 0
    argv = ["cache", "--pairs", out / "pairs.jsonl", "--vae", vae_file, "--output", tmp_path / "data", "--text_encoder", TEXT,
            "--device", "cpu", "--width", 64, "--height", 48, "--frames", 9]  # fmt: skip
    assert prism.main([str(a) for a in argv]) == 0
    assert [r.outcome for r in prism_data.load(tmp_path / "data").rows] == [{"overall": 1}]


def test_a_killed_run_loses_nothing(tmp_path):
    for group in "abc":
        (tmp_path / "groups" / group).mkdir(parents=True)
        for i in range(2):
            write_clip(tmp_path / "groups" / group / f"{i}.mkv", moving(6, seed=i))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainers.pairs", "build", "--groups", str(tmp_path / "groups"), "--output", str(out),
               "--jobs", "1", "--backend", "torch"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        log, until = out / "candidates.jsonl", time.monotonic() + 60
        while not (log.is_file() and log.stat().st_size) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = log.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    scored = len(kept.splitlines())
    assert 1 <= scored < 6
    assert not (out / "groups.jsonl").exists()
    # What it might have been writing when it was killed.
    log.write_bytes(kept + b'{"candidate": "c/1", "sco')
    assert build(tmp_path / "groups", out) in (0, 1)
    assert log.read_bytes().startswith(kept)
    assert sorted(r["candidate"] for r in lines(log)) == [f"{g}/{i}" for g in "abc" for i in range(2)]
    assert len(lines(out / "groups.jsonl")) == 3


def test_a_full_disk_leaves_the_earlier_manifest(records, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert build(records, out) == 0
    before = (out / "pairs.jsonl").read_bytes()
    plain = atomic.os.replace

    def full(source, target):
        if Path(target).name == "pairs.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        plain(source, target)

    monkeypatch.setattr(atomic.os, "replace", full)
    assert build(records, out, "--pairs_per_group", 2) == 2
    assert "pairs.jsonl: No space left on device" in capsys.readouterr().err
    assert (out / "pairs.jsonl").read_bytes() == before
    assert not [p for p in out.iterdir() if "partial" in p.name]


@pytest.fixture
def models(tmp_path):
    """A tiny backbone, a head on it, and a manifold of noise."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    WanTransformer3DModel(**(CONFIG | {"text_dim": 256})).save_pretrained(tmp_path / "dit")
    dit = wan_dit.load(tmp_path / "dit", 1)
    head = PrismHead(HeadConfig(dit.backbone.width, dim=32, heads=4, layers=2, taps=(1,), dimensions=("look", "motion")))
    files.save(files.LoadedHead(head, dit.backbone, WAN21, (0.0, 1.0)), tmp_path / "head.safetensors")
    anchors = Anchors(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)), torch.ones(16, 16))
    save(ShellManifold(anchors, WAN21), tmp_path / "shell.safetensors")
    return tmp_path


def test_prism_scores_are_its_trainers_differences(records, models, tmp_path):
    """Against prism's differences on a folder made of the same records, noise level by noise level."""
    out = tmp_path / "out"
    more = ("--by", "prism", "--head", models / "head.safetensors", "--backbone", models / "dit", "--text_encoder", TEXT)
    more += ("--min_gap", 0, "--max_error", "inf", "--prism_dimensions", "motion", "--levels", 0.5, 0.2)
    assert build(records, out, *more) == 0
    values = {Path(r["candidate"]).name: r["value"] for r in lines(out / "candidates.jsonl")}
    argv = ["cache", "--pairs", records, "--dimensions", "look", "--output", tmp_path / "data", "--text_encoder", TEXT,
            "--device", "cpu", "--latent_dtype", "float32"]  # fmt: skip
    assert prism.main([str(a) for a in argv]) == 0
    data = prism_data.load(tmp_path / "data")
    loaded = files.load(models / "head.safetensors")
    scorer = prism_train.Scorer(wan_dit.load(models / "dit", 1), loaded.head)
    found = sum(differences(scorer, data, data.rows, s, 2)[:, 1] for s in (0.5, 0.2)) / 2
    expected = torch.tensor([values[Path(r.a).name] - values[Path(r.b).name] for r in data.rows])
    # The folder keeps texts in fp16.
    torch.testing.assert_close(expected, found, atol=2e-3, rtol=2e-2)
    assert found.abs().max() > 0.02
    before = (out / "candidates.jsonl").read_bytes()
    assert build(records, out, *more) == 0
    assert (out / "candidates.jsonl").read_bytes() == before


def test_the_model_itself_scores_clips_without_a_head(records, models, tmp_path, capsys):
    """Against the rewards on the same latents: noise and length are shared within a group."""
    from trainers.kernels.rewards.flow_residual import FlowResidual
    from trainers.kernels.rewards.prompt_gap import PromptGap
    from trainers.scorers.latent_view import ConditionalNetwork, LatentView
    from trainers.wan.prompts import EncoderOptions, embed, text_id

    out = tmp_path / "out"
    more = ("--by", "flow_residual=1", "prompt_gap=2", "--backbone", models / "dit", "--text_encoder", TEXT)
    more += ("--min_gap", 0, "--max_error", "inf", "--draws", 2, "--negative_prompt", "blurry", "--seed", 3)
    assert build(records, out, *more) == 0
    rows = lines(out / "candidates.jsonl")
    found_groups = groups.read([records])
    dit = wan_dit.load(models / "dit").model
    prompts = [*{g.prompt for g in found_groups}, "blurry"]
    texts = embed(prompts, EncoderOptions(TEXT, device="cpu"))
    rewards = {"flow_residual": FlowResidual(noises=2, seed=3), "prompt_gap": PromptGap(noises=2, seed=3)}
    reader = clips.ClipReader(clips.ClipOptions())
    for group in found_groups:
        network = ConditionalNetwork(dit, texts[text_id(group.prompt)].float(), texts[text_id("blurry")].float())
        for candidate in group.candidates:
            z, _ = reader.latents(candidate)
            for name, reward in rewards.items():
                wanted = float(reward.scores(reward.measure(LatentView(network, z[None].float()))))
                (found,) = [r["value"] for r in rows if (r["candidate"], r["scorer"]) == (candidate.name, name)]
                assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert len({r["value"] for r in rows}) == len(rows)
    before = (out / "candidates.jsonl").read_bytes()
    assert build(records, out, *more) == 0
    assert (out / "candidates.jsonl").read_bytes() == before
    capsys.readouterr()
    assert build(records, out, *more[:-2], "--seed", 4) == 0
    assert len(lines(out / "candidates.jsonl")) == 2 * len(rows)


def test_shell_lcc_prefers_what_lies_nearer_to_the_shell(records, models, tmp_path, capsys):
    shell = models / "shell.safetensors"
    more = ("--by", "shell_lcc", "--manifold", shell, "--min_gap", 0, "--max_error", "inf")
    assert build(records, tmp_path / "out", *more) == 0
    manifold = load_manifold(shell)
    for row in lines(tmp_path / "out" / "candidates.jsonl"):
        z = read_clip(clips.clip_of(records / "latents" / Path(row["candidate"]).name))
        distance = evaluation.score(manifold, z)
        assert row["value"] == pytest.approx(-abs(float(distance.square().mean().sqrt()) - manifold.radius), rel=1e-5)
    for row in lines(tmp_path / "out" / "pairs.jsonl"):
        assert row["scores_a"]["shell_lcc"] > row["scores_b"]["shell_lcc"]
    path = next((records / "latents").iterdir())
    tensors, header = formats.read(path, "latents")
    formats.write(path, {k: v * float("nan") for k, v in tensors.items()}, header)
    assert build(records, tmp_path / "out", *more) == 0
    skipped = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]["shell_lcc"]
    assert [("NaN or Inf" in text) for text in skipped.values()] == [True]


def test_a_vae_stands_between_latents_and_videos(models, vae_file, tmp_path, monkeypatch):  # noqa: F811
    """Latents without a record are decoded for geometry, videos are encoded for Shell-LCC."""
    vae = wan_vae.load(vae_file)
    z = latents(1, 5, (16, 2, 6, 8))[0]
    frames = clips.decode(vae, z)
    with torch.no_grad():
        video = vae.model.decode(WAN21.denormalise(z[None])).sample[0]
    assert frames.shape == (5, 48, 64, 3)
    torch.testing.assert_close(frames.movedim(-1, 0).float() / 127.5 - 1, video.clamp(-1, 1), atol=1 / 250, rtol=0)
    folder = tmp_path / "records"
    append_record(folder, "p", latents(2, 5, (16, 2, 6, 8)), WAN21)
    assert build(folder, tmp_path / "out", "--vae", vae_file, "--keep_undetermined") in (0, 1)
    rows = lines(tmp_path / "out" / "candidates.jsonl")
    expected = tracks.score_clip(frames, "torch", pictures=False).record
    assert GeometryRecord.from_json(rows[0]["record"]).dumps() == expected.dumps()
    monkeypatch.setitem(BUCKETS, "144p", ((64, 48),))
    (tmp_path / "videos" / "p").mkdir(parents=True)
    for i in range(2):
        write_clip(tmp_path / "videos" / "p" / f"{i}.mkv", moving(5, seed=i))
    more = ("--by", "shell_lcc", "--manifold", models / "shell.safetensors", "--vae", vae_file, "--size", "144p")
    assert build(tmp_path / "videos", tmp_path / "other", *more, "--frames", 5) == 0
    assert len(lines(tmp_path / "other" / "pairs.jsonl")) == 1


class TestGroups:
    def test_folders(self, tmp_path):
        for name in ("b/2.mp4", "b/10.mp4", "b/2.safetensors", "b/notes.md", "a/x.mkv", ".hidden/y.mkv", "c/readme.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "b" / "prompt.txt").write_text("\ufeffa fox\n in snow\n", encoding="utf-8")
        first, second = groups.read([tmp_path])
        assert (first.name, first.prompt, [c.name for c in first.candidates]) == ("a", "a", ["a/x"])
        assert (second.prompt, [c.name for c in second.candidates]) == ("a fox in snow", ["b/10", "b/2"])
        both = second.candidates[1]
        assert (both.video.name, both.latents.name, both.path.name) == ("2.mp4", "2.safetensors", "2.safetensors")
        (alone,) = groups.read([tmp_path / "a"])
        assert alone == first

    def test_what_is_no_group(self, tmp_path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "x.mp4").write_bytes(b"")
        (tmp_path / "c" / "b").mkdir(parents=True)
        (tmp_path / "c" / "b" / "x.mp4").write_bytes(b"")
        with pytest.raises(GroupError, match="two groups have the name 'b'"):
            groups.read([tmp_path / "a", tmp_path / "c"])
        with pytest.raises(GroupError, match="no clips in its subfolders"):
            groups.read([tmp_path])
        with pytest.raises(FileNotFoundError):
            groups.read([tmp_path / "nowhere"])
        (tmp_path / "c" / "b" / "x.mov").write_bytes(b"")
        with pytest.raises(GroupError, match="two files of video with one name"):
            groups.read([tmp_path / "c"])
        (tmp_path / "a" / "b" / "prompt.txt").write_text("\n")
        with pytest.raises(GroupError, match=r"prompt\.txt: is empty"):
            groups.read([tmp_path / "a"])

    def test_records_of_several_scorers_are_not_compared(self):
        def group(*found):
            return Group("g", "p", [Candidate(str(i), None, Path("x"), geometry=r) for i, r in enumerate(found)])

        assert usable_records(group(record(0.1), record(0.2)))
        assert not usable_records(group(record(0.1), None))
        assert not usable_records(group(record(0.1), record(0.1, scorer=DENSE)))
        assert not usable_records(group(replace(record(0.1), version=0), replace(record(0.1), version=0)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--by", "beauty=1"), "unknown scorer; give geometry, flow_residual, prompt_gap, prism, shell_lcc or stored:NAME"),
        (("--by", "prompt_gap"), "--by prompt_gap needs --backbone, the whole model"),
        (("--by", "flow_residual", "--backbone", "a"), "--by flow_residual needs the prompts: --text_encoder"),
        (("--draws", "0"), "--draws must be 1 or more, got 0"),
        (("--by", "geometry=0"), "expected each scorer once, with a weight above 0"),
        (("--by", "geometry=-1"), "expected each scorer once"),
        (("--by", "geometry=much"), "expected each scorer once"),
        (("--by", "geometry", "geometry=2"), "expected each scorer once"),
        (("--by", "prism"), "--by prism needs --head and --backbone"),
        (("--by", "shell_lcc"), "--by shell_lcc needs --manifold"),
        (("--motion_ratio", 2, 0.5), "expected 0 <= LOW <= HIGH"),
        (("--min_gap", 1), "--min_gap must be 0 or more and below 1"),
        (("--max_lost", "nan"), "--max_lost must be 0 or more"),
        (("--max_moving", "-1"), "--max_moving must be 0 or more"),
        (("--pairs_per_group", 0), "--pairs_per_group must be 1 or more"),
        (("--frames", 8), "is not 4n+1"),
    ],
)
def test_bad_arguments(records, tmp_path, capsys, more, message):
    assert build(records, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_clip_lacks_is_said_before_anything_is_scored(tmp_path, models, capsys):
    append_record(tmp_path / "records", "p", latents(), WAN21, geometry=[record(0.1), None])
    assert build(tmp_path / "records", tmp_path / "out") == 2
    assert "without a geometry record that is comparable with its group's; give --vae" in capsys.readouterr().err
    (tmp_path / "groups" / "g").mkdir(parents=True)
    write_clip(tmp_path / "groups" / "g" / "a.mkv", moving(5))
    assert build(tmp_path / "groups", tmp_path / "out", "--by", "shell_lcc", "--manifold", models / "shell.safetensors") == 2
    assert "a.mkv: a video; --by shell_lcc reads latents, so give --vae" in capsys.readouterr().err
    assert build(tmp_path / "records", tmp_path / "out", "--by", "shell_lcc", "--manifold", models / "head.safetensors") == 2
    assert "found a PRISM head, expected a Shell-LCC manifold" in capsys.readouterr().err


def test_a_table_with_several_dimensions_must_say_which_decides(tmp_path):
    row = {"prompt": "p", "a": "x", "b": "y", "preference": {"look": "b", "motion": "tie"}}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(tables.PairsError, match="has the dimensions look, motion; name the one that decides"):
        manifest.read(tmp_path / "t.jsonl")
    (found,) = manifest.read(tmp_path / "t.jsonl", dimension="look")
    assert (found.winner.name, found.loser.name) == ("y", "x")
    assert manifest.read(tmp_path / "t.jsonl", dimension="motion") == []


def test_margins_are_asked_for(tmp_path):
    found = chosen({"a": record(0.1), "b": record(0.4, INCONSISTENT), "c": record(0.2)}, Limits(margin=3.0))
    assert found.reason.filter == "margin"
    assert found.tried[0][0] == Ranked("a", "b", pytest.approx(found.tried[0][0].margin))
