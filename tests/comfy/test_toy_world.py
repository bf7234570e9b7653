"""The toy world's committed stack through ComfyUI's own loaders and sampler gives what it gives headless.

Tests that compare with the headless stack need diffusers: they ask for the fixture `toy_world`, which skips without it.
"""

import pytest
import torch

from .shell_lcc_material import GUIDANCE
from .test_stock import stock_t2v

pytestmark = pytest.mark.thorough

CAPTION = "a red ball in a wood room, fast orbit"


def close(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_captions_give_the_same_embeddings(comfy, toy):
    from benchmarks.toy_world import text_encoder, weights
    from trainers.wan import text_encoder as umt5

    path = weights.FOLDER / weights.TEXT
    headless, encoder = text_encoder.load(path), umt5.load(path)
    for text in (CAPTION, ""):
        ((embedding, _),) = comfy.run("CLIPTextEncode", clip=toy.clip, text=text)[0]
        assert close(embedding, headless.encode([text])) < 1e-3
        words = encoder.encode(text)
        assert close(embedding[0, : len(words)], words) < 1e-3


def test_the_same_noise_prompt_and_schedule_give_the_same_latents(comfy, toy, toy_world):
    from benchmarks.toy_world.pipeline import CFG, SHIFT, STEPS
    from trainers.kernels.latent_space import WAN21

    model = comfy.run("ModelSamplingSD3", model=toy.model, shift=SHIFT)[0]
    positive, negative = (comfy.run("CLIPTextEncode", clip=toy.clip, text=t)[0] for t in (CAPTION, ""))
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=17, batch_size=1)
    (out,) = comfy.run(
        "KSampler", model=model, seed=5, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative, latent_image=latent, denoise=1.0,
    )  # fmt: skip
    ours = WAN21.denormalise(toy_world.sample([CAPTION], [5]))
    assert close(out["samples"], ours) < 1e-3


def test_tokens_after_block_11_agree(comfy, toy_files, toy_world):
    from benchmarks.toy_world import pipeline, weights

    # A model and a stack of its own: both are changed here, and those of the fixtures are everybody's.
    (model,) = comfy.run("UNETLoader", unet_name=weights.DIT, weight_dtype="default")
    diffusion, world = model.model.diffusion_model.float(), pipeline.load()
    seen = {}
    hooks = [
        net.blocks[11].register_forward_hook(lambda m, i, out, k=k: seen.__setitem__(k, out))
        for k, net in (("comfy", diffusion), ("diffusers", world.dit))
    ]
    x, time, text = pipeline.initial_noise([0]), torch.tensor([700.0]), world.text.encode([CAPTION])
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for block in world.dit.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    with torch.no_grad():
        diffusion(x, time, text)
        world.dit(x, time, text)
    for hook in hooks:
        hook.remove()
    assert close(seen["comfy"], seen["diffusers"]) < 1e-4


def test_the_vae_encodes_and_decodes_alike(comfy, toy, toy_world):
    from benchmarks.toy_world.clips import as_video, clip

    frames = clip("test", 0).frames
    (latent,) = comfy.run("VAEEncode", pixels=frames.permute(0, 2, 3, 1).float() / 255, vae=toy.vae)
    ours = toy_world.vae.encode(as_video(frames)[None]).latent_dist.mode()
    assert close(latent["samples"], ours) < 1e-3


@pytest.fixture(scope="module")
def manifold_path(models_dir, tmp_path_factory):
    """A manifold of the bundled latents, fitted headless, where ComfyUI looks for manifolds."""
    from benchmarks.toy_world import weights
    from trainers.shell_lcc import cli as shell_lcc

    path = tmp_path_factory.mktemp("fit") / "toy.safetensors"
    latents = weights.FOLDER / weights.LATENTS
    assert not shell_lcc.main(["fit", "--latents", str(latents), "--output", str(path), "--held_out", "0.25"])
    folder = models_dir / "shell_lcc"
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    return path


