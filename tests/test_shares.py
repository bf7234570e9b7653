"""Shares of work: which items a process has, the files it writes, and what is refused."""

from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainers.running import results_log, shares
from trainers.running.accelerator import on_any_process
from trainers.running.device import DistributedContext
from trainers.running.shares import Share, ShareError


def parse(*argv, overwrite=False):
    parser = ArgumentParser()
    shares.add_arguments(parser, earlier=("--num_shards",))
    args = parser.parse_args([str(a) for a in argv])
    args.overwrite = overwrite
    return args


class Launched:
    """accelerate's PartialState as far as shares use it."""

    def __init__(self, broken=False):
        self.broken, self.waited, self.closed = broken, 0, 0

    def wait_for_everyone(self):
        if self.broken:
            raise RuntimeError("Connection closed by peer")
        self.waited += 1

    def destroy_process_group(self):
        self.closed += 1


@pytest.fixture
def launch(monkeypatch):
    """A function that makes this process one of a launcher."""

    def launched(rank, world, state=None):
        state = state or Launched()
        context = DistributedContext(torch.device("cpu"), rank, world, state)
        monkeypatch.setattr(shares, "init_distributed", lambda *_: context)
        return state

    return launched


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_every_item_belongs_to_one_share(count):
    items = list(range(10))
    parts = [Share(i, count).of(items) for i in range(count)]
    assert sorted(k for part in parts for k in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [k for k in items if k in parts[count // 2]] == parts[count // 2]


def test_each_share_has_its_own_file(tmp_path):
    path = tmp_path / "scores.jsonl"
    assert shares.WHOLE.path(path) == path
    assert Share(3, 8).path(path) == tmp_path / "scores-00003-of-00008.jsonl"
    for name in ("scores-00001-of-00002.jsonl", "scores-00000-of-00002.jsonl", "scores-old.jsonl", "my-scores.jsonl",
                 "scores-00000-of-00002.json", "scores-copy-00000-of-00002.jsonl", "scores-98765-of-99999.jsonl"):  # fmt: skip
        (tmp_path / name).touch()
    assert {p.name: n for p, n in shares.shard_files(path).items()} == {
        "scores-00000-of-00002.jsonl": (0, 2), "scores-00001-of-00002.jsonl": (1, 2),
        "scores-98765-of-99999.jsonl": (98765, 99999),
    }  # fmt: skip


def fill(path, *indices, count=5):
    results_log.write(path, [{"from": "whole"}])
    for i in indices:
        results_log.write(Share(i, count).path(path), [{"from": i}])


def test_rows_of_all_files_become_one_file(tmp_path):
    path = tmp_path / "scores.jsonl"
    assert shares.rows(path) == []
    fill(path, 4, 1)
    # A process that was killed left half a line.
    with open(Share(1, 5).path(path), "ab") as f:
        f.write(b'{"from"')
    found = shares.rows(path)
    assert found == [{"from": "whole"}, {"from": 1}, {"from": 4}]
    shares.settle(path, found)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.jsonl"]
    assert shares.rows(path) == found


def test_a_full_disk_keeps_the_shards_files(tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    fill(path, 0, 1)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(results_log, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        shares.settle(path, shares.rows(path))
    assert len(shares.rows(path)) == 3


def test_shares_together_remove_everything(tmp_path):
    path = tmp_path / "scores.jsonl"
    fill(path, *range(5))
    shares.remove(path, Share(1, 2))
    assert [row["from"] for row in shares.rows(path)] == ["whole", 0, 2, 4]
    shares.remove(path, Share(0, 2))
    assert not list(tmp_path.iterdir())
    fill(path, *range(5))
    shares.remove(path, shares.WHOLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--shard_index", 2, "--shard_count", 2), r"--shard_index 2 must lie between 0 and --shard_count - 1 \(1\)"),
        (("--shard_index", -1, "--shard_count", 2), "--shard_index -1 must lie between 0"),
        (("--shard_index", 0, "--shard_count", 0), "--shard_count must be 1 or more, got 0"),
        (("--shard_index", 0), "--shard_index 0 needs --shard_count"),
        (("--shard_count", 4), "--shard_count 4 needs --shard_index, from 0 to 3"),
        (("--num_shards", 4), "--shard_count 4 needs --shard_index"),
        (("--merge", "--shard_index", 0, "--shard_count", 4), "leave out --shard_index"),
    ],
)
def test_bad_arguments(argv, message):
    with pytest.raises(ShareError, match=message):
        shares.begin(parse(*argv), "cpu")


def test_merging_does_not_go_with_overwriting():
    with pytest.raises(ShareError, match="--merge gathers what --overwrite deletes"):
        shares.check(parse("--merge", overwrite=True))
    shares.check(parse("--merge"))
    shares.check(parse(overwrite=True))


def test_a_process_without_a_launcher():
    share, device = shares.begin(parse(), "cpu")
    assert (share, device) == (shares.WHOLE, torch.device("cpu"))
    assert share.whole
    assert share.finishes
    assert share.is_main
    share, _ = shares.begin(parse("--shard_index", 3, "--shard_count", 8), "cpu")
    assert (share.index, share.count, share.whole, share.finishes, share.is_main) == (3, 8, False, False, True)
    share.wait()
    for argv in (("--merge",), ("--merge", "--shard_count", 8), ("--shard_index", 0, "--shard_count", 1)):
        assert shares.begin(parse(*argv), "cpu")[0].whole


def test_a_process_of_a_launcher(launch):
    state = launch(2, 4)
    with shares.begin(parse(), "auto")[0] as share:
        assert (share.index, share.count, share.whole, share.finishes, share.is_main) == (2, 4, False, False, False)
        share.wait()
    assert (state.waited, state.closed) == (1, 1)
    launch(0, 4)
    share, _ = shares.begin(parse(), "auto")
    assert share.finishes
    assert share.is_main
    assert not share.whole


def test_a_launcher_and_a_job_array_at_once(launch):
    for argv, flag in ((("--shard_index", 1, "--shard_count", 2), "--shard_count"), (("--merge",), "--merge")):
        state = launch(1, 4)
        with pytest.raises(ShareError, match=f"{flag} is for commands without a launcher, but 4 processes were launched"):
            shares.begin(parse(*argv), "cpu")
        assert state.closed == 1
    launch(1, 4)
    share, _ = shares.begin(parse("--shard_index", 1, "--shard_count", 2), "cpu", nested=True)
    assert (share.index, share.count) == (5, 8)


def test_a_launcher_without_accelerate(monkeypatch):
    """Each process would take itself for the only one."""
    monkeypatch.setattr(shares, "init_distributed", lambda *_: DistributedContext(torch.device("cpu")))
    assert shares.begin(parse(), "cpu")[0].whole
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(ShareError, match="pip install accelerate"):
        shares.begin(parse(), "cpu")


def test_another_process_that_stops(launch):
    launch(0, 2, Launched(broken=True))
    share, _ = shares.begin(parse(), "cpu")
    with pytest.raises(ShareError, match="another process of this run has stopped"):
        share.wait()


def test_missing_shards_are_named(tmp_path):
    path = tmp_path / "scores.jsonl"
    shares.require_none([], 10, "clips", path, None)
    with pytest.raises(ShareError, match="2 of 10 clips are not done, those of shard 3 of 4; run it again with"):
        shares.require_none([3, 7], 10, "clips", path, 4)
    with pytest.raises(ShareError, match="those of shards 0, 2 of 4; run them again"):
        shares.require_none({8, 2}, 10, "clips", path, 4)
    with pytest.raises(ShareError, match=r"3 of 10 clips are not done; run the shards .*--merge --shard_count N names them"):
        shares.require_none([1, 2, 3], 10, "clips", path, None)
    # The files' names say how many shards there are, where they agree.
    fill(path, 0)
    with pytest.raises(ShareError, match="shard 1 of 5"):
        shares.require_none([1, 6], 10, "clips", path, None)
    results_log.write(Share(0, 3).path(path), [])
    with pytest.raises(ShareError, match="names them"):
        shares.require_none([1, 6], 10, "clips", path, None)


def test_a_shard_says_how_to_finish():
    said = shares.done_text(Share(2, 5), Path("out/s.jsonl"), "3 of 15 clips")
    assert said.startswith("out/s.jsonl: 3 of 15 clips, shard 2 of 5")
    assert "--merge in place of --shard_index" in said


@pytest.mark.parametrize(("mine", "others", "expected"), [(True, 0, True), (False, 1, True), (False, 0, False)])
def test_what_one_process_is_told_all_do(mine, others, expected):
    """A signal may reach one process only: the sum over processes decides."""
    accelerator = SimpleNamespace(num_processes=3, device="cpu", reduce=lambda t, reduction: t + others)
    assert on_any_process(accelerator, mine) is expected
    assert on_any_process(SimpleNamespace(num_processes=1), mine) is mine
