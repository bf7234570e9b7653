"""Latents from disk: our shards, ComfyUI's .latent files, plain .pt tensors; and one clear sentence for what is none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainers.compare import sides
from trainers.kernels import latent_space
from trainers.kernels.files import header as formats
from trainers.kernels.files import latents as latents_file
from trainers.kernels.files.header import FormatError, Header
from trainers.kernels.latent_space import RAW, WAN21, WAN22, LatentSpaceError
from trainers.latents.read import LatentDataError, list_clips, read_clip
from trainers.preferences import groups
from trainers.running.inputs import InputError

# A real latent of Wan2.1, [1, 16, 16, h, w], where there is one: it is not part of the repository.
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "test_latents_wan.pth"


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


def states(path, sigmas):
    """A file of a run as `collect` writes it: states at noise levels, None for the finished latent."""
    clips = {f"run@{s}": {"run": "run", "prompt": "p", "sigma": s, "seed": 0} for s in sigmas}
    latents_file.write_latents(path, {k: normal(16, 3, 4, 4, seed=i) for i, k in enumerate(clips)}, WAN21, clips)
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


# Finished clips, and what else lies in a folder


def entry(sigma=None, **more):
    return {"run": "r", "prompt": "p", "sigma": sigma, "seed": 0, "source": "r", "video": "r"} | more


def earlier_states(path, sigmas, **more):
    """A shard of `prism collect` as earlier versions wrote it: one latent for each noise level, None for the finished one."""
    clips = {f"r@{s}": entry(s, **more) for s in sigmas}
    config = {"state": "normalised", "clips": clips, "settings": {}, "videos": {}}
    formats.write(path, {k: normal(16, 2, 4, 4, seed=i) for i, k in enumerate(clips)}, Header("latents", WAN21, config))
    return path


def test_noisy_states_are_no_clips(tmp_path):
    path, said = earlier_states(tmp_path / "a.safetensors", (None, 0.9, 0.5)), []
    assert [r.clip_id for r in list_clips([path], say=said.append)] == ["r@None"]
    assert said == ["left out, no clips: 2 noisy states of runs"]
    assert len(list_clips([path], noisy_states=True, say=said.append)) == 3
    assert len(said) == 1
    noisy = earlier_states(tmp_path / "b.safetensors", (0.9, 0.5))
    with pytest.raises(LatentDataError, match=r"b\.safetensors: holds noisy states of runs, 2 in all, and no finished clip"):
        list_clips([noisy])


def test_a_header_says_what_a_latent_is(tmp_path):
    z, said = normal(16, 2, 4, 4), []
    path = tmp_path / "a.safetensors"
    clips = {"clip": {"source": "c"}, "image": {"source": "c", "holds": "image"}, "state": {"source": "c", "sigma": 0.5}}
    latents_file.write_latents(path, dict.fromkeys(clips, z), WAN21, clips)
    assert [r.clip_id for r in list_clips([path], say=said.append)] == ["clip"]
    assert said == ["left out, no clips: 1 images of image-to-video pairs, 1 noisy states of runs"]
    entries = formats.read_header(path, "latents").config["clips"]
    assert {k: e["holds"] for k, e in entries.items()} == {"clip": "clip", "image": "image", "state": "state"}
    assert len({e["digest"] for e in entries.values()}) == 1
    for name, clip in (("state", {"sigma": 0.5}), ("image", {"holds": "image"})):
        one = tmp_path / f"{name}.safetensors"
        latents_file.write_latents(one, {"x": z}, WAN21, {"x": clip})
        for read_it in (latents_file.read_one, latents_file.describe_one):
            with pytest.raises(FormatError, match=rf"{name}\.safetensors: holds a latent of kind '{name}'"):
                read_it(one)


def test_earlier_folders_of_image_to_video_pairs_do_not_say_which_are_images(tmp_path):
    config = {"state": "normalised", "clips": {"x": {"source": "x"}}, "settings": {}, "videos": {}}
    made = {"command": "python -m trainers.dpo cache --pairs p --image_to_video"}
    header = Header("latents", WAN21, config, {}, made)
    formats.write(tmp_path / "latents-000of001-00000.safetensors", {"x": normal(16, 2, 4, 4)}, header)
    with pytest.raises(LatentDataError, match="does not say which are images"):
        list_clips([tmp_path / "latents-000of001-00000.safetensors"])
    assert list_clips([tmp_path / "latents-000of001-00000.safetensors"], noisy_states=True)


def ours(folder):
    """Files of every kind that this pack writes into such folders and that hold no latents."""
    one = {"x": torch.zeros(3)}
    for kind in ("texts", "prism_head", "shell_lcc", "geometry"):
        formats.write(folder / f"{kind}.safetensors", one, Header(kind, WAN21))
    run = folder / "run.checkpoints"
    (run / "checkpoint-5").mkdir(parents=True)
    save_file(one, run / "checkpoint-5" / "state.safetensors", {"format": "intrinsic_reward_checkpoint"})
    save_file(one, run / "best-5.safetensors")
    save_file(one, folder / "lora.safetensors", {"format": "pt", "intrinsic_reward.training": "{}"})
    save_file(one, folder / "merged.safetensors", {"format": "pt", "intrinsic_reward.merged": "{}"})
    torch.save({"model": torch.zeros(3)}, folder / "released.pth")


def test_a_folder_is_read_without_our_other_files(tmp_path):
    ours(tmp_path)
    shard(tmp_path / "a.safetensors", {"x": normal(16, 2, 4, 4)})
    earlier_states(tmp_path / "b.safetensors", (0.9,))
    said = []
    assert [r.clip_id for r in list_clips([tmp_path], say=said.append)] == ["x"]
    (text,) = said
    for part in (
        "1 embedded prompts", "1 PRISM heads", "1 Shell-LCC manifolds", "1 geometry of clips", "2 checkpoints",
        "2 LoRAs or models", "1 .pth files without a tensor", "1 noisy states of runs",
    ):  # fmt: skip
        assert part in text
    # Given by name, each is an error that names the file.
    for name in ("texts", "prism_head", "shell_lcc", "lora"):
        with pytest.raises(FormatError, match=rf"{name}\.safetensors"):
            list_clips([tmp_path / f"{name}.safetensors", tmp_path])


def test_foreign_and_damaged_files_in_a_folder_are_errors(tmp_path):
    shard(tmp_path / "a.safetensors", {"x": normal(16, 2, 4, 4)})
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FormatError, match=r"foreign\.safetensors: no format entry"):
        list_clips([tmp_path])
    (tmp_path / "foreign.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=r"foreign\.safetensors"):
        list_clips([tmp_path])
    (tmp_path / "foreign.safetensors").unlink()
    torch.save(normal(3, 16, 8, 8), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:2000])
    with pytest.raises(LatentDataError, match=r"cut\.pth: damaged"):
        list_clips([tmp_path])


def test_folders_of_candidates_are_read_without_our_other_files(tmp_path, caplog):
    ours(tmp_path)
    shard(tmp_path / "a.safetensors", {"x": normal(16, 2, 4, 4)})
    earlier_states(tmp_path / "b.safetensors", (0.9,))
    (group,) = groups.read([tmp_path])
    assert [c.name.split("/")[1] for c in group.candidates] == ["a"]
    assert "1 PRISM heads" in caplog.text
    assert [g.name for g in sides.read({"one": tmp_path, "two": tmp_path}).groups] == ["a"]


def test_equal_clips_of_two_writers_count_once(tmp_path):
    """Two processes that encode one video into one folder at the same time."""
    z = normal(16, 2, 4, 4)
    for name in "ab":
        latents_file.write_latents(tmp_path / f"{name}.safetensors", {"x": z}, WAN21, {"x": {"source": "x", "video": "v"}})
    assert len(list_clips([tmp_path])) == 1
    latents_file.write_latents(tmp_path / "b.safetensors", {"x": z + 1}, WAN21, {"x": {"source": "x", "video": "v"}})
    with pytest.raises(LatentDataError, match="both hold the clip 'x'"):
        list_clips([tmp_path])


# Axes of .pt and .pth


def clip_like(channels=16, frames=16, h=6, w=8, seed=0):
    """[C, T, h, w] with what tells the axes of real clips: channels have means of their own, frames follow each other."""
    still = normal(channels, 1, h, w, seed=seed) + normal(channels, 1, 1, 1, seed=seed + 1) / 2
    return still + 0.3 * normal(channels, frames, h, w, seed=seed + 2).cumsum(1) / frames**0.5


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize("frames", [3, 16])
def test_pt_axes_are_told(tmp_path, suffix, frames):
    z = clip_like(frames=frames)
    for i, stored in enumerate((z, z.movedim(0, 1), z[None], z.movedim(0, 1)[None])):
        torch.save(stored.contiguous(), tmp_path / f"{i}.{suffix}")
        clip, found, _ = read(tmp_path / f"{i}.{suffix}", trust_state=True)
        assert clip == f"{i}.{suffix}"
        assert torch.equal(found, z)


def test_a_batch_in_a_pt_is_its_clips(tmp_path):
    z = torch.stack([clip_like(frames=3, seed=i) for i in range(2)])
    torch.save(z, tmp_path / "x.pt")
    found = read_all(tmp_path / "x.pt", trust_state=True)
    assert [clip for clip, _, _ in found] == ["x.pt#0", "x.pt#1"]
    assert torch.equal(torch.stack([f for _, f, _ in found]), z)


def test_axes_that_nothing_tells_are_refused_unless_given(tmp_path):
    z = normal(16, 16, 6, 8)
    torch.save(z, tmp_path / "x.pt")
    with pytest.raises(LatentDataError, match=r"x\.pt: of shape \[16, 16, 6, 8\], .*--pt_axes tchw or cthw"):
        read(tmp_path / "x.pt")
    assert torch.equal(read(tmp_path / "x.pt", pt_axes="cthw")[1], z)
    assert torch.equal(read(tmp_path / "x.pt", pt_axes="tchw")[1], z.movedim(1, 0))
    torch.save(normal(3, 16, 6, 8), tmp_path / "x.pt")
    with pytest.raises(LatentSpaceError, match=r"x\.pt: expected 16 channels .* on axis 0, found shape"):
        read(tmp_path / "x.pt", pt_axes="cthw")


@pytest.mark.skipif(not REAL.is_file(), reason="needs a real latent of Wan2.1")
def test_the_axes_of_a_real_latent_are_told(tmp_path):
    """T = C = 16: as diffusers gives it, transposed, cropped, raw, reversed and with as much noise as clip."""
    z = torch.load(REAL, map_location="cpu", weights_only=True).float()[0]
    changed = {
        "whole": z, "crop": z[:, :, 3:11, 20:28], "token": z[:, :, 7:8, 7:8], "reversed": z.flip(1),
        "raw": WAN21.denormalise(z, dim=0), "noisy": (z + normal(*z.shape)) / 2,
    }  # fmt: skip
    for name, x in changed.items():
        for stored in (x[None], x, x.movedim(0, 1)):
            torch.save(stored.contiguous(), tmp_path / "x.pth")
            assert torch.equal(read(tmp_path / "x.pth", trust_state=True)[1], x), name
