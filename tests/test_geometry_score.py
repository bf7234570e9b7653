"""`python -m trainers.geometry score`: its table and lines, geometry saved by any tool, and how it goes on after a crash."""

import errno
import json
import math

import numpy as np
import pytest
import torch

from trainers.scorers import geometry_files as scorer
from trainers.video.frames import read_frames

pytest.importorskip("av")

from benchmarks.toy_world import renderer
from benchmarks.toy_world.captions import Attributes
from trainers.geometry import cli as geometry
from trainers.geometry import score as geometry_score
from trainers.kernels.geometry import dense, tracks, view_files
from trainers.kernels.geometry.record import DENSE, TRACKS, GeometryError, GeometryRecord
from trainers.kernels.geometry.views import Views
from trainers.kernels.video.clips import SourceReport
from trainers.running import results_log as geometry_log
from trainers.scorers import depth_files as geometry_files

from .video_clips import moving, write_clip

SCENE = renderer.Scene(Attributes("red", "cube", "brick", "orbit", "fast"))


@pytest.fixture(scope="module")
def room():
    """Frames [T, H, W, 3] of an orbit through a textured room, and their truth."""
    return renderer.render(SCENE).movedim(1, -1).numpy(), renderer.truth(SCENE)


@pytest.fixture
def clips(room, tmp_path):
    """Two clips that can be scored, one of two frames and one that is no video."""
    return write_clips(tmp_path / "clips", room[0])


@pytest.fixture
def small(tmp_path):
    """The same, quicker to score."""
    return write_clips(tmp_path / "clips", moving(6, seed=3))


def write_clips(folder, frames):
    (folder / "sub").mkdir(parents=True)
    write_clip(folder / "room.mkv", frames)
    write_clip(folder / "sub" / "shift.mkv", moving(6))
    write_clip(folder / "two.mkv", moving(2))
    (folder / "none.mkv").write_bytes(b"no video")
    return folder


def score(clips, output, *more):
    argv = ["score", "--videos", clips, "--output", output, "--backend", "torch", "--jobs", 1, *more]
    return geometry.main([str(a) for a in argv])


