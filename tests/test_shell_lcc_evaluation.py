"""Held-out figures against their definitions, the split's promises, and the fitting losses against plain formulas."""

import json
import math

import pytest
import torch

from benchmarks.sheets import sheet_clips
from trainers.kernels.latent_space import WAN21
from trainers.kernels.shell_lcc import evaluation, fit_predictor
from trainers.kernels.shell_lcc import predictor as predictor_module
from trainers.kernels.shell_lcc.anchors import Anchors
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold
from trainers.kernels.shell_lcc.predictor import Predictor


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_predictor(bases=37, hidden=24, seed=3):
    torch.manual_seed(seed)
    coder = Predictor(16, bases, hidden)
    coder.predictor[1].running_mean.normal_(0, 0.3)
    for p in coder.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return coder


@pytest.mark.parametrize("count", [2, 3, 10, 101])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_split_is_a_partition_with_both_sides(count, share):
    names = [f"clip{i}" for i in range(count)]
    fit, held = evaluation.held_out_split(names, share, seed=7)
    assert sorted(fit + held) == list(range(count))
    assert fit
    assert held
    assert abs(len(held) - share * count) <= 1
    assert (fit, held) == evaluation.held_out_split(names, share, seed=7)


def test_split_depends_on_the_seed():
    names = [str(i) for i in range(50)]
    assert evaluation.held_out_split(names, 0.2, 0) != evaluation.held_out_split(names, 0.2, 1)


def test_windows_of_one_video_stay_on_one_side():
    names = [f"video{i // 4}" for i in range(40)]
    fit, held = evaluation.held_out_split(names, 0.2, 3)
    assert not {names[i] for i in fit} & {names[i] for i in held}
    fit, held = evaluation.held_out_split(["only"] * 10, 0.2, 3)
    assert (len(fit), len(held)) == (8, 2)


def test_one_clip_is_split_in_time():
    with pytest.raises(evaluation.SplitError, match="two clips"):
        evaluation.held_out_split(["only"], 0.1)
    z = rand(16, 9, 2, 3)
    fit, held = evaluation.split_frames(z)
    assert torch.equal(torch.cat([fit, held], dim=1), z)
    assert held.shape[1] == 3
    assert evaluation.split_frames(rand(16, 2, 2, 3))[1].shape[1] == 1
    with pytest.raises(evaluation.SplitError, match="single latent frame"):
        evaluation.split_frames(rand(16, 1, 2, 3))


@pytest.mark.parametrize("seed", range(6))
def test_a_large_group_is_held_out_only_when_there_is_no_smaller(seed):
    names = ["long"] * 10 + ["short"] * 3 + ["other"] * 4
    fit, held = evaluation.held_out_split(names, 0.25, seed)
    assert {names[i] for i in held} in ({"short"}, {"other"})
    fit, held = evaluation.held_out_split(["long"] * 10 + ["short"] * 5, 0.1, seed)
    assert held == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("sizes", "cap", "expected"),
    [([10, 10, 10], 100, [10, 10, 10]), ([10, 10, 10], 9, [3, 3, 3]), ([100, 2, 100], 42, [20, 2, 20]), ([5], 3, [3])],
)
def test_quotas_fill_the_cap_evenly(sizes, cap, expected):
    assert evaluation.quotas(sizes, cap) == expected


def test_quotas_use_the_whole_cap():
    shares = evaluation.quotas([7, 50, 13, 4, 90], 99)
    assert sum(shares) == 99
    assert max(shares) - min(s for s, n in zip(shares, [7, 50, 13, 4, 90], strict=True) if s < n) <= 1


def test_drawn_tokens_are_the_clips_own_without_repeats():
    z = torch.arange(16 * 60).float().view(16, 3, 4, 5)
    drawn = evaluation.draw_tokens("a", z, 20, seed=1)
    assert drawn.shape == (20, 16)
    assert len(set(drawn[:, 0].tolist())) == 20
    assert {tuple(t) for t in drawn.tolist()} <= {tuple(t) for t in evaluation.tokens(z).tolist()}
    assert torch.equal(drawn, evaluation.draw_tokens("a", z, 20, seed=1))
    assert not torch.equal(drawn, evaluation.draw_tokens("b", z, 20, seed=1))
    assert torch.equal(evaluation.draw_tokens("a", z, 1000), evaluation.tokens(z))
    assert torch.equal(evaluation.tokens(z)[7], z[:, 0, 1, 2])


