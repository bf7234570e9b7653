"""Output of commands: checked before any work, and never replaced by a process that writes at the same time."""

import errno
import io
import os
import tempfile
from pathlib import Path

import pytest
import torch

from trainers import encode
from trainers.compare import cli as compare
from trainers.dpo import cli as dpo
from trainers.geometry import cli as geometry
from trainers.kernels.files import atomic, latents
from trainers.kernels.files import header as formats
from trainers.kernels.latent_space import WAN21
from trainers.latents import shards
from trainers.pairs import cli as pairs
from trainers.prism import cli as prism
from trainers.prism import collect
from trainers.running.output import require_output, require_output_folder
from trainers.shell_lcc import cli as shell_lcc
from trainers.shell_reward import cli as shell_reward

# Checks


def fail(monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


def test_a_writable_output_is_accepted(tmp_path):
    require_output_folder(tmp_path / "a" / "b")
    require_output_folder(Path("."))
    assert not list(tmp_path.iterdir())
    require_output(tmp_path / "c" / "x.safetensors", False)
    assert not list((tmp_path / "c").iterdir())


def test_a_file_where_a_folder_is_expected(tmp_path):
    (tmp_path / "file").write_text("x")
    for check in (
        lambda: require_output_folder(tmp_path / "file"),
        lambda: require_output_folder(tmp_path / "file" / "deeper" / "still"),
        lambda: require_output(tmp_path / "file" / "x.safetensors", True),
    ):
        with pytest.raises(OSError, match=r"file.*: cannot be written: .*file is a file, expected a folder; give"):
            check()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="link is a link to nothing, expected a folder"):
        require_output_folder(tmp_path / "link")


def test_a_folder_that_is_read_only_and_a_missing_one_in_it(tmp_path, monkeypatch):
    fail(monkeypatch, errno.EACCES)
    with pytest.raises(OSError, match=r": cannot be written: .* is not writable \(Permission denied\); give another place"):
        require_output_folder(tmp_path)
    with pytest.raises(OSError, match=r"x\.safetensors: cannot be written: .*gone does not exist, and .* is not writable"):
        require_output(tmp_path / "gone" / "x.safetensors", False)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path, monkeypatch, code):
    fail(monkeypatch, code)
    with pytest.raises(OSError, match="cannot be written: no space is left in .*; free some"):
        require_output_folder(tmp_path / "new")


def test_the_probe_writes_bytes(tmp_path, monkeypatch):
    """An empty file can be made on a full disk."""

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, f"{len(data)} bytes do not fit")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(OSError, match="no space is left"):
        require_output_folder(tmp_path)


# Every command, before it reads a model: all of the other files named here are missing.
GONE = "gone.safetensors"
FOLDERS = {
    "encode": (encode.main, ["--videos", "CLIPS", "--vae", GONE]),
    "prism cache": (prism.main, ["cache", "--pairs", GONE]),
    "prism collect": (prism.main, ["collect", "--backbone", GONE, "--texts", GONE]),
    "dpo cache": (dpo.main, ["cache", "--pairs", GONE]),
    "pairs build": (pairs.main, ["build", "--groups", GONE]),
    "geometry score": (geometry.main, ["score", "--videos", GONE]),
}
FILES = {
    "shell_lcc fit": (shell_lcc.main, ["fit", "--latents", GONE]),
    "shell_lcc import": (shell_lcc.main, ["import", GONE]),
    "prism embed": (prism.main, ["embed", "--prompts", GONE, "--text_encoder", GONE]),
    "prism train": (prism.main, ["train", "--data", GONE, "--backbone", GONE]),
    "dpo train": (dpo.main, ["train", "--data", GONE, "--backbone", GONE]),
    "dpo merge": (dpo.main, ["merge", "--backbone", GONE, "--lora", GONE]),
    "shell_reward train": (
        shell_reward.main, ["train", "--manifold", GONE, "--backbone", GONE, "--prompts", GONE, "--text_encoder", GONE],
    ),
}  # fmt: skip
REPORTS = {
    "shell_lcc eval": (shell_lcc.main, ["eval", "--manifold", GONE, "--latents", GONE]),
    "prism eval": (prism.main, ["eval", "--head", GONE, "--data", GONE, "--backbone", GONE]),
    "dpo eval": (dpo.main, ["eval", "--data", GONE, "--backbone", GONE, "--lora", GONE]),
    "shell_reward eval": (
        shell_reward.main,
        ["eval", "--manifold", GONE, "--backbone", GONE, "--lora", GONE, "--prompts", GONE, "--text_encoder", GONE],
    ),
}
COMMANDS = [
    *((f, a, "--output", "folder", name) for name, (f, a) in FOLDERS.items()),
    *((f, a, "--output", "file.safetensors", name) for name, (f, a) in FILES.items()),
    *((f, a, "--json", "file.json", name) for name, (f, a) in REPORTS.items()),
]


