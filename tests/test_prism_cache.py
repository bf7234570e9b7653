"""`python -m trainers.prism cache` and `embed`: tables of videos become a folder that a head is trained from."""

import json
import shutil

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("sentencepiece")

from benchmarks.toy_world import weights
from trainers.kernels.files import header as formats
from trainers.kernels.latent_space import WAN21
from trainers.prism import cli as prism
from trainers.prism import data as prism_data
from trainers.wan import text_encoder
from trainers.wan.prompts import text_id

from .test_encode import vae_file  # noqa: F401 (a fixture)
from .test_prism_train import train
from .test_wan_dit import CONFIG
from .video_clips import moving, write_clip

TEXT = weights.FOLDER / weights.TEXT
PROMPTS = ("a red ball", "a blue cube", "a green cone")
SIZE = ("--width", 64, "--height", 48, "--frames", 9, "--device", "cpu")


@pytest.fixture
def table(tmp_path):
    """Six clips, of 9 frames or more, two a prompt, in a table as VideoAlign has it."""
    folder = tmp_path / "set"
    (folder / "clips").mkdir(parents=True)
    lines = ["path_A,path_B,prompt,VQ,MQ"]
    for i, prompt in enumerate(PROMPTS):
        for side in "ab":
            write_clip(folder / "clips" / f"{i}{side}.mkv", moving(12, seed=2 * i + (side == "b")))
        lines.append(f"clips/{i}a.mkv,clips/{i}b.mkv,{prompt},{'ABA'[i]},same")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def cache(table, vae, out, *more, text=("--text_encoder", TEXT), dimensions=("--dimensions", "VQ")):  # noqa: F811
    argv = ["cache", "--pairs", table, "--vae", vae, "--output", out, *SIZE, *text, *dimensions, *more]
    return prism.main([str(a) for a in argv])


