"""Preference losses of flow models: values, coefficients, the split step, beta, noise levels."""

import math

import pytest
import torch

from trainers.kernels.tuning import naive, noise_levels, split_step
from trainers.kernels.tuning import preference_loss as losses
from trainers.kernels.tuning.auto_beta import AutoBeta, FixedBeta
from trainers.kernels.tuning.noise_levels import NoiseLevels
from trainers.kernels.tuning.preference_loss import Errors, LossError, PreferenceLoss
from trainers.kernels.tuning.split_step import NoisyPair

EVERY = [
    PreferenceLoss(anchor=0, static=0),
    PreferenceLoss("sigmoid", 0.1, sft=0.3, anchor=2, static=0.5),
    PreferenceLoss("sigmoid", sft=0.3, anchor=2, reference=0.7, static=5),
    PreferenceLoss("ipo", anchor=1, static=0.5),
    PreferenceLoss("linear", anchor=1, reference=0.2, static=0.5),
    PreferenceLoss("linear", anchor=1, static=0),
    PreferenceLoss("sft", anchor=0, static=0),
    PreferenceLoss("sft", sft=0.5, anchor=1, static=0.5),
]
IDS = [f"{i}-{loss.kind}" for i, loss in enumerate(EVERY)]


def some_errors(grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    e = [0.3 + 0.01 * torch.randn(5, generator=g) for _ in range(4)]
    return Errors(e[0].requires_grad_(grad), e[1].requires_grad_(grad), e[2], e[3])


def test_losses_are_the_published_formulas():
    d, beta = torch.tensor([0.004, -0.01, 0.0]), 300.0
    by_hand = [-(math.log(1 / (1 + math.exp(-beta * x)))) for x in d.tolist()]
    torch.testing.assert_close(losses.preference(d, beta, PreferenceLoss()), torch.tensor(by_hand))
    smooth = [0.9 * a + 0.1 * -(math.log(1 / (1 + math.exp(beta * x)))) for a, x in zip(by_hand, d.tolist(), strict=True)]
    torch.testing.assert_close(losses.preference(d, beta, PreferenceLoss(smoothing=0.1)), torch.tensor(smooth))
    torch.testing.assert_close(losses.preference(d, beta, PreferenceLoss("ipo")), (d - 1 / 600) ** 2)
    torch.testing.assert_close(losses.preference(d, beta, PreferenceLoss("linear")), -300 * d)
    assert losses.gradient_factor(d, beta)[2] == 0.5
    e = Errors(*(torch.tensor([v]) for v in (0.30, 0.42, 0.31, 0.40)))
    torch.testing.assert_close(e.difference, torch.tensor([0.03]))


def test_the_static_penalty_sees_lost_motion_only():
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 4, 5, 3, 3, generator=g)
    still = x0[:, :, :1].expand_as(x0)
    m = losses.motion(x0)
    variance = x0.double().var(dim=2, correction=0).mean(dim=(1, 2, 3))
    steps = (x0[:, :, 1:] - x0[:, :, :-1]).double().square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(m, (0.7 * variance + 0.3 * steps).float())
    assert losses.motion(still).max() < 1e-10
    assert losses.motion(x0[:, :, :1]).tolist() == [0, 0]
    sigma, loss = torch.tensor([0.5, 0.5]), PreferenceLoss(anchor=0, static=3.0)

    def of(prediction):
        v = (x0 - prediction) / 0.5
        return losses.of_prediction(v, x0, sigma, m, None, 10.0, loss)

    torch.testing.assert_close(of(still), 0.5 * 5 * 3 * m)
    assert of(1.1 * x0).tolist() == [0, 0]


@pytest.mark.parametrize("loss", EVERY, ids=IDS)
def test_coefficients_are_autograds(loss):
    e = some_errors(grad=True)
    wanted = torch.autograd.grad(losses.of_errors(e, 200.0, loss).sum(), (e.winner, e.loser), allow_unused=True)
    found = losses.coefficients(e, 200.0, loss)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
        assert not a.requires_grad


