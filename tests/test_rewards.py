"""Rewards: their figures against plain formulas, how they are combined, and what they refuse."""

import math

import pytest
import torch

from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism.files import LoadedHead
from trainers.kernels.prism.head import HeadConfig, PrismHead
from trainers.kernels.rewards import flow_residual, mix
from trainers.kernels.rewards.flow_residual import FlowResidual, motion_weight
from trainers.kernels.rewards.mix import Mix, normalised
from trainers.kernels.rewards.prism import PrismReward
from trainers.kernels.rewards.prompt_gap import PromptGap
from trainers.kernels.rewards.renoise import shared_noise
from trainers.kernels.rewards.reward import FINISHED, FRAMES, RewardError, RewardInfo, SingleFigure
from trainers.kernels.rewards.schedule import Schedule, at
from trainers.kernels.rewards.shell_lcc import ShellReward
from trainers.kernels.shell_lcc.anchors import Anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold


class View:
    """A ClipView of a network that is a plain function of x, sigma and the prompt."""

    def __init__(self, z, x=None, sigma=FINISHED):
        self.z, self.x, self.sigma, self.calls = z, x, sigma, []

    def noisy(self):
        return self.x

    def clean(self):
        return self.z

    def velocity(self, x, sigma, negative=False):
        self.calls.append((sigma, negative))
        return (0.5 if negative else 0.8) * x + sigma

    def features(self, x, sigma, taps):
        self.calls.append(sigma)
        tokens = x.flatten(3).flatten(1, 2).transpose(1, 2)[..., :32]
        tokens = torch.nn.functional.pad(tokens, (0, 32 - tokens.shape[-1]))
        return [tokens for _ in taps], tokens[:, :3], torch.ones(len(x), 3, dtype=torch.bool)


def latents(batch=3, shape=(4, 5, 6, 7), seed=0, dtype=torch.float32):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_residual(z, sigmas, noises, seed, negative=False):
    """Proprio's formula, clip by clip and number by number."""
    out = []
    for clip in z:
        errors = []
        for level, sigma in enumerate(sigmas):
            for draw in range(noises):
                noise = shared_noise(z, seed, level * noises + draw)[0]
                x = (1 - sigma) * clip + sigma * noise
                velocity = (0.5 if negative else 0.8) * x + sigma
                errors += [float(e) for e in ((velocity - (noise - clip)) ** 2).flatten()]
        out.append(sum(errors) / len(errors))
    return torch.tensor(out)


class TestFlowResidual:
    @pytest.mark.parametrize("shape", [(4, 5, 6, 7), (2, 1, 3, 1)])
    def test_it_is_the_plain_formula(self, shape):
        z = latents(shape=shape)
        reward = FlowResidual((0.3, 0.6), noises=2, seed=4)
        view = View(z)
        found = reward.measure(view)
        assert found.shape == (3, 1)
        torch.testing.assert_close(found[:, 0], plain_residual(z, (0.3, 0.6), 2, 4), rtol=1e-5, atol=1e-6)
        assert [s for s, _ in view.calls] == [0.3, 0.3, 0.6, 0.6]
        assert reward.info.forwards == len(view.calls)
        assert torch.equal(reward.scores(found), -found[:, 0])

    def test_non_contiguous_and_half_latents(self):
        z = latents()
        turned = z.transpose(3, 4).contiguous().transpose(3, 4)
        assert not turned.is_contiguous()
        reward = FlowResidual()
        assert torch.equal(reward.measure(View(turned)), reward.measure(View(z)))
        half = reward.measure(View(z.bfloat16()))
        torch.testing.assert_close(half, reward.measure(View(z)), rtol=2e-2, atol=0)

    def test_clips_of_a_batch_share_their_noise_and_draws_differ(self):
        z = latents()
        alone = torch.cat([FlowResidual().measure(View(one[None])) for one in z])
        torch.testing.assert_close(FlowResidual().measure(View(z)), alone)
        assert not torch.equal(shared_noise(z, 0, 0), shared_noise(z, 0, 1))
        assert not torch.equal(shared_noise(z, 0, 0), shared_noise(z, 1, 0))
        assert torch.equal(shared_noise(z, 2**64 - 1, 5), shared_noise(z, 2**64 - 1, 5))

    def test_motion(self):
        z = latents()
        z[0] = z[0, :, :1]
        weight = motion_weight(z)
        assert torch.equal(weight[0], torch.ones_like(weight[0]))
        torch.testing.assert_close(weight.mean(dim=(1, 2, 3)), torch.ones(3))
        assert torch.equal(motion_weight(z[:, :, :1]), torch.ones(3, 1, 6, 7))
        # A clip with one moving corner: only its error counts.
        still = torch.zeros(1, 4, 5, 6, 7)
        still[:, :, ::2, 0, 0] = 3.0
        place = torch.zeros(1, 5, 6, 7)
        place[:, :, 0, 0] = 1.0
        torch.testing.assert_close(motion_weight(still), place * 42)
        plain, hybrid, moving = (FlowResidual((0.5,), 1, motion=m).measure(View(still)) for m in (0.0, 0.8, 1.0))
        torch.testing.assert_close(hybrid, 0.2 * plain + 0.8 * moving)
        noise = shared_noise(still, 0, 0)
        x = 0.5 * still + 0.5 * noise
        error = flow_residual.residual(0.8 * x + 0.5, noise, still)
        torch.testing.assert_close(moving[0, 0], error[:, :, 0, 0].mean())

    def test_settings_that_make_no_sense_are_refused(self):
        for options in ({"sigmas": ()}, {"sigmas": (1.0,)}, {"sigmas": (0.0,)}, {"noises": 0}, {"motion": 1.5}):
            with pytest.raises(ValueError, match="expected sigmas"):
                FlowResidual(**options)


