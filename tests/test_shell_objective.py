"""Objectives on the Shell-LCC distance of predicted latents: values, gradients, layouts and dtypes, and signs of noise."""

import pytest
import torch

pytest.importorskip("faiss")

from trainers.kernels.latent_space import LatentSpace
from trainers.kernels.shell_lcc import naive
from trainers.kernels.shell_lcc.anchors import FLOOR, Anchors
from trainers.kernels.shell_lcc.calibration import Calibration, calibrate, quantiles
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold, UncalibratedError
from trainers.kernels.shell_lcc.predictor import Predictor
from trainers.kernels.tuning import latent_detail
from trainers.kernels.tuning import shell_objective as shell
from trainers.kernels.tuning.latent_detail import detail_of
from trainers.kernels.tuning.shell_objective import OBJECTIVES, ShellTarget, SigmaTargets, shell_loss

from .pretend_gpu import DEVICE, PretendGPU, PretendTensor

SPACE = LatentSpace("tiny", 4, (0.0,) * 4, (1.0,) * 4)


@pytest.fixture(params=["anchors", "predictor"])
def manifold(request):
    torch.manual_seed(0)
    if request.param == "anchors":
        coder = fit_anchors(torch.randn(400, 4), 20, 5)
    else:
        coder = Predictor(4, 24, 8)
        coder.predictor[1].running_mean.normal_()
    made = ShellManifold(coder, SPACE)
    made.calibration = calibrate(list(made.distance(torch.randn(6, 4, 3, 5, 5))))
    return made


def plain_distance(manifold, z):
    """d [B, T, h, w] by the plain formulas, with autograd."""
    tokens = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
    coder = manifold.coder
    if isinstance(coder, Anchors):
        code = naive.anchors_code(tokens, coder.anchors, coder.region_thickness, coder.neighbours, coder.locality, FLOOR)
    else:
        code = naive.predictor_code(tokens, coder.state_dict())
    return naive.distance(tokens, *code).view(z.shape[0], *z.shape[2:])


def plain_loss(d, objective, low, high, tau):
    """The losses written out token by token."""
    found = []
    for i, clip in enumerate(d.flatten(1)):
        if objective == "distance":
            found.append(sum(clip) / len(clip))
        elif objective == "mean_tau":
            found.append(abs(sum(clip) / len(clip) - tau[i]))
        else:
            zero = clip.new_zeros(())
            outside = [v - high[i] if v > high[i] else low[i] - v if v < low[i] else zero for v in clip]
            found.append(sum(outside) / len(clip))
    return torch.stack(found)


def target(low, high, tau):
    return ShellTarget(*(torch.tensor(v) for v in (low, high, tau)))


@pytest.mark.parametrize("objective", OBJECTIVES)
class TestLoss:
    def test_values_and_gradients_are_those_of_the_plain_formulas(self, manifold, objective):
        z = 1.5 * torch.randn(2, 4, 2, 3, 5, generator=torch.Generator().manual_seed(3))
        low, high, tau = [0.9, 0.7], [1.1, 1.3], [1.0, 40.0]
        mine, other = z.clone().requires_grad_(True), z.clone().requires_grad_(True)
        loss, distance = shell_loss(manifold, mine, objective, target(low, high, tau))
        expected = plain_loss(plain_distance(manifold, other), objective, low, high, tau)
        assert loss.shape == (2,)
        assert not distance.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        weights = torch.tensor([0.3, 2.0])
        (weights * loss).sum().backward()
        (weights * expected).sum().backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)
        assert float(mine.grad.abs().max()) > 0

    def test_layout_and_dtype_do_not_matter(self, manifold, objective):
        z = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(4))
        spread = z.permute(0, 4, 2, 3, 1).contiguous().permute(0, 4, 2, 3, 1)
        assert not spread.is_contiguous()
        expected, _ = shell_loss(manifold, z, objective)
        torch.testing.assert_close(shell_loss(manifold, spread, objective)[0], expected)
        low = z.bfloat16().requires_grad_(True)
        loss, distance = shell_loss(manifold, low, objective)
        assert loss.dtype == distance.dtype == torch.float32
        exact, _ = shell_loss(manifold, z.bfloat16().float(), objective)
        torch.testing.assert_close(loss, exact)
        loss.sum().backward()
        assert low.grad.dtype == torch.bfloat16
        assert bool(torch.isfinite(low.grad).all())

    def test_chunks_do_not_matter(self, manifold, objective, monkeypatch):
        z = torch.randn(1, 4, 3, 7, 5, generator=torch.Generator().manual_seed(5))
        found = []
        for size in (10_000, 32):
            monkeypatch.setattr(type(manifold.coder), "chunk_tokens", lambda self, device, size=size: size)
            x = z.clone().requires_grad_(True)
            loss, _ = shell_loss(manifold, x, objective)
            loss.sum().backward()
            found.append((loss.detach(), x.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_inside_the_band_there_is_no_loss_and_no_gradient(manifold):
    z = torch.randn(1, 4, 2, 4, 4).requires_grad_(True)
    loss, d = shell_loss(manifold, z, "band", target([0.0], [float(manifold.distance(z.detach()).max()) + 1], [1.0]))
    loss.sum().backward()
    assert float(loss.detach()) == 0
    assert float(z.grad.abs().max()) == 0
    assert float(d.max()) > 0


def test_a_step_along_the_gradient_moves_tokens_into_the_band_from_both_sides(manifold):
    z = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(6))
    d = manifold.distance(z)
    edge = float(d.median())
    x = z.clone().requires_grad_(True)
    shell_loss(manifold, x, "band", target([edge], [edge], [1.0]))[0].sum().backward()
    moved = manifold.distance(z - 0.01 * x.grad * d.numel())
    below = d < edge
    assert float((moved - d)[below].mean()) > 0 > float((moved - d)[~below].mean())


def test_the_file_gives_the_targets(manifold):
    c = manifold.calibration
    found = shell.target_of([c, c])
    assert found.low.tolist() == pytest.approx([c.band[0]] * 2)
    assert found.high.tolist() == pytest.approx([c.band[1]] * 2)
    d = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).square()
    table = Calibration(quantiles(d), quantiles(d), 1.0)
    assert shell.mean_distance(table) == pytest.approx(float(d.mean()), abs=1e-3)


