"""PRISM Best-of-N inside ComfyUI: candidates are ordinary runs, winners too, and the cost is the plan's."""

import json
import re
import threading

import pytest
import torch

from .prism_material import make_head, node
from .shell_lcc_material import FIT, GUIDANCE, sheet
from .tiny_wan import I2V_NAME, T2V_NAME, UMT5_NAME, VAE_NAME

pytestmark = pytest.mark.thorough

STEPS = 8
# Of the schedule of eight steps at the model's own shift of 8: before steps 2, 4 and 6.
CHECKPOINTS = "0.97, 0.9, 0.75"


@pytest.fixture(scope="module")
def wan(comfy):
    (model,) = comfy.run("UNETLoader", unet_name=T2V_NAME, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    prompts = [comfy.run("CLIPTextEncode", clip=clip, text=t)[0] for t in ("a cat walks on grass", "blurry")]
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)
    return model, *prompts, latent


@pytest.fixture(scope="module")
def head(comfy, models_dir, wan):
    backbone = comfy.module("kernels.prism.backbone").of_wan(wan[0].model.diffusion_model.state_dict())
    make_head(comfy, models_dir / "prism" / "race.safetensors", backbone, taps=(1, 3))
    return comfy.run(node("LoadPrism"), file="race.safetensors")[0]


def plain(comfy, wan, seed, sampler="euler", cfg=6.0, model=None, latent=None):
    model_, positive, negative, empty = wan
    (out,) = comfy.run(
        "KSampler",
        model=model or model_,
        positive=positive,
        negative=negative,
        latent_image=latent or empty,
        seed=seed,
        steps=STEPS,
        cfg=cfg,
        sampler_name=sampler,
        scheduler="simple",
        denoise=1.0,
    )
    return out["samples"]


def race(comfy, wan, head, sampler="euler", cfg=6.0, model=None, latent=None, seed=5, **changes):
    """(samples, scores, seeds, report)"""
    model_, positive, negative, empty = wan
    options = {"candidates": 8, "keep": 1, "checkpoints": CHECKPOINTS, "finish": "continue"} | changes
    out, scores, seeds, text, _ = comfy.run(
        node("PrismKSampler"),
        model=model or model_,
        head=head,
        positive=positive,
        negative=negative,
        latent_image=latent or empty,
        seed=seed,
        steps=STEPS,
        cfg=cfg,
        sampler_name=sampler,
        scheduler="simple",
        denoise=1.0,
        **options,
    )
    return out["samples"], scores, seeds, text


def close(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "euler_ancestral"])
def test_one_candidate_is_the_stock_samplers_run(comfy, wan, head, sampler):
    assert torch.equal(race(comfy, wan, head, sampler, candidates=1)[0], plain(comfy, wan, 5, sampler))


