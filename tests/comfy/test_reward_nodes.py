"""Rewards inside ComfyUI: what they score, and Best-of-N by any of them, early, at the finish and on drafts."""

import re

import pytest
import torch

from .prism_material import node
from .race_material import STEPS, advanced, difference, load_parts, scene_of, stock
from .shell_lcc_material import FIT, sheet

pytestmark = pytest.mark.thorough

SEED = 5


@pytest.fixture(scope="module")
def parts(comfy, models_dir):
    return load_parts(comfy, models_dir, "parity", layers=4)


@pytest.fixture(scope="module")
def scene(comfy, parts):
    return scene_of(comfy, parts, side=64)


def model_reward(comfy, kind="prompt gap", **changes):
    inputs = {"kind": kind, "draws": 2, "draw_seed": 0, "sigmas": "", "motion": 0.0} | changes
    return comfy.run(node("ModelReward"), **inputs)[0]


def best_of(comfy, scene, reward, **changes):
    """(samples, scores, seeds, report) of the KSampler form."""
    plan = {"candidates": 3, "keep": 1, "checkpoints": "25 %", "finish": "restart"} | changes
    out, scores, seeds, text, _ = comfy.run(node("PrismKSampler"), head=reward, **scene.sampling(SEED), **plan)
    return out["samples"], scores, seeds, text


def batch_of(comfy, scene, seeds=(5, 6, 7)):
    """LATENT of the stock clips of some seeds."""
    return {"samples": torch.cat([stock(comfy, scene, s) for s in seeds])}


def velocity(model, conditioning, x, sigma):
    """The velocity of the network itself for latents in model space."""
    text = conditioning[0][0].expand(len(x), -1, -1)
    with torch.inference_mode():
        return model.model.diffusion_model(x, torch.full((len(x),), 1000.0 * sigma), text)


def residual_by_hand(comfy, parts, z, sigmas, draws, conditioning):
    noise_of = comfy.module("kernels.rewards.renoise").shared_noise
    total = torch.zeros(len(z))
    for level, sigma in enumerate(sigmas):
        for draw in range(draws):
            noise = noise_of(z, 0, level * draws + draw)
            v = velocity(parts.model, conditioning, (1 - sigma) * z + sigma * noise, sigma)
            total += (v - (noise - z)).square().mean(dim=(1, 2, 3, 4))
    return total / (len(sigmas) * draws)


def test_the_flow_residual_is_the_models_own_error(comfy, parts, scene):
    latent = batch_of(comfy, scene)
    common = {"model": parts.model, "positive": parts.positive, "latent": latent}
    score, clips, text = comfy.run(
        node("FlowResidualScore"), **common, draws=2, draw_seed=0, sigmas="0.4, 0.6", motion=0.0
    )
    z = parts.model.model.process_latent_in(latent["samples"])
    wanted = residual_by_hand(comfy, parts, z, (0.4, 0.6), 2, parts.positive)
    assert clips == pytest.approx((-wanted).tolist(), rel=1e-4)
    assert score == pytest.approx(sum(clips) / 3)
    first, *_, best, cost = text.splitlines()
    assert first.startswith("Flow Residual Score, lower is better: mean squared error of the model's own velocity")
    assert best == f"Best: clip {int(wanted.argmin()) + 1}"
    # Two levels, two draws, four blocks.
    assert cost == "16 transformer blocks per clip"
    reward = model_reward(comfy, "flow residual", sigmas="0.4, 0.6")
    again = comfy.run(node("RewardScore"), **common, reward=reward)
    assert again[1] == pytest.approx(clips, rel=1e-6)


def test_the_prompt_gap_compares_the_prompt_with_the_negative_one(comfy, parts, scene):
    latent = batch_of(comfy, scene)
    reward = model_reward(comfy)
    common = {"model": parts.model, "reward": reward, "positive": parts.positive, "latent": latent}
    _, clips, text = comfy.run(node("RewardScore"), **common, negative=parts.negative)
    z = parts.model.model.process_latent_in(latent["samples"])
    with_prompt, without = (residual_by_hand(comfy, parts, z, (0.93,), 2, c) for c in (parts.positive, parts.negative))
    assert clips == pytest.approx((without - with_prompt).tolist(), rel=1e-2, abs=1e-4)
    assert "higher is better" in text.splitlines()[0]
    with pytest.raises(Exception, match="has no negative conditioning"):
        comfy.run(node("RewardScore"), **common)