@pytest.fixture
def wide_backbone(tmp_path):
    """A tiny transformer that reads the toy world's texts, in a diffusers folder."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    WanTransformer3DModel(**(CONFIG | {"text_dim": 256})).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_a_head_is_trained_from_a_table_of_videos(table, vae_file, wide_backbone, tmp_path):  # noqa: F811
    out = tmp_path / "data"
    assert cache(table, vae_file, out) == 0
    data = prism_data.load(out)
    assert sorted(data.runs) == [f"clips/{i}{s}.mkv" for i in range(3) for s in "ab"]
    assert [r.outcome for r in data.rows] == [{"VQ": 1}, {"VQ": -1}, {"VQ": 1}]
    assert data.state("clips/0a.mkv", None).shape == (16, 3, 6, 8)
    encoder = text_encoder.load(TEXT, torch.bfloat16)
    for prompt in PROMPTS:
        kept = data.texts[text_id(prompt)]
        torch.testing.assert_close(kept, encoder.encode(prompt), atol=2e-3, rtol=2e-3)
    assert train(out, wide_backbone, tmp_path / "head.safetensors", steps=2) == 0


def test_a_second_run_encodes_nothing_anew(table, vae_file, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "data"
    assert cache(table, vae_file, out, "--shard_clips", 4) == 0
    shards = sorted(out.glob("latents-*"))
    assert len(shards) == 2
    times = [p.stat().st_mtime_ns for p in shards]
    shards[1].unlink()
    assert cache(table, vae_file, out, "--shard_clips", 4, text=()) == 0
    # The fourth was encoded, but its being whole was noted in the shard that is gone.
    assert "3  already encoded" in capsys.readouterr().out
    assert sorted(out.glob("latents-*"))[0].stat().st_mtime_ns == times[0]
    assert len(prism_data.load(out).runs) == 6
    assert cache(table, vae_file, out, "--fps", 8) == 2
    assert "other settings" in capsys.readouterr().err
    assert cache(table, vae_file, out, "--fps", 8, "--overwrite") == 0
    assert len(prism_data.load(out).runs) == 6


def test_a_broken_video_loses_its_pair_alone(table, vae_file, tmp_path):  # noqa: F811
    (table.parent / "clips" / "1b.mkv").write_bytes(b"no video")
    assert cache(table, vae_file, tmp_path / "data") == 0
    data = prism_data.load(tmp_path / "data")
    assert [r.a for r in data.rows] == ["clips/0a.mkv", "clips/2a.mkv"]
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["videos"]["clips/1b.mkv"]["status"] == "skipped"
    for name in ("0a", "1a", "2a"):
        (table.parent / "clips" / f"{name}.mkv").write_bytes(b"no video")
    assert cache(table, vae_file, tmp_path / "none") == 2


def test_copies_of_a_clip_are_one_run(table, vae_file, tmp_path, capsys):  # noqa: F811
    """Of one prompt; under another prompt the clip is stored again, and both prompts are on one side of a split."""
    clips = table.parent / "clips"
    shutil.copy(clips / "0a.mkv", clips / "0c.mkv")
    shutil.copy(clips / "0a.mkv", clips / "2d.mkv")
    lines = [f"clips/0c.mkv,clips/0b.mkv,{PROMPTS[0]},A,same", f"clips/0c.mkv,clips/0a.mkv,{PROMPTS[0]},A,same",
             f"clips/2d.mkv,clips/2b.mkv,{PROMPTS[2]},A,same"]  # fmt: skip
    table.write_text(table.read_text() + "\n".join(lines) + "\n")
    for _ in range(2):
        assert cache(table, vae_file, tmp_path / "data") == 0
        said = capsys.readouterr().out
        assert "clips/0c.mkv: a copy of clips/0a.mkv, which is encoded" in said
        assert "1 pairs are left out: both of their clips have the same content" in said
        data = prism_data.load(tmp_path / "data")
        assert "clips/0c.mkv" not in data.runs
        assert len(data.runs) == 7
        assert [r.a for r in data.rows] == [f"clips/{n}.mkv" for n in ("0a", "1a", "2a", "0a", "2d")]
    groups = prism_data.prompt_groups(data)
    assert groups[text_id(PROMPTS[0])] == groups[text_id(PROMPTS[2])] != groups[text_id(PROMPTS[1])]


def test_clips_of_two_lengths_are_compared_over_the_shorter(table, vae_file, tmp_path):  # noqa: F811
    write_clip(table.parent / "clips" / "0b.mkv", moving(5, seed=1))
    assert cache(table, vae_file, tmp_path / "data") == 0
    data = prism_data.load(tmp_path / "data")
    batch = prism_data.draw(data, [data.rows[0]], 0.5, torch.Generator().manual_seed(0))
    assert batch.x.shape == (2, 16, 2, 6, 8)
    noise = (batch.x[1] - 0.5 * data.state("clips/0b.mkv", None)) / 0.5
    torch.testing.assert_close(batch.x[0], 0.5 * noise + 0.5 * data.state("clips/0a.mkv", None)[:, :2])
    assert sorted(len(g) for g in prism_data.by_shape(data, data.rows)) == [1, 2]


def test_latents_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    latents = {side: torch.randn(16, 2, 4, 4, generator=g) for side in "ab"}
    for side, z in latents.items():
        config = {"state": "normalised", "settings": {}, "clips": {side: {"source": side, "video": side}}, "videos": {}}
        formats.write(folder / f"{side}.safetensors", {side: z}, formats.Header("latents", WAN21, config, {}, {}))
    row = {"prompt": PROMPTS[0], "a": "a.safetensors", "b": "b.safetensors", "preference": "b"}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    argv = ["cache", "--pairs", folder / "pairs.jsonl", "--output", tmp_path / "data", "--text_encoder", TEXT,
            "--latent_dtype", "float32"]  # fmt: skip
    assert prism.main([str(a) for a in argv]) == 0
    data = prism_data.load(tmp_path / "data")
    assert data.rows[0].outcome == {"overall": -1}
    assert torch.equal(data.state("b.safetensors", None), latents["b"])


def test_prompts_embedded_before_are_used(table, vae_file, tmp_path, capsys):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n")
    argv = ["embed", "--prompts", tmp_path / "prompts.txt", "--text_encoder", TEXT, "--output", tmp_path / "t.safetensors",
            "--negative", "still", "--device", "cpu"]  # fmt: skip
    assert prism.main([str(a) for a in argv]) == 0
    texts, header = formats.read(tmp_path / "t.safetensors", "texts")
    assert header.config["prompts"] == {text_id(p): p for p in PROMPTS[:2]} | {"negative": "still"}
    assert len(texts) == 3
    capsys.readouterr()
    assert cache(table, vae_file, tmp_path / "data", text=("--texts", tmp_path / "t.safetensors")) == 2
    assert "lacks 1 prompts, such as 'a green cone'" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert prism.main([str(a) for a in (*argv, "--overwrite")]) == 0
    assert cache(table, vae_file, tmp_path / "data", text=("--texts", tmp_path / "t.safetensors")) == 0
    assert set(prism_data.load(tmp_path / "data").texts) == {text_id(p) for p in PROMPTS}


@pytest.mark.parametrize(
    ("edit", "more", "message"),
    [
        (lambda t: t.replace("path_B", "other"), {}, "no column 'path_B'"),
        (lambda t: t, {"dimensions": ("--dimensions", "MQ")}, "in dimension 'MQ' every pair is a tie"),
        (lambda t: t, {"dimensions": ("--dimensions", "TA")}, "no dimension 'TA'"),
        (lambda t: t, {"text": ()}, "--text_encoder or --texts is needed"),
        (lambda t: t.replace("clips/1b", "clips/0a"), {}, "has two different prompts"),
    ],
)
def test_bad_tables_are_answered_before_anything_is_encoded(table, vae_file, tmp_path, capsys, edit, more, message):  # noqa: F811
    table.write_text(edit(table.read_text()))
    assert cache(table, vae_file, tmp_path / "data", **more) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "data").glob("latents-*")) if (tmp_path / "data").exists() else True


def test_what_is_left_out_of_a_table_is_said(table, vae_file, tmp_path, capsys):  # noqa: F811
    table.write_text(table.read_text().replace("2a.mkv", "9a.mkv").replace("cube,B", "cube,N/A"))
    assert cache(table, vae_file, tmp_path / "data") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        "cells that are no label A, B or same, left out: line 3, VQ 'N/A'",
        "rows without any outcome, left out: line 3",
        f"files that do not exist, whose pairs are left out: {table.parent / 'clips' / '9a.mkv'}",
        "VQ: 1 decided, 0 ties",
    ]
    assert "1 of 1 pairs, 1 prompts" in said[-1]


@pytest.mark.parametrize("more", [("--frames", 8), ("--width", 60), ("--fps", 0), ("--shard_clips", 0)])
def test_bad_sizes(table, vae_file, tmp_path, more):  # noqa: F811
    assert cache(table, vae_file, tmp_path / "data", *more) == 2


def test_a_full_disk_leaves_no_half_file(table, vae_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(formats, "save_file", full)
    assert cache(table, vae_file, tmp_path / "data") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "data").glob("*.safetensors*"))
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "data")
    assert cache(table, vae_file, tmp_path / "data") == 0
