"""Preference records: what is written is read back, by trainers too, and nothing is ever half there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainers.kernels.files import header as formats
from trainers.kernels.files.preference_records import RecordError, read
from trainers.kernels.geometry.record import TRACKS, UNDETERMINED, VERSIONS, GeometryRecord
from trainers.kernels.latent_space import WAN21, LatentSpaceError
from trainers.latents import read as latent_data

from .preference_material import preference_folder

ROOT = Path(__file__).resolve().parents[1]
APPEND = """
import sys, torch
from tests.preference_material import append_record
from trainers.kernels.latent_space import WAN21
torch.manual_seed(0)
z = torch.randn(2, 16, 2, 4, 4)
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    append_record(sys.argv[1], f"{sys.argv[2]} {i} " + 4000 * sys.argv[2], z, WAN21, seeds=[i, None])
"""


@pytest.fixture
def records(pack):
    """The module that appends."""
    return preference_folder()


def geometry(score=0.7):
    measured = {"error": 0.3, "residual": float("nan")}
    return GeometryRecord(TRACKS, VERSIONS[TRACKS], score, UNDETERMINED, "why", measured, 9, [0, 4], [0.1, 0.2])


def latents(count=2, seed=0):
    return torch.randn(count, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def process(folder, word, count):
    command = [sys.executable, "-c", APPEND, str(folder), word, str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_what_is_written_is_read_back(tmp_path, records):
    name = records.append(
        tmp_path / "new" / "set", "a fox", latents(), WAN21, negative="blur", model="wan", seeds=[7, None],
        scores={"prism": [0.25, -1.5]}, geometry=[geometry(), None], preference=(1, 0),
    )  # fmt: skip
    (record,) = read(tmp_path / "new" / "set")
    assert (record.id, record.prompt, record.negative, record.model) == (name, "a fox", "blur", "wan")
    assert record.preference == (1, 0)
    first, second = record.candidates
    assert (first.seed, first.scores) == (7, {"prism": 0.25})
    assert (second.seed, second.scores, second.geometry) == (None, {"prism": -1.5}, None)
    assert first.geometry.to_json() == geometry().to_json()
    assert read(tmp_path / "new" / "set" / "records.jsonl") == read(tmp_path / "new" / "set")


def test_trainers_read_the_latents(tmp_path, records):
    z = latents(3)
    record = records.append(tmp_path, "a fox", z, WAN21, seeds=[1, 2, 3])
    refs = latent_data.list_clips([tmp_path / "latents"])
    assert [r.clip_id for r in refs] == [f"{record}-{i}" for i in range(3)]
    assert [r.path for r in refs] == [c.latent for c in read(tmp_path)[0].candidates]
    for ref, item in zip(refs, z, strict=True):
        assert torch.equal(latent_data.read_clip(ref), item)
    assert refs[0].entry["video"] == refs[2].entry["video"] == record
    assert refs[0].entry["frames"] == 9


def test_a_latent_whose_line_was_lost_still_says_what_it_is(tmp_path, records):
    records.append(tmp_path, "a fox", latents(1), WAN21, model="wan", seeds=[5], scores={"prism": [0.5]})
    (path,) = (tmp_path / "latents").iterdir()
    said = formats.read_header(path, "latents").provenance
    assert (said["prompt"], said["model"], said["seed"], said["scores"]) == ("a fox", "wan", 5, {"prism": 0.5})


def test_ids_sort_by_time(tmp_path, records):
    names = [records.append(tmp_path, str(i), latents(1), WAN21) for i in range(5)]
    assert names == sorted(set(names))
    assert [r.prompt for r in read(tmp_path)] == list("01234")


@pytest.mark.parametrize("kept", [1, 60, -1])
def test_a_torn_last_line_is_passed_over_and_then_removed(tmp_path, caplog, kept, records):
    for prompt in ("first", "torn" + 70_000 * "x"):
        records.append(tmp_path, prompt, latents(1), WAN21)
    path = tmp_path / "records.jsonl"
    first, torn = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + torn[:kept])
    assert [r.prompt for r in read(tmp_path)] == ["first"]
    assert "the last line is incomplete" in caplog.text
    records.append(tmp_path, "third", latents(1), WAN21)
    assert [r.prompt for r in read(tmp_path)] == ["first", "third"]
    assert path.read_bytes().startswith(first + b'\n{"candidates"')


def test_a_whole_last_line_without_its_end_is_kept(tmp_path, records):
    records.append(tmp_path, "first", latents(1), WAN21)
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(read(tmp_path)) == 1
    records.append(tmp_path, "second", latents(1), WAN21)
    assert [r.prompt for r in read(tmp_path)] == ["first", "second"]


def test_two_processes_append_at_once(tmp_path):
    running = [process(tmp_path, word, 25) for word in "ab"]
    assert [p.wait(60) for p in running] == [0, 0]
    found = [r.prompt.split()[:2] for r in read(tmp_path)]
    assert sorted(found) == sorted([word, str(i)] for word in "ab" for i in range(25))
    assert len(latent_data.list_clips([tmp_path / "latents"])) == 100


def test_a_process_killed_in_the_middle_leaves_whole_records(tmp_path, records):
    running = process(tmp_path, "a", 100_000)
    running.stdout.readline()
    deadline = time.monotonic() + 30
    while len(files(tmp_path)) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    running.wait(30)
    before = len(read(tmp_path))
    assert before > 5
    records.append(tmp_path, "after", latents(1), WAN21)
    found = read(tmp_path)
    assert len(found) == before + 1
    for candidate in (c for r in found for c in r.candidates):
        (ref,) = latent_data.list_clips([candidate.latent])
        latent_data.read_clip(ref)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def only_a_part(descriptor, data, write=os.write):
    return write(descriptor, data[: len(data) // 2])


@pytest.mark.parametrize("broken", [full, only_a_part])
@pytest.mark.parametrize("there", [0, 1])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, broken, there, records):
    for _ in range(there):
        records.append(tmp_path, "first", latents(), WAN21)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with monkeypatch.context() as m:
        m.setattr(records.os, "write", broken)
        with pytest.raises(OSError, match=r"records\.jsonl: .*nothing was added"):
            records.append(tmp_path, "second", latents(), WAN21)
    (tmp_path / "records.jsonl").touch()
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before | (
        {} if there else {"records.jsonl": b""}
    )
    records.append(tmp_path, "third", latents(), WAN21)
    assert read(tmp_path)[-1].prompt == "third"


def test_a_disk_that_fills_with_the_latents_leaves_none_of_them(tmp_path, monkeypatch, records):
    calls = []

    def second_fails(path, *rest, write=formats.write):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *rest)

    latents_file = sys.modules["intrinsic_reward.kernels.files.latents"]
    monkeypatch.setattr(latents_file.header, "write", second_fails)
    with pytest.raises(OSError, match=r"No space.*-1\.safetensors"):
        records.append(tmp_path, "a", latents(), WAN21)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: damaged"),
        ("[1]", "line 2: damaged"),
        ('{"version": 1}', "line 2: damaged.*created"),
        ('{"version": 2}', "line 2: version 2, this pack reads up to 1"),
    ],
)
def test_another_damaged_line_is_named(tmp_path, line, message, records):
    for _ in range(2):
        records.append(tmp_path, "a", latents(1), WAN21)
    path = tmp_path / "records.jsonl"
    first, last = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n{last}\n")
    with pytest.raises(RecordError, match=f"records.jsonl, {message}"):
        read(tmp_path)


def test_missing_files_are_named(tmp_path, records):
    with pytest.raises(FileNotFoundError, match=r"records\.jsonl: no such file"):
        read(tmp_path)
    records.append(tmp_path, "a", latents(1), WAN21)
    (path,) = (tmp_path / "latents").iterdir()
    path.unlink()
    with pytest.raises(RecordError, match=f"line 1: its latents .*{path.name} are missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.zeros(16, 2, 4, 4)}, r"found shape \[16, 2, 4, 4\]"),
        ({"latents": torch.full((2, 16, 2, 4, 4), float("nan"))}, "latents: found NaN"),
        ({"seeds": [1]}, "seeds: found 1 for 2"),
        ({"scores": {"prism": [1.0, 2.0, 3.0]}}, "scores 'prism': found 3 for 2"),
        ({"scores": {"prism": [1.0, float("nan")]}}, "scores 'prism'.*finite"),
        ({"geometry": [None]}, "geometry: found 1 for 2"),
        ({"preference": (0, 0)}, "two different candidates"),
        ({"preference": (0, 2)}, "two different candidates of 0 to 1"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path, changes, message, records):
    arguments = {"prompt": "a", "latents": latents(), "space": WAN21} | changes
    with pytest.raises(records.preference_records.RecordError, match=message):
        records.append(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()
    with pytest.raises(LatentSpaceError, match="expected 16 channels"):
        records.append(tmp_path / "set", "a", torch.zeros(2, 48, 2, 4, 4), WAN21)


def test_a_preference_of_no_candidate_is_damage(tmp_path, records):
    records.append(tmp_path, "a", latents(), WAN21, preference=(0, 1))
    path = tmp_path / "records.jsonl"
    plain = json.loads(path.read_text())
    plain["preference"]["winner"] = 5
    path.write_text(json.dumps(plain) + "\n")
    with pytest.raises(RecordError, match=r"line 1: damaged.*\(5, 1\) among 2"):
        read(tmp_path)


class WindowsLocks:
    """Stands in for msvcrt: the first attempt to lock fails, as after ten seconds of waiting."""

    LK_LOCK, LK_UNLCK = 1, 0

    def __init__(self):
        self.calls = []

    def locking(self, descriptor, mode, count):
        self.calls.append((mode, count, os.lseek(descriptor, 0, os.SEEK_CUR)))
        if len(self.calls) == 1:
            raise OSError(errno.EDEADLK, "resource deadlock avoided")


def test_on_windows_one_byte_far_behind_the_lines_is_locked_and_released(tmp_path, monkeypatch, records):
    locks = WindowsLocks()
    monkeypatch.setattr(records, "fcntl", None)
    monkeypatch.setattr(records, "msvcrt", locks)
    records.append(tmp_path, "first", latents(1), WAN21)
    assert locks.calls == [(1, 1, 1 << 40), (1, 1, 1 << 40), (0, 1, 1 << 40)]
    assert [r.prompt for r in read(tmp_path)] == ["first"]
    assert (tmp_path / "records.jsonl").stat().st_size < 1 << 16


def test_without_any_locks_records_are_written_all_the_same(tmp_path, monkeypatch, records, caplog):
    monkeypatch.setattr(records, "msvcrt", None)
    if records.fcntl is not None:
        monkeypatch.setattr(records.fcntl, "flock", full)
        records.append(tmp_path, "first", latents(1), WAN21)
        assert "this file system has no locks" in caplog.text
    monkeypatch.setattr(records, "fcntl", None)
    records.append(tmp_path, "second", latents(1), WAN21)
    assert [r.prompt for r in read(tmp_path)][-1] == "second"


def test_a_record_survives_its_line(tmp_path, records):
    """What to_line writes parse_line reads, with paths relative to the folder that the line is in."""
    files = records.preference_records
    record = files.new_record(tmp_path / "a", "a fox", latents(), WAN21, seeds=[3, None], preference=(1, 0))
    line = files.to_line(record, tmp_path / "a")
    assert files.parse_line(line, tmp_path / "a", "here") == record
    moved = files.parse_line(line, tmp_path / "b", "here")
    assert [c.latent for c in moved.candidates] == [tmp_path / "b" / "latents" / c.latent.name for c in record.candidates]
    with pytest.raises(files.RecordError, match="here: damaged"):
        files.parse_line(line[:-10], tmp_path, "here")


def test_one_candidates_file_is_described_and_read(tmp_path):
    from trainers.kernels.files import latents as files
    from trainers.kernels.files.header import FormatError

    z = torch.randn(16, 2, 4, 4)
    path = tmp_path / "one.safetensors"
    files.write_latents(path, {"a": z.half()}, WAN21, {"a": {}})
    assert files.describe_one(path) == (WAN21, (16, 2, 4, 4))
    assert torch.equal(files.read_one(path), z.half().float())
    files.write_latents(path, {"a": z, "b": z}, WAN21, {"a": {}, "b": {}})
    with pytest.raises(FormatError, match="holds 2 clips, expected the one normalised clip of a candidate"):
        files.describe_one(path)
    files.write_latents(path, {"a": z * torch.nan}, WAN21, {"a": {}})
    with pytest.raises(FormatError, match="one.safetensors: contains NaN or infinite values"):
        files.read_one(path)
