"""`python -m trainers.prism collect` in several processes: every run is the run that one process would have made."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from trainers.kernels.files import header as formats
from trainers.kernels.files import preference_records
from trainers.kernels.latent_space import WAN21
from trainers.latents.read import list_clips, read_clip
from trainers.pairs import cli as pairs
from trainers.preferences import manifest
from trainers.prism import cli as prism
from trainers.prism import collect as module

from .launcher import launch
from .preference_material import append_record
from .test_prism_train import backbone  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
PROMPTS = ("a cat", "a dog", "a fox", "an owl", "a yak")
KILLED = (
    # The convolutions of the other runs, which round differently on some processors.
    "from tests import fast_convolutions; fast_convolutions.use()\n"
    "import os, signal, sys; from trainers.kernels.files import header; from trainers.prism import cli\n"
    "save, count = header.save_file, []\n"
    "def killed(tensors, path, metadata):\n"
    "    if 'latents-' in path:\n"
    "        if count:\n"
    "            open(path, 'wb').write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    "        count.append(1)\n"
    "    save(tensors, path, metadata=metadata)\n"
    "header.save_file = killed; cli.main(sys.argv[1:])"
)


@pytest.fixture
def texts(tmp_path):
    g = torch.Generator().manual_seed(0)
    found = {name: torch.randn(3 + i, 24, generator=g) for i, name in enumerate((*PROMPTS, "bad"))}
    formats.write(tmp_path / "t.safetensors", found, formats.Header("texts", WAN21))
    return tmp_path / "t.safetensors"


@pytest.fixture
def sampled(monkeypatch):
    """Seeds of the runs that are sampled from now on in this process."""
    found, plain = [], module._runs
    monkeypatch.setattr(module, "_runs", lambda *args: found.extend(args[3]) or plain(*args))
    return found


def arguments(backbone, texts, out, *more):  # noqa: F811
    argv = ["collect", "--backbone", backbone, "--texts", texts, "--output", out, "--negative", "bad", "--seeds", 2,
            "--levels", 0.9, "--device", "cpu", "--width", 64, "--height", 32, "--frames", 5, "--steps", 3, "--cfg", 3,
            "--score", "flow_residual", *more]  # fmt: skip
    return [str(a) for a in argv]


def collect(*args):
    return prism.main(arguments(*args))


def shard(index, count):
    return ("--shard_index", index, "--shard_count", count)


def contents(folder):
    """{file: (tensors, what its header says of the clips and settings)}, or bytes of a file that is no safetensors."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            tensors, header = formats.read(path, "latents" if path.name.startswith("latents") else "texts")
            found[path.name] = ({k: v.numpy().tobytes() for k, v in tensors.items()}, header.config)
        else:
            found[path.name] = path.read_bytes()
    return found


def test_three_shards_sample_what_one_process_samples(backbone, texts, tmp_path, sampled, capsys):  # noqa: F811
    one, three = tmp_path / "one", tmp_path / "three"
    assert collect(backbone, texts, one) == 0
    said, seeds = capsys.readouterr().out, sorted(sampled)
    assert len(set(seeds)) == 10
    sampled.clear()
    for index in (1, 2):
        assert collect(backbone, texts, three, *shard(index, 3)) == 0
    assert "2 of 5 prompts, 2 runs each, shard 1 of 3" in capsys.readouterr().out
    assert not (three / "scores.jsonl").exists()
    # The shard that completes the last prompt finishes.
    assert collect(backbone, texts, three, *shard(0, 3)) == 0
    assert capsys.readouterr().out == said.replace(str(one), str(three))
    assert sorted(sampled) == seeds
    assert len(contents(one)) == 5 + 2
    assert contents(one) == contents(three)
    sampled.clear()
    (three / "scores.jsonl").unlink()
    assert collect(backbone, texts, three, "--merge") == 0
    assert sampled == []
    assert contents(one) == contents(three)