def test_one_candidate_is_sampler_custom_advanceds_run(comfy, wan, head):
    model, positive, negative, latent = wan
    (noise,) = comfy.run("RandomNoise", noise_seed=9)
    (guider,) = comfy.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=5.0)
    (sampler,) = comfy.run("KSamplerSelect", sampler_name="dpmpp_2m")
    (sigmas,) = comfy.run("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)
    stock = comfy.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent, "head": head}
    plan = {"keep": 1, "checkpoints": CHECKPOINTS, "finish": "continue"}
    ours = comfy.run(node("PrismBestOfN"), **inputs, candidates=1, **plan)
    assert torch.equal(ours[0]["samples"], stock[0]["samples"])
    four = comfy.run(node("PrismBestOfN"), **inputs, candidates=4, **plan)
    (again,) = comfy.run("RandomNoise", noise_seed=four[2][0])
    stock = comfy.run("SamplerCustomAdvanced", noise=again, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
    assert close(four[0]["samples"], stock[0]["samples"]) < 1e-4


def test_seeds_wrap_after_the_largest(comfy, wan, head):
    last = 2**64 - 1
    _, _, seeds, _ = race(comfy, wan, head, seed=last, candidates=2, keep=2, checkpoints="0.9")
    assert sorted(seeds) == [0, last]
    (noise,) = comfy.run("RandomNoise", noise_seed=last)
    following = comfy.module("nodes.prism_best_of_n").noise_of_candidate(noise, 1)
    (first,) = comfy.run("RandomNoise", noise_seed=0)
    assert torch.equal(following.generate_noise(wan[3]), first.generate_noise(wan[3]))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_schedule_without_steps_returns_the_latent(comfy, wan, head, keep):
    """As KSampler with denoise 0, and SamplerCustomAdvanced with empty sigmas."""
    model, positive, negative, _ = wan
    latent = {"samples": torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "batch_index": [4]}
    common = {"head": head, "latent_image": latent, "candidates": 3, "keep": keep, "checkpoints": "0.9", "finish": "restart"}
    sampling = {"seed": 5, "steps": 4, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 0.0}
    conds = {"model": model, "positive": positive, "negative": negative}
    (stock,) = comfy.run("KSampler", **conds, **sampling, latent_image=latent)
    ours = comfy.run(node("PrismKSampler"), **conds, **sampling, **common)
    (noise,) = comfy.run("RandomNoise", noise_seed=5)
    (guider,) = comfy.run("CFGGuider", **conds, cfg=5.0)
    (sampler,) = comfy.run("KSamplerSelect", sampler_name="euler")
    custom = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": torch.FloatTensor([])}
    advanced = comfy.run("SamplerCustomAdvanced", **custom, latent_image=latent)[0]
    for out, expected in ((ours, stock), (comfy.run(node("PrismBestOfN"), **custom, **common), advanced)):
        samples, scores, seeds, text, _ = out
        assert torch.equal(samples["samples"], torch.cat([expected["samples"]] * keep))
        assert (scores, seeds) == ([0.0] * keep, [5, 6][:keep])
        assert "no candidate was scored" in text
        assert samples.get("batch_index") == ([4] if keep == 1 else None)


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "euler_ancestral", "dpmpp_2m"])
def test_a_winner_is_the_plain_run_of_its_seed(comfy, wan, head, sampler):
    samples, _, (seed,), _ = race(comfy, wan, head, sampler, finish="restart")
    assert torch.equal(samples, plain(comfy, wan, seed, sampler))
    continued, _, seeds, _ = race(comfy, wan, head, sampler)
    assert seeds == [seed]
    assert close(continued, samples) < 1e-4


@pytest.mark.parametrize(("finish", "cfg"), [("continue", 6.0), ("restart", 6.0), ("continue", 1.0)])
def test_the_blocks_that_run_are_the_plans(comfy, wan, head, finish, cfg):
    rows = []
    blocks = wan[0].model.diffusion_model.blocks
    hooks = [b.register_forward_hook(lambda m, a, out: rows.append(out.shape[0])) for b in blocks]
    text = race(comfy, wan, head, finish=finish, cfg=cfg)[3]
    for hook in hooks:
        hook.remove()
    make_plan = comfy.module("kernels.prism.plan").make_plan
    (sigmas,) = comfy.run("BasicScheduler", model=wan[0], scheduler="simple", steps=STEPS, denoise=1.0)
    levels = [float(s) for s in CHECKPOINTS.split(",")]
    passes = 1 if cfg == 1.0 else 2
    plan = make_plan(sigmas.tolist(), 8, 1, levels, passes=passes, depth=6, scoring=4, finish=finish)
    assert [p.step for p in plan.checkpoints] == [2, 4, 6]
    assert sum(rows) == plan.cost.blocks
    evaluations, spent, share, full = re.search(r"(\d+) evaluations, (\d+) blocks: ([\d.]+) % of .*\((\d+)\)", text).groups()
    assert (int(evaluations), int(spent), int(full)) == (plan.cost.evaluations, plan.cost.blocks, plan.full_cost.blocks)
    assert float(share) == pytest.approx(100 * plan.share, abs=0.06)