class Network(torch.nn.Module):
    """A velocity with a nonlinearity and, if wanted, dropout."""

    def __init__(self, dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inside, self.outside = torch.nn.Conv3d(4, 8, 3, padding=1), torch.nn.Conv3d(8, 4, 1)
        self.drop = torch.nn.Dropout(dropout)

    def forward(self, x, sigma):
        return self.outside(self.drop(torch.tanh(self.inside(x)))) * (1 + sigma.view(-1, 1, 1, 1, 1))


def some_pair(first=0, dtype=torch.float32, batch=3):
    g = torch.Generator().manual_seed(1)
    w, l, n = (torch.randn(batch, 4, 5, 4, 4, generator=g).to(dtype) for _ in range(3))
    return NoisyPair(w, l, n, torch.rand(batch, generator=g).to(dtype), first, 5)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("loss", EVERY, ids=IDS)
def test_the_split_steps_gradients_are_the_joint_ones(loss, first):
    reference_model, model, pair = Network(), Network(), some_pair(first)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    reference = split_step.measure_reference(reference_model, pair)
    figures = split_step.backward(model, pair, reference, 20.0, loss, 1 / 3)
    split = gradients(model)
    model.zero_grad()
    sides = [pair.noisy(s) for s in ("winner", "loser")]
    with torch.no_grad():
        fixed = tuple(reference_model(x, pair.sigma) for x in sides)
    moving = tuple(model(x, pair.sigma) for x in sides)
    joint = naive.joint_loss(moving, fixed, (pair.winner, pair.loser), pair.noise, pair.sigma, 20.0, loss, first)
    joint.mean().backward()
    torch.testing.assert_close(figures.loss, joint.detach(), rtol=1e-5, atol=1e-6)
    for name, grad in gradients(model).items():
        assert (grad - split[name]).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name
    measured = split_step.measure(model, pair, reference, 20.0, loss)
    torch.testing.assert_close(measured.loss, figures.loss)
    torch.testing.assert_close(measured.difference, figures.difference)
    torch.testing.assert_close(measured.loser, figures.loser)
    assert (figures.deviation > 0).all()


def test_repeated_forwards_draw_the_same_dropout():
    """The loser's error that the coefficients are of must be the one that is differentiated."""
    model, pair, seen = Network(dropout=0.5).train(True), some_pair(), []
    reference = split_step.measure_reference(Network(), pair)

    def velocity(x, sigma):
        v = model(x, sigma)
        seen.append(v.detach().clone())
        return v

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    split_step.backward(velocity, pair, reference, 20.0, PreferenceLoss(), 1.0)
    assert torch.equal(torch.rand(1), expected)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], model(pair.noisy("loser"), pair.sigma))


def test_only_one_graph_is_alive():
    """The winner's activations are freed before the loser's forward with a graph begins."""
    model, pair, alive = Network(), some_pair(), []
    reference = split_step.measure_reference(model, pair)
    counts = {"saved": 0}

    class Kept:
        def __init__(self, t):
            self.t = t
            counts["saved"] += 1

        def __del__(self):
            counts["saved"] -= 1

    def velocity(x, sigma):
        alive.append((torch.is_grad_enabled(), counts["saved"]))
        return model(x, sigma)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
        split_step.backward(velocity, pair, reference, 20.0, PreferenceLoss(static=0), 1.0)
    assert [a for a in alive if a[0]] == [(True, 0), (True, 0)]


@pytest.mark.parametrize("scale", [1e-4, 3e-3, 9e-3])
def test_auto_beta_holds_the_gradient_factor(scale):
    beta, g = AutoBeta(low=1.0, high=1e6), torch.Generator().manual_seed(0)
    assert beta.beta == 1e6
    for _ in range(100):
        beta.update(float((scale * (1 + 0.3 * torch.randn(16, generator=g))).abs().mean()))
    d = scale * (1 + 0.3 * torch.randn(2000, generator=g))
    assert 0.2 < float(losses.gradient_factor(d, beta.beta).mean()) < 0.3