def test_a_killed_shard_goes_on_as_part_of_another_count(backbone, texts, tmp_path, sampled):  # noqa: F811
    """Shard 0 of 2 dies while it writes its second prompt."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, *arguments(backbone, texts, out, *shard(0, 2))]
    ended = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (kept,) = out.glob("latents-*.safetensors")
    before = kept.read_bytes()
    for index in (2, 0, 1):
        assert collect(backbone, texts, out, *shard(index, 3)) == 0
    assert len(sampled) == len(set(sampled)) == 8
    assert kept.read_bytes() == before
    for path in out.glob(".*.partial"):
        path.unlink()
    assert collect(backbone, texts, tmp_path / "one") == 0
    assert contents(out) == contents(tmp_path / "one")


def test_processes_of_a_launcher_share_the_prompts(backbone, texts, tmp_path):  # noqa: F811
    out = tmp_path / "two"
    # The main process finds its share done, and has to wait.
    assert collect(backbone, texts, out, *shard(0, 2)) == 0
    ended = launch("trainers.prism.cli", arguments(backbone, texts, out), tmp_path / "said")
    assert ended.codes == [0, 0], ended.stderr
    assert ended.stdout.count("5 prompts, 2 runs each") == 1
    assert collect(backbone, texts, tmp_path / "one") == 0
    assert contents(out) == contents(tmp_path / "one")


def test_a_missing_shard_is_named(backbone, texts, tmp_path, sampled, capsys):  # noqa: F811
    out = tmp_path / "out"
    for index in (0, 2):
        assert collect(backbone, texts, out, *shard(index, 3)) == 0
    sampled.clear()
    assert collect(backbone, texts, out, "--merge", "--shard_count", 3) == 2
    assert "2 of 5 prompts are not done, those of shard 1 of 3; run it again with --shard_index I" in capsys.readouterr().err
    assert collect(backbone, texts, out, "--merge") == 2
    assert "2 of 5 prompts are not done; run the shards that are missing again" in capsys.readouterr().err
    assert sampled == []
    # Without --merge one process does what is left.
    assert collect(backbone, texts, out) == 0
    assert len(sampled) == 4


def test_shards_with_other_settings_are_not_merged(backbone, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert collect(backbone, texts, out) == 0
    assert collect(backbone, texts, out, "--cfg", 4, "--merge") == 2
    assert "made with another cfg" in capsys.readouterr().err
    path = sorted(out.glob("latents-*"))[2]
    tensors, header = formats.read(path, "latents")
    header.config["settings"]["backbone"] = {"of": "another model"}
    formats.write(path, tensors, header)
    assert collect(backbone, texts, out, "--merge") == 2
    assert f"{path}: made with another backbone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--part", "1/2", "--shard_index", 0), "--part is the same as --shard_index"),
        (("--shard_index", 3, "--shard_count", 2), "between 0 and --shard_count - 1 (1)"),
        (("--merge", "--part", "1/2"), "leave out --shard_index"),
    ],
)
def test_bad_arguments(backbone, texts, tmp_path, capsys, more, message):  # noqa: F811
    assert collect(backbone, texts, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shard_without_prompts_loads_no_model(backbone, texts, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(module.wan_dit, "load", None)
    assert collect(backbone, texts, tmp_path / "out", *shard(5, 6)) == 0
    assert "0 of 5 prompts" in capsys.readouterr().out


def test_runs_become_preference_records_whatever_the_count(backbone, texts, tmp_path, capsys):  # noqa: F811
    """Pairs by the scores of the records; a candidate's latents are its run's."""
    one, two, records = tmp_path / "one", tmp_path / "two", "records"
    assert collect(backbone, texts, one, "--records", one / records) == 0
    for index in (1, 0):
        assert collect(backbone, texts, two, "--records", two / records, *shard(index, 2)) == 0
    assert lines(one / records) == lines(two / records)
    found = preference_records.read(two / records)
    assert sorted(r.prompt for r in found) == sorted(PROMPTS)
    runs = {ref.clip_id: read_clip(ref) for ref in list_clips(sorted(two.glob("latents-*")))}
    for record in found:
        assert len(record.candidates) == 2
        for c in record.candidates:
            (ref,) = list_clips([c.latent])
            assert torch.equal(read_clip(ref), runs[f"{record.prompt}-{c.seed}"])
            assert c.scores.keys() == {"flow_residual"}
    argv = ["build", "--groups", two / records, "--output", tmp_path / "pairs", "--by", "stored:flow_residual"]
    assert pairs.main([str(a) for a in argv]) == 0
    pair = next(p for p in manifest.read(tmp_path / "pairs" / "pairs.jsonl") if p.prompt == "a fox")
    (record,) = (r for r in found if r.prompt == "a fox")
    best = max(record.candidates, key=lambda c: c.scores["flow_residual"])
    assert pair.winner.resolve() == best.latent.resolve()
    # A candidate that was lost is written again; records of other settings or origin stay.
    best.latent.unlink()
    assert collect(backbone, texts, two, "--records", two / records, "--merge") == 0
    assert preference_records.read(two / records) == found
    append_record(two / records, "by hand", torch.randn(2, 16, 2, 4, 8), WAN21)
    assert collect(backbone, texts, tmp_path / "three", "--records", two / records, "--cfg", 2) == 0
    prompts = [r.prompt for r in preference_records.read(two / records)]
    assert prompts == [*(r.prompt for r in found), "by hand", *sorted(PROMPTS)]
    assert len(list((two / records / "latents").iterdir())) == 10 + 2 + 10
    (two / records / "records.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert collect(backbone, texts, two, "--records", two / records) == 2
    assert "records.jsonl, line 1: damaged, or not a preference record" in capsys.readouterr().err


def lines(folder):
    """The records of a folder without their times."""
    return [json.loads(line) | {"created": None} for line in (folder / "records.jsonl").read_text().splitlines()]