def test_drawn_frames_are_whole_and_spread():
    z = torch.arange(9.0).view(1, 9, 1, 1).expand(16, 9, 2, 3)
    assert evaluation.draw_frames(z, 18)[0, :, 0, 0].tolist() == [0, 4, 8]
    assert evaluation.draw_frames(z, 1).shape == (16, 1, 2, 3)
    assert evaluation.draw_frames(z, 10**6) is z


@pytest.fixture(params=["anchors", "predictor"])
def measured(request, monkeypatch):
    """A manifold whose chunks are tiny, its figures on three clips, and those clips."""
    clips = [(f"c{i}", z) for i, z in enumerate(sheet_clips(3, (2, 9, 7)))]
    tokens = torch.cat([evaluation.tokens(z) for _, z in clips])
    coder = fit_anchors(tokens, 20, 5) if request.param == "anchors" else make_predictor()
    monkeypatch.setattr(predictor_module.Predictor, "chunk_tokens", lambda self, device: 7)
    monkeypatch.setattr(Anchors, "chunk_tokens", lambda self, device: 7)
    manifold = ShellManifold(coder, WAN21)
    manifold.calibration = calibrate([evaluation.score(manifold, z) for _, z in clips])
    return manifold, evaluation.evaluate(manifold, iter(clips)), tokens


