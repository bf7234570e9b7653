"""Latent spaces: constants, conversion, detection, and the raw-for-normalised mistake."""

import json

import pytest
import torch

from trainers.kernels import latent_space as ls


def clip(space, state, scale=1.0, seed=0, shape=(1, 3, 12, 12)):
    """A latent with a normalised latent's moments (times scale), in the state asked for."""
    z = scale * torch.randn(shape[0], space.channels, *shape[1:], generator=torch.Generator().manual_seed(seed))
    return space.denormalise(z) if state == ls.RAW else z


@pytest.mark.parametrize("space", ls.KNOWN.values(), ids=ls.KNOWN)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_normalise_and_back(space, dim):
    z = torch.randn(2, space.channels, 3, 4, 5).movedim(1, dim)
    raw = space.denormalise(z, dim)
    torch.testing.assert_close(space.normalise(raw, dim), z, rtol=1e-5, atol=1e-5)
    picked = raw.movedim(dim, 0)[3]
    torch.testing.assert_close(picked, z.movedim(dim, 0)[3] * space.std[3] + space.mean[3])


def test_bf16_keeps_its_dtype():
    assert ls.WAN21.normalise(torch.zeros(1, 16, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_wrong_channels_name_the_space():
    with pytest.raises(ls.LatentSpaceError, match="16 channels.*wan21.*\\[1, 4, 1, 2, 2\\]"):
        ls.WAN21.normalise(torch.zeros(1, 4, 1, 2, 2))


def test_unknown_id_lists_the_known():
    with pytest.raises(ls.LatentSpaceError, match="wan21, wan22"):
        ls.by_id("wan3")


@pytest.mark.parametrize("space", ls.KNOWN.values(), ids=ls.KNOWN)
def test_json_round_trip(space):
    assert ls.LatentSpace.from_json(space.to_json()) == space


def test_a_known_id_with_other_constants_is_refused():
    d = json.loads(ls.WAN21.to_json())
    d["mean"][0] += 1
    with pytest.raises(ls.LatentSpaceError, match="declared with other means"):
        ls.LatentSpace.from_json(json.dumps(d))


class Wan21Like:
    """ComfyUI's latent format protocol: process_in on [B, C, T, H, W]."""

    latent_channels, spacial_downscale_ratio, temporal_downscale_ratio = 16, 8, 4
    gain = 1.0

    def process_in(self, latent):
        shape = (1, 16, 1, 1, 1)
        return (latent - torch.tensor(ls.WAN21.mean).view(shape)) * self.gain / torch.tensor(ls.WAN21.std).view(shape)


class ScaledLike(Wan21Like):
    latent_channels = 4

    def process_in(self, latent):
        return latent * 0.18215


class PackedLike(Wan21Like):
    def process_in(self, latent):
        return latent.flatten(1)[:, :3]


class BentLike(Wan21Like):
    def process_in(self, latent):
        return latent.abs() * latent


def test_comfy_format_is_detected_by_what_it_does():
    assert ls.from_comfy(Wan21Like()) == ls.WAN21


def test_comfy_format_with_other_constants_is_another_space():
    other = Wan21Like()
    other.gain = 2.0
    found = ls.from_comfy(other)
    assert found.id.startswith("custom16-")
    assert not found.same_as(ls.WAN21)
    x = torch.randn(1, 16, 2, 3, 3)
    torch.testing.assert_close(found.normalise(x), other.process_in(x), rtol=1e-4, atol=1e-4)


def test_plain_scale_factor_is_detected():
    found = ls.from_comfy(ScaledLike())
    assert found.channels == 4
    assert found.std[0] == pytest.approx(1 / 0.18215, rel=1e-5)


@pytest.mark.parametrize("fmt", [PackedLike(), BentLike()])
def test_formats_that_are_no_shift_and_scale_are_refused(fmt):
    with pytest.raises(ls.LatentSpaceError, match=type(fmt).__name__):
        ls.from_comfy(fmt)


def test_diffusers_config():
    config = {"latents_mean": list(ls.WAN22.mean), "latents_std": list(ls.WAN22.std), "z_dim": 48}
    assert ls.from_diffusers(config) is ls.WAN22
    with pytest.raises(ls.LatentSpaceError, match="latents_std"):
        ls.from_diffusers({"latents_mean": [0.0] * 16})


@pytest.mark.parametrize("space", ls.KNOWN.values(), ids=ls.KNOWN)
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_raw_for_normalised_is_loud(space, scale):
    raw, normalised = clip(space, ls.RAW, scale), clip(space, ls.NORMALISED, scale)
    ls.require_state(raw, space, ls.RAW, "a.latent")
    ls.require_state(normalised, space, ls.NORMALISED, "b.pt")
    with pytest.raises(ls.LatentSpaceError, match="a.latent.*raw"):
        ls.require_state(raw, space, ls.NORMALISED, "a.latent")
    with pytest.raises(ls.LatentSpaceError, match="b.pt.*twice"):
        ls.require_state(normalised, space, ls.RAW, "b.pt")


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(1, 16, 4, 4), r"expected a video latent.*\[1, 16, 4, 4\].*video VAE"),
        (torch.zeros(1, 4, 2, 4, 4), "16 channels.*wan21"),
        (torch.full((1, 16, 2, 4, 4), float("nan")), "NaN"),
        (torch.full((1, 16, 2, 4, 4), float("inf")), "found NaN or infinite"),
    ],
)
def test_require_names_the_source(z, message):
    with pytest.raises(ValueError, match=message) as caught:
        ls.WAN21.require_video(z, "samples")
    assert str(caught.value).startswith("samples")