def test_several_winners_come_out_best_first(comfy, wan, head):
    samples, scores, seeds, text = race(comfy, wan, head, keep=3)
    assert samples.shape[0] == len(seeds) == 3
    assert scores == sorted(scores, reverse=True)
    for one, seed in zip(samples, seeds, strict=True):
        assert close(one[None], plain(comfy, wan, seed)) < 1e-4
    assert text.count("kept") == 3
    assert text.count("dropped at step") == 5


def test_guidance_shift_and_batches_stay_in_force(comfy, wan, head):
    (manifold, *_) = comfy.run(node("FitShellLCC"), latents={"samples": 2 * sheet(6)}, **FIT)
    (guided,) = comfy.run(node("ShellLCCGuidance"), model=wan[0], manifold=manifold, **GUIDANCE)
    (guided,) = comfy.run("ModelSamplingSD3", model=guided, shift=5.0)
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=2)
    samples, scores, (seed, same), _ = race(comfy, wan, head, model=guided, latent=latent, finish="restart", candidates=3)
    assert samples.shape[0] == len(scores) == 2
    assert seed == same
    assert torch.equal(samples, plain(comfy, wan, seed, model=guided, latent=latent))
    assert not torch.allclose(samples, plain(comfy, wan, seed, latent=latent))


def test_an_image_to_video_model_races_too(comfy, models_dir):
    (model,) = comfy.run("UNETLoader", unet_name=I2V_NAME, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    (vae,) = comfy.run("VAELoader", vae_name=VAE_NAME)
    (text,) = comfy.run("CLIPTextEncode", clip=clip, text="a cat walks")
    positive, negative, latent = comfy.run(
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
    make_head(comfy, models_dir / "prism" / "i2v_race.safetensors", backbone, taps=(2,))
    (head,) = comfy.run(node("LoadPrism"), file="i2v_race.safetensors")
    samples, _, (seed,), _ = race(comfy, (model, positive, negative, latent), head, candidates=3)
    assert close(samples, plain(comfy, (model, positive, negative, latent), seed)) < 1e-4


def test_an_interruption_leaves_no_thread_and_the_next_run_clean(comfy, wan, head, monkeypatch):
    import comfy.model_management as management

    before, threads = race(comfy, wan, head, candidates=4)[0], threading.active_count()
    blocks, calls = wan[0].model.diffusion_model.blocks, []

    def interrupt(module, arguments, out):
        calls.append(1)
        if len(calls) == 40:
            raise management.InterruptProcessingException

    hook = blocks[0].register_forward_hook(interrupt)
    with pytest.raises(management.InterruptProcessingException):
        race(comfy, wan, head, candidates=8)
    hook.remove()
    assert threading.active_count() == threads
    assert torch.equal(race(comfy, wan, head, candidates=4)[0], before)


def test_what_cannot_race_is_named(comfy, wan, head):
    model, positive, negative, latent = wan
    with pytest.raises(Exception, match="no step starts at or below sigma 0.001"):
        race(comfy, wan, head, checkpoints="0.001")
    with pytest.raises(Exception, match="input 'checkpoints': found 'soon'"):
        race(comfy, wan, head, checkpoints="soon")
    with pytest.raises(Exception, match="keep 9 of 8 candidates"):
        race(comfy, wan, head, keep=9)
    (noise,) = comfy.run("DisableNoise")
    (guider,) = comfy.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=5.0)
    (sampler,) = comfy.run("KSamplerSelect", sampler_name="euler")
    (sigmas,) = comfy.run("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)
    with pytest.raises(Exception, match="noise without a seed"):
        comfy.run(
            node("PrismBestOfN"),
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
            head=head,
            candidates=2,
            keep=1,
            checkpoints=CHECKPOINTS,
            finish="continue",
        )


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "euler_ancestral"])
def test_candidates_may_be_evaluated_together(comfy, wan, head, sampler):
    rows = []
    blocks = wan[0].model.diffusion_model.blocks
    hooks = [b.register_forward_hook(lambda m, a, out: rows.append(out.shape[0])) for b in blocks]
    samples, scores, (seed,), text = race(comfy, wan, head, sampler, chunk=3)
    for hook in hooks:
        hook.remove()
    alone = race(comfy, wan, head, sampler)
    assert seed == alone[2][0]
    assert scores == pytest.approx(alone[1], abs=1e-4)
    assert close(samples, plain(comfy, wan, seed, sampler)) < 1e-4
    assert max(rows) == 6
    ran, once = (int(re.search(r"(\d+) blocks", t)[1]) for t in (text, alone[3]))
    # The first batch is compared with its first candidate alone: one step with its two forwards of six blocks.
    assert sum(rows) == ran == once + 12


