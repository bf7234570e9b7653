"""The toy world: renderer against its own ground truth, grammar, defects, judge, and the committed stack end to end."""

import itertools

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.toy_world import captions, corruptions, export, judge, pipeline, renderer, text_encoder, weights
from benchmarks.toy_world.captions import Attributes
from benchmarks.toy_world.clips import as_frames, as_video, clip, clips, scene_of
from trainers.kernels.latent_space import WAN21
from trainers.wan.text_padding import use_bias


def scene(move="orbit", speed="slow", shape="cube"):
    a = Attributes("red", shape, "tile", move, None if move == "still" else speed)
    return renderer.draw_scene(a, torch.Generator().manual_seed(5))


def rendered(n, split="judge_test"):
    material = clips(split, n)
    return torch.stack([c.frames for c in material]), [c.scene.attributes for c in material]


def test_a_clip_is_the_same_every_time():
    a, b = clip("train", 3), clip("train", 3)
    assert a.caption == b.caption
    assert a.scene == b.scene
    assert torch.equal(a.frames, b.frames)
    assert a.frames.shape == (17, 3, 64, 64)
    assert not torch.equal(a.frames, clip("train", 4).frames)


@pytest.mark.parametrize("move", [m for m in captions.MOVES if m != "still"])
def test_depth_and_poses_agree_between_frames(move):
    t = renderer.truth(scene(move, "fast"))
    first, last = 0, 16
    v, u = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).view(-1, 3)
    points = (pixels @ t.K.inverse().T) * t.depth[first].view(-1, 1)
    world = (points - t.world_to_camera[first, :3, 3]) @ t.world_to_camera[first, :3, :3]
    there = world @ t.world_to_camera[last, :3, :3].T + t.world_to_camera[last, :3, 3]
    projected = there @ t.K.T
    at = projected[:, :2] / projected[:, 2:]
    inside = ((at > 1) & (at < 63)).all(dim=1) & (there[:, 2] > 0.1)
    assert inside.float().mean() > 0.2
    seen = t.depth[last][at[inside, 1].long(), at[inside, 0].long()]
    error = (seen - there[inside, 2]).abs() / seen
    assert error.median() < 0.02


def test_the_object_is_where_the_truth_says_it_is():
    s = scene("orbit", "fast", "ball")
    t = renderer.truth(s)
    for frame in (0, 8, 16):
        centre = t.world_to_camera[frame] @ torch.cat([t.object_centre[frame], torch.ones(1)])
        u, v, z = t.K @ centre[:3]
        rows, columns = t.object_mask[frame].nonzero().float().T
        assert abs(columns.mean() + 0.5 - u / z) < 1.5
        assert abs(rows.mean() + 0.5 - v / z) < 1.5
        assert (columns.max() - columns.min()) / 2 >= 12


def test_a_still_camera_changes_nothing_and_others_do():
    still = renderer.render(scene("still"))
    assert torch.equal(still[0], still[16])
    slow, fast = (judge.measure(renderer.render(scene("left", s))[None])["dynamics"].item() for s in ("slow", "fast"))
    assert 0.5 < slow < fast


def test_held_out_combinations_leave_every_pair_of_values_in_training():
    seen = [a for a in captions.combinations() if not captions.is_held_out(a)]
    assert len(captions.combinations()) == 432
    assert 40 < 432 - len(seen) < 70
    for (i, j), pairs in ((c, {(a[c[0]], a[c[1]]) for a in map(values, captions.combinations())}) for c in PAIRS):
        assert {(a[i], a[j]) for a in map(values, seen)} == pairs
    assert all(captions.is_held_out(scene_of("unseen", i)[0].attributes) for i in range(20))
    assert not any(captions.is_held_out(scene_of("train", i)[0].attributes) for i in range(20))


PAIRS = list(itertools.combinations(range(5), 2))


def values(a):
    return tuple(a.__dict__.values())


