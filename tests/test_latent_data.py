"""Latents from disk: our shards, ComfyUI's .latent files, plain .pt tensors; and one clear sentence for what is none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainers.kernels import latent_space
from trainers.kernels.files import header as formats
from trainers.kernels.files.header import FormatError, Header
from trainers.kernels.files.latents import write_latents
from trainers.kernels.latent_space import RAW, WAN21, WAN22, LatentSpaceError
from trainers.latents.read import LatentDataError, list_clips, read_clip
from trainers.running.inputs import InputError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shard(path, clips, space=WAN21, state="normalised", dtype=torch.float16):
    config = {"state": state, "clips": {k: {"source": f"{k}.mp4"} for k in clips}, "settings": {}, "videos": {}}
    formats.write(path, {k: z.to(dtype) for k, z in clips.items()}, Header("latents", space, config))
    return path


def comfy_latent(path, raw, marker=True):
    save_file({"latent_tensor": raw.contiguous()} | ({"latent_format_version_0": torch.tensor([])} if marker else {}), path)
    return path


def read_all(path, space=None, **options):
    """(clip id, latents, latent space) of every clip of a file or folder."""
    return [(ref.clip_id, read_clip(ref, **options), ref.space) for ref in list_clips([path], space)]


def read(path, space=None, **options):
    (clip,) = read_all(path, space, **options)
    return clip


# What is read


def test_shards_by_file_folder_and_pattern_in_order_of_names(tmp_path):
    z = normal(16, 3, 4, 5)
    (tmp_path / "sub").mkdir()
    shard(tmp_path / "sub" / "b.safetensors", {"q": z, "p": z + 1})
    shard(tmp_path / "a.safetensors", {"x": z})
    (tmp_path / "report.json").write_text("{}")
    assert [r.clip_id for r in list_clips([tmp_path])] == ["x", "p", "q"]
    assert [r.clip_id for r in list_clips([f"{tmp_path}/*.safetensors", tmp_path / "sub" / "b.safetensors"])] == [
        "x",
        "p",
        "q",
    ]
    assert list_clips([tmp_path])[0].entry == {"source": "x.mp4"}
    clips = read_all(tmp_path)
    assert torch.equal(clips[2][1], z.half().float())
    assert all(z.dtype == torch.float32 and space == WAN21 for _, z, space in clips)


def test_listing_reads_no_latents(tmp_path):
    """A NaN is found when its clip is read, not before; the clips ahead of it are usable."""
    good, bad = normal(16, 2, 4, 4), normal(16, 2, 4, 4)
    bad[3, 1, 2, 2] = float("nan")
    shard(tmp_path / "a.safetensors", {"good": good, "sick": bad})
    refs = list_clips([tmp_path])
    assert read_clip(refs[0]).shape == good.shape
    with pytest.raises(LatentDataError, match=r"a\.safetensors \(sick\): contains NaN or Inf"):
        read_clip(refs[1])


def test_comfyui_latents_are_normalised(tmp_path):
    z = normal(2, 16, 3, 8, 8)
    raw = WAN21.denormalise(z)
    both = read_all(comfy_latent(tmp_path / "pair.latent", raw))
    assert [clip for clip, _, _ in both] == ["pair.latent#0", "pair.latent#1"]
    for i in range(2):
        assert torch.allclose(both[i][1], z[i], atol=1e-5)
    clip, _, space = read(comfy_latent(tmp_path / "one.latent", raw[:1]))
    assert (clip, space) == ("one.latent", WAN21)
    wide = comfy_latent(tmp_path / "wide.latent", WAN22.denormalise(normal(1, 48, 3, 8, 8)))
    assert read(wide)[2] == WAN22


def test_comfyui_latents_are_contradicted_unless_trusted(tmp_path):
    z = normal(1, 16, 3, 8, 8)
    path = comfy_latent(tmp_path / "x.latent", z)
    with pytest.raises(LatentSpaceError, match=r"x\.latent .*normalised twice.* --trust_state"):
        read(path)
    assert torch.allclose(read(path, trust_state=True)[1], WAN21.normalise(z)[0], atol=1e-5)


def test_pt_files_are_time_first_and_normalised_unless_stated(tmp_path):
    z = normal(3, 16, 8, 8)
    torch.save(z.half(), tmp_path / "x.pt")
    clip, read_back, space = read(tmp_path / "x.pt")
    assert (clip, space) == ("x.pt", WAN21)
    assert torch.equal(read_back, z.half().float().movedim(1, 0))
    with pytest.raises(LatentSpaceError, match=r"x\.pt: stated to be raw.* --trust_state"):
        read(tmp_path / "x.pt", pt_state=RAW)
    torch.save(WAN21.denormalise(z), tmp_path / "raw.pt")
    with pytest.raises(LatentSpaceError, match=r"raw\.pt: stated to be normalised"):
        read(tmp_path / "raw.pt")
    assert torch.allclose(read(tmp_path / "raw.pt", pt_state=RAW)[1], z.movedim(1, 0), atol=1e-5)


def smooth_clip(channels=16, frames=16, side=12, noise=0.0):
    """[C, T, h, w] of unit variance: channels of their own, frames that change slowly."""
    z = normal(channels, 1, side, side) + 0.3 * normal(channels, frames, side, side, seed=1).cumsum(1) / frames**0.5
    z = z / z.std()
    return (1 - noise**2) ** 0.5 * z + noise * normal(*z.shape, seed=2)


@pytest.mark.parametrize("frames", [3, 16, 21])
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("half", [False, True])
def test_the_axes_of_a_pt_file_are_told_by_size_or_content(tmp_path, frames, noise, half):
    z = smooth_clip(frames=frames, noise=noise)
    z = z.half() if half else z
    for name, stored in (("cthw", z), ("tchw", z.movedim(1, 0)), ("bcthw", z[None])):
        for suffix in (".pt", ".pth"):
            torch.save(stored.contiguous(), tmp_path / (name + suffix))
            assert torch.equal(read(tmp_path / (name + suffix))[1], z.float()), name


def test_axes_that_nothing_tells_apart_have_to_be_stated(tmp_path):
    z = normal(16, 16, 8, 8)
    torch.save(z, tmp_path / "x.pt")
    with pytest.raises(LatentDataError, match=r"x\.pt: of shape \[16, 16, 8, 8\], .*neither size nor content.* --pt_axes"):
        read(tmp_path / "x.pt")
    assert torch.equal(read(tmp_path / "x.pt", pt_axes="cthw")[1], z)
    assert torch.equal(read(tmp_path / "x.pt", pt_axes="tchw")[1], z.movedim(1, 0))
    torch.save(z[None].expand(2, -1, -1, -1, -1).contiguous(), tmp_path / "two.pt")
    with pytest.raises(LatentDataError, match=r"two\.pt: .* 2 clips; save one clip a file"):
        read(tmp_path / "two.pt")


def test_a_real_latent_in_every_order(tmp_path):
    real = Path(__file__).resolve().parents[2] / "shared" / "data" / "test_latents_wan.pth"
    if not real.is_file():
        pytest.skip(f"no real latent at {real}")
    z = torch.load(real, map_location="cpu", weights_only=True).float()[0]
    assert z.shape[:2] == (16, 16)
    for name, stored in (("cthw", z), ("tchw", z.movedim(1, 0)), ("bcthw", z[None])):
        for part in (slice(None), slice(0, 8)):
            torch.save(stored[..., part, part].contiguous(), tmp_path / f"{name}.pt")
            assert torch.equal(read(tmp_path / f"{name}.pt")[1], z[..., part, part]), name


def states(path, sigmas):
    """A file of a run as `collect` writes it: states at noise levels, None for the finished latent."""
    clips = {f"run@{s}": {"run": "run", "prompt": "p", "sigma": s, "seed": 0} for s in sigmas}
    write_latents(path, {k: normal(16, 3, 4, 4, seed=i) for i, k in enumerate(clips)}, WAN21, clips, provenance={})
    return path


def test_noisy_states_of_runs_are_no_clips(tmp_path, caplog):
    states(tmp_path / "latents-a.safetensors", (0.9, 0.5, None))
    assert [r.clip_id for r in list_clips([tmp_path])] == ["run@None"]
    assert "left out, no clips: 2 noisy states of runs" in caplog.text
    assert len(list_clips([tmp_path], noisy_states=True)) == 3
    only = states(tmp_path / "only.safetensors", (0.9, 0.5))
    with pytest.raises(LatentDataError, match=r"only\.safetensors: holds noisy states of runs, .* and no finished clip"):
        list_clips([only])


def test_other_files_of_the_pack_are_left_out_of_a_folder_and_counted(tmp_path, caplog):
    shard(tmp_path / "a.safetensors", {"x": normal(16, 3, 4, 5)})
    for name, kind in (("texts", "texts"), ("head", "prism_head"), ("shell", "shell_lcc")):
        formats.write(tmp_path / f"{name}.safetensors", {"a": torch.zeros(1)}, Header(kind, WAN21, {}))
    (tmp_path / "run.checkpoints" / "checkpoint-2").mkdir(parents=True)
    state = tmp_path / "run.checkpoints" / "checkpoint-2" / "state.safetensors"
    save_file({"a": torch.zeros(1)}, state, {"format": "intrinsic_reward_checkpoint", "state": "{}"})
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors", {"intrinsic_reward.training": "{}"})
    assert [r.clip_id for r in list_clips([tmp_path])] == ["x"]
    for what in ("1 embedded prompts", "1 PRISM heads", "1 Shell-LCC manifolds", "1 checkpoints", "1 LoRAs"):
        assert what in caplog.text
    # One that is named is refused, and so is a foreign file.
    with pytest.raises(FormatError, match=r"head\.safetensors: .*a PRISM head"):
        list_clips([tmp_path / "head.safetensors"])
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FormatError, match=r"foreign\.safetensors: no format entry"):
        list_clips([tmp_path])


def test_a_given_space_decides(tmp_path):
    custom = latent_space.identify([0.5] * 16, [2.0] * 16)
    z = normal(1, 16, 3, 8, 8)
    path = comfy_latent(tmp_path / "x.latent", custom.denormalise(z))
    _, read_back, space = read(path, space=custom)
    assert space.id == custom.id
    assert torch.allclose(read_back, z[0], atol=1e-5)
    with pytest.raises(LatentSpaceError, match=r"x\.latent: 16 channels, but latent space 'wan22' has 48"):
        read(path, space=WAN22)
    with pytest.raises(LatentSpaceError, match=r"a\.safetensors: holds 'wan21' latents, expected 'wan22'"):
        list_clips([shard(tmp_path / "a.safetensors", {"x": z[0]})], WAN22)


# What is refused


def test_mixed_latent_spaces_name_two_files(tmp_path):
    shard(tmp_path / "a.safetensors", {"x": normal(16, 2, 4, 4)})
    shard(tmp_path / "b.safetensors", {"y": normal(48, 2, 4, 4)}, WAN22)
    with pytest.raises(LatentSpaceError, match=r"a\.safetensors holds 'wan21' latents and .*b\.safetensors 'wan22'"):
        list_clips([tmp_path])


def test_one_clip_in_two_shards_is_refused(tmp_path):
    for name in "ab":
        shard(tmp_path / f"{name}.safetensors", {"x": normal(16, 2, 4, 4)})
    with pytest.raises(LatentDataError, match=r"a\.safetensors and .*b\.safetensors both hold the clip 'x'"):
        list_clips([tmp_path])


class Bomb:
    fired = False

    def __reduce__(self):
        return setattr, (Bomb, "fired", True)


def test_code_in_a_pt_file_is_not_executed(tmp_path):
    torch.save({"latents": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(
        LatentDataError, match=r"bomb\.pt: holds Python objects other than tensors; none of its code was executed"
    ):
        read(tmp_path / "bomb.pt")
    assert not Bomb.fired
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert Bomb.fired


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(3)}, "holds a dict, expected one tensor"),
        (torch.zeros(3, 8, 8, 8), r"expected 16 channels .* on axis 1, found shape \[3, 8, 8, 8\]"),
        (torch.zeros(16, 8, 8), r"of shape \[16, 8, 8\], expected floats"),
        (torch.zeros(3, 16, 8, 8, dtype=torch.int32), "a torch.int32 tensor"),
        (torch.zeros(0, 16, 8, 8), "expected latents"),
        (torch.full((3, 16, 8, 8), float("inf")), "NaN or Inf"),
    ],
)
def test_wrong_pt_files(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises((LatentDataError, LatentSpaceError), match=rf"x\.pt.*{message}"):
        read(tmp_path / "x.pt")


def test_wrong_latent_files(tmp_path):
    for raw, marker, message in (
        (torch.zeros(1, 4, 64, 64), True, "an image latent of shape"),
        (torch.zeros(1, 4, 64, 64), False, "no 'latent_format_version_0' in it"),
        (torch.zeros(1, 12, 3, 8, 8), True, "12 channels; wan21 has 16 and wan22 has 48: choose one with --latent_space"),
        (torch.zeros(1, 2, 16, 3, 8, 8), True, "not a video latent of shape"),
        (torch.full((1, 16, 3, 8, 8), float("nan")), True, "NaN or Inf"),
    ):
        with pytest.raises((LatentDataError, LatentSpaceError), match=rf"x\.latent.*{message}"):
            read(comfy_latent(tmp_path / "x.latent", raw, marker))
    save_file({"other": torch.zeros(3)}, tmp_path / "x.latent")
    with pytest.raises(LatentDataError, match=r"x\.latent: no tensor 'latent_tensor'"):
        read(tmp_path / "x.latent")


def test_wrong_shards(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(LatentSpaceError, match=r"x\.safetensors \(c\): expected 16 channels"):
        read(shard(path, {"c": normal(4, 2, 4, 4)}))
    with pytest.raises(LatentDataError, match=r"x\.safetensors \(c\): expected latents \[C, T, h, w\]"):
        read(shard(path, {"c": normal(16, 4, 4)}))
    with pytest.raises(LatentDataError, match=r"x\.safetensors: the header does not state that its latents are normalised"):
        read(shard(path, {"c": normal(16, 2, 4, 4)}, state="raw"))
    save_file({"c": normal(16, 2, 4, 4)}, path)
    with pytest.raises(FormatError, match=r"x\.safetensors: no format entry"):
        read(path)
    with pytest.raises(LatentDataError, match="hold no clips"):
        list_clips([shard(path, {})])


@pytest.mark.parametrize("suffix", ["safetensors", "latent", "pt"])
def test_cut_and_foreign_files(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    z = normal(3, 16, 8, 8)
    {
        "safetensors": lambda: shard(path, {"c": z}),
        "latent": lambda: comfy_latent(path, z[None]),
        "pt": lambda: torch.save(z, path),
    }[suffix]()
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\0\0\0\x18ftypmp42" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises((LatentDataError, FormatError), match=rf"x\.{suffix}: "):
            read(path)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="no latents in this folder"):
        list_clips([tmp_path])
    with pytest.raises(InputError, match=r"gone\.pt: no such file"):
        list_clips([tmp_path / "gone.pt"])
    (tmp_path / "x.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match=r"x\.mp4: latents come as \.safetensors, \.latent, \.pt"):
        list_clips([tmp_path / "x.mp4"])