def test_figures_equal_their_definitions(measured):
    manifold, figures, tokens = measured
    coder = manifold.coder
    with torch.no_grad():
        code = coder.code(tokens)
        d = ((tokens - code.skeleton) / code.thickness).norm(dim=1)
        if isinstance(coder, Anchors):
            nearest = torch.cdist(tokens, coder.anchors).argmin(dim=1)
            usage = torch.bincount(nearest, minlength=20).double()
            dead = int((usage == 0).sum())
        else:
            usage = coder.weights(tokens).double().sum(dim=0)
            dead = int((usage / usage.sum() < 0.01 / 37).sum())
    assert figures["tokens"] == len(tokens)
    assert figures["clips"] == 3
    for name, q in (("p01", 0.01), ("p05", 0.05), ("median", 0.5), ("p99", 0.99)):
        assert figures["distance"][name] == pytest.approx(float(d.quantile(q)), rel=1e-4)
    assert figures["distance"]["mean"] == pytest.approx(float(d.mean()), rel=1e-5)
    error = (tokens - code.skeleton).square().mean()
    assert figures["reconstruction"]["mse"] == pytest.approx(float(error), rel=1e-4)
    variance = tokens.var(dim=0, correction=0).mean()
    assert figures["reconstruction"]["relative"] == pytest.approx(float(error / variance), rel=1e-4)
    share = usage / usage.sum()
    entropy = -sum(p * math.log(p) for p in share.tolist() if p > 0)
    assert figures["codebook"]["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert figures["codebook"]["dead"] == dead
    assert figures["outside_band"] == pytest.approx(0.1, abs=0.02)


def test_figures_are_json_and_repeatable(measured):
    manifold, figures, _ = measured
    assert json.loads(json.dumps(figures)) == figures
    clips = [(f"c{i}", z) for i, z in enumerate(sheet_clips(3, (2, 9, 7)))]
    assert evaluation.evaluate(manifold, clips) == figures
    manifold.calibration = None
    assert evaluation.evaluate(manifold, clips)["outside_band"] is None


def test_a_good_manifold_orders_clips_and_a_constant_one_does_not():
    clips = [(f"c{i}", z) for i, z in enumerate(sheet_clips(6, (2, 12, 12)))]
    coder = fit_anchors(torch.cat([evaluation.tokens(z) for _, z in clips[:4]]), 64)
    good = evaluation.evaluate(ShellManifold(coder, WAN21), clips[4:])
    assert good["ordered"] == 1.0
    assert good["auroc_clean_over_blurred"] > 0.8
    assert good["auroc_noisy_over_clean"] > 0.7
    one = Anchors(torch.zeros(1, 16), torch.full((1, 16), float("inf")), 1)
    constant = evaluation.evaluate(ShellManifold(one, WAN21), clips[4:])
    assert (constant["ordered"], constant["auroc_clean_over_blurred"], constant["auroc_noisy_over_clean"]) == (0.0, 0.5, 0.5)


def test_figures_need_a_clip():
    with pytest.raises(ValueError, match="at least one"):
        evaluation.evaluate(ShellManifold(make_predictor(), WAN21), [])


def test_lcc_terms_equal_their_sums():
    coder, z = make_predictor().train(False), rand(50, 16)
    w = coder.weights(z)
    loss = fit_predictor.lcc_loss(coder, z, w, 1.0, 0.3, 0.7)
    squared = (z[:, None] - coder.basis[None]).square().sum(dim=2)
    s = (w @ coder.basis) * coder.global_scale + coder.global_bias
    usage = w.mean(dim=0)
    torch.testing.assert_close(loss.reconstruction, (s - z).square().mean())
    torch.testing.assert_close(loss.locality, (w * squared).sum(dim=1).mean())
    torch.testing.assert_close(loss.usage, (usage * (usage * 37).log()).sum())
    torch.testing.assert_close(loss.basis, squared.amin(dim=0).mean())
    torch.testing.assert_close(loss.total, loss.reconstruction + loss.locality + 0.3 * loss.usage + 0.7 * loss.basis)
    plain = fit_predictor.lcc_loss(coder, z, w, 0.25, 0.0, 0.0)
    torch.testing.assert_close(plain.total, loss.reconstruction + 0.25 * loss.locality)
    assert float(plain.usage) == float(plain.basis) == 0


def test_locality_has_the_sums_gradient():
    basis, z = rand(9, 16).requires_grad_(True), rand(20, 16, seed=1)
    w = torch.softmax(rand(20, 9, seed=2), dim=1)
    (fast,) = torch.autograd.grad(fit_predictor.locality(z, w, basis), basis)
    (slow,) = torch.autograd.grad((w * (z[:, None] - basis[None]).square().sum(dim=2)).sum(dim=1).mean(), basis)
    torch.testing.assert_close(fast, slow)


def test_usage_divergence_of_known_usages():
    assert float(fit_predictor.usage_divergence(torch.full((4, 8), 1 / 8))) == pytest.approx(0, abs=1e-6)
    assert float(fit_predictor.usage_divergence(torch.eye(8)[:1])) == pytest.approx(math.log(8))


def test_basis_search_in_pieces_is_the_same(monkeypatch):
    z, basis = rand(30, 16), rand(11, 16, seed=1)
    whole = fit_predictor.basis_distance(z, basis)
    monkeypatch.setattr(fit_predictor, "SEARCH_BYTES", 4 * 30 * 2)
    torch.testing.assert_close(fit_predictor.basis_distance(z, basis), whole)


def test_shell_loss_equals_the_formula():
    z, s, v = rand(40, 16), rand(40, 16, seed=1), 0.2 * rand(40, 16, seed=2)
    loss = fit_predictor.shell_loss(z, s, v)
    d = ((z - s) / (v.exp() + 1e-6)).square().sum(dim=1).sqrt()
    torch.testing.assert_close(loss.total, ((d - 1) ** 2).mean() + 0.01 * (v**2).mean())
    torch.testing.assert_close(loss.distance, d.mean())


def test_stages_train_what_they_should():
    coder = make_predictor()
    fit_predictor.prepare_lcc(coder)
    first = {n for n, p in coder.named_parameters() if p.requires_grad}
    assert coder.predictor[1].training
    fit_predictor.prepare_shell(coder)
    second = {n for n, p in coder.named_parameters() if p.requires_grad}
    assert not coder.predictor[1].training
    assert not first & second
    assert first | second == {n for n, _ in coder.named_parameters()}
    assert all(n.startswith("surface_head") for n in second)


def test_regressed_start_uses_the_whole_codebook():
    """From a random start most bases never get weight; from the regressed one a token's basis is mostly its nearest."""
    tokens = torch.cat([evaluation.tokens(z) for z in sheet_clips(4, (2, 12, 16))])
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    coder = Predictor(16, 24, 64)
    coder.basis.data.copy_(tokens[:24])
    fit_predictor.start_by_regression(coder, tokens)
    assert coder.training
    with torch.no_grad():
        w = coder.train(False).weights(tokens)
    nearest = torch.cdist(tokens, coder.basis).argmin(dim=1)
    assert float((w.argmax(dim=1) == nearest).float().mean()) > 0.7
