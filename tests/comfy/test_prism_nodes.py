"""The PRISM nodes inside ComfyUI: a latent's score there is the trainer's score of the same latent and noise."""

import pytest
import torch

from .tiny_wan import I2V_NAME, T2V_NAME, UMT5_NAME, VAE_NAME

pytest.importorskip("diffusers")

PROMPT = "a red ball in a wood room, fast orbit"
SCORE = {"sigmas": "0.2, 0.6", "draws": 2, "seed": 3}


def node(name):
    return f"IntrinsicReward_{name}"


def make_head(comfy, path, backbone, seed=0, **options):
    """A random head for a backbone, written where ComfyUI looks for heads. Returns what was saved."""
    files, heads = comfy.module("kernels.prism.files"), comfy.module("kernels.prism.head")
    space = comfy.module("kernels.latent_space").WAN21
    torch.manual_seed(seed)
    config = heads.HeadConfig(backbone.width, **({"dim": 64, "heads": 4, "layers": 3} | options))
    head = heads.PrismHead(config)
    for p in head.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    path.parent.mkdir(exist_ok=True)
    files.save(files.LoadedHead(head, backbone, space, (0.05, 0.99), name=path.stem), path)


@pytest.fixture(scope="module")
def toy(comfy, models_dir):
    """(model, positive, headless stack) of the toy world."""
    from benchmarks.toy_world import export, pipeline, weights

    export.to_comfyui(models_dir)
    (model,) = comfy.run("UNETLoader", unet_name=weights.DIT, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=weights.TEXT, type="wan")
    (positive,) = comfy.run("CLIPTextEncode", clip=clip, text=PROMPT)
    return model, positive, pipeline.load()


@pytest.fixture(scope="module")
def dit():
    """The same transformer as trainers read it."""
    from benchmarks.toy_world import weights
    from trainers.wan import dit as wan_dit

    return wan_dit.load(weights.FOLDER / weights.DIT, last_block=7)


@pytest.fixture(scope="module")
def head(comfy, models_dir, dit):
    make_head(comfy, models_dir / "prism" / "toy.safetensors", dit.backbone, taps=(3, 7), dimensions=("look", "motion"))
    return comfy.run(node("LoadPrism"), file="toy.safetensors")[0]


@pytest.fixture(scope="module")
def latent():
    """Two raw latents, normalised alike by both sides."""
    from trainers.kernels.latent_space import WAN21

    z = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"samples": WAN21.denormalise(z)}


def score(comfy, toy, head, latent, model=None, **changes):
    inputs = {"model": model or toy[0], "head": head, "positive": toy[1], "latent": latent, **SCORE, **changes}
    return comfy.run(node("PrismScore"), **inputs)


def test_the_score_is_the_trainers(comfy, toy, head, latent, dit, models_dir):
    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.prism import files
    from trainers.prism.train_loop import Scorer

    mean, clips, text = score(comfy, toy, head, latent)
    scorer = Scorer(dit, files.load(models_dir / "prism" / "toy.safetensors").head)
    words = toy[2].text.words([PROMPT, PROMPT])
    z = WAN21.normalise(latent["samples"])
    theirs = []
    with torch.no_grad():
        for draw in range(2):
            noise = torch.randn((1, 16, 5, 8, 8), generator=torch.Generator().manual_seed(3 + draw))
            for sigma in (0.2, 0.6):
                theirs.append(scorer(sigma * noise + (1 - sigma) * z, torch.full((2,), sigma), words))
    theirs = torch.stack(theirs).mean(dim=0)
    spread = float(theirs.std())
    torch.testing.assert_close(torch.tensor(clips), theirs.mean(dim=1), rtol=1e-3, atol=1e-3 * spread)
    assert mean == pytest.approx(sum(clips) / 2)
    assert f"look {float(theirs[0, 0]):.3f}" in text
    assert "Best: clip" in text