def lines(output):
    rows = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    found = {row["video"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def report(output):
    return json.loads((output / "report.json").read_text())


def test_a_folder_is_scored_and_bad_clips_are_named(clips, room, tmp_path, capsys):
    assert score(clips, tmp_path / "out") == 0
    said = capsys.readouterr().out
    rows = lines(tmp_path / "out")
    assert sorted(rows) == ["none.mkv", "room.mkv", "sub/shift.mkv", "two.mkv"]
    expected = tracks.score_clip(torch.from_numpy(room[0]), "torch").record
    assert GeometryRecord.from_json(rows["room.mkv"]["record"]).dumps() == expected.dumps()
    assert rows["sub/shift.mkv"]["record"]["frames"] == 6
    assert rows["none.mkv"]["skipped"].startswith("none.mkv: damaged or not a video")
    assert rows["two.mkv"]["skipped"].startswith("two.mkv: ")
    assert "2" in rows["two.mkv"]["skipped"]
    for text in ("clip", "room.mkv", "sub/shift.mkv", expected.verdict, "skipped: two.mkv", "skipped: none.mkv"):
        assert text in said
    totals = report(tmp_path / "out")["totals"]
    assert (totals["clips"], totals["skipped"], totals["not reached"]) == (4, 2, 0)
    assert report(tmp_path / "out")["provenance"]["command"].startswith("python -m trainers.geometry score --videos clips")


def test_no_clip_that_can_be_read(small, tmp_path, capsys):
    assert score(small / "none.mkv", tmp_path / "out") == 1
    assert "skipped: none.mkv" in capsys.readouterr().out
    assert score(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "no such file or folder" in capsys.readouterr().err


def counted(monkeypatch):
    """Names of the clips that are scored from now on."""
    scored, plain = [], scorer.score_file
    monkeypatch.setattr(scorer, "score_file", lambda task: scored.append(task.name) or plain(task))
    return scored


def test_a_second_run_scores_what_is_new_or_changed(small, tmp_path, monkeypatch, capsys):
    assert score(small, tmp_path / "out") == 0
    before = lines(tmp_path / "out")
    scored = counted(monkeypatch)
    assert score(small, tmp_path / "out") == 0
    assert scored == ["none.mkv", "two.mkv"]
    assert lines(tmp_path / "out")["room.mkv"] == before["room.mkv"]
    write_clip(small / "sub" / "shift.mkv", moving(7))
    write_clip(small / "new.mkv", moving(5, seed=1))
    scored.clear()
    assert score(small, tmp_path / "out") == 0
    assert scored == ["new.mkv", "none.mkv", "sub/shift.mkv", "two.mkv"]
    assert lines(tmp_path / "out")["sub/shift.mkv"]["record"]["frames"] == 7
    capsys.readouterr()
    assert score(small, tmp_path / "out", "--frames", 4) == 2
    assert "scored with other settings (frames 81 against 4); give another --output, or --overwrite" in capsys.readouterr().err
    assert score(small, tmp_path / "out", "--frames", 4, "--overwrite") == 0
    assert lines(tmp_path / "out")["room.mkv"]["record"]["frames"] == 4


def test_a_killed_run_goes_on_behind_its_torn_line(small, tmp_path, monkeypatch, capsys):
    def interrupted(tasks, jobs):
        yield scorer.score_file(tasks[0])
        yield scorer.score_file(tasks[1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(geometry_score, "results", interrupted)
        assert score(small, tmp_path / "out") == 130
    assert "2 of 4 clips done; run the same command again to go on" in capsys.readouterr().err
    assert report(tmp_path / "out")["totals"]["not reached"] == 2
    path = tmp_path / "out" / "scores.jsonl"
    kept = lines(tmp_path / "out")["room.mkv"]
    with open(path, "ab") as f:
        f.write(b'{"video": "sub/shift.mkv", "rec')
    scored = counted(monkeypatch)
    assert score(small, tmp_path / "out") == 0
    assert scored == ["none.mkv", "sub/shift.mkv", "two.mkv"]
    assert lines(tmp_path / "out")["room.mkv"] == kept
    path.write_bytes(b"{damaged\n" + path.read_bytes())
    assert score(small, tmp_path / "out") == 2
    assert "scores.jsonl, line 1: damaged" in capsys.readouterr().err


def test_a_full_disk_leaves_whole_lines_only(small, tmp_path, monkeypatch, capsys):
    plain, calls = geometry_log.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(geometry_log.os, "fsync", full)
    assert score(small, tmp_path / "out") == 2
    assert "scores.jsonl: could not be written (No space left on device)" in capsys.readouterr().err
    assert list(lines(tmp_path / "out")) == ["none.mkv"]
    monkeypatch.undo()
    assert score(small, tmp_path / "out") == 0
    assert len(lines(tmp_path / "out")) == 4


def test_two_processes_find_what_one_does_and_finish_what_is_at_hand(small, tmp_path, monkeypatch, capsys):
    """Ctrl-C comes while the second half is being scored."""
    assert score(small, tmp_path / "one") == 0
    plain, calls = scorer.wait, []

    def interrupted(futures, return_when):
        calls.append(len(futures))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(futures, return_when="ALL_COMPLETED")

    monkeypatch.setattr(scorer, "wait", interrupted)
    write_clip(small / "unreached.mkv", moving(6, seed=4))
    argv = ["score", "--videos", str(small), "--output", str(tmp_path / "two"), "--backend", "torch", "--jobs", "2"]
    assert geometry.main(argv) == 130
    assert calls == [2, 2]
    assert "4 of 5 clips done; run the same command again to go on" in capsys.readouterr().err
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert {k: (v.get("record"), v.get("skipped")) for k, v in one.items()} == {
        k: (v.get("record"), v.get("skipped")) for k, v in two.items()
    }


@pytest.mark.parametrize(("count", "fps", "limit", "expected"), [(3, 16, 81, 3), (10, 25, 81, 10), (12, 8, 7, 7)])
def test_every_frame_is_read_at_the_clips_own_rate(tmp_path, count, fps, limit, expected):
    frames = moving(count)
    path, source = write_clip(tmp_path / "a.mkv", frames, fps), SourceReport("a.mkv")
    found = read_frames(path, source, limit)
    assert torch.equal(found, torch.from_numpy(np.stack(frames[:expected])))
    assert source.notes == []
    assert read_frames(path, source, limit, "144p").shape[1:] == (160, 208, 3)


def save(path, truth, frames=None, **changed):
    """An .npz of nine views of the truth; changed: arrays to replace, or to leave out (None)."""
    indices = np.arange(0, 17, 2)
    arrays = {
        "depth": truth.depth[indices].numpy(),
        "K": truth.K.expand(9, 3, 3).numpy(),
        "world_to_camera": truth.world_to_camera[indices].numpy(),
        "frame_indices": indices,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return path


def read(path, frames):
    return geometry_files.views_of(geometry_files.read(path), torch.from_numpy(frames).float() / 255)


def test_geometry_of_any_tool(room, tmp_path):
    frames, truth = room
    plain = read(save(tmp_path / "a.npz", truth), frames)
    assert plain.frame_indices == list(range(0, 17, 2))
    assert plain.frames == 17
    torch.testing.assert_close(plain.images, torch.from_numpy(frames[::2]).float() / 255)
    torch.testing.assert_close(plain.K, truth.K.expand(9, 3, 3))
    half = truth.depth[::2, ::2, ::2].numpy()
    scaled = truth.K.clone()
    scaled[:2] *= 0.5
    units = truth.K.clone()
    units[:2] /= 64
    poses = truth.world_to_camera[::2].numpy()
    variants = {
        "names of others": {
            "depth": None, "depths": truth.depth[None, ::2, ..., None].numpy(), "K": None, "world_to_camera": None,
            "intrinsic": truth.K.expand(1, 9, 3, 3).numpy(), "extrinsics": poses[None, :, :3],
        },
        "one K": {"K": truth.K.numpy()},
        "units of the picture": {"K": units.numpy()},
    }  # fmt: skip
    for name, changed in variants.items():
        found = read(save(tmp_path / "b.npz", truth, **changed), frames)
        for part in ("depth", "K", "world_to_camera", "images"):
            torch.testing.assert_close(getattr(found, part), getattr(plain, part), msg=f"{name}: {part}")
    for K in (truth.K, scaled, units):
        small = read(save(tmp_path / "c.npz", truth, depth=half, K=K.numpy()), frames)
        torch.testing.assert_close(small.K, scaled.expand(9, 3, 3))
        assert small.images.shape == (9, 32, 32, 3)
    seen = (255 - frames[::2]).transpose(0, 3, 1, 2)
    own = read(save(tmp_path / "d.npz", truth, images=seen), frames)
    torch.testing.assert_close(own.images, 1 - plain.images)


class Trap:
    """An object whose reading would leave a trace."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path(TRACE).write_text('run')".replace("TRACE", repr(Trap.trace)),))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": None}, "no 'depth' .* in it, nor depths; it holds K "),
        ({"frame_indices": None}, "geometry of a clip of 9 frames, the video has more"),
        ({"frame_indices": np.arange(12, 21)}, "names frame 17, the clip has 17"),
        ({"frame_indices": np.arange(8)}, "names 8 frames, the depth has 9 views"),
        ({"frame_indices": np.arange(9) + 0.5}, "expected whole numbers"),
        ({"K": np.zeros((9, 3, 3))}, "intrinsics of view 0"),
        ({"K": np.eye(4)[None].repeat(9, 0)}, r"expected \[S, 3, 3\]"),
        ({"K": np.eye(3)[None].repeat(4, 0)}, "K of shape"),
        ({"world_to_camera": np.eye(4)[None].repeat(9, 0)}, "identity"),
        ({"world_to_camera": np.zeros((9, 2, 4))}, r"\[S, 3, 4\] or \[S, 4, 4\]"),
        ({"depth": np.full((9, 64, 64), np.nan)}, "finite depth above zero in 0 of 9"),
        ({"depth": np.zeros((9, 64, 64))}, "finite depth above zero in 0 of 9"),
        ({"depth": np.array(["a"] * 9)}, "holds <U1, expected numbers"),
        ({"depth": np.ones((9, 64))}, r"'depth' has shape \[9, 64\], expected \[S, h, w\]"),
        ({"depth": np.ones((9, 64, 30))}, "depth maps of 30x64"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_geometry_that_cannot_be_used(room, tmp_path, changed, message):
    path = save(tmp_path / "a.npz", room[1], **changed)
    with pytest.raises(GeometryError, match=message) as e:
        read(path, room[0])
    assert "a.npz" in str(e.value)


def test_objects_in_an_npz_are_refused_and_not_run(room, tmp_path):
    Trap.trace = str(tmp_path / "trace")
    path = save(tmp_path / "a.npz", room[1], depth=np.array([Trap()], dtype=object))
    with pytest.raises(GeometryError, match="holds Python objects, none of which was run"):
        read(path, room[0])
    assert not (tmp_path / "trace").exists()
    for content in (b"", b"no archive", path.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(GeometryError, match=r"a\.npz: damaged or not an \.npz"):
            read(path, room[0])


def test_clips_with_geometry_get_the_dense_score(clips, room, tmp_path, capsys):
    save(tmp_path / "geo" / "room.npz", room[1])
    save(tmp_path / "geo" / "sub" / "shift.npz", room[1])
    assert score(clips, tmp_path / "out", "--geometry", tmp_path / "geo") == 0
    rows = lines(tmp_path / "out")
    record = GeometryRecord.from_json(rows["room.mkv"]["record"])
    assert record.dumps() == dense.score_views(read(tmp_path / "geo" / "room.npz", room[0])).record.dumps()
    assert record.scorer == DENSE
    assert math.isfinite(record.error)
    assert "shift.npz: 'frame_indices' names frame 6, the clip has 6" in rows["sub/shift.mkv"]["skipped"]
    # Geometry that was mended, and a clip whose geometry is gone, are scored again.
    (tmp_path / "geo" / "sub" / "shift.npz").unlink()
    save(tmp_path / "geo" / "room.npz", room[1], confidence=np.ones((9, 64, 64)))
    assert score(clips, tmp_path / "out", "--geometry", tmp_path / "geo") == 0
    again = lines(tmp_path / "out")
    assert again["room.mkv"]["geometry"] != rows["room.mkv"]["geometry"]
    assert again["sub/shift.mkv"]["record"]["scorer"] == TRACKS
    assert score(clips / "sub", tmp_path / "other", "--geometry", tmp_path / "geo") == 2
    assert "no file for any of the 1 clips; expected such as shift.npz" in capsys.readouterr().err


def test_geometry_of_our_node(room, tmp_path):
    frames, truth = room
    indices = [0, 4, 8, 12, 16]
    views = Views(None, truth.depth[indices], truth.K.expand(5, 3, 3), truth.world_to_camera[indices], None, indices, 17)
    path = tmp_path / "room.safetensors"
    view_files.save_views(path, views)
    saved = geometry_files.read(path)
    assert saved.frames == 18
    found = read(path, frames)
    torch.testing.assert_close(found.images, torch.from_numpy(frames[indices]).float() / 255)
    with pytest.raises(GeometryError, match="geometry of a clip of 17 frames, the video has 16"):
        read(path, frames[:16])
    save(tmp_path / "room.npz", truth)
    with pytest.raises(GeometryError, match="two files of geometry for one clip"):
        geometry_files.find(tmp_path, "room.mp4")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--frames", 2), "--frames must be 3 or more"),
        (("--jobs", -1), "--jobs must be 0"),
        (("--geometry", "nowhere"), "no such folder of geometry"),
        (("--geometry", ".", "--size", "144p"), "--size does not go with --geometry"),
        (("--geometry", ".", "--lpips", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--lpips", "vgg.safetensors"), "--lpips is used with --geometry only"),
    ],
)
def test_bad_arguments(small, tmp_path, capsys, more, message):
    assert score(small, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