def test_every_caption_is_short_and_has_an_embedding_of_its_own():
    encoder = text_encoder.from_tensors(text_encoder.make())
    texts = captions.every_caption()
    assert len(set(texts)) == len(texts)
    assert max(len(encoder.tokens(t)) for t in texts) <= text_encoder.TOKENS
    a, b = "a red ball in a wood room, static camera", "a red cube in a wood room, static camera"
    x = encoder.encode([a, b, ""], 16)
    length = len(encoder.tokens(a))
    assert (x[0, length:] == 0).all()
    assert torch.equal(x, encoder.encode([a, b, ""], 20)[:, :16])
    assert (x[0] - x[1]).abs().max() > 1
    first, second = (i for i, t in enumerate(encoder.tokens(a)) if t == encoder.tokens("a")[0])
    assert (x[0, first] - x[0, second]).abs().max() > 0.1


@pytest.mark.parametrize("defect", corruptions.DEFECTS)
def test_a_defect_of_strength_zero_is_none_and_grows(defect):
    clean = clip("test", 6)
    assert torch.equal(corruptions.corrupt(clean, defect, 0.0).frames, clean.frames)
    assert corruptions.corrupt(clean, defect, 0.0).caption == clean.caption
    if defect == "wrong_caption":
        assert corruptions.corrupt(clean, defect, 0.2).caption != clean.caption
        return
    weak, strong = (corruptions.corrupt(clean, defect, s, seed=1).frames.float() for s in (0.3, 1.0))
    changes = [(x - clean.frames.float()).abs().mean() for x in (weak, strong)]
    assert 0 < changes[0] < changes[1]
    assert torch.equal(corruptions.corrupt(clean, defect, 1.0, seed=1).frames.float(), strong)


def test_defects_do_what_they_say():
    clean = clip("test", 6)
    before = judge.measure(clean.frames[None])

    def after(defect):
        return judge.measure(corruptions.corrupt(clean, defect, 1.0).frames[None])

    assert after("blur")["laplacian"] < 0.2 * before["laplacian"]
    assert after("noise")["high_frequency"] > 1.5 * before["high_frequency"]
    assert after("over_smoothing")["laplacian"] < 0.8 * before["laplacian"]
    assert after("jitter")["roughness"] > 1.3 * before["roughness"]
    assert after("freeze")["dynamics"] == 0
    with pytest.raises(ValueError, match="strength"):
        corruptions.corrupt(clean, "blur", 2.0)
    with pytest.raises(KeyError, match="unknown defect"):
        corruptions.corrupt(clean, "rust")


def test_the_frechet_distance_is_zero_for_the_same_and_the_squared_shift_for_a_shifted_set():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert abs(judge.frechet(x, x)) < 1e-5
    assert abs(judge.frechet(x, x + 0.5) - 8 * 0.25) < 1e-4


def test_the_judge_reads_clean_renders(toy_judge):
    frames, truth = rendered(24)
    reading = toy_judge.read(frames)
    for attribute in captions.VALUES:
        assert reading.correct(truth, attribute).float().mean() > 0.85, attribute
    scores = reading.scores(truth)
    assert set(scores) == {*judge.DIMENSIONS, "overall"}
    assert all(((s >= 0) & (s <= 1)).all() for s in scores.values())
    assert scores["overall"].mean() > 0.6


@pytest.fixture(scope="module")
def coded(toy_world):
    """Renders, what they show, and their latents."""
    frames, truth = rendered(6)
    return frames, truth, toy_world.encode(frames)


def test_the_judge_reads_reconstructions(toy_judge, toy_world, coded):
    frames, truth, z = coded
    again = toy_world.decode(z)
    reading = toy_judge.read(again)
    right = torch.cat([reading.correct(truth, k) for k in captions.VALUES]).float().mean()
    assert right > 0.8
    psnr = -10 * ((again.float() - frames.float()) / 255).square().mean(dim=(0, 2, 3, 4)).log10()
    assert psnr.mean() > 20
    assert psnr[0] > psnr.mean() - 1.5


def test_the_vae_has_wan21s_latent_space(toy_world, coded):
    frames, _, z = coded
    assert z.shape == (6, *pipeline.LATENT_SHAPE)
    assert z.mean().abs() < 0.2
    assert abs(z.std() - 1) < 0.2
    raw = toy_world.vae.encode(as_video(frames[:1])).latent_dist.mode()
    assert torch.allclose(WAN21.normalise(raw), z[:1], atol=1e-4)
    assert torch.equal(as_frames(as_video(frames)), frames)