def test_auto_beta_does_not_follow_a_runaway_margin_down():
    beta = AutoBeta()
    for step in range(100):
        beta.update(0.01 * 1.2**step)
    assert beta.beta == 100.0
    assert float(losses.gradient_factor(torch.tensor(3.0), beta.beta)) < 1e-6
    beta.update(math.nan)
    assert beta.beta == 100.0
    other = AutoBeta()
    other.load_state_dict(beta.state_dict())
    assert other.mean == beta.mean
    assert FixedBeta(500).beta == 500
    for bad in ({"factor": 0.5}, {"decay": 1.0}, {"low": 0.0}, {"low": 9.0, "high": 1.0}):
        with pytest.raises(ValueError, match="must"):
            AutoBeta(**bad)
    with pytest.raises(ValueError, match="finite"):
        FixedBeta(math.inf)


def test_settings_that_do_not_fit():
    for bad in ({"kind": "kto"}, {"smoothing": 0.5}, {"kind": "ipo", "smoothing": 0.1}, {"sft": -1.0}, {"anchor": math.nan}):
        with pytest.raises(LossError):
            PreferenceLoss(**bad)


class TestNoiseLevels:
    def test_shifted_levels(self):
        t = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        s = NoiseLevels("shifted", 3.0).at(t)
        torch.testing.assert_close(s, (3 * t / (1 + 2 * t)).float())
        torch.testing.assert_close(noise_levels.unshift(0.6, 3.0), 0.6 / (3 - 2 * 0.6))

    @pytest.mark.parametrize("kind", ["uniform", "logit_normal", "shifted"])
    def test_a_range_keeps_the_density_within(self, kind):
        """Levels within a range are distributed as those of the whole distribution that fall into it."""
        g = torch.Generator().manual_seed(0)
        whole = NoiseLevels(kind, 2.0).draw(40000, g)
        wanted = whole[(whole >= 0.7) & (whole <= 0.9)].sort().values
        found = NoiseLevels(kind, 2.0, 0.7, 0.9).draw(len(wanted), g).sort().values
        assert 0.7 <= found.min() < 0.71 < 0.89 < found.max() <= 0.9
        assert (found - wanted).abs().max() < 0.02

    def test_the_logit_normal(self):
        s = NoiseLevels("logit_normal", 1.0).draw(40000, torch.Generator().manual_seed(0))
        logits = torch.logit(s.double())
        assert abs(logits.mean()) < 0.03
        assert abs(logits.std() - 1) < 0.03

    def test_a_list_and_a_fixed_table(self):
        levels = NoiseLevels("list", levels=(0.2, 0.5, 0.9), low=0.4)
        drawn = levels.draw(200, torch.Generator().manual_seed(0))
        assert sorted({round(s, 6) for s in drawn.tolist()}) == [0.5, 0.9]
        torch.testing.assert_close(NoiseLevels("uniform").fixed(4), torch.tensor([0.125, 0.375, 0.625, 0.875]))

    def test_bad_settings(self):
        outside = {"kind": "list", "levels": (0.1,), "low": 0.5}
        for bad in ({"kind": "beta"}, {"low": 0.5, "high": 0.5}, {"shift": 0.0}, {"kind": "list"}, outside):
            with pytest.raises(ValueError, match="expected|must|no noise level"):
                NoiseLevels(**bad)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "linear"])
def test_on_a_pretend_gpu_nothing_changes_its_device_or_waits(kind):
    """Coefficients and terms are computed where the errors are, without waiting for the device."""
    from .pretend_gpu import DEVICE, PretendGPU

    loss = PreferenceLoss(kind, sft=0.1, anchor=1, reference=0.5, static=0.5)
    pair = some_pair()
    v, r = torch.randn_like(pair.winner), torch.randn_like(pair.winner)

    def everything(v, r, w, n, s):
        error = losses.velocity_error(v, n - w, 1)
        errors = Errors(error, 1.1 * error, 0.9 * error, error)
        further = losses.of_prediction(v, w, s, losses.motion(r), r, 50.0, loss, 1)
        return (*losses.coefficients(errors, 50.0, loss), losses.of_errors(errors, 50.0, loss), further)

    inputs = (v, r, pair.winner, pair.noise, pair.sigma)
    wanted = everything(*inputs)
    with PretendGPU() as gpu:
        found = everything(*(t.to(DEVICE) for t in inputs))
        assert not gpu.synchronisations
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.held, b)