def test_without_calibration_only_the_distance_can_be_minimised(manifold):
    manifold.calibration = None
    z = torch.randn(1, 4, 1, 4, 4)
    assert float(shell_loss(manifold, z, "distance")[0]) > 0
    with pytest.raises(UncalibratedError, match="objective 'band'"):
        shell_loss(manifold, z, "band")
    with pytest.raises(UncalibratedError, match="objective 'mean_tau'"):
        shell_loss(manifold, z, "mean_tau")


def test_unknown_objectives_and_other_channels_are_refused(manifold):
    with pytest.raises(ValueError, match="'nearest'.*band, distance, mean_tau"):
        shell_loss(manifold, torch.randn(1, 4, 1, 4, 4), "nearest")
    with pytest.raises(ValueError, match=r"\[1, 5, 1, 4, 4\]"):
        shell_loss(manifold, torch.randn(1, 5, 1, 4, 4), "distance")


class TestSigmaTargets:
    def table(self):
        g = torch.Generator().manual_seed(1)
        return SigmaTargets.measured((0.7, 1.0), [[s + torch.rand(2, 4, 4, generator=g) for _ in range(3)] for s in (1, 10)])

    def test_clips_get_the_target_of_the_nearest_level(self):
        found = self.table().at(torch.tensor([0.95, 0.71, 1.0]))
        assert (found.low > torch.tensor([9.0, 0.9, 9.0])).all()
        assert (found.high < torch.tensor([11.1, 2.1, 11.1])).all()
        assert found.tau.tolist() == pytest.approx([10.5, 1.5, 10.5], abs=0.15)

    def test_they_survive_json(self):
        table = self.table()
        again = SigmaTargets.from_json(table.to_json())
        assert again.sigmas == table.sigmas
        for a, b in zip(again.calibrations, table.calibrations, strict=True):
            assert torch.equal(a.token_quantiles, b.token_quantiles)
            assert a.radius == b.radius
        with pytest.raises(ValueError, match="101 quantiles"):
            SigmaTargets.from_json([{"sigma": 1, "radius": 1, "token_quantiles": [1.0], "frame_quantiles": [1.0]}])


class TestDetail:
    def clip(self):
        """A smooth clip with some fine detail."""
        g = torch.Generator().manual_seed(2)
        smooth = torch.nn.functional.interpolate(torch.randn(16, 3, 4, 4, generator=g), size=(16, 16), mode="bilinear")
        return smooth + 0.1 * torch.randn(16, 3, 16, 16, generator=g)

    def test_the_laplacian_is_that_of_a_convolution(self):
        z = self.clip()
        kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
        plain = torch.nn.functional.conv2d(z.reshape(-1, 1, 16, 16), kernel)
        assert latent_detail.laplacian_variance(z) == pytest.approx(float(plain.var(correction=0)), rel=1e-5)
        assert detail_of(z.bfloat16()).laplacian == pytest.approx(detail_of(z).laplacian, rel=0.02)

    def test_flattened_noise_raises_the_alarm_and_detail_does_not(self):
        z = self.clip()
        base = detail_of(z)

        def ratios(clip):
            found = detail_of(clip)
            return found.laplacian / base.laplacian, found.high_frequency / base.high_frequency

        noise = 0.06 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
        assert "noise, not detail" in latent_detail.alarm(*ratios(0.2 * z + noise))
        blurred = torch.nn.functional.avg_pool2d(z, 3, 1, 1)
        assert "lose fine detail" in latent_detail.alarm(*ratios(blurred))
        assert latent_detail.alarm(*ratios(z + 0.2 * (z - blurred))) is None
        assert latent_detail.alarm(1.0, 1.0) is None

    def test_too_small_latents_are_refused(self):
        with pytest.raises(ValueError, match="3 or more"):
            detail_of(torch.randn(4, 3, 2, 8))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_a_pretend_gpu_values_are_the_cpu_s_and_nothing_waits(manifold, objective):
    z = torch.randn(2, 4, 2, 3, 5, generator=torch.Generator().manual_seed(3))
    wanted = shell_loss(manifold, z, objective, target([0.9, 0.7], [1.1, 1.3], [1.0, 40.0]))
    with PretendGPU() as gpu:
        there = target([0.9, 0.7], [1.1, 1.3], [1.0, 40.0]).to(DEVICE)
        found = shell_loss(manifold.to(DEVICE), z.to(DEVICE), objective, there)
        assert not gpu.synchronisations
        for mine, cpu in zip(found, wanted, strict=True):
            assert isinstance(mine, PretendTensor)
            torch.testing.assert_close(mine.held, cpu)
        own, _ = shell_loss(manifold, z.to(DEVICE), objective)
        assert isinstance(own, PretendTensor)