def test_predictions_are_scored_as_they_were_reported(comfy, parts, scene):
    """SamplerLCMUpscale adds noise to the prediction in place after it has reported it."""

    def guider(model):
        return comfy.run("CFGGuider", model=model, positive=parts.positive, negative=parts.negative, cfg=4.0)[0]

    views, measure = [], comfy.module("kernels.rewards.prompt_gap").PromptGap.measure
    (sampler,) = comfy.run("SamplerLCMUpscale", scale_ratio=1.0, scale_steps=1, upscale_method="nearest-exact")
    inputs = advanced(comfy, scene.but(guider=guider, sampler=sampler))
    (noise,) = comfy.run("RandomNoise", noise_seed=5)
    seen, forward = [], type(inputs["guider"]).predict_noise

    def predict(self, x, timestep, *args, **kwargs):
        out = forward(self, x, timestep, *args, **kwargs)
        seen.append(out.clone())
        return out

    def watched(self, view):
        views.append(view.clean().clone())
        return measure(self, view)

    cls, gap = type(inputs["guider"]), comfy.module("kernels.rewards.prompt_gap").PromptGap
    cls.predict_noise, gap.measure = predict, watched
    try:
        comfy.run(
            node("PrismBestOfN"), noise=noise, head=model_reward(comfy), **inputs, candidates=2, keep=1, checkpoints="50 %",
            finish="restart",
        )  # fmt: skip
    finally:
        cls.predict_noise, gap.measure = forward, measure
    assert len(views) == 2
    # Each candidate's second prediction: the first is scaled, which copies it.
    for view, prediction in zip(views, (seen[1], seen[3]), strict=True):
        torch.testing.assert_close(view, prediction)


def test_best_of_n_without_a_file(comfy, parts, scene):
    reward = model_reward(comfy)
    samples, scores, (seed,), text = best_of(comfy, scene, reward)
    assert torch.equal(samples, stock(comfy, scene, seed))
    first = text.splitlines()[0]
    assert first.startswith(f"Best of 3: seed {seed}. Scores, higher is better: how much smaller the model's error")
    continued, again, (same,), _ = best_of(comfy, scene, reward, finish="continue")
    assert same == seed
    assert again == scores
    assert torch.equal(continued, samples)
    # What is scored is the prediction after the first step.
    found = [float(v) for v in re.findall(r"seed \d+: (-?[\d.]+);", text)]
    assert len(found) == 3
    assert max(found) == pytest.approx(scores[0], abs=5e-4)


def test_the_blocks_of_a_race_by_the_model_are_counted(comfy, parts, scene):
    rows = []
    blocks = parts.model.model.diffusion_model.blocks
    hooks = [b.register_forward_hook(lambda m, a, out: rows.append(out.shape[0])) for b in blocks]
    text = best_of(comfy, scene, model_reward(comfy))[3]
    for hook in hooks:
        hook.remove()
    assert int(re.search(r"(\d+) blocks", text)[1]) == sum(rows)
    # One step of three candidates, four forwards of two draws each, and the winner whole: of two forwards a step.
    assert sum(rows) == 4 * (3 * 2 + 3 * 4 + 2 * STEPS)


def test_every_kind_of_reward_ranks_candidates(comfy, parts, scene):
    (manifold, *_) = comfy.run(node("FitShellLCC"), latents={"samples": 2 * sheet(6)}, **FIT)
    gap = model_reward(comfy)
    (mix,) = comfy.run(
        node("MixRewards"), normalise="rank", reward_1=gap, weight_1=1.0, weight_2=0.5, weight_3=2.0, weight_4=1.0,
        reward_2=parts.head, reward_3=manifold,
    )  # fmt: skip
    for name, reward in {"head": parts.head, "manifold": manifold, "gap": gap, "mix": mix}.items():
        samples, scores, (seed,), text = best_of(comfy, scene, reward)
        assert torch.equal(samples, stock(comfy, scene, seed)), name
        assert len(scores) == 1
        assert "higher is better" in text.splitlines()[0]
    assert "is known to work at sigma 0.000 to 0.000" in text
    # The mix's scores are ranks with the weights 1, 0.5 and 2.
    assert all(abs(float(v)) <= 3.5 for v in re.findall(r"seed \d+: (-?[\d.]+);", text))