def test_a_batch_of_clips_is_evaluated_together_too(comfy, wan, head):
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=2)
    samples, scores, (seed, _), _ = race(comfy, wan, head, latent=latent, candidates=4, chunk=4)
    assert scores[0] != scores[1]
    assert close(samples, plain(comfy, wan, seed, latent=latent)) < 1e-4


def test_where_memory_runs_out_fewer_are_evaluated_together(comfy, wan, head, monkeypatch):
    rows, failures = [], []
    block = wan[0].model.diffusion_model.blocks[0]

    def full(module, arguments, out):
        rows.append(out.shape[0])
        if out.shape[0] > 4:
            failures.append(out.shape[0])
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    hook = block.register_forward_hook(full)
    try:
        samples, _, (seed,), _ = race(comfy, wan, head, chunk=8)
    finally:
        hook.remove()
    # Seven candidates after the first alone have fourteen rows, then four: from there on two candidates, four rows.
    assert failures == [14, 8]
    assert close(samples, plain(comfy, wan, seed)) < 1e-4
    hook = block.register_forward_hook(lambda m, a, out: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("all of it")))
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            race(comfy, wan, head, chunk=2)
    finally:
        hook.remove()


class TestDrafts:
    """Candidates under a step cache."""

    @pytest.fixture
    def cached(self, comfy, wan):
        return comfy.run("EasyCache", model=wan[0], reuse_threshold=9.0, start_percent=0.1, end_percent=0.95, verbose=False)[0]

    @pytest.fixture
    def lazy(self, comfy, wan):
        return comfy.run("LazyCache", model=wan[0], reuse_threshold=9.0, start_percent=0.1, end_percent=0.95, verbose=False)[0]

    @pytest.mark.parametrize("which", ["cached", "lazy"])
    def test_each_is_the_cached_run_of_its_seed(self, comfy, wan, head, which, request):
        model = request.getfixturevalue(which)
        samples, _, seeds, text = race(comfy, wan, head, model=model, candidates=3, keep=3, chunk=3)
        assert seeds == [5, 6, 7]
        for one, seed in zip(samples, seeds, strict=True):
            assert torch.equal(one[None], plain(comfy, wan, seed, model=model))
            assert close(one[None], plain(comfy, wan, seed)) > 1e-3
        evaluations = int(re.search(r"(\d+) evaluations", text)[1])
        assert evaluations < 3 * 2 * STEPS

    @pytest.mark.parametrize("which", ["cached", "lazy"])
    def test_scores_do_not_touch_the_memory(self, comfy, wan, head, which, request):
        model = request.getfixturevalue(which)
        samples, _, (seed,), _ = race(comfy, wan, head, model=model, candidates=4)
        assert close(samples, plain(comfy, wan, seed, model=model)) < 1e-4

    @pytest.mark.parametrize("which", ["cached", "lazy"])
    def test_a_restarted_winner_is_sampled_without(self, comfy, wan, head, which, request):
        model = request.getfixturevalue(which)
        samples, _, (seed,), text = race(comfy, wan, head, model=model, candidates=4, finish="restart", checkpoints="0.75")
        assert torch.equal(samples, plain(comfy, wan, seed))
        whole = race(comfy, wan, head, candidates=4, finish="restart", checkpoints="0.75")[3]
        share = [float(re.search(r"blocks: ([\d.]+) %", t)[1]) for t in (text, whole)]
        assert share[0] < 0.9 * share[1]


