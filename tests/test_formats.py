"""The file contract: round trip, atomic writing, and one clear sentence for every wrong file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from trainers.kernels.files import header as formats
from trainers.kernels.files.header import FormatError, Header
from trainers.kernels.files.latents import CLIP, digest, write_latents
from trainers.kernels.latent_space import WAN21, LatentSpace

HEADER = Header("shell_lcc", WAN21, {"coder": "anchors", "num_bases": 3}, {"auroc": 0.9}, {"seed": 1})


def written(path, header=HEADER, tensors=None):
    formats.write(path, tensors or {"a": torch.arange(6.0).view(2, 3).t()}, header)
    return path


def test_round_trip(tmp_path):
    tensors, header = formats.read(written(tmp_path / "new" / "m.safetensors"), "shell_lcc")
    assert header == HEADER
    assert formats.read_header(tmp_path / "new" / "m.safetensors", "shell_lcc") == HEADER
    torch.testing.assert_close(tensors["a"], torch.arange(6.0).view(2, 3).t())


def test_custom_space_travels_in_the_file(tmp_path):
    space = LatentSpace("mine", 2, (0.0, 1.0), (2.0, 3.0))
    written(tmp_path / "m.safetensors", Header("latents", space))
    assert formats.read_header(tmp_path / "m.safetensors", "latents").latent_space == space


def test_shared_memory_is_no_obstacle(tmp_path):
    base = torch.randn(4, 4)
    tensors, _ = formats.read(written(tmp_path / "m.safetensors", tensors={"x": base, "y": base[:2]}), "shell_lcc")
    assert torch.equal(tensors["y"], base[:2])


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = written(tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        written(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.safetensors: no such file"):
        formats.read(tmp_path / "gone.safetensors", "latents")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        formats.read(tmp_path, "latents")


def rewrite(path, **changes):
    """A valid file whose metadata is then altered; None removes an entry."""
    metadata = {**formats.to_metadata(HEADER), **changes}
    save_file({"a": torch.zeros(1)}, path, {k: v for k, v in metadata.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "no format entry.*not a Shell-LCC manifold.*trainers.shell_lcc fit"),
        ({"format": "pt"}, "format 'pt'"),
        ({"kind": "latents"}, "found a shard of encoded latents, expected a Shell-LCC manifold"),
        ({"kind": "something"}, "of kind 'something'"),
        ({"format_version": "7"}, "version 7.*reads up to 1; update"),
        ({"format_version": "one"}, "'one' is not a number"),
        ({"latent_space": None}, "header is damaged"),
        ({"latent_space": "{}"}, "header is damaged"),
        ({"config": "{"}, "header is damaged"),
    ],
)
def test_wrong_headers(tmp_path, changes, message):
    path = rewrite(tmp_path / "m.safetensors", **changes)
    with pytest.raises(FormatError, match=message) as caught:
        formats.read_header(path, "shell_lcc")
    assert "m.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (b"\x80\x02}q\x00.", "old PyTorch checkpoint"),
        (b"\x00\x00\x00\x20ftypisom", "video file"),
        (b"hello, this is text", "not a safetensors file"),
    ],
)
def test_other_files_are_recognised(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        formats.read(path, "shell_lcc")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, keep):
    path = written(tmp_path / "m.safetensors", tensors={"a": torch.randn(100)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FormatError, match="complete safetensors file"):
        formats.read(path, "shell_lcc")


def test_metadata_is_plain_json(tmp_path):
    assert json.loads(formats.to_metadata(HEADER)["config"]) == HEADER.config


def test_a_file_of_latents_holds_clips_and_what_they_were_made_with(tmp_path):
    path = tmp_path / "latents.safetensors"
    clips = {"b": {"source": "b.mp4", "video": "v", "frames": 5}, "a": {"source": "a.mp4", "video": "w", "frames": 5}}
    tensors = {name: torch.full((16, 2, 4, 4), i).half() for i, name in enumerate(clips)}
    write_latents(path, tensors, WAN21, clips, settings={"vae": "x"}, videos={"v": {"clips": 1}}, provenance={"seed": 1})
    found, header = formats.read(path, "latents")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    clips = {name: {"holds": CLIP, "digest": digest(tensors[name])} | entry for name, entry in clips.items()}
    config = {"state": "normalised", "settings": {"vae": "x"}, "clips": clips, "videos": {"v": {"clips": 1}}}
    assert header == Header("latents", WAN21, config, {}, {"seed": 1})
    write_latents(path, tensors, WAN21, clips)
    assert formats.read_header(path, "latents").config == {"state": "normalised", "settings": {}, "clips": clips, "videos": {}}