@pytest.mark.parametrize(("command", "arguments", "flag", "name"), [c[:4] for c in COMMANDS], ids=[c[4] for c in COMMANDS])
def test_every_command_checks_its_output_first(tmp_path, monkeypatch, capsys, command, arguments, flag, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"x")
    (tmp_path / "taken").write_text("x")
    given = ["clips" if a == "CLIPS" else a for a in arguments]
    assert command([*given, flag, str(Path("taken") / name)]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err


def test_a_comparison_checks_its_output_first(tmp_path, capsys):
    for side in "ab":
        (tmp_path / side).mkdir()
        (tmp_path / side / "x.mp4").write_bytes(b"x")
    (tmp_path / "taken").write_text("x")
    given = ["--a", tmp_path / "a", "--b", tmp_path / "b", "--output", tmp_path / "taken"]
    assert compare.main(list(map(str, given))) == 2
    assert "taken is a file, expected a folder" in capsys.readouterr().err


def test_the_folder_of_checkpoints_is_checked_too(tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    argv = ["train", "--data", GONE, "--backbone", GONE, "--output", tmp_path / "x.safetensors", "--output_dir"]
    for command in (dpo.main, prism.main):
        assert command([*map(str, argv), str(tmp_path / "taken")]) == 2
        assert "taken is a file, expected a folder" in capsys.readouterr().err


# Two writers


def writer(folder, clip, value):
    made = shards.Writer(folder, WAN21, {}, {})
    made.add(clip, torch.full((16, 1, 2, 2), value), {"source": clip, "video": clip, "window": 0})
    return made


def clips_of(folder):
    return sorted(k for p in folder.glob("*.safetensors") for k in formats.read(p, "latents")[0])


def test_two_writers_at_once_keep_both_shards(tmp_path, monkeypatch):
    """The second one begins and ends while the first is in the middle of its write."""
    first, second = writer(tmp_path, "a", 1.0), writer(tmp_path, "b", 2.0)
    save = formats.save_file

    def slow(*args, **kwargs):
        monkeypatch.setattr(formats, "save_file", save)
        second.flush()
        save(*args, **kwargs)

    monkeypatch.setattr(formats, "save_file", slow)
    first.flush()
    assert clips_of(tmp_path) == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"latents-000of001-0000{i}.safetensors" for i in range(2)]
    writer(tmp_path, "c", 3.0).flush()
    assert (tmp_path / "latents-000of001-00002.safetensors").is_file()


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_takes_the_first_free_name(tmp_path, monkeypatch, links):
    """Also on file systems without hard links."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    names = [tmp_path / str(i) for i in range(4)]
    names[1].write_text("other")

    def write(partial):
        # Another process takes the first name meanwhile.
        names[0].write_text("other")
        Path(partial).write_text("own")

    assert atomic.write_new(names, write) == names[2]
    assert sorted((p.name, p.read_text()) for p in tmp_path.iterdir()) == [("0", "other"), ("1", "other"), ("2", "own")]


def test_a_killed_writer_takes_no_number(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "save_file", die)
    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path, "a", 1.0).flush()
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    writer(tmp_path, "b", 2.0).flush()
    assert [p.name for p in tmp_path.iterdir()] == ["latents-000of001-00000.safetensors"]


def test_a_name_that_is_taken_is_an_error_where_there_is_no_other(tmp_path):
    (tmp_path / "x").write_text("first")
    with pytest.raises(FileExistsError, match="x: was written by another process"):
        atomic.write_new([tmp_path / "x"], lambda partial: Path(partial).write_text("second"))
    assert (tmp_path / "x").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_prompt_that_two_processes_collect_is_kept_once(tmp_path, monkeypatch):
    """Both sample it; the one that ends later keeps the other's file, or names the setting that differs."""
    target = collect.path_of(tmp_path, "p")

    def other_first(settings):
        latents.write_latents(target, {"theirs": torch.zeros(16, 1, 2, 2)}, WAN21, {"theirs": {}}, settings=settings)

    monkeypatch.setattr(collect.wan_dit, "load", lambda *_: BACKBONE)
    monkeypatch.setattr(collect, "_settings", lambda _: {"steps": 2})
    texts = {"p": torch.zeros(2, 4)}
    for theirs, error in (({"steps": 2, "backbone": {}}, None), ({"steps": 3, "backbone": {}}, "made with another steps")):
        target.unlink(missing_ok=True)

        def runs(*_, theirs=theirs):
            other_first(theirs)
            return [{None: torch.ones(16, 1, 2, 2)}]

        monkeypatch.setattr(collect, "_runs", runs)
        if error:
            with pytest.raises(ValueError, match=error):
                collect._sample(ARGS(tmp_path), texts, {}, ["p"], torch.device("cpu"), False)
        else:
            collect._sample(ARGS(tmp_path), texts, {}, ["p"], torch.device("cpu"), False)
        assert clips_of(tmp_path) == ["theirs"]


class BACKBONE:
    model = None

    class backbone:
        to_json = staticmethod(dict)


class ARGS:
    backbone, backbone_dtype, steps, shift, sigmas, negative = GONE, "float32", 2, 3.0, (), None
    seeds, seed, batch, score, records, argv = 1, 0, 1, (), None, ()

    def __init__(self, output):
        self.output = output