def test_the_board_shows_every_candidate(comfy, wan, head):
    model_, positive, negative, empty = wan
    *_, text, board = comfy.run(
        node("PrismKSampler"), model=model_, head=head, positive=positive, negative=negative, latent_image=empty, seed=5,
        steps=STEPS, cfg=6.0, sampler_name="euler", scheduler="simple", denoise=1.0, candidates=5, keep=2,
        checkpoints=CHECKPOINTS, finish="continue",
    )  # fmt: skip
    assert board.ndim == 4
    assert board.shape[0] == 1
    assert board.shape[3] == 3
    # Four columns and two rows of pictures 256 wide.
    assert board.shape[2] > 4 * 256
    assert board.shape[1] > 2 * 256
    assert 0 <= float(board.min()) < float(board.max()) <= 1


def test_a_sampler_that_never_calls_back_has_a_board_too(comfy, wan, head):
    from comfy.samplers import KSAMPLER

    def silent(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            x0 = model(x, sigma * x.new_ones([x.shape[0]]), **extra_args)
            x = x + (x - x0) / sigma * (following - sigma)
        return x

    model, positive, negative, latent = wan
    (noise,) = comfy.run("RandomNoise", noise_seed=5)
    (guider,) = comfy.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=6.0)
    (sigmas,) = comfy.run("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)
    out, _, (seed,), _, board = comfy.run(
        node("PrismBestOfN"), noise=noise, guider=guider, sampler=KSAMPLER(silent), sigmas=sigmas, latent_image=latent,
        head=head, candidates=2, keep=1, checkpoints="0.97", finish="continue",
    )  # fmt: skip
    assert close(out["samples"], plain(comfy, wan, seed)) < 1e-4
    assert board.shape[2] > 2 * 256


def test_scores_are_in_what_is_saved(comfy, wan, head):
    model_, positive, negative, empty = wan
    saved = {"workflow": {}}
    comfy.run(
        node("PrismKSampler"), model=model_, head=head, positive=positive, negative=negative, latent_image=empty, seed=5,
        steps=STEPS, cfg=6.0, sampler_name="euler", scheduler="simple", denoise=1.0, candidates=4, keep=1,
        checkpoints=CHECKPOINTS, finish="continue", extra_data={"extra_pnginfo": saved},
    )  # fmt: skip
    (entry,) = saved["intrinsic_reward"].values()
    assert entry["head"] == "race"
    assert [c["seed"] for c in entry["candidates"]] == [5, 6, 7, 8]
    assert sum(c["dropped"] is None for c in entry["candidates"]) == len(entry["winners"]) == 1
    assert json.loads(json.dumps(entry)) == entry


def test_the_first_of_two_experts_is_raced_on_its_part_of_the_schedule(comfy, wan, head):
    """Wan 2.2 A14B samples with one model down to a noise level, and with another from there."""
    model, positive, negative, latent = wan
    (guider,) = comfy.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=5.0)
    (sampler,) = comfy.run("KSamplerSelect", sampler_name="euler")
    (sigmas,) = comfy.run("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)
    high, low = comfy.run("SplitSigmas", sigmas=sigmas, step=5)
    (second,) = comfy.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=2.0)
    (nothing,) = comfy.run("DisableNoise")

    def finish(out):
        inputs = {"noise": nothing, "guider": second, "sampler": sampler, "sigmas": low, "latent_image": out}
        return comfy.run("SamplerCustomAdvanced", **inputs)[0]["samples"]

    (noise,) = comfy.run("RandomNoise", noise_seed=5)
    first = {"guider": guider, "sampler": sampler, "sigmas": high, "latent_image": latent}
    out, _, (seed,), *_ = comfy.run(
        node("PrismBestOfN"), noise=noise, head=head, candidates=4, keep=1, checkpoints="0.97, 0.9", finish="restart", **first
    )
    (own,) = comfy.run("RandomNoise", noise_seed=seed)
    assert torch.equal(finish(out), finish(comfy.run("SamplerCustomAdvanced", noise=own, **first)[0]))
    with pytest.raises(Exception, match="no step starts at or below sigma 0.5"):
        comfy.run(
            node("PrismBestOfN"), noise=noise, head=head, candidates=4, keep=1, checkpoints="0.5", finish="continue", **first
        )


