"""The miniature VAE, and loading Wan VAEs from files and folders."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks import mini_vae
from trainers.kernels import latent_space
from trainers.kernels.latent_space import WAN21
from trainers.wan import vae as wan_vae
from trainers.wan.vae import VaeError
from trainers.wan.vae_keys import to_diffusers, to_original

from .video_clips import moving, write_clip

diffusers = pytest.importorskip("diffusers")


def noise(count=1, seed=0):
    return mini_vae.moving_noise(count, torch.Generator().manual_seed(seed))


def frames(count=5, height=32, width=48):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def clips():
    return [c[:, :9, :48, :64] for c in noise(2)]


@pytest.fixture(scope="module")
def calibrated(clips):
    vae = mini_vae.build(0)
    mini_vae.calibrate(vae, clips)
    return vae.train(False)


@pytest.fixture(scope="module")
def file(calibrated, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "mini.safetensors"
    mini_vae.save(calibrated, path, {"seed": "0"})
    return path


# The layout


def test_layout_is_wan21s(file):
    with safe_open(file, framework="pt") as f:
        shapes = {k: f.get_slice(k).get_shape() for k in f.keys()}  # noqa: SIM118
        assert "Miniature" in f.metadata()["title"]
    assert len(shapes) == 194
    assert shapes["conv1.weight"] == [32, 32, 1, 1, 1]
    assert shapes["encoder.downsamples.5.time_conv.weight"] == [16, 16, 3, 1, 1]
    assert shapes["decoder.upsamples.14.residual.6.weight"] == [8, 8, 3, 3, 3]
    assert shapes["decoder.head.0.gamma"] == [8, 1, 1, 1]


def test_names_go_there_and_back():
    names = list(mini_vae.build(0).state_dict())
    originals = to_original(names)
    assert len(set(originals.values())) == len(names)
    assert [to_diffusers(originals[n]) for n in names] == names


def test_diffusers_own_loader_reads_the_same_vae(file, calibrated, tmp_path):
    """Its converter and our names agree, so a real wan_2.1_vae.safetensors is read alike by both."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"} | dict(calibrated.config)))
    theirs = diffusers.AutoencoderKLWan.from_single_file(str(file), config=str(tmp_path))
    ours = wan_vae.load(file)
    video = frames().float().movedim(0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        raw = theirs.encode(video).latent_dist.mode()
        assert torch.allclose(raw, calibrated.encode(video).latent_dist.mode(), atol=1e-5)
        assert torch.allclose(theirs.decode(raw).sample, calibrated.decode(raw).sample, atol=1e-5)
    assert torch.allclose(ours.encode(frames()), WAN21.normalise(raw)[0], atol=1e-5)
    assert ours.space == WAN21
    assert len(ours.digest) == 16


def test_wan22_names_and_sizes_are_read(tmp_path):
    """A small VAE of Wan 2.2's kind under its original names, written here from diffusers' own."""
    config = {
        "base_dim": 8, "decoder_base_dim": 12, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
        "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": list(latent_space.WAN22.mean),
        "latents_std": list(latent_space.WAN22.std),
    }  # fmt: skip
    model = diffusers.AutoencoderKLWan.from_config(config).train(False)
    state = {}
    for name, value in model.state_dict().items():
        original = to_original([name])[name] if "_blocks" not in name else wan22_name(name)
        assert to_diffusers(original) == name
        state[original] = value.contiguous()
    save_file(state, tmp_path / "vae.safetensors")
    vae = wan_vae.load(tmp_path / "vae.safetensors")
    assert vae.space == latent_space.WAN22
    assert {k: vae.model.config[k] for k in config} == config
    video = frames().float().movedim(0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        raw = model.encode(video).latent_dist.mode()
    assert torch.allclose(vae.encode(frames()), vae.space.normalise(raw)[0], atol=1e-5)
    assert raw.shape == (1, 48, 2, 2, 3)


def wan22_name(name):
    side, _, stage, kind, *rest = name.split(".")
    group = "downsamples" if side == "encoder" else "upsamples"
    index = rest.pop(0) if kind == "resnets" else str(2 if side == "encoder" else 3)
    tail = ".".join(rest)
    for ours, theirs in (("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"), ("conv2", "residual.6"),
                         ("conv_shortcut", "shortcut")):  # fmt: skip
        if tail.startswith(ours):
            tail = theirs + tail[len(ours) :]
    return f"{side}.{group}.{stage}.{group}.{index}.{tail}"


# The miniature


def test_raw_latents_have_wan21s_means_and_stds(calibrated, clips):
    with torch.no_grad():
        raw = torch.cat([calibrated.encode(c[None]).latent_dist.mode()[0].flatten(1) for c in clips], dim=1)
    assert torch.allclose(raw.mean(1), torch.tensor(WAN21.mean), atol=1e-3)
    assert torch.allclose(raw.std(1), torch.tensor(WAN21.std), atol=1e-3)
    latent_space.require_state(raw, WAN21, latent_space.RAW, "calibrated", dim=0)


def test_calibration_changes_no_reconstruction_and_no_posterior(calibrated, clips):
    plain = mini_vae.build(0)
    with torch.no_grad():
        before, after = (v.encode(clips[0][None]).latent_dist for v in (plain, calibrated))
        scale = (after.mean.std((0, 2, 3, 4)) / before.mean.std((0, 2, 3, 4))).view(1, -1, 1, 1, 1)
        assert torch.allclose(after.std, before.std * scale, rtol=1e-3)
        a, b = mini_vae.decode(plain, before.mean), mini_vae.decode(calibrated, after.mean)
    assert torch.allclose(a, b, atol=1e-3)
    assert a.std() > 1e-2


def test_own_decode_is_diffusers_without_the_clamp(calibrated):
    z = WAN21.denormalise(torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        ours, theirs = mini_vae.decode(calibrated, z), calibrated.decode(z).sample
    assert torch.allclose(ours.clamp(-1, 1), theirs, atol=1e-5)
    assert ours.shape == (1, 3, 9, 32, 32)


def test_posterior_starts_narrow(clips):
    with torch.no_grad():
        assert mini_vae.build(0).encode(clips[0][None]).latent_dist.std.mean() < 0.1


def test_training_learns_more_than_the_mean_colour(monkeypatch):
    """Two flat clips, one dark and one bright: by their mean alone the loss would stay near 2 * 0.6^2 + 0.3 * 0.6."""
    monkeypatch.setattr(mini_vae, "CROP", 16)
    monkeypatch.setattr(mini_vae, "BATCH", 2)
    shade = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    vae = mini_vae.build(0)
    losses = list(mini_vae.train(vae, [shade - 0.6, shade + 0.6], 30, torch.Generator().manual_seed(0)))
    assert losses[0] > 0.5
    assert sum(losses[10:20]) / 10 < 0.45


def test_command_line_is_repeatable_and_careful(tmp_path, capsys, monkeypatch):
    several = mini_vae.moving_noise
    monkeypatch.setattr(mini_vae, "moving_noise", lambda count, generator: [c[:, :5, :48, :64] for c in several(1, generator)])
    made = {}
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        path = tmp_path / f"{name}.safetensors"
        assert mini_vae.main(["--output", str(path), "--seed", seed, "--train_steps", "1"]) == 0
        made[name] = load_file(path)
    assert all(torch.equal(made["a"][k], made["b"][k]) for k in made["a"])
    assert not torch.equal(made["a"]["conv1.weight"], made["c"]["conv1.weight"])
    assert "dB PSNR" in capsys.readouterr().out
    for arguments, message in (
        (["--output", str(path)], "exists; use --overwrite"),
        (["--output", "x.bin"], "must end in .safetensors"),
        (["--output", str(tmp_path / "d.safetensors"), "--train_steps", "-1"], "0 or more"),
    ):
        with pytest.raises(SystemExit):
            mini_vae.main(arguments)
        assert message in capsys.readouterr().err


def test_command_line_on_videos(tmp_path, capsys):
    pytest.importorskip("av")
    write_clip(tmp_path / "a.mkv", moving(5))
    (tmp_path / "b.mp4").write_bytes(b"broken")
    out = tmp_path / "vae.safetensors"
    assert mini_vae.main(["--output", str(out), "--videos", str(tmp_path)]) == 0
    assert wan_vae.load(out).space == WAN21
    (tmp_path / "a.mkv").unlink()
    assert mini_vae.main(["--output", str(out), "--videos", str(tmp_path), "--overwrite"]) == 2
    assert "b.mp4: damaged" in capsys.readouterr().err


# Loading


def test_folder_with_or_without_vae_subfolder(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path / "whole" / "vae")
    z = None
    for folder in (tmp_path / "whole", tmp_path / "whole" / "vae"):
        vae = wan_vae.load(folder)
        assert vae.space == WAN21
        z = vae.encode(frames()) if z is None else z
        assert torch.equal(vae.encode(frames()), z)


def test_folder_with_its_own_constants_is_a_space_of_its_own(calibrated, tmp_path):
    calibrated.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}))
    vae = wan_vae.load(tmp_path)
    assert vae.space.id.startswith("custom16-")
    video = frames().float().movedim(0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        assert torch.allclose(vae.encode(frames()), calibrated.encode(video).latent_dist.mode()[0], atol=1e-5)


def test_bad_folders(calibrated, tmp_path):
    with pytest.raises(VaeError, match=r"neither config\.json nor vae/config\.json"):
        wan_vae.load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(VaeError, match="a WanTransformer3DModel, expected an AutoencoderKLWan"):
        wan_vae.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VaeError, match=r"config\.json: not a configuration"):
        wan_vae.load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(VaeError, match=r"no \.safetensors file"):
        wan_vae.load(tmp_path)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["blocks.0.self_attn.q.weight", "head.modulation"], "a diffusion model"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a diffusion model, checkpoint or text encoder"),
        (["shared.weight", "encoder.block.0.layer.0.weight"], "text encoder"),
        (["diffusion_model.x.lora_A.weight"], "a LoRA"),
        (["decoder.1.weight", "decoder.3.conv.0.weight"], "a decoder without an encoder"),
        (["encoder.1.weight", "decoder.1.weight"], "another kind of VAE"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "another kind of VAE"),
        (["quant_conv.weight", "encoder.down_blocks.0.norm1.gamma"], "diffusers' layout"),
        (["something"], "none of the known kinds"),
    ],
)
def test_other_models_are_named(tmp_path, names, kind):
    save_file({n: torch.zeros(2) for n in names}, tmp_path / "x.safetensors")
    with pytest.raises(VaeError, match=rf"x\.safetensors: .*{kind}"):
        wan_vae.load(tmp_path / "x.safetensors")


