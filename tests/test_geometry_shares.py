"""`python -m trainers.geometry score` in several processes: what they write together is what one writes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.scorers import geometry_files

pytest.importorskip("av")

from .test_geometry_score import counted, lines, report, score
from .video_clips import moving, write_clip

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# Of a process that kills itself after two clips.
KILLED = (
    "import os, signal, sys; from trainers.geometry import cli; from trainers.running import results_log\n"
    "add, count = results_log.Log.add, []\n"
    "def killed(self, row):\n"
    "    if len(count) == 2:\n"
    "        self.file.write(b'{\"video\": \"half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    "    count.append(1); add(self, row)\n"
    "results_log.Log.add = killed; cli.main(sys.argv[1:])"
)


@pytest.fixture
def clips(tmp_path):
    """Seven clips, one of which is no video."""
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for i in range(6):
        write_clip(folder / ("sub" if i % 2 else "") / f"{i}.mkv", moving(5, seed=i))
    (folder / "none.mkv").write_bytes(b"no video")
    return folder


def python(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False
    )


def command(clips, output, *more):
    return ["score", "--videos", clips, "--output", output, "--backend", "torch", "--jobs", 1, *more]


def without_times(output):
    """The lines and the report without what a clock decides."""
    rows = [row | {"seconds": 0} for row in map(json.loads, (output / "scores.jsonl").read_text().splitlines())]
    return rows, report(output) | {"seconds": 0, "provenance": None}


def shard(clips, output, index, count, *more):
    return score(clips, output, "--shard_index", index, "--shard_count", count, *more)


def test_three_shards_find_what_one_process_finds(clips, tmp_path, monkeypatch, capsys):
    out = tmp_path / "three"
    assert score(clips, tmp_path / "one") == 0
    table = capsys.readouterr().out.replace(str(tmp_path / "one"), str(out))
    scored = counted(monkeypatch)
    for index in (2, 0, 1):
        assert shard(clips, out, index, 3) == 0
    said = capsys.readouterr().out
    assert "3 of 7 clips, shard 0 of 3" in said
    assert "--merge in place of --shard_index" in said
    assert sorted(p.name for p in out.iterdir()) == [f"scores-{i:05d}-of-00003.jsonl" for i in range(3)]
    assert sorted(scored) == sorted({*scored}) == sorted(lines(tmp_path / "one"))
    scored.clear()
    assert score(clips, out, "--merge") == 0
    assert scored == []
    assert capsys.readouterr().out == table
    assert sorted(p.name for p in out.iterdir()) == ["report.json", "scores.jsonl"]
    assert without_times(out) == without_times(tmp_path / "one")


def test_a_killed_shard_goes_on_as_part_of_another_count(clips, tmp_path, monkeypatch):
    """Shard 0 of 2 dies in its third line; then four shards do the rest, and one more time all is found."""
    out = tmp_path / "out"
    ended = python("-c", KILLED, *command(clips, out, "--shard_index", 0, "--shard_count", 2))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    done = sorted(json.loads(line)["video"] for line in (out / "scores-00000-of-00002.jsonl").read_text().splitlines()[:2])
    assert done == ["0.mkv", "4.mkv"]
    kept = [json.loads(line) for line in (out / "scores-00000-of-00002.jsonl").read_text().splitlines()[:2]]
    scored = counted(monkeypatch)
    for index in range(4):
        assert shard(clips, out, index, 4) == 0
    assert sorted(scored) == sorted(set(lines_of_all(out)) - set(done))
    assert score(clips, out, "--merge") == 0
    assert sorted(p.name for p in out.iterdir()) == ["report.json", "scores.jsonl"]
    assert score(clips, tmp_path / "one") == 0
    assert without_times(out) == without_times(tmp_path / "one")
    assert [row for row in lines(out).values() if row["video"] in done] == kept


def lines_of_all(output):
    """Names of the clips in all files, without lines that were cut off."""
    found = []
    for path in output.glob("scores*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                found.append(json.loads(line)["video"])
    return found


def test_a_killed_shard_goes_on_in_one_process(clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert shard(clips, out, 1, 3) == 0
    done = lines_of_all(out)
    assert len(done) == 2
    scored = counted(monkeypatch)
    assert score(clips, out) == 0
    assert sorted([*scored, *done]) == sorted(lines(out))
    assert [p.name for p in sorted(out.iterdir())] == ["report.json", "scores.jsonl"]


def test_a_missing_shard_is_named(clips, tmp_path, capsys):
    out = tmp_path / "out"
    for index in (0, 2):
        assert shard(clips, out, index, 3) == 0
    assert score(clips, out, "--merge") == 2
    assert "scores.jsonl: 2 of 7 clips are not done, those of shard 1 of 3; run it again" in capsys.readouterr().err
    assert not (out / "scores.jsonl").exists()
    # A clip that changed since is not done either.
    assert shard(clips, out, 1, 3) == 0
    write_clip(clips / "0.mkv", moving(6, seed=9))
    assert score(clips, out, "--merge") == 2
    assert "1 of 7 clips are not done, those of shard 0 of 3" in capsys.readouterr().err
    assert shard(clips, out, 0, 3) == 0
    assert score(clips, out, "--merge") == 0
    assert lines(out)["0.mkv"]["record"]["frames"] == 6


def test_shards_that_overwrite_leave_nothing_old(clips, tmp_path, capsys):
    out = tmp_path / "out"
    for index in range(3):
        assert shard(clips, out, index, 3) == 0
    assert score(clips, out) == 0
    for index in range(3):
        assert shard(clips, out, index, 3, "--frames", 4) == 2
    assert "scored with other settings (frames 81 against 4)" in capsys.readouterr().err
    for index in (1, 0):
        assert shard(clips, out, index, 2, "--frames", 4, "--overwrite") == 0
    assert score(clips, out, "--merge", "--frames", 4) == 0
    assert {row["record"]["frames"] for row in lines(out).values() if "record" in row} == {4}


def test_more_shards_than_clips(clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(geometry_files, "score_file", None)
    assert shard(clips, out, 9, 10) == 0
    assert (out / "scores-00009-of-00010.jsonl").read_bytes() == b""


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2)])
def test_a_record_counts_whatever_file_says_that_the_clip_was_skipped(clips, tmp_path, monkeypatch, first, second):
    """A clip that could not be read once, as on a disk that was away, is scored by the next shard that has it."""
    plain, out = geometry_files.score_file, tmp_path / "out"

    def away(task):
        row = plain(task)
        return {k: v for k, v in row.items() if k != "record"} | {"skipped": "0.mkv: away"} if task.name == "0.mkv" else row

    with monkeypatch.context() as patched:
        patched.setattr(geometry_files, "score_file", away)
        for index in range(first):
            assert shard(clips, out, index, first) == 0
    scored = counted(monkeypatch)
    for index in range(second):
        assert shard(clips, out, index, second) == 0
    assert scored == ["0.mkv", "none.mkv"]
    assert score(clips, out, "--merge") == 0
    assert "record" in lines(out)["0.mkv"]
    assert report(out)["totals"]["skipped"] == 1