def test_sampling_depends_on_seed_and_caption_only(toy_world):
    texts = ["a red ball in a wood room, static camera", "a blue cube in a tile room, fast orbit"]
    both = toy_world.sample(texts, [1, 2], steps=4)
    assert both.shape == (2, *pipeline.LATENT_SHAPE)
    assert torch.allclose(both[1:], toy_world.sample(texts[1:], [2], steps=4), atol=1e-4)
    assert torch.equal(both, toy_world.sample(texts, [1, 2], steps=4))
    assert not torch.allclose(both[1:], toy_world.sample(texts[:1], [2], steps=4), atol=1e-2)


def test_the_hook_sees_x0_and_steers_it(toy_world):
    seen = []

    def watch(x0, sigma, step):
        seen.append((round(sigma, 3), step))
        return x0

    def pull(x0, sigma, step):
        return torch.zeros_like(x0)

    text = ["a red ball in a wood room, static camera"]
    plain = toy_world.sample(text, [0], steps=4)
    assert torch.allclose(plain, toy_world.sample(text, [0], hook=watch, steps=4), atol=1e-4)
    assert [s for _, s in seen] == [0, 1, 2, 3]
    assert seen[0][0] == 1.0
    assert toy_world.sample(text, [0], hook=pull, steps=4).abs().max() < 1e-5


def test_folded_padding_is_padding_to_512(toy_world):
    x, time = pipeline.initial_noise([3]), torch.tensor([500.0])
    text = ["the green cone, brick room, slow dolly in"]
    folded = toy_world.denoiser(text, cfg=1.0).velocity(x, 0.5)
    use_bias(toy_world.dit, None)
    whole = toy_world.dit(x, time, toy_world.text.encode(text), return_dict=False)[0]
    assert (folded - whole).norm() / whole.norm() < 1e-4


def test_the_schedule_is_comfyuis_simple_one():
    assert torch.allclose(pipeline.sigmas(4, 1.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert torch.allclose(pipeline.sigmas(2, 3.0), torch.tensor([1.0, 0.75, 0.0]))


def test_the_committed_weights_are_small_and_in_the_original_layout():
    files = sorted(weights.FOLDER.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 20e6
    assert {f.name for f in files} == {weights.DIT, weights.VAE, weights.TEXT, weights.LATENTS, judge.WEIGHTS.name}
    assert '"text_dim": 256' in weights.header(weights.FOLDER / weights.DIT)["config"]


def test_both_exports_are_the_same_models(toy_world, tmp_path):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    export.to_diffusers(tmp_path / "diffusers")
    copied = export.to_comfyui(tmp_path / "models")
    assert [p.parent.name for p in copied] == ["diffusion_models", "vae", "text_encoders", "prism", "prism"]
    dit = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers/transformer")
    x, time, text = pipeline.initial_noise([0]), torch.tensor([700.0]), ["a red ball, tile room, fast orbit"]
    embedded = toy_world.text.encode(text)
    ours = toy_world.denoiser(text, cfg=1.0).velocity(x, 0.7)
    theirs = dit(x, time, embedded, return_dict=False)[0]
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "diffusers/vae")
    video = as_video(clip("test", 0).frames)[None]
    assert torch.allclose(vae.encode(video).latent_dist.mode(), toy_world.vae.encode(video).latent_dist.mode(), atol=1e-4)
    assert torch.allclose(torch.tensor(vae.config.latents_std), torch.tensor(WAN21.std))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "diffusers/tokenizer")
    texts = captions.every_caption()[::37] + ["", "a purple dog runs"]
    assert tokenizer(texts).input_ids == [toy_world.text.tokens(t) for t in texts]
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "diffusers/text_encoder")
    ids = torch.tensor([toy_world.text.tokens(text[0])])
    assert torch.allclose(encoder(ids).last_hidden_state, embedded[:, : ids.shape[1]], atol=1e-4)