def test_files_that_are_not_safetensors(file, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pth")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:100_000])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name, message in (
        ("old.pth", "zip archive"),
        ("cut.safetensors", "truncated"),
        ("empty.safetensors", "an empty file"),
    ):
        with pytest.raises(VaeError, match=rf"{name}: .*{message}.*expected a Wan VAE"):
            wan_vae.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone: no such file or folder"):
        wan_vae.load(tmp_path / "gone")


def test_incomplete_and_misshapen_files(file, tmp_path):
    state = load_file(file)
    path = tmp_path / "x.safetensors"
    for change, message in (
        ({"conv2.weight": None}, "not a complete Wan VAE"),
        ({"encoder.middle.1.proj.bias": None}, "do not fit together"),
        ({"encoder.conv1.weight": torch.zeros(8, 4, 3, 3, 3)}, "takes 4 channels, not RGB"),
        ({"conv2.weight": torch.zeros(4, 4, 1, 1, 1)}, "with 4 latent channels and a stride of 8"),
        ({"decoder.conv9.weight": torch.zeros(1)}, "does not belong to a Wan VAE"),
    ):
        save_file({k: v for k, v in (state | change).items() if v is not None}, path)
        with pytest.raises(VaeError, match=rf"x\.safetensors: .*{message}"):
            wan_vae.load(path)


def test_prefixed_names_are_read(file, tmp_path):
    save_file({f"model.{k}": v for k, v in load_file(file).items()}, tmp_path / "x.safetensors")
    assert torch.equal(wan_vae.load(tmp_path / "x.safetensors").encode(frames()), wan_vae.load(file).encode(frames()))


def test_wrong_lengths_and_bfloat16(file):
    vae = wan_vae.load(file, torch.bfloat16)
    z, exact = vae.encode(frames()), wan_vae.load(file).encode(frames())
    assert z.dtype == torch.float32
    assert 0 < (z - exact).abs().max() < 0.2
    with pytest.raises(VaeError, match="4 frames: a Wan VAE takes 4n\\+1"):
        vae.encode(frames(4))
