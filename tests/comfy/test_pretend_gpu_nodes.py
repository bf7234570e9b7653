"""Nodes' own tensor code on a pretend GPU: latent thumbnails, the score board, and models that memory is short for."""

from types import SimpleNamespace

import pytest
import torch

from ..pretend_gpu import DEVICE, PretendGPU, PretendTensor
from .shell_lcc_material import FIT

NODE = "IntrinsicReward_"
ANCHORS = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
LATENT = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpu(comfy):
    with PretendGPU() as running:
        yield running


@pytest.fixture(params=["wan21", "reshaped", "without colours"])
def latent_format(comfy, request):
    from comfy.latent_formats import LatentFormat, Wan21

    if request.param == "wan21":
        return Wan21()
    if request.param == "without colours":
        return LatentFormat()
    reshaped = Wan21()
    reshaped.latent_rgb_factors_reshape = lambda z: z.flip(1)
    return reshaped


def test_a_thumbnail_is_made_on_the_cpu_of_one_copy(comfy, gpu, latent_format):
    thumbnail = comfy.module("nodes.latent_thumbnail").thumbnail
    wanted = thumbnail(LATENT, latent_format)
    found = thumbnail(LATENT.to(DEVICE), latent_format)
    assert not isinstance(found, PretendTensor)
    assert torch.equal(found, wanted)
    assert gpu.count("copy to the CPU") == gpu.count() == 1


def test_the_score_board_shows_candidates_that_were_on_the_gpu(comfy, gpu):
    from comfy.latent_formats import Wan21

    board, thumbnail = comfy.module("nodes.race_board"), comfy.module("nodes.latent_thumbnail").thumbnail
    standings = [SimpleNamespace(index=i, scores={2: 0.5 + i}, dropped=None if i else 4) for i in range(2)]

    def racing(latent):
        pictures = {i: thumbnail(latent[i : i + 1], Wan21()) for i in range(2)}
        return SimpleNamespace(board=standings, thumbnails=pictures, seeds=[7, 8], plan=None)

    wanted, found = board.as_image(racing(LATENT)), board.as_image(racing(LATENT.to(DEVICE)))
    assert torch.equal(found, wanted)
    assert found.std() > 0.05


@pytest.fixture
def shell(comfy, gpu, monkeypatch):
    """A calibrated manifold on a wire, which ComfyUI moves to the GPU whole."""
    import comfy.model_management as memory

    def load(patchers, **_):
        for patcher in patchers:
            load_in_part(patcher, 2.0)

    monkeypatch.setattr(memory, "load_models_gpu", load)
    kernels = {name: comfy.module(f"kernels.shell_lcc.{name}") for name in ("manifold", "anchors", "calibration")}
    coder = kernels["anchors"].Anchors(ANCHORS, torch.ones(64, 16), 8)
    manifold = kernels["manifold"].ShellManifold(coder, comfy.module("kernels.latent_space").WAN21)
    manifold.calibration = kernels["calibration"].calibrate([*manifold.distance(LATENT)])
    return comfy.module("nodes.shell_lcc_type").for_wire(manifold)


@pytest.mark.parametrize("place", ["cpu", DEVICE], ids=["latents on the CPU", "latents on the GPU"])
class TestShellLCC:
    """ComfyUI keeps latents on the CPU between nodes, with --gpu-only on the GPU."""

    def latent(self, shell, place):
        return {"samples": shell.manifold.space.denormalise(LATENT).to(place)}

    def test_score(self, comfy, gpu, shell, place):
        inputs = {"manifold": shell, "frames": "video frames"}
        wanted = shell.manifold.distance(LATENT)
        score, _, clips, frames, image, _ = comfy.run(NODE + "ShellLCCScore", latent=self.latent(shell, place), **inputs)
        assert shell.manifold.device == DEVICE
        assert score == pytest.approx(float(wanted.mean()), rel=1e-4)
        assert clips == pytest.approx(wanted.mean(dim=(1, 2, 3)).tolist(), rel=1e-4)
        assert len(frames) == 6
        assert not isinstance(image, PretendTensor)

    @pytest.mark.parametrize("method", ["project", "band", "gradient", "minimise"])
    def test_refine(self, comfy, gpu, shell, place, method):
        wanted = shell.manifold.space.denormalise(shell.manifold.pull(LATENT, method, 1.0))
        inputs = {"manifold": shell, "strength": 1.0, "method": method, "target": "auto", "radius": 1.0, "trust": 0.2}
        (out,) = comfy.run(NODE + "ShellLCCRefine", latent=self.latent(shell, place), **inputs)
        assert out["samples"].device == torch.device(place)
        torch.testing.assert_close(out["samples"].cpu(), wanted, rtol=1e-3, atol=1e-4)

    def test_fit(self, comfy, gpu, shell, place):
        torch.manual_seed(0)
        latent = {"samples": shell.manifold.space.denormalise(torch.randn(4, 16, 3, 8, 8)).to(place)}
        fitted = comfy.run(NODE + "FitShellLCC", lists={"latents": [latent]}, **FIT)[0]
        assert fitted.manifold.device.type == "cpu"
        assert fitted.manifold.radius > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
class TestMemoryIsShort:
    """A patcher that loads a model in part moves some of its layers: what computes on one device has to be moved whole."""

    def test_a_manifold(self, comfy, gpu, share):
        manifolds, space = comfy.module("kernels.shell_lcc.manifold"), comfy.module("kernels.latent_space").WAN21
        coder = comfy.module("kernels.shell_lcc.predictor").Predictor(16, 64, 32)
        shell = comfy.module("nodes.shell_lcc_type").for_wire(manifolds.ShellManifold(coder, space))
        load_in_part(shell.patcher, share)
        assert shell.manifold.distance(LATENT.to(DEVICE)).device == DEVICE

    @pytest.mark.parametrize("pooling", ["query", "mean"])
    def test_a_prism_head(self, comfy, gpu, pooling, share):
        heads, files = comfy.module("kernels.prism.head"), comfy.module("kernels.prism.files")
        options = {"time": True, "sigmas": (0.2, 0.6), "pooling": pooling}
        head = heads.PrismHead(heads.HeadConfig(24, dim=16, heads=2, taps=(1, 3), **options))
        loaded = files.LoadedHead(head, None, comfy.module("kernels.latent_space").WAN21, (0.05, 0.99), name="head")
        load_in_part(comfy.module("nodes.prism_type").for_wire(loaded).patcher, share)
        # Nodes move features to where the head's first parameter is.
        device = next(head.parameters()).device
        tokens = [torch.ones(2, n, 24).to(device) for n in (4, 4, 3)]
        with torch.no_grad():
            scores = head(tokens[:2], tokens[2], None, torch.tensor([0.2, 0.5]).to(device))
        assert scores.shape == (2, 1)


def load_in_part(patcher, share):
    """Loads a model to the GPU with room for a share of it."""
    patcher.load_device = DEVICE
    patcher.partially_load(DEVICE, extra_memory=int(share * patcher.model_size()))