def test_finalists_are_scored_when_they_are_finished(comfy, parts, scene):
    residual = model_reward(comfy, "flow residual")
    (schedule,) = comfy.run(node("RewardSchedule"), early=model_reward(comfy), late=residual, until=0.0)
    _, clips, _ = comfy.run(
        node("FlowResidualScore"), model=parts.model, positive=parts.positive, latent=batch_of(comfy, scene, (5, 6, 7, 8)),
        draws=2, draw_seed=0, sigmas="", motion=0.0,
    )  # fmt: skip
    by_seed = dict(zip((5, 6, 7, 8), clips, strict=True))
    for finish in ("restart", "continue"):
        options = {"candidates": 4, "finalists": 2, "finish": finish}
        samples, scores, (seed,), text = best_of(comfy, scene, schedule, **options)
        assert torch.equal(samples, stock(comfy, scene, seed))
        assert scores[0] == pytest.approx(by_seed[seed], rel=1e-4)
        assert text.count("dropped at step 1") == 2
        assert text.count("dropped at the finish") == 1
        kept = [int(s) for s, v in re.findall(r"seed (\d+): ([^;]+);", text) if "," in v]
        assert by_seed[seed] == max(by_seed[s] for s in kept)
        assert "minus mean squared error of the model's own velocity" in text.splitlines()[0]
    two = best_of(comfy, scene, schedule, candidates=4, finalists=3, keep=2)
    assert two[1] == sorted(two[1], reverse=True)
    assert len(two[2]) == two[0].shape[0] == 2


class TestDrafts:
    def test_with_fewer_steps(self, comfy, parts, scene):
        residual = model_reward(comfy, "flow residual")
        samples, scores, (seed,), text = best_of(comfy, scene, residual, plan="drafts", draft_steps=2)
        assert torch.equal(samples, stock(comfy, scene, seed))
        drafts = torch.cat([
            comfy.run("KSampler", **{**scene.sampling(s), "steps": 2})[0]["samples"] for s in (5, 6, 7)
        ])  # fmt: skip
        _, clips, _ = comfy.run(
            node("FlowResidualScore"), model=parts.model, positive=parts.positive, latent={"samples": drafts}, draws=2,
            draw_seed=0, sigmas="", motion=0.0,
        )  # fmt: skip
        assert seed == 5 + clips.index(max(clips))
        assert scores[0] == pytest.approx(max(clips), rel=1e-4)
        assert "Candidates were drafts with 2 steps; winners were sampled again in full" in text
        # Three drafts of two steps, six residuals each, and the winner: of two forwards a step and four blocks.
        assert int(re.search(r"(\d+) blocks", text)[1]) == 4 * (3 * 2 * 2 + 3 * 6 + 2 * STEPS)

    def test_under_a_step_cache(self, comfy, parts, scene):
        (cached,) = comfy.run(
            "EasyCache", model=parts.model, reuse_threshold=9.0, start_percent=0.1, end_percent=0.95, verbose=False
        )
        residual = model_reward(comfy, "flow residual")
        samples, _, (seed,), text = best_of(comfy, scene.but(model=cached), residual, plan="drafts", draft_steps=0)
        assert torch.equal(samples, stock(comfy, scene, seed))
        assert "Candidates were drafts with a step cache" in text
        with pytest.raises(Exception, match="plan 'drafts' without a draft"):
            best_of(comfy, scene, residual, plan="drafts", draft_steps=0)
        with pytest.raises(Exception, match="9 draft steps of 4"):
            best_of(comfy, scene, residual, plan="drafts", draft_steps=9)

    def test_in_the_advanced_form(self, comfy, parts, scene):
        def guider(model):
            return comfy.run("CFGGuider", model=model, positive=parts.positive, negative=parts.negative, cfg=4.0)[0]

        case = scene.but(guider=guider)
        (noise,) = comfy.run("RandomNoise", noise_seed=5)
        out, _, (seed,), text, _ = comfy.run(
            node("PrismBestOfN"), noise=noise, head=model_reward(comfy, "both"), **advanced(comfy, case), candidates=3,
            keep=1, checkpoints="0.9", finish="restart", plan="drafts", draft_steps=2,
        )  # fmt: skip
        assert difference(out["samples"], stock(comfy, case, seed)) == 0
        assert "weighted sum of rewards, each as its z-score" in text.splitlines()[0]


