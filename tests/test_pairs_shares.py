"""`python -m trainers.pairs build` in several processes: scores and pairs are those of one process."""

import json
import os
import signal
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from trainers.kernels.latent_space import WAN21, WAN22
from trainers.kernels.shell_lcc.anchors import Anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold, save
from trainers.kernels.video.sizes import BUCKETS
from trainers.pairs import cli as pairs
from trainers.preferences.groups import Candidate
from trainers.scorers import shell_lcc
from trainers.scorers.cache import ScoreCache, file_identities, known_of, sorted_rows

from .launcher import launch
from .preference_material import append_record
from .test_encode import vae_file  # noqa: F401 (a fixture)
from .test_pairs import TEXT, build, latents, lines, models, record, records  # noqa: F401 (some are fixtures)
from .video_clips import moving, write_clip

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
KILLED = (
    "import os, signal, sys; from trainers.pairs import cli; from trainers.running import results_log\n"
    "add, count = results_log.Log.add, []\n"
    "def killed(self, row):\n"
    "    if len(count) == 4:\n"
    "        self.file.write(b'{\"candidate\": \"half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    "    count.append(1); add(self, row)\n"
    "results_log.Log.add = killed; cli.main(sys.argv[1:])"
)
LOOSE = ("--min_gap", 0, "--max_error", "inf", "--min_parallax_ratio", 0)


def python(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False
    )


def shards(groups, output, count, *more, indices=None):
    for index in indices or range(count):
        assert build(groups, output, *more, "--shard_index", index, "--shard_count", count) == 0


def outcome(output):
    """{name: content} of all that a build writes, without the time and the command in report.json."""
    found = {p.name: p.read_bytes() for p in sorted(output.iterdir())}
    found["report.json"] = json.loads(found["report.json"]) | {"provenance": None}
    return found


def by_shell(models):  # noqa: F811
    return ("--by", "geometry=1", "shell_lcc=2", "--manifold", models / "shell.safetensors", *LOOSE)


def other_shell(models):  # noqa: F811
    anchors = Anchors(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)), torch.ones(16, 16))
    save(ShellManifold(anchors, WAN21), models / "other.safetensors")
    return models / "other.safetensors"


def counted(monkeypatch):
    """The latents that the manifold scores from now on, as sums."""
    scored, plain = [], shell_lcc.distance_to_shell
    monkeypatch.setattr(shell_lcc, "distance_to_shell", lambda shell, z: scored.append(float(z.sum())) or plain(shell, z))
    return scored


def test_three_shards_choose_what_one_process_chooses(records, models, tmp_path, monkeypatch, capsys):  # noqa: F811
    one, three = tmp_path / "one", tmp_path / "three"
    scored = counted(monkeypatch)
    assert build(records, one, *by_shell(models)) == 0
    first, said = sorted(scored), capsys.readouterr().out
    scored.clear()
    shards(records, three, 3, *by_shell(models), indices=(2, 0, 1))
    assert sorted(scored) == first
    assert "2 of 4 groups scored, shard 0 of 3" in capsys.readouterr().out
    assert sorted(p.name for p in three.iterdir()) == [f"candidates-{i:05d}-of-00003.jsonl" for i in range(3)]
    scored.clear()
    assert build(records, three, *by_shell(models), "--merge") == 0
    assert scored == []
    assert capsys.readouterr().out == said.replace(str(one), str(three))
    assert outcome(one) == outcome(three)
    assert len(lines(three / "pairs.jsonl")) == 4
    assert len(lines(three / "candidates.jsonl")) == 12