class TestShortOfMemory:
    """Networks of plain layers stay whole where ComfyUI has memory for a part of them only."""

    @pytest.fixture(params=["head", "manifold"])
    def patcher(self, comfy, request):
        """The patcher of a new network, as the loaders make it; the network is lost in the test."""
        if request.param == "head":
            backbone = comfy.module("kernels.prism.backbone").Backbone
            files, heads = comfy.module("kernels.prism.files"), comfy.module("kernels.prism.head")
            head = heads.PrismHead(heads.HeadConfig(32, dim=64, heads=4, layers=3))
            space = comfy.module("kernels.latent_space").WAN21
            loaded = files.LoadedHead(head, backbone.__new__(backbone), space, (0.05, 0.99), name="whole")
            return comfy.module("nodes.prism_type").for_wire(loaded).patcher
        (manifold, _) = comfy.run(node("FitShellLCC"), latents={"samples": 2 * sheet(6)}, **FIT)
        return manifold.patcher

    def devices(self, patcher):
        tensors = [*patcher.model.parameters(), *patcher.model.buffers()]
        assert tensors
        return {t.device.type for t in tensors}

    def test_loading_is_whole(self, patcher):
        assert self.devices(patcher) == {"cpu"}
        # A budget of one byte; "meta" stands for the GPU.
        patcher.partially_load(torch.device("meta"), extra_memory=1)
        assert self.devices(patcher) == {"meta"}
        assert patcher.loaded_size() == patcher.model_size()
        # ComfyUI's budget for a network that is in use may be negative.
        patcher.partially_load(torch.device("meta"), extra_memory=-1)
        assert self.devices(patcher) == {"meta"}

    def test_unloading_is_whole(self, patcher):
        size = patcher.model_size()
        patcher.load(torch.device("cpu"), lowvram_model_memory=1)
        assert patcher.partially_unload(torch.device("meta"), memory_to_free=1) == size
        assert self.devices(patcher) == {"meta"}
        assert patcher.loaded_size() == 0

    def test_a_plain_patcher_splits_the_head(self, comfy):
        from comfy.model_patcher import ModelPatcher

        heads = comfy.module("kernels.prism.head")
        head = heads.PrismHead(heads.HeadConfig(32, dim=64, heads=4, layers=3))
        patcher = ModelPatcher(head, load_device=torch.device("meta"), offload_device=torch.device("cpu"))
        patcher.partially_load(torch.device("meta"), extra_memory=patcher.model_size() // 2)
        assert self.devices(patcher) == {"cpu", "meta"}


@pytest.mark.parametrize("name", ["PrismBestOfN", "PrismKSampler"])
def test_wrong_widgets_are_refused_before_the_run(comfy, name):
    check = comfy.node(node(name)).validate_inputs
    good = {"candidates": 8, "keep": 1, "checkpoints": "0.98, 15 %", "plan": "checkpoints"}
    assert check(**good) is True
    assert check() is True
    for widget, value, message in (
        ("keep", 20, "input 'keep': found 20 of 8 candidates, expected 1 to 8"),
        ("candidates", 0, "input 'candidates': found 0"),
        ("checkpoints", "5, 10, 20", "input 'checkpoints': 5 is no noise level"),
        ("plan", "quick", "expected one of checkpoints, fast"),
    ):
        assert message in check(**good | {widget: value})
    assert "such as 15 %, 40 %" in check(**good | {"checkpoints": "soon"})
    # Presets and drafts do not read the text: a saved workflow may have any.
    assert check(**good | {"checkpoints": "soon", "plan": "drafts"}) is True
    if name == "PrismKSampler":
        assert "input 'steps': found 1, expected 2 or more" in check(**good, steps=1)
        assert "input 'steps': found 0, expected 1 to 10000" in check(**good, steps=0)
        assert check(**good | {"plan": "drafts"}, steps=1) is True
        assert check(**good | {"candidates": 1}, steps=1) is True
    # A connected input has no value yet.
    assert check(candidates=None, keep=20, checkpoints=None, plan=None) is True