def toy_t2v(seed, guided):
    """The stock text-to-video prompt on the toy world's files, as `pipeline.sample` samples."""
    from benchmarks.toy_world import pipeline, weights

    prompt = stock_t2v(seed, pipeline.STEPS)
    names = {"1": ("unet_name", weights.DIT), "2": ("clip_name", weights.TEXT), "3": ("vae_name", weights.VAE)}
    for key, (name, value) in names.items():
        prompt[key]["inputs"][name] = value
    prompt["4"]["inputs"]["shift"] = pipeline.SHIFT
    prompt["5"]["inputs"]["text"], prompt["6"]["inputs"]["text"] = CAPTION, ""
    prompt["7"]["inputs"]["length"] = 17
    prompt["8"]["inputs"] |= {"cfg": pipeline.CFG, "sampler_name": "euler"}
    prompt["10"]["inputs"]["filename_prefix"] = "toy"
    if guided:
        prompt["20"] = {"class_type": "IntrinsicReward_LoadShellLCC", "inputs": {"file": "toy.safetensors"}}
        inputs = {"model": ["1", 0], "manifold": ["20", 0], **GUIDANCE}
        prompt["21"] = {"class_type": "IntrinsicReward_ShellLCCGuidance", "inputs": inputs}
        prompt["4"]["inputs"]["model"] = ["21", 0]
    return prompt


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "guided"])
def served(request, server, toy_files, manifold_path):
    """(whether it was guided, frames of the clip [17, 64, 64, 3]) from the stock workflow in a server."""
    return request.param, server.images(server.post(toy_t2v(5, request.param), timeout=240), "10")


def test_the_stock_workflow_shows_what_the_caption_says(served, toy_judge):
    _, seen = served
    assert seen.shape == (17, 64, 64, 3)
    read = toy_judge.read(torch.from_numpy(seen).permute(0, 3, 1, 2)[None])
    assert read.probabilities["colour"].argmax() == 0
    assert read.probabilities["room"].argmax() == 0


def test_the_stock_workflow_makes_the_clip_that_is_made_headless(served, toy_world, manifold_path):
    from trainers.kernels.shell_lcc.manifold import load

    (guided, seen), manifold = served, load(manifold_path)
    hook = (lambda x0, sigma, step: manifold.pull(x0)) if guided else None
    frames = toy_world.decode(toy_world.sample([CAPTION], [5], hook))[0]
    ours = frames.permute(0, 2, 3, 1).numpy().astype(int)
    assert abs(seen.astype(int) - ours).max() <= 2


def test_a_race_in_comfyui_has_the_winner_of_the_headless_search(comfy, toy, toy_world):
    from benchmarks.toy_world import candidates, pipeline, prism_rows, search, weights
    from trainers.kernels.latent_space import WAN21

    world, size = toy_world, 4
    scorer = candidates.load_heads(candidates.heads_folder(), weights.FOLDER / weights.DIT)["query"]
    plan = prism_rows.plan_of(size, prism_rows.HALVING, max(scorer.head.config.taps))
    caption = candidates.caption_of(world, prism_rows.SPLIT, 0)
    with torch.no_grad():
        found = search.search(world, scorer, caption, 0, plan)
    model = comfy.run("ModelSamplingSD3", model=toy.model, shift=pipeline.SHIFT)[0]
    positive, negative = (comfy.run("CLIPTextEncode", clip=toy.clip, text=t)[0] for t in (caption.text, ""))
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=17, batch_size=1)
    (head,) = comfy.run("IntrinsicReward_LoadPrism", file=candidates.HEADS["query"])
    seeds = candidates.seeds(0, size)
    out, _, winners, report, _ = comfy.run(
        "IntrinsicReward_PrismKSampler", model=model, head=head, positive=positive, negative=negative, latent_image=latent,
        seed=seeds[0], steps=pipeline.STEPS, cfg=pipeline.CFG, sampler_name="euler", scheduler="simple", denoise=1.0,
        candidates=size, keep=1, checkpoints=", ".join(map(str, prism_rows.HALVING)), finish="continue",
    )  # fmt: skip
    assert winners == [seeds[found.winner]]
    assert f"{plan.cost.blocks} blocks" in report
    assert "weights are not those" not in report
    assert close(out["samples"], WAN21.denormalise(found.z)) < 1e-3