@pytest.mark.parametrize("plan", ["fast", "balanced", "careful"])
def test_presets_are_shares_of_the_steps(comfy, scene, plan):
    text = best_of(comfy, scene, model_reward(comfy), plan=plan, candidates=8)[3]
    steps = [int(s) for s in re.findall(r"^Step (\d+)", text, re.MULTILINE)]
    assert steps == {"fast": [1], "balanced": [1, 2], "careful": [1, 2, 3]}[plan]


def test_checkpoints_may_be_shares(comfy, scene):
    text = best_of(comfy, scene, model_reward(comfy), checkpoints="0.97, 75%", candidates=4)[3]
    assert [int(s) for s in re.findall(r"^Step (\d+)", text, re.MULTILINE)] == [1, 3]
    for wrong in ("200 %", "0%", "soon %"):
        with pytest.raises(Exception, match="expected a share of the steps"):
            best_of(comfy, scene, model_reward(comfy), checkpoints=wrong)


class TestFrames:
    """Rewards of decoded frames."""

    @pytest.fixture
    def brightness(self, comfy, monkeypatch):
        class Brightness:
            """A scorer of another pack in the old form, with a widget and a model of its own."""

            RETURN_TYPES, FUNCTION = ("STRING", "FLOAT"), "run"

            @classmethod
            def INPUT_TYPES(cls):
                model = ("AESTHETIC_MODEL",)
                widgets = {"gain": ("FLOAT", {"default": 1.0}), "mode": (["mean", "max"],)}
                return {"required": {"pixels": ("IMAGE",), "network": model, **widgets}}

            def run(self, pixels, network, gain, mode):
                return f"{network} {mode}", [gain * float(frame.mean()) for frame in pixels]

        monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "Brightness", Brightness)

    def reward(self, comfy, **changes):
        inputs = {"node_id": "Brightness", "settings": '{"gain": 2.0}', "every": 2, "higher_is_better": False, "extra": "net"}
        return comfy.run(node("ImageScorerReward"), **inputs | changes)[0]

    def test_a_scorer_of_another_pack(self, comfy, parts, scene, brightness):
        latent = batch_of(comfy, scene)
        common = {"model": parts.model, "positive": parts.positive, "latent": latent, "reward": self.reward(comfy)}
        _, clips, text = comfy.run(node("RewardScore"), **common, vae=parts.vae)
        frames = [comfy.run("VAEDecode", vae=parts.vae, samples={"samples": z[None]})[0] for z in latent["samples"]]
        wanted = [-2 * float(f.reshape(-1, 64, 64, 3)[::2].mean()) for f in frames]
        assert clips == pytest.approx(wanted, rel=1e-4)
        assert text.startswith("Reward Score, lower is better: what the node 'Brightness' returns")
        with pytest.raises(Exception, match="connect a VAE"):
            comfy.run(node("RewardScore"), **common)
        samples, _, (seed,), _ = best_of(comfy, scene, common["reward"], vae=parts.vae, finalists=2)
        assert torch.equal(samples, stock(comfy, scene, seed))

    def test_what_cannot_be_wrapped_is_named(self, comfy, brightness):
        cases = {
            "there is no node with the id 'Nothing'": {"node_id": "Nothing"},
            "has no input 'gian'; its inputs are pixels, network, gain, mode": {"settings": '{"gian": 1}'},
            "needs a AESTHETIC_MODEL for its input 'network'": {"extra": None},
            "input 'settings': not JSON": {"settings": "gain=2"},
            "input 'settings': found '3'": {"settings": "3"},
            "node 'VAEDecode' has no IMAGE input": {"node_id": "VAEDecode", "settings": ""},
            "node 'ImageInvert' returns IMAGE, expected a FLOAT": {"node_id": "ImageInvert", "settings": ""},
        }
        for text, changes in cases.items():
            with pytest.raises(Exception, match=re.escape(text)):
                self.reward(comfy, **changes)

    def test_geometry(self, comfy, parts, scene):
        (reward,) = comfy.run(node("GeometryReward"), backend="torch")
        latent = batch_of(comfy, scene, (5, 6))
        _, clips, text = comfy.run(
            node("RewardScore"), model=parts.model, positive=parts.positive, latent=latent, reward=reward, vae=parts.vae
        )
        assert all(0 <= v <= 1 for v in clips)
        assert text.startswith("Reward Score, higher is better: consistency with one rigid scene, 0 to 1")
        assert text.splitlines()[1] == "Good clips have 0.5 to 1."
        # Nothing can be judged in noise.
        assert clips == [0, 0]
        assert "Equal best: clips 1, 2" in text