class TestPromptGap:
    def test_it_is_the_difference_of_two_residuals(self):
        z = latents()
        reward = PromptGap((0.9, 0.95), noises=3, seed=1)
        view = View(z)
        found = reward.measure(view)[:, 0]
        wanted = [plain_residual(z, (0.9, 0.95), 3, 1, negative) for negative in (True, False)]
        torch.testing.assert_close(found, wanted[0] - wanted[1], rtol=1e-4, atol=1e-5)
        assert sum(negative for _, negative in view.calls) == 6
        assert reward.info.forwards == len(view.calls) == 12
        assert torch.equal(reward.scores(found[:, None]), found)

    def test_predictions_are_scored_too(self):
        info = PromptGap().info
        assert info.valid_at(0.0)
        assert info.valid_at(0.945)
        assert not info.valid_at(0.99)
        assert not FlowResidual().info.valid_at(0.9)
        with pytest.raises(ValueError, match="expected sigmas"):
            PromptGap(noises=0)


class Given(SingleFigure):
    """A reward whose figures are known."""

    def __init__(self, values, higher=True, **info):
        self.values = torch.tensor(values)
        self.info = RewardInfo("given", FRAMES, "a number", higher, **info)

    def measure(self, view):
        return self.values[: len(view.clean())][:, None]