def test_a_score_depends_on_prompt_seed_and_latent_and_not_on_the_batch(comfy, toy, head, latent):
    both = score(comfy, toy, head, latent)[1]
    assert score(comfy, toy, head, {"samples": latent["samples"][1:]})[1] == pytest.approx(both[1:], rel=1e-4)
    assert score(comfy, toy, head, latent, seed=4)[1] != pytest.approx(both, rel=1e-4)
    assert score(comfy, toy, head, latent, sigmas="0.9")[1] != pytest.approx(both, rel=1e-3)
    assert both[0] != pytest.approx(both[1], rel=1e-4)


def test_other_patches_of_the_model_stay_in_force(comfy, toy, head, latent):
    before = score(comfy, toy, head, latent)[1]
    patched = toy[0].clone()
    calls = []

    def roll(args, extra):
        calls.append(args["img"].shape)
        out = extra["original_block"](args)
        return {"img": out["img"].roll(1, dims=-1)}

    patched.set_model_patch_replace(roll, "dit", "double_block", 7)
    after = score(comfy, toy, head, latent, model=patched)[1]
    assert calls
    assert after != pytest.approx(before, rel=1e-3)
    assert score(comfy, toy, head, latent)[1] == pytest.approx(before, rel=1e-5)


def test_blocks_after_the_last_tap_do_not_run(comfy, toy, head, latent):
    ran = []
    blocks = toy[0].model.diffusion_model.blocks
    hooks = [b.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    score(comfy, toy, head, {"samples": latent["samples"][:1]}, sigmas="0.2", draws=1)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(8))


def test_a_shift_node_changes_nothing_and_a_sampler_still_runs(comfy, toy, head, latent):
    before = score(comfy, toy, head, latent)[1]
    (shifted,) = comfy.run("ModelSamplingSD3", model=toy[0], shift=8.0)
    assert score(comfy, toy, head, latent, model=shifted)[1] == pytest.approx(before, rel=1e-5)


def test_a_head_for_another_backbone_is_refused_by_name(comfy, toy, head, latent):
    (other,) = comfy.run("UNETLoader", unet_name=T2V_NAME, weight_dtype="default")
    with pytest.raises(Exception, match=r"head 'toy' was trained on wan, 12 blocks of width 128.*the model is wan, 6 blocks"):
        score(comfy, toy, head, latent, model=other)


def test_other_weights_are_said_to_be_other_weights(comfy, toy, latent, models_dir, dit):
    import dataclasses

    foreign = dataclasses.replace(dit.backbone, fingerprint={k: [-v for v in p] for k, p in dit.backbone.fingerprint.items()})
    make_head(comfy, models_dir / "prism" / "foreign.safetensors", foreign)
    (head,) = comfy.run(node("LoadPrism"), file="foreign.safetensors")
    assert "not those head 'foreign' was trained on" in score(comfy, toy, head, latent)[2]


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


@pytest.mark.parametrize(
    ("sigmas", "message"), [("", "found no number"), ("low", "expected numbers"), ("0.2, 200", "200 is no noise level")]
)
def test_bad_sigmas_are_named(comfy, toy, head, latent, sigmas, message):
    with pytest.raises(Exception, match=message):
        score(comfy, toy, head, latent, sigmas=sigmas)


def test_a_sigma_beyond_the_heads_is_remarked_on(comfy, toy, head, latent):
    assert "trained on sigma 0.05 to 0.99; 0 lies outside" in score(comfy, toy, head, latent, sigmas="0")[2]


def test_bad_latents_and_prompts_are_named(comfy, toy, head, latent):
    with pytest.raises(Exception, match="expected a video latent"):
        score(comfy, toy, head, {"samples": torch.randn(1, 16, 8, 8)})
    with pytest.raises(Exception, match="NaN or infinite"):
        score(comfy, toy, head, {"samples": latent["samples"] * float("nan")})
    two = [*toy[1], *toy[1]]
    with pytest.raises(Exception, match="reads one prompt, found 2"):
        comfy.run(node("PrismScore"), model=toy[0], head=head, positive=two, latent=latent, **SCORE)


def test_a_missing_file_is_named(comfy):
    answer = comfy.node(node("LoadPrism")).validate_inputs(file="gone.safetensors")
    assert "there is no 'gone.safetensors'" in answer
