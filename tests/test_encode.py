"""`python -m trainers.encode`: the latents it writes, what it skips, and how it goes on after a crash."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks import mini_vae
from trainers import encode
from trainers.kernels import latent_space
from trainers.kernels.files import header as formats
from trainers.kernels.video.clips import DecodeOptions, SourceReport, VideoError
from trainers.kernels.video.sizes import nearest_bucket
from trainers.latents import encode_videos, shards
from trainers.latents.read import list_clips, read_clip
from trainers.running import identity
from trainers.running.device import pick_device
from trainers.video.read import decode_clips
from trainers.wan import vae as wan_vae

from .launcher import launch
from .video_clips import counting, moving, real_clip, write_clip

pytest.importorskip("av")
pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ("--width", "64", "--height", "48", "--frames", "9")


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "mini.safetensors"
    vae = mini_vae.build(0)
    mini_vae.calibrate(vae, mini_vae.moving_noise(1, torch.Generator().manual_seed(0)))
    mini_vae.save(vae, path, {})
    return path


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.mkv", "sub/b.mkv", "c.mkv")):
        write_clip(folder / name, moving(10 + 9 * i, seed=i))
    return folder


def run(videos, vae_file, output, *options):
    return encode.main(["--videos", str(videos), "--vae", str(vae_file), "--output", str(output), *SMALL, *options])


def contents(output):
    """{clip id: tensor} of all shards."""
    found = {}
    for path in sorted(Path(output).glob("latents-*.safetensors")):
        tensors, _ = formats.read(path, "latents")
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def entries(output):
    found = {}
    for path in sorted(Path(output).glob("latents-*.safetensors")):
        found |= formats.read_header(path, "latents").config["clips"]
    return found


def report(output, name="report.json"):
    return json.loads((Path(output) / name).read_text())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# What is written


def test_shards_hold_normalised_latents_and_say_where_they_are_from(videos, vae_file, tmp_path):
    assert run(videos, vae_file, tmp_path / "out", "--max_clips_per_video", "0", "--dtype", "float32") == 0
    (shard,) = (tmp_path / "out").glob("latents-*.safetensors")
    tensors, header = formats.read(shard, "latents")
    assert header.latent_space == latent_space.WAN21
    assert header.config["state"] == "normalised"
    assert {(e["source"], e["window"], e["start_frame"]) for e in header.config["clips"].values()} == {
        ("a.mkv", 0, 0), ("c.mkv", 0, 0), ("c.mkv", 1, 9), ("c.mkv", 2, 18), ("sub/b.mkv", 0, 0), ("sub/b.mkv", 1, 9),
    }  # fmt: skip
    for key, z in tensors.items():
        assert z.shape == (16, 3, 6, 8)
        assert z.dtype == torch.float32
        entry = header.config["clips"][key]
        assert (entry["fps"], entry["frames"], entry["width"], entry["height"]) == (16, 9, 64, 48)
        assert entry["start_s"] == entry["start_frame"] / 16
    assert str(tmp_path) not in json.dumps([header.config, header.provenance])

    vae = wan_vae.load(vae_file)
    options = DecodeOptions(lambda w, h: (64, 48), frames=9)
    clip = next(decode_clips(videos / "a.mkv", options, SourceReport("a.mkv")))
    video = clip.frames.float().movedim(0, 1)[None] / 127.5 - 1
    raw = vae.model.encode(video).latent_dist.mean[0]
    (key,) = (k for k, e in header.config["clips"].items() if e["source"] == "a.mkv")
    assert torch.allclose(tensors[key], latent_space.WAN21.normalise(raw, dim=0), atol=1e-5)
    totals = {"encoded": 3, "already encoded": 0, "damaged": 0, "skipped": 0, "not reached": 0}
    assert report(tmp_path / "out")["totals"] == totals


def test_stored_type_and_two_runs_alike(videos, vae_file, tmp_path):
    for name in "pq":
        assert run(videos, vae_file, tmp_path / name) == 0
    first, second = contents(tmp_path / "p"), contents(tmp_path / "q")
    assert same(first, second)
    assert {z.dtype for z in first.values()} == {torch.float16}
    assert run(videos, vae_file, tmp_path / "b", "--dtype", "bfloat16") == 0
    assert {z.dtype for z in contents(tmp_path / "b").values()} == {torch.bfloat16}


def test_real_clips_by_bucket_are_read_back_by_the_fit_trainers(vae_file, tmp_path):
    names = ("bikes.mp4", "carphone_pristine.mp4")
    paths = [str(real_clip(name)) for name in names]
    code = encode.main(
        ["--videos", *paths, "--vae", str(vae_file), "--output", str(tmp_path), "--size", "144p", "--frames", "9"]
    )
    assert code == 0
    clips = [(ref.clip_id, read_clip(ref), ref.space) for ref in list_clips([tmp_path])]
    assert [z.shape for _, z, _ in clips] == [(16, 3, 18, 32), (16, 3, 20, 26)]
    assert all(clip.startswith(name.split(".")[0]) for (clip, _, _), name in zip(clips, names, strict=True))
    assert all(space == latent_space.WAN21 and z.dtype == torch.float32 for _, z, space in clips)
    assert nearest_bucket("144p", 640, 272) == (256, 144)


def test_tiling_is_another_setting_and_gives_other_latents(vae_file, tmp_path):
    write_clip(tmp_path / "wide.mkv", moving(5, 48, 320))
    for name, options in (("whole", ()), ("tiled", ("--tiling",))):
        arguments = ["--videos", tmp_path / "wide.mkv", "--vae", vae_file, "--output", tmp_path / name, *options]
        assert encode.main([*map(str, arguments), "--width", "320", "--height", "48", "--frames", "5"]) == 0
    (a,), (b,) = (contents(tmp_path / n).values() for n in ("whole", "tiled"))
    assert a.shape == b.shape
    assert not torch.equal(a, b)
    assert torch.allclose(a[..., :12].float(), b[..., :12].float(), atol=0.5)


# Going on


def test_finished_videos_are_skipped_and_new_ones_added(videos, vae_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, vae_file, out)
    before = contents(out)
    write_clip(videos / "d.mkv", moving(9, seed=9))
    encoded = []
    original = wan_vae.WanVae.encode
    monkeypatch.setattr(wan_vae.WanVae, "encode", lambda self, frames: encoded.append(1) or original(self, frames))
    assert run(videos, vae_file, out) == 0
    assert len(encoded) == 1
    after = contents(out)
    assert len(after) == 4
    assert same(before, {k: after[k] for k in before})
    assert report(out)["totals"] == {"encoded": 1, "already encoded": 3, "damaged": 0, "skipped": 0, "not reached": 0}


def test_more_clips_per_video_add_only_the_missing_ones(videos, vae_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, vae_file, out, "--max_clips_per_video", "1")
    encoded = []
    original = wan_vae.WanVae.encode
    monkeypatch.setattr(wan_vae.WanVae, "encode", lambda self, frames: encoded.append(1) or original(self, frames))
    run(videos, vae_file, out, "--max_clips_per_video", "0")
    assert len(encoded) == 3
    run(videos, vae_file, out, "--max_clips_per_video", "2")
    assert len(encoded) == 3
    assert len(contents(out)) == 6
    run(videos, vae_file, tmp_path / "all", "--max_clips_per_video", "0")
    assert same(contents(out), contents(tmp_path / "all"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
def test_a_stop_in_the_middle_loses_nothing(videos, vae_file, tmp_path, monkeypatch, capsys, error):
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(videos, vae_file, whole, "--max_clips_per_video", "0")
    original, calls = wan_vae.WanVae.encode, []

    def stumble(self, frames):
        calls.append(1)
        if len(calls) == 3:
            raise error("in the middle")
        return original(self, frames)

    monkeypatch.setattr(wan_vae.WanVae, "encode", stumble)
    options = ("--max_clips_per_video", "0", "--shard_clips", "2")
    if error is RuntimeError:
        with pytest.raises(RuntimeError):
            run(videos, vae_file, out, *options)
    else:
        assert run(videos, vae_file, out, *options) == (130 if error is KeyboardInterrupt else 2)
        assert ("run the same command again" if error is KeyboardInterrupt else "try --tiling") in capsys.readouterr().err
    assert len(contents(out)) == 2
    assert report(out)["totals"]["not reached"] == 2
    assert run(videos, vae_file, out, *options) == 0
    assert len(calls) == 3 + 4
    assert same(contents(out), contents(whole))


def test_a_killed_process_loses_at_most_a_shard(videos, vae_file, tmp_path, monkeypatch):
    """The process dies while it writes its second shard: the first is whole, no half-written file is taken for one."""
    out = tmp_path / "out"
    code = (
        "from tests import fast_convolutions; fast_convolutions.use()\n"
        "import os, sys; from trainers import encode; from trainers.kernels.files import header as formats\n"
        "write, count = formats.save_file, []\n"
        "def save(tensors, path, metadata):\n"
        "    count.append(1)\n"
        "    if len(count) == 2:\n"
        "        open(path, 'wb').write(b'half'); os._exit(9)\n"
        "    write(tensors, path, metadata=metadata)\n"
        "formats.save_file = save; encode.main(sys.argv[1:])"
    )
    arguments = [
        "--videos",
        videos,
        "--vae",
        vae_file,
        "--output",
        out,
        *SMALL,
        "--max_clips_per_video",
        "0",
        "--shard_clips",
        "2",
    ]
    ended = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=ONE_THREAD)
    assert ended.returncode == 9
    assert len(contents(out)) == 2
    run(videos, vae_file, out, "--max_clips_per_video", "0")
    run(videos, vae_file, tmp_path / "whole", "--max_clips_per_video", "0")
    assert same(contents(out), contents(tmp_path / "whole"))


def test_other_settings_are_refused_and_overwrite_starts_afresh(videos, vae_file, tmp_path, capsys):
    out = tmp_path / "out"
    run(videos, vae_file, out)
    assert run(videos, vae_file, out, "--fps", "12") == 2
    message = capsys.readouterr().err
    assert "made with other settings (fps 16.0 against 12.0)" in message
    assert "--overwrite" in message
    assert run(videos, vae_file, out, "--fps", "12", "--overwrite") == 0
    assert {e["fps"] for e in entries(out).values()} == {12}
    assert len(entries(out)) == 3


def test_a_changed_file_is_encoded_again_with_a_note(videos, vae_file, tmp_path):
    out = tmp_path / "out"
    run(videos, vae_file, out)
    write_clip(videos / "a.mkv", moving(9, seed=77))
    assert run(videos, vae_file, out) == 0
    assert len(contents(out)) == 4
    assert "changed since it was encoded" in report(out)["videos"]["a.mkv"]["notes"][0]


# Copies


def counted(monkeypatch):
    """A list that grows by one for each clip encoded."""
    encoded = []
    original = wan_vae.WanVae.encode
    monkeypatch.setattr(wan_vae.WanVae, "encode", lambda self, frames: encoded.append(1) or original(self, frames))
    return encoded


def test_a_copy_is_encoded_once_and_named(videos, vae_file, tmp_path, monkeypatch, capsys):
    """Under another name, in one run."""
    shutil.copy(videos / "c.mkv", videos / "a copy.mkv")
    encoded = counted(monkeypatch)
    assert run(videos, vae_file, tmp_path / "out") == 0
    assert len(encoded) == 3
    rows = report(tmp_path / "out")["videos"]
    assert (rows["a copy.mkv"]["status"], rows["a copy.mkv"]["copy_of"]) == ("encoded", None)
    assert (rows["c.mkv"]["status"], rows["c.mkv"]["copy_of"]) == ("already encoded", "a copy.mkv")
    assert "c.mkv: a copy of a copy.mkv, which is encoded" in capsys.readouterr().out


def test_new_names_and_times_encode_nothing_again(videos, vae_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(videos, vae_file, out, "--max_clips_per_video", "1")
    before = contents(out)
    (videos / "a.mkv").rename(videos / "z.mkv")
    os.utime(videos / "c.mkv", ns=(1, 1))
    encoded = counted(monkeypatch)
    assert run(videos, vae_file, out, "--max_clips_per_video", "1") == 0
    assert not encoded
    assert same(before, contents(out))
    assert report(out)["videos"]["z.mkv"]["copy_of"] == "a.mkv"
    # The clips that are missing are added to those of the earlier name.
    assert run(videos, vae_file, out, "--max_clips_per_video", "0") == 0
    assert len(encoded) == 3
    whole = {(e["video"], e["window"]) for e in entries(out).values()}
    assert len(whole) == len(entries(out)) == 6


def test_copies_of_other_shares_are_not_encoded_twice(videos, vae_file, tmp_path, monkeypatch):
    for name in ("d.mkv", "e.mkv"):
        shutil.copy(videos / "a.mkv", videos / name)
    encoded = counted(monkeypatch)
    for index in "01":
        assert run(videos, vae_file, tmp_path / "out", "--shard_count", "2", "--shard_index", index) == 0
    assert len(encoded) == 3
    rows = report(tmp_path / "out", "report-0-of-2.json")["videos"]
    assert {name: row["copy_of"] for name, row in rows.items() if row["copy_of"]} == {"d.mkv": "a.mkv", "e.mkv": "a.mkv"}


def test_folders_of_earlier_versions_go_on(videos, vae_file, tmp_path, monkeypatch):
    """Their ids were made of name, size and time."""
    out = tmp_path / "out"
    with monkeypatch.context() as before:
        before.setattr(
            shards.ShardContents, "id_of", lambda self, name, path, settings, variant="":
            shards.earlier_video_id(name, path, settings),
        )  # fmt: skip
        run(videos, vae_file, out)
    shutil.copy(videos / "c.mkv", videos / "a copy.mkv")
    encoded = counted(monkeypatch)
    assert run(videos, vae_file, out) == 0
    assert not encoded
    assert report(out)["totals"]["already encoded"] == 4
    assert report(out)["videos"]["a copy.mkv"]["copy_of"] == "c.mkv"
    # More clips of a video keep its earlier id, so that its windows are one video.
    assert run(videos, vae_file, out, "--max_clips_per_video", "0") == 0
    assert len(encoded) == 3
    assert len({e["video"] for e in entries(out).values()}) == 3


def test_a_large_file_is_known_by_blocks(tmp_path):
    size = (identity.BLOCKS + 4) * identity.BLOCK
    data = bytearray(os.urandom(1 << 10) * (size >> 10))
    path = tmp_path / "x"
    path.write_bytes(data)
    first = identity.content_digest(path)
    os.utime(path, ns=(1, 1))
    assert identity.content_digest(path) == first
    for place in (0, size - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert identity.content_digest(path) != first
    path.write_bytes(data + b"x")
    assert identity.content_digest(path) != first
    small = tmp_path / "y"
    small.write_bytes(b"abc")
    assert identity.content_digest(small) != identity.content_digest(path)
    shutil.copy(small, tmp_path / "z")
    assert identity.copies({"x": path, "y": small, "z": tmp_path / "z"}) == {"z": "y"}


def test_a_damaged_shard_is_named(videos, vae_file, tmp_path, capsys):
    out = tmp_path / "out"
    run(videos, vae_file, out)
    (shard,) = out.glob("latents-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:500])
    assert run(videos, vae_file, out) == 2
    assert shard.name in capsys.readouterr().err


# Several processes


def test_two_processes_make_what_one_makes(videos, vae_file, tmp_path):
    run(videos, vae_file, tmp_path / "one", "--max_clips_per_video", "0")
    for index in "10":
        options = ("--max_clips_per_video", "0", "--num_shards", "2", "--shard_index", index)
        assert run(videos, vae_file, tmp_path / "two", *options) == 0
    assert same(contents(tmp_path / "one"), contents(tmp_path / "two"))
    names = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert names == [
        "latents-000of002-00000.safetensors", "latents-001of002-00000.safetensors",
        "report-0-of-2.json", "report-1-of-2.json",
    ]  # fmt: skip
    assert list(report(tmp_path / "two", "report-0-of-2.json")["videos"]) == ["a.mkv", "sub/b.mkv"]
    # One process finds everything done, whoever did it.
    assert run(videos, vae_file, tmp_path / "two", "--max_clips_per_video", "0") == 0
    assert report(tmp_path / "two")["totals"]["already encoded"] == 3


def test_processes_of_a_launcher_share_the_work(videos, vae_file, tmp_path):
    arguments = ["--videos", videos, "--vae", vae_file, "--output", tmp_path / "two", *SMALL, "--device", "cpu"]
    ended = launch("trainers.encode", arguments, tmp_path / "said")
    assert ended.codes == [0, 0], ended.stderr
    assert len(list((tmp_path / "two").glob("latents-00?of002-00000.safetensors"))) == 2
    run(videos, vae_file, tmp_path / "one")
    assert same(contents(tmp_path / "one"), contents(tmp_path / "two"))


def test_overwriting_by_fewer_processes_leaves_no_old_shard(tmp_path):
    for index in range(5):
        (tmp_path / f"latents-{index:03d}of005-00000.safetensors").write_bytes(b"old")
    shards.remove(tmp_path, 0, 2)
    assert sorted(p.name[8:11] for p in tmp_path.iterdir()) == ["001", "003"]
    shards.remove(tmp_path, 1, 2)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_folder_lose_no_shard(tmp_path, monkeypatch):
    """All choose a number before any of them has written; a number that was taken in the meantime is not used again."""
    settings, written = {"dtype": "float32"}, []
    writers = [shards.Writer(tmp_path, latent_space.WAN21, settings, {}) for _ in range(3)]
    original, begun = shards.write_unused_latents, []

    def slow(names, tensors, *args, **kwargs):
        begun.append(names)
        if len(begun) < 3:
            # While this shard is being written, the next process begins one.
            writers[len(begun)].flush()
        path = original(names, tensors, *args, **kwargs)
        written.append(path.name)
        return path

    monkeypatch.setattr(shards, "write_unused_latents", slow)
    for i, writer in enumerate(writers):
        writer.add(f"c{i}", torch.zeros(16, 1, 2, 2), {"source": f"{i}.mp4", "video": str(i)})
    writers[0].flush()
    assert sorted(written) == [f"latents-000of001-{i:05d}.safetensors" for i in range(3)]
    assert sorted(contents(tmp_path)) == ["c0", "c1", "c2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(written)
    # A number below a shard's that was deleted is not used again.
    (tmp_path / "latents-000of001-00000.safetensors").unlink()
    writers[0].add("c3", torch.zeros(16, 1, 2, 2), {"source": "3.mp4", "video": "3"})
    writers[0].flush()
    assert (tmp_path / "latents-000of001-00003.safetensors").is_file()


def test_more_processes_than_videos_is_no_error(videos, vae_file, tmp_path):
    assert run(videos, vae_file, tmp_path / "out", "--num_shards", "5", "--shard_index", "4") == 0
    assert report(tmp_path / "out", "report-4-of-5.json")["videos"] == {}


# What is refused


def test_clips_before_the_damage_are_kept_and_said(videos, vae_file, tmp_path, monkeypatch, capsys):
    original = encode_videos.decode_clips

    def cut_short(path, options, source):
        for clip in original(path, options, source):
            yield clip
            if path.name == "a.mkv":
                raise VideoError(f"{source.name}: damaged at 0.50 s")

    monkeypatch.setattr(encode_videos, "decode_clips", cut_short)
    assert run(videos, vae_file, tmp_path / "out") == 0
    row = report(tmp_path / "out")["videos"]["a.mkv"]
    assert (row["status"], row["clips"]) == ("damaged", 1)
    assert row["reason"] == "a.mkv: damaged at 0.50 s; clips before the damage are kept: 1"
    assert row["reason"] in capsys.readouterr().out
    assert [e["source"] for e in entries(tmp_path / "out").values()].count("a.mkv") == 1


def test_a_damaged_file_is_skipped_and_reported(videos, vae_file, tmp_path, capsys):
    (videos / "broken.mp4").write_bytes(b"nonsense" * 100)
    write_clip(videos / "one.mkv", counting(1))
    assert run(videos, vae_file, tmp_path / "out") == 0
    skipped = {k: v["reason"] for k, v in report(tmp_path / "out")["videos"].items() if v["status"] == "skipped"}
    assert skipped.keys() == {"broken.mp4", "one.mkv"}
    assert skipped["broken.mp4"].startswith("broken.mp4: damaged or not a video")
    assert skipped["one.mkv"].startswith("one.mkv: 1 frame at")
    printed = capsys.readouterr().out
    assert skipped["broken.mp4"] in printed
    assert "3  encoded: 3 clips" in printed
    # Its repair is picked up by the next run.
    write_clip(videos / "one.mkv", counting(9))
    run(videos, vae_file, tmp_path / "out")
    assert report(tmp_path / "out")["totals"]["encoded"] == 1


def test_exit_code_1_when_nothing_could_be_encoded(vae_file, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nonsense" * 100)
    assert run(tmp_path / "broken.mp4", vae_file, tmp_path / "out") == 1
    assert report(tmp_path / "out")["totals"]["skipped"] == 1


def test_latents_that_are_not_finite_are_not_stored(videos, vae_file, tmp_path):
    vae = wan_vae.load(vae_file)
    with torch.no_grad():
        vae.model.quant_conv.bias[0] = float("nan")
    broken = tmp_path / "broken.safetensors"
    mini_vae.save(vae.model, broken, {})
    assert run(videos, broken, tmp_path / "out") == 1
    reason = report(tmp_path / "out")["videos"]["a.mkv"]["reason"]
    assert reason.startswith("a.mkv: the VAE gave latents with NaN or Inf")
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", "80"), "use 77 or 81"),
        (("--frames", "0"), "use 1 or 5"),
        (("--width", "100"), "use 96 or 112"),
        (("--size", "480p"), "not both"),
        (("--fps", "0"), "above 0"),
        (("--min_frames", "10"), "between 1 and --frames 9"),
        (("--shard_index", "2", "--num_shards", "2"), "between 0 and --shard_count - 1 (1)"),
        (("--num_shards", "2"), "--shard_count 2 needs --shard_index, from 0 to 1"),
        (("--max_clips_per_video", "-1"), "0 (all) or more"),
        (("--shard_clips", "0"), "1 or more"),
    ],
)
def test_wrong_arguments(videos, vae_file, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(videos, vae_file, tmp_path / "out", *options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_inputs_and_devices_are_one_sentence(videos, vae_file, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    for source, options, message in (
        (tmp_path / "none", (), "no videos in this folder"),
        (tmp_path / "*.mp4", (), "matches no file"),
        (tmp_path / "gone.mp4", (), "no such file or folder"),
        (videos, ("--device", "cuda:77"), "--device cuda:77: cannot be used here"),
        (videos, ("--vae", str(tmp_path / "gone.safetensors")), "gone.safetensors: no such file or folder"),
    ):
        assert run(source, vae_file, tmp_path / "out", *options) == 2
        assert message in capsys.readouterr().err


def test_auto_takes_the_first_accelerator_of_those_given(monkeypatch):
    """encode does not pick mps; the other commands do."""
    for backend in (torch.cuda, torch.xpu):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto", accelerators=("cuda", "xpu")) == torch.device("cpu")
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("auto", accelerators=("cuda", "xpu")) == torch.device("cuda")
    assert pick_device("cpu", accelerators=()) == torch.device("cpu")


def test_command_line_from_the_repository_root(videos, vae_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "trainers.encode",
        "--videos",
        f"{videos}/*.mkv",
        "--vae",
        vae_file,
        "--output",
        tmp_path / "o",
    ]
    ended = subprocess.run(
        [*map(str, command), *SMALL], cwd=ROOT, capture_output=True, text=True,
        env=ONE_THREAD,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "2  encoded: 2 clips" in ended.stdout
    (shard,) = (tmp_path / "o").glob("latents-*.safetensors")
    with safe_open(shard, framework="pt") as f:
        assert f.metadata()["kind"] == "latents"