def test_a_shard_without_videos_finds_the_settings_of_one_with(models, vae_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    """How videos are encoded belongs to the settings of all, since one group of the run has videos."""
    monkeypatch.setitem(BUCKETS, "144p", ((64, 48),))
    folder = tmp_path / "groups"
    for name in "ab":
        append_record(tmp_path / name, name, latents(2, ord(name)), WAN21)
        (folder / name).mkdir(parents=True)
        for i, path in enumerate(sorted((tmp_path / name / "latents").iterdir())):
            path.rename(folder / name / f"{i}.safetensors")
    for name in "vw":
        (folder / name).mkdir()
        for i in range(2):
            write_clip(folder / name / f"{i}.mkv", moving(5, seed=i + 2 * ord(name)))
    (folder / "w" / "2.mkv").write_bytes(b"no video")
    more = ("--by", "shell_lcc", "--manifold", models / "shell.safetensors", "--vae", vae_file)
    more += ("--size", "144p", "--frames", 5)
    assert build(folder, tmp_path / "one", *more, "--sheet_pairs", 0) == 0
    shards(folder, tmp_path / "four", 4, *more)
    scored = counted(monkeypatch)
    assert build(folder, tmp_path / "four", *more, "--sheet_pairs", 0, "--merge") == 0
    assert outcome(tmp_path / "one") == outcome(tmp_path / "four")
    assert scored == []
    skipped = json.loads((tmp_path / "four" / "report.json").read_text())["skipped"]
    assert list(skipped["shell_lcc"]) == ["w/2"]
    # A plain second run tries the broken clip again, and no other.
    assert build(folder, tmp_path / "four", *more, "--sheet_pairs", 0) == 0
    assert scored == []


def test_noise_does_not_depend_on_the_count(records, models, tmp_path):  # noqa: F811
    more = ("--by", "prism=1", "flow_residual=1", "--head", models / "head.safetensors", "--backbone", models / "dit",
            "--text_encoder", TEXT, "--draws", 1, "--levels", 0.5, *LOOSE)  # fmt: skip
    assert build(records, tmp_path / "one", *more) == 0
    shards(records, tmp_path / "two", 2, *more)
    assert build(records, tmp_path / "two", *more, "--merge") == 0
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


def test_a_killed_shard_goes_on_as_part_of_another_count(records, models, tmp_path, monkeypatch):  # noqa: F811
    """Shard 0 of 2 dies in its fifth line; three shards do what is left."""
    out = tmp_path / "out"
    argv = ["build", "--groups", records, "--output", out, "--jobs", 1, "--backend", "torch", "--device", "cpu",
            *by_shell(models), "--shard_index", 0, "--shard_count", 2]  # fmt: skip
    ended = python("-c", KILLED, *argv)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    cut = out / "candidates-00000-of-00002.jsonl"
    kept = cut.read_bytes()
    assert kept.count(b"\n") == 4
    assert not kept.endswith(b"\n")
    scored = counted(monkeypatch)
    shards(records, out, 3, *by_shell(models), indices=(1, 2, 0))
    assert len(scored) == 12 - 4
    assert cut.read_bytes() == kept
    assert build(records, out, *by_shell(models), "--merge") == 0
    assert build(records, tmp_path / "one", *by_shell(models)) == 0
    assert outcome(out) == outcome(tmp_path / "one")


def test_one_process_goes_on_with_what_shards_have_scored(records, models, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    shards(records, out, 4, *by_shell(models), indices=(1, 3))
    scored = counted(monkeypatch)
    assert build(records, out, *by_shell(models)) == 0
    assert len(scored) == 6
    assert build(records, tmp_path / "one", *by_shell(models)) == 0
    assert outcome(out) == outcome(tmp_path / "one")
    # Scores by other settings hide none of these, in whatever file they are.
    other = (*by_shell(models), "--manifold", other_shell(models))
    shards(records, out, 2, *other)
    scored.clear()
    shards(records, out, 3, *by_shell(models))
    assert build(records, out, *other, "--merge") == 0
    assert build(records, out, *by_shell(models)) == 0
    assert scored == []
    assert len(lines(out / "candidates.jsonl")) == 24


def test_processes_of_a_launcher_share_the_groups(records, models, tmp_path):  # noqa: F811
    out = tmp_path / "two"
    # The main process finds its share done, and has to wait.
    shards(records, out, 2, *by_shell(models), indices=(0,))
    argv = ["build", "--groups", records, "--output", out, "--jobs", 1, "--backend", "torch", "--device", "cpu"]
    ended = launch("trainers.pairs.cli", [*argv, *by_shell(models)], tmp_path / "said")
    assert ended.codes == [0, 0], ended.stderr
    assert ended.stdout.count("4 pairs of 4 groups") == 1
    assert build(records, tmp_path / "one", *by_shell(models)) == 0
    assert outcome(out) == outcome(tmp_path / "one")


def test_a_missing_shard_is_named(records, models, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    shards(records, out, 3, *by_shell(models), indices=(0, 1))
    assert build(records, out, *by_shell(models), "--merge") == 2
    assert "candidates.jsonl: 1 of 4 groups are not done, those of shard 2 of 3; run it again" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["candidates-00000-of-00003.jsonl", "candidates-00001-of-00003.jsonl"]
    # What was scored with another setting is missing as well.
    shards(records, out, 3, *by_shell(models), indices=(2,))
    assert build(records, out, *by_shell(models), "--manifold", other_shell(models), "--merge") == 2
    assert "4 of 4 groups are not done, those of shards 0, 1, 2 of 3" in capsys.readouterr().err
    append_record(records, "new", latents(2, 9), WAN21, geometry=[record(0.1), record(0.4)])
    assert build(records, out, *by_shell(models), "--merge") == 2
    assert "1 of 5 groups are not done, those of shard 1 of 3" in capsys.readouterr().err


def test_a_shard_may_have_nothing_but_clips_that_cannot_be_scored(records, models, tmp_path, capsys):  # noqa: F811
    append_record(tmp_path / "other", "other", latents(2, 7, (48, 3, 6, 8)), WAN22)
    both = [records, tmp_path / "other"]
    out = tmp_path / "out"

    def run(*more):
        argv = ["build", "--groups", *both, "--output", out, "--device", "cpu", "--by", "shell_lcc", "--manifold",
                models / "shell.safetensors", *LOOSE, *more]  # fmt: skip
        return pairs.main([str(a) for a in argv])

    for index in range(5):
        assert run("--shard_index", index, "--shard_count", 5) == 0
    capsys.readouterr()
    assert run("--merge") == 0
    assert len(json.loads((out / "report.json").read_text())["skipped"]["shell_lcc"]) == 2
    both = [tmp_path / "other"]
    assert run("--merge") == 2
    assert "--by shell_lcc: none of 2 clips could be scored" in capsys.readouterr().err


def test_rows_of_several_files_are_one_memory(tmp_path):
    """A score hides a failure, another setting hides nothing, and what is kept does not depend on the order of the files."""
    (tmp_path / "a.pt").write_bytes(b"a")
    candidate = Candidate("g/a", None, tmp_path / "a.pt")
    row = {"candidate": "g/a", "scorer": "shell_lcc", "settings": "now", "files": file_identities(candidate)}
    rows = [row | {"value": 1.0}, row | {"skipped": "g/a: away"}, row | {"settings": "before", "value": 2.0},
            row | {"files": [None, [1, 1]], "value": 3.0}, {"candidate": "g/a"}]  # fmt: skip
    for order in permutations(rows):
        known = known_of(order)
        gathering = ScoreCache(known, None, [])
        assert gathering.find(candidate, "shell_lcc", "now") == rows[0]
        assert gathering.find(candidate, "shell_lcc", "before") == rows[2]
        kept = sorted_rows(known)
        assert kept == sorted_rows(known_of(rows))
        assert len(kept) == 3
        assert all(r in kept for r in (rows[0], rows[2], rows[3]))
    # A failure alone is tried again, but not when scores are gathered; a score that nobody has is missing.
    known = known_of(rows[1:])
    assert ScoreCache(known, "a log", []).find(candidate, "shell_lcc", "now") is None
    gathering = ScoreCache(known, None, [])
    assert gathering.find(candidate, "shell_lcc", "now") == rows[1]
    assert gathering.missing == set()
    assert "not scored" in gathering.find(candidate, "shell_lcc", "later")["skipped"]
    assert gathering.missing == {"g/a"}
