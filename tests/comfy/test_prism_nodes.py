"""The PRISM nodes inside ComfyUI: what a score depends on, what it costs, and what is refused.

That a score is the trainers' is tested in test_prism_trainer_parity.py, which needs diffusers.
"""

import dataclasses
from functools import partial

import pytest
import torch

from . import prism_material
from .prism_material import SCORE, make_head, node
from .tiny_wan import I2V_NAME, T2V_NAME, UMT5_NAME, VAE_NAME


@pytest.fixture(scope="module")
def head(comfy, models_dir, toy_backbone):
    make_head(comfy, models_dir / "prism" / "toy.safetensors", toy_backbone, taps=(3, 7), dimensions=("look", "motion"))
    return comfy.run(node("LoadPrism"), file="toy.safetensors")[0]


@pytest.fixture(scope="module")
def positive(comfy, toy):
    return comfy.run("CLIPTextEncode", clip=toy.clip, text=prism_material.PROMPT)[0]


@pytest.fixture(scope="module")
def latent():
    return prism_material.two_latents()


@pytest.fixture
def score(comfy, toy, positive):
    """(head, latent, **inputs) -> the outputs of PRISM Score."""
    return partial(prism_material.score, comfy, toy, positive)


def test_a_score_depends_on_prompt_seed_and_latent_and_not_on_the_batch(score, head, latent):
    both = score(head, latent)[1]
    assert score(head, {"samples": latent["samples"][1:]})[1] == pytest.approx(both[1:], rel=1e-4)
    assert score(head, latent, seed=4)[1] != pytest.approx(both, rel=1e-4)
    assert score(head, latent, sigmas="0.9")[1] != pytest.approx(both, rel=1e-3)
    assert both[0] != pytest.approx(both[1], rel=1e-4)


def test_other_patches_of_the_model_stay_in_force(toy, score, head, latent):
    before = score(head, latent)[1]
    patched = toy.model.clone()
    calls = []

    def roll(args, extra):
        calls.append(args["img"].shape)
        out = extra["original_block"](args)
        return {"img": out["img"].roll(1, dims=-1)}

    patched.set_model_patch_replace(roll, "dit", "double_block", 7)
    after = score(head, latent, model=patched)[1]
    assert calls
    assert after != pytest.approx(before, rel=1e-3)
    assert score(head, latent)[1] == pytest.approx(before, rel=1e-5)


def test_blocks_after_the_last_tap_do_not_run(toy, score, head, latent):
    ran = []
    blocks = toy.model.model.diffusion_model.blocks
    hooks = [b.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    score(head, {"samples": latent["samples"][:1]}, sigmas="0.2", draws=1)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(8))


def test_a_shift_node_changes_nothing_and_a_sampler_still_runs(comfy, toy, score, head, latent):
    before = score(head, latent)[1]
    (shifted,) = comfy.run("ModelSamplingSD3", model=toy.model, shift=8.0)
    assert score(head, latent, model=shifted)[1] == pytest.approx(before, rel=1e-5)


def test_a_head_for_another_backbone_is_refused_by_name(comfy, toy, score, head, latent):
    (other,) = comfy.run("UNETLoader", unet_name=T2V_NAME, weight_dtype="default")
    with pytest.raises(Exception, match=r"head 'toy' was trained on wan, 12 blocks of width 128.*the model is wan, 6 blocks"):
        score(head, latent, model=other)


def test_other_weights_are_said_to_be_other_weights(comfy, toy_backbone, score, latent, models_dir):
    import dataclasses

    foreign = dataclasses.replace(toy_backbone, fingerprint={k: [-v for v in p] for k, p in toy_backbone.fingerprint.items()})
    make_head(comfy, models_dir / "prism" / "foreign.safetensors", foreign)
    (head,) = comfy.run(node("LoadPrism"), file="foreign.safetensors")
    assert "not those head 'foreign' was trained on" in score(head, latent)[2]


def test_an_image_to_video_models_words_are_read(comfy, models_dir):
    (model,) = comfy.run("UNETLoader", unet_name=I2V_NAME, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    (vae,) = comfy.run("VAELoader", vae_name=VAE_NAME)
    (text,) = comfy.run("CLIPTextEncode", clip=clip, text="a cat walks")
    positive, _, latent = comfy.run(
        "WanImageToVideo",
        positive=text,
        negative=text,
        vae=vae,
        width=64,
        height=64,
        length=9,
        batch_size=1,
        start_image=torch.rand(1, 64, 64, 3),
    )
    backbone = comfy.module("kernels.prism.backbone").of_wan(model.model.diffusion_model.state_dict())
    assert backbone.channels == 36
    make_head(comfy, models_dir / "prism" / "i2v.safetensors", backbone, taps=(2,))
    (head,) = comfy.run(node("LoadPrism"), file="i2v.safetensors")
    latent = {"samples": torch.randn_like(latent["samples"])}
    found = comfy.run(node("PrismScore"), model=model, head=head, positive=positive, latent=latent, **SCORE)
    assert torch.isfinite(torch.tensor(found[1])).all()


def test_auto_takes_the_levels_that_the_head_was_trained_on(score, head, latent):
    assert head.loaded.sigmas == (0.05, 0.99)
    assert score(head, latent, sigmas="auto")[1] == score(head, latent, sigmas="0.1, 0.2, 0.3")[1]
    narrow = type(head)(dataclasses.replace(head.loaded, sigmas=(0.15, 0.9)), head.patcher)
    assert score(narrow, latent, sigmas=" Auto ")[1] == score(head, latent, sigmas="0.2, 0.3")[1]


@pytest.mark.parametrize(
    ("sigmas", "message"), [("", "found no number"), ("low", "expected numbers"), ("0.2, 200", "200 is no noise level")]
)
def test_bad_sigmas_are_named(score, head, latent, sigmas, message):
    with pytest.raises(Exception, match=message):
        score(head, latent, sigmas=sigmas)


def test_a_sigma_beyond_the_heads_is_remarked_on(score, head, latent):
    assert "trained on sigma 0.05 to 0.99; 0 lies outside" in score(head, latent, sigmas="0")[2]


def test_bad_latents_and_prompts_are_named(comfy, toy, score, positive, head, latent):
    with pytest.raises(Exception, match="expected a video latent"):
        score(head, {"samples": torch.randn(1, 16, 8, 8)})
    with pytest.raises(Exception, match="NaN or infinite"):
        score(head, {"samples": latent["samples"] * float("nan")})
    two = [*positive, *positive]
    with pytest.raises(Exception, match="reads one prompt, found 2"):
        comfy.run(node("PrismScore"), model=toy.model, head=head, positive=two, latent=latent, **SCORE)


def test_a_missing_file_is_named(comfy):
    answer = comfy.node(node("LoadPrism")).validate_inputs(file="gone.safetensors")
    assert "there is no 'gone.safetensors'" in answer