class TestMix:
    view = View(torch.zeros(4, 1, 1, 1, 1))

    @pytest.mark.parametrize("how", mix.NORMALISATIONS)
    def test_units_do_not_matter(self, how):
        small, large = Given([1.0, 2.0, 3.0, 4.0]), Given([4000.0, 1000.0, 3000.0, 2000.0], higher=False)
        mixed = Mix([(small, 1.0), (large, 1.0)], how)
        figures = mixed.measure(self.view)
        assert figures.shape == (4, 2)
        scores = mixed.scores(figures)
        rescaled = Mix([(Given([10.0, 20.0, 30.0, 40.0]), 1.0), (large, 1.0)], how)
        torch.testing.assert_close(rescaled.scores(rescaled.measure(self.view)), scores)
        assert scores.argmax() == 3
        assert abs(float(scores.mean())) < 1e-6

    def test_weights_and_nested_mixes(self):
        a, b, c = Given([1.0, 2.0, 3.0, 4.0]), Given([4.0, 3.0, 2.0, 1.0]), Given([0.0, 9.0, 0.0, 0.0])
        inner = Mix([(a, 1.0), (b, 1.0)])
        outer = Mix([(inner, 1.0), (c, 2.0)], mix.RANK)
        assert outer.width == 3
        scores = outer.scores(outer.measure(self.view))
        assert scores.argmax() == 1
        assert Mix([(a, -1.0)]).scores(a.measure(self.view)).argmax() == 0

    def test_normalised(self):
        assert normalised(torch.tensor([5.0]), mix.Z).tolist() == [0.0]
        assert normalised(torch.tensor([2.0, 2.0]), mix.RANK).tolist() == [0.0, 0.0]
        assert normalised(torch.tensor([2.0, 2.0]), mix.Z).tolist() == [0.0, 0.0]
        assert normalised(torch.tensor([3.0, 1.0, 1.0]), mix.RANK).tolist() == [1.0, -0.5, -0.5]
        for how in mix.NORMALISATIONS:
            assert math.isnan(float(normalised(torch.tensor([1.0, float("nan")]), how)[1]))
        z = normalised(torch.tensor([1.0, 2.0, 6.0]), mix.Z)
        assert float(z.std(unbiased=False)) == pytest.approx(1.0)

    def test_the_description_adds_up(self):
        mixed = Mix([(FlowResidual(), 1.0), (Given([1.0], sigmas=(0.0, 0.5), decodes=1), 2.0)])
        assert (mixed.info.forwards, mixed.info.decodes, mixed.info.reads) == (12, 1, FRAMES)
        assert mixed.info.sigmas == (0.0, 0.0)
        assert mixed.info.higher_is_better
        with pytest.raises(ValueError, match="at least one reward"):
            Mix([])
        with pytest.raises(ValueError, match="unknown normalisation"):
            Mix([(FlowResidual(), 1.0)], "softmax")


def test_a_schedule_uses_the_late_reward_from_its_level_on():
    early, late = Given([1.0]), Given([2.0])
    schedule = Schedule(early, late, 0.9)
    view = View(torch.zeros(1, 1, 1, 1, 1))
    for sigma, wanted in ((0.95, 1.0), (0.9, 2.0), (0.0, 2.0)):
        view.sigma = sigma
        assert float(schedule.measure(view)) == wanted
        assert at(schedule, sigma) is (early if wanted == 1.0 else late)
    assert at(late, 0.5) is late
    only_finished = Schedule(early, Schedule(early, late), 0.0)
    assert at(only_finished, 0.1) is early
    assert at(only_finished, FINISHED) is late
    with pytest.raises(TypeError, match="use `at`"):
        schedule.scores(torch.zeros(1, 1))


def test_a_prism_head_scores_noisy_latents_as_they_are_and_finished_ones_with_noise():
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(32, dim=64, heads=2, layers=1, taps=(1, 2))).train(False)
    loaded = LoadedHead(head, None, WAN21, (0.15, 0.99), name="mine")
    reward, z = PrismReward(loaded), latents()
    x = latents(seed=3)
    noisy = View(z, x, 0.9)
    found = reward.measure(noisy)
    assert noisy.calls == [0.9]
    visual, text, mask = noisy.features(x, 0.9, (1, 2))
    wanted = head(visual, text, mask, torch.full((3,), 0.9)).mean(dim=1)
    torch.testing.assert_close(found[:, 0], wanted)
    finished = View(z)
    both = reward.measure(finished)
    assert finished.calls == [0.2, 0.3]
    parts = [reward.measure(View(z, s * shared_noise(z, 0, i) + (1 - s) * z, s)) for i, s in enumerate((0.2, 0.3))]
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)
    assert reward.info.cost(depth=30) == 3


def test_a_manifold_scores_the_distance_from_the_shell():
    manifold = ShellManifold(Anchors(torch.eye(16) * 3, torch.ones(16, 16), 8), WAN21, name="mine")
    z = latents(shape=(16, 2, 3, 3))
    found = ShellReward(manifold).measure(View(z))[:, 0]
    rms = torch.stack([manifold.distance(one[None]).square().mean().sqrt() for one in z])
    torch.testing.assert_close(found, (rms - manifold.radius).abs())
    with pytest.raises(RewardError, match="manifold 'mine' is of 'wan21' latents, found 4 channels"):
        ShellReward(manifold).measure(View(latents()))