def test_what_makes_no_reward_is_refused(comfy, parts):
    for sigmas in ("0", "1.0", "0.5, 1"):
        with pytest.raises(Exception, match="leaves no noise or no clip"):
            model_reward(comfy, sigmas=sigmas)
    gap = model_reward(comfy)
    (schedule,) = comfy.run(node("RewardSchedule"), early=gap, late=gap, until=0.5)
    weights = {f"weight_{k}": 1.0 for k in (1, 2, 3, 4)}
    with pytest.raises(Exception, match="a Reward Schedule cannot be mixed"):
        comfy.run(node("MixRewards"), normalise="rank", reward_1=schedule, **weights)


def test_memory_does_not_grow_with_the_candidates(comfy, parts, scene):
    """Whatever is alive between candidates is their states: a few latents each."""
    import gc

    def tensors_while_scoring(count):
        race = comfy.module("nodes.race")
        seen, score = [], race.GuiderNetwork.score

        def watched(self, calls, checkpoint):
            gc.collect()
            alive = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.ndim >= 3]
            seen.append(sum(t.numel() * t.element_size() for t in alive))
            return score(self, calls, checkpoint)

        race.GuiderNetwork.score = watched
        try:
            best_of(comfy, scene, parts.head, candidates=count)
        finally:
            race.GuiderNetwork.score = score
        return seen[0]

    size = stock(comfy, scene, 5).numel() * 4
    few, many = tensors_while_scoring(2), tensors_while_scoring(10)
    # The noise, the state, the prediction and what the sampler's frame holds.
    assert many - few <= 8 * 8 * size
    # One block's output would be this much for every candidate.
    tokens = 3 * 4 * 4 * 128 * 4
    assert tokens * 8 > 8 * size / 4


def test_decoded_clips_are_selected_by_a_reward_of_frames(comfy):
    clips = torch.rand(2, 9, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    clips[1] *= 0.5
    (dark,) = comfy.run(
        node("ImageScorerReward"), node_id="IntrinsicReward_GeometryTracks", settings='{"backend": "torch"}', every=1,
        higher_is_better=True,
    )  # fmt: skip
    lists = {"images": [clips.flatten(0, 1)], "clips": [2], "backend": ["torch"]}
    *_, scores, records, _, text = comfy.run(node("GeometryBestOfN"), lists=lists | {"reward": [dark]})
    assert len(scores) == len(records) == 2
    assert text.startswith("Best of 2: clip ")
    assert "higher is better: what the node 'IntrinsicReward_GeometryTracks' returns" in text
    with pytest.raises(Exception, match="this node has decoded frames only"):
        comfy.run(node("GeometryBestOfN"), lists=lists | {"reward": [model_reward(comfy)]})
