"""Kernels on a pretend GPU: devices agree from end to end, results are the CPU's, and hot paths wait for nothing."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch

from benchmarks.geometry import room
from trainers.kernels.geometry import dense, lucas_kanade, point_tracks, tracks
from trainers.kernels.geometry import heat_map as geometry_heat_map
from trainers.kernels.geometry.lpips import STAGES, WIDTHS, from_state
from trainers.kernels.geometry.splat import splat
from trainers.kernels.geometry.views import Views
from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism import accuracy, preference_loss
from trainers.kernels.prism.head import HeadConfig, PrismHead
from trainers.kernels.shell_lcc import calibration, evaluation, fit_anchors, heat_map
from trainers.kernels.shell_lcc.anchors import Anchors
from trainers.kernels.shell_lcc.manifold import METHODS, ShellManifold
from trainers.kernels.shell_lcc.predictor import Predictor

from .pretend_gpu import DEVICE, PretendGPU, PretendTensor


@pytest.fixture
def gpu():
    with PretendGPU() as running:
        yield running


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def held(found):
    """The values of a result of the GPU, which has to be there."""
    assert isinstance(found, PretendTensor)
    return found.held


class TestShellLCC:
    Z = random(2, 16, 3, 4, 4)

    @pytest.fixture(params=["anchors", "predictor"])
    def manifold(self, request):
        torch.manual_seed(0)
        coder = Anchors(random(64, 16), torch.ones(64, 16), 8) if request.param == "anchors" else Predictor(16, 64, 32)
        manifold = ShellManifold(coder, WAN21)
        manifold.calibration = calibration.calibrate([*manifold.distance(random(4, 16, 3, 4, 4, seed=1))])
        return manifold

    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_pulls_without_waiting(self, gpu, manifold, method):
        wanted = manifold.pull(self.Z, method, 0.7)
        found = manifold.to(DEVICE).pull(self.Z.to(DEVICE), method, 0.7)
        torch.testing.assert_close(held(found), wanted)
        assert not gpu.synchronisations

    def test_many_chunks_are_the_same(self, gpu, manifold, monkeypatch):
        monkeypatch.setattr(type(manifold.coder), "chunk_tokens", lambda self, device: 7)
        wanted = manifold.pull(self.Z)
        torch.testing.assert_close(held(manifold.to(DEVICE).pull(self.Z.to(DEVICE))), wanted)
        assert not gpu.synchronisations

    def test_distance_and_its_gradient_wait_for_nothing(self, gpu, manifold):
        z = self.Z.clone().requires_grad_()
        wanted = manifold.distance(z)
        wanted.sum().backward()
        there = self.Z.to(DEVICE).requires_grad_()
        found = manifold.to(DEVICE).distance(there)
        found.sum().backward()
        torch.testing.assert_close(held(found.detach()), wanted.detach())
        torch.testing.assert_close(held(there.grad), z.grad)
        assert not gpu.synchronisations

    def test_a_latent_of_the_cpu_is_moved_there_and_its_result_back(self, gpu, manifold):
        wanted = manifold.distance(self.Z), manifold.pull(self.Z)
        manifold = manifold.to(DEVICE)
        for found, expected in zip((manifold.distance(self.Z), manifold.pull(self.Z)), wanted, strict=True):
            assert not isinstance(found, PretendTensor)
            torch.testing.assert_close(found, expected)
        assert gpu.count("copy to the CPU at kernels/shell_lcc/manifold.py") == gpu.count() == 2

    @pytest.mark.parametrize("video_frames", [False, True])
    @pytest.mark.parametrize("calibrated", [False, True])
    def test_heat_map(self, gpu, manifold, video_frames, calibrated):
        if not calibrated:
            manifold.calibration = None
        distance = manifold.distance(self.Z)
        wanted = heat_map.heat_map(manifold, distance, video_frames)
        found = heat_map.heat_map(manifold.to(DEVICE), distance.to(DEVICE), video_frames)
        torch.testing.assert_close(held(found), wanted)
        # The length of a clip with its frames repeated is read from the GPU once.
        assert gpu.count() <= int(video_frames)

    def test_percentiles_and_the_band(self, gpu, manifold):
        distance = manifold.distance(self.Z)
        wanted = manifold.token_percentile(distance), manifold.outside_band(distance)
        there = manifold.to(DEVICE), distance.to(DEVICE)
        for found, expected in zip((f(there[0], there[1]) for f in PER_TOKEN), wanted, strict=True):
            torch.testing.assert_close(held(found), expected)
        assert not gpu.synchronisations

    def test_calibration_of_distances_there(self, gpu, manifold):
        maps = [*manifold.distance(self.Z)]
        wanted, found = calibration.calibrate(maps), calibration.calibrate([m.to(DEVICE) for m in maps])
        torch.testing.assert_close(found.token_quantiles, wanted.token_quantiles)
        assert found.radius == pytest.approx(wanted.radius)

    @pytest.mark.parametrize("clips_on_gpu", [False, True])
    def test_evaluation(self, gpu, manifold, clips_on_gpu):
        clips = [(str(i), z) for i, z in enumerate(self.Z)]
        wanted = evaluation.evaluate(manifold, clips)
        found = evaluation.evaluate(manifold.to(DEVICE), [(n, z.to(DEVICE) if clips_on_gpu else z) for n, z in clips])
        assert found["distance"] == pytest.approx(wanted["distance"], rel=1e-4)
        assert found["reconstruction"] == pytest.approx(wanted["reconstruction"], rel=1e-4)
        assert found["codebook"] == pytest.approx(wanted["codebook"], rel=1e-4)

    def test_region_thickness(self, gpu):
        coder, tokens = Anchors(random(64, 16), torch.ones(64, 16), 8), random(500, 16, seed=2)
        wanted = fit_anchors.region_thickness(coder, tokens)
        found = fit_anchors.region_thickness(coder.to(DEVICE), tokens.to(DEVICE))
        torch.testing.assert_close(found.cpu(), wanted)


PER_TOKEN = (ShellManifold.token_percentile, ShellManifold.outside_band)


class TestPrism:
    @pytest.mark.parametrize("pooling", ["query", "mean"])
    @pytest.mark.parametrize("time", [False, True])
    @pytest.mark.parametrize("sigmas", [(), (0.2, 0.6)])
    def test_a_head_scores_without_waiting(self, gpu, pooling, time, sigmas):
        head, inputs = make_head(pooling=pooling, time=time, sigmas=sigmas), features()
        with torch.no_grad():
            wanted = head(*inputs)
            found = head.to(DEVICE)(*(there(x) for x in inputs))
        torch.testing.assert_close(held(found), wanted)
        assert not gpu.synchronisations

    def test_without_a_mask_and_with_half_precision_features(self, gpu):
        head, (visual, text, _, sigma) = make_head(), features(torch.bfloat16)
        with torch.no_grad():
            wanted = head(visual, text, None, sigma)
            found = head.to(DEVICE)(there(visual), text.to(DEVICE), None, sigma.to(DEVICE))
        torch.testing.assert_close(held(found), wanted)

    def test_a_step_of_training_waits_for_nothing(self, gpu):
        head, inputs = make_head(time=True, sigmas=(0.2, 0.6)).to(DEVICE), [there(x) for x in features()]
        difference = head(*inputs).mean(dim=1)
        loss = preference_loss.rao_kupper(difference, torch.tensor([1, 0], device=DEVICE)).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.held.isfinite().all() for p in head.parameters())
        assert not gpu.synchronisations

    def test_accuracies(self, gpu):
        difference, outcome = random(50), torch.randint(-1, 2, (50,), generator=torch.Generator().manual_seed(1))
        on_gpu = difference.to(DEVICE), outcome.to(DEVICE)
        assert accuracy.accuracy(*on_gpu, 0.3) == accuracy.accuracy(difference, outcome, 0.3)
        wanted = accuracy.calibration_error(difference, outcome)
        assert accuracy.calibration_error(*on_gpu) == pytest.approx(wanted)

    def test_the_threshold_of_ties(self, gpu):
        difference, outcome = random(50), torch.randint(-1, 2, (50,), generator=torch.Generator().manual_seed(1))
        wanted = accuracy.tie_threshold(difference, outcome)
        assert accuracy.tie_threshold(difference.to(DEVICE), outcome.to(DEVICE)) == wanted


def make_head(**options):
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(24, dim=16, heads=2, layers=3, taps=(1, 3), queries=2, dimensions=("a", "b"), **options))
    for p in head.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return head


def features(dtype=torch.float32):
    """Two taps' tokens, text, its mask and sigma, of two clips."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    tokens = [random(2, n, 24, seed=n).to(dtype) for n in (12, 12, 5)]
    return tokens[:2], tokens[2], mask, torch.tensor([0.1, 0.7])


def there(x):
    """A tensor, or a list of them, moved to the GPU."""
    return [there(v) for v in x] if isinstance(x, list) else x.to(DEVICE)


class TestDenseGeometry:
    COUNT = 4

    @pytest.fixture
    def views(self):
        made = room.render(replace(room.draw_scene(4, "truck"), frames=self.COUNT, width=64, height=48))
        indices = list(range(self.COUNT))
        return Views(made.frames.float() / 255, made.depth, made.K, made.world_to_camera, None, indices, self.COUNT)

    def test_the_record_is_the_cpus(self, gpu, views):
        wanted, found = dense.score_views(views), dense.score_views(moved(views))
        assert found.record.verdict == wanted.record.verdict
        assert found.record.measurements == pytest.approx(wanted.record.measurements, rel=1e-4)
        torch.testing.assert_close(held(found.error_map), wanted.error_map, equal_nan=True, rtol=1e-3, atol=1e-5)
        assert isinstance(found.preview, PretendTensor)

    def test_it_waits_a_few_times_for_each_view(self, gpu, views):
        dense.score_views(moved(views))
        few = gpu.count()
        gpu.synchronisations.clear()
        # One view less.
        dense.score_views(moved(replace(views, **{f: getattr(views, f)[:3] for f in PER_VIEW}, frames=3)))
        assert few - gpu.count() <= WAITS_PER_VIEW, gpu.synchronisations

    def test_missing_depth_and_confidence(self, gpu, views):
        views.depth[:, :5] = math.inf
        views = replace(views, confidence=torch.ones_like(views.depth))
        wanted, found = dense.score_views(views), dense.score_views(moved(views))
        assert found.record.notes == wanted.record.notes
        assert found.record.measurements == pytest.approx(wanted.record.measurements, rel=1e-4)

    def test_with_lpips(self, gpu, views):
        lpips = from_state(random_vgg(), "random")
        wanted = dense.score_views(views, lpips).record.measurements
        found = dense.score_views(moved(views), lpips.to(DEVICE)).record.measurements
        assert found == pytest.approx(wanted, rel=1e-3)
        assert {"lpips", "3dcs", "mvcs"} <= set(found)

    def test_the_splat_waits_for_nothing_once_cameras_are_on_the_cpu(self, gpu, views):
        arguments = views.K, views.world_to_camera, 1, [0, 2]
        wanted, found = splat(views.depth, *arguments), splat(views.depth.to(DEVICE), *arguments)
        for field in fields(wanted):
            assert torch.equal(held(getattr(found, field.name)), getattr(wanted, field.name))
        assert not gpu.synchronisations

    def test_the_heat_map_of_its_errors(self, gpu, views):
        scored = dense.score_views(views)
        full = geometry_heat_map.full_error([scored.error_map], scored.record.scorer)
        wanted = geometry_heat_map.heat_map(views.images, scored.error_map, [0, 1, 2, 3], full)
        maps = scored.error_map.to(DEVICE)
        assert geometry_heat_map.full_error([maps], scored.record.scorer) == pytest.approx(full)
        found = geometry_heat_map.heat_map(views.images.to(DEVICE), maps, [0, 1, 2, 3], full)
        torch.testing.assert_close(held(found), wanted)


PER_VIEW = ("images", "depth", "K", "world_to_camera", "frame_indices")
WAITS_PER_VIEW = 6


def moved(views):
    """Views whose tensors are all on the GPU."""
    tensors = {f.name: getattr(views, f.name) for f in fields(views)}
    return replace(views, **{k: v.to(DEVICE) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


def random_vgg():
    """VGG16's convolutions and LPIPS's heads with random weights, in the layout of the lpips package."""
    state, fan_in = {}, 3
    for i, (stage, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
        for position in stage:
            state[f"net.slice{i + 1}.{position}.weight"] = random(width, fan_in, 3, 3) * (2 / (9 * fan_in)) ** 0.5
            state[f"net.slice{i + 1}.{position}.bias"] = torch.zeros(width)
            fan_in = width
        state[f"lin{i}.model.1.weight"] = random(1, width, 1, 1).abs() / width
    return state


class TestTracks:
    def test_the_record_is_the_cpus(self, tracked):
        clip, found, _ = tracked
        wanted = tracks.score_clip(clip, "torch")
        assert found.record.verdict == wanted.record.verdict
        assert found.record.measurements == pytest.approx(wanted.record.measurements, rel=1e-3)
        assert "tracks by torch" in found.record.notes

    def test_it_waits_for_lucas_kanade_at_most_once_an_iteration(self, tracked):
        _, _, gpu = tracked
        steps = FRAMES - 1
        iterations = (lucas_kanade.LEVELS + point_tracks.BACK_LEVELS) * lucas_kanade.ITERATIONS
        # Corners, and regions without corners.
        assert gpu.count("lucas_kanade.py") <= 2 * steps * iterations
        assert gpu.count() - gpu.count("lucas_kanade.py") <= 24 * FRAMES, gpu.synchronisations

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_pictures_lie_where_they_lie_for_every_verdict(self, gpu, tracked, dtype):
        clip, scored, _ = tracked
        plain = torch.full(clip.shape, 128 if dtype == torch.uint8 else 0.5, dtype=dtype)
        nothing = tracks.score_clip(plain.to(DEVICE))
        assert nothing.record.measurements.get("tracks", 0) < tracks.LEAST_TRACKS <= scored.record.measurements["tracks"]
        assert nothing.preview.device == scored.preview.device
        assert nothing.error_map.device == scored.error_map.device


FRAMES = 5


@pytest.fixture(scope="module")
def tracked():
    """(clip, what the scorer says of it on the GPU, the GPU)."""
    clip = room.render(replace(room.draw_scene(4, "truck"), frames=FRAMES, width=128, height=128)).frames
    with PretendGPU() as gpu:
        found = tracks.score_clip(clip.to(DEVICE))
    return clip, found, gpu


def test_a_copy_of_a_module_stays_on_its_device(gpu):
    head = make_head().to(DEVICE)
    assert all(p.device == DEVICE for p in copy.deepcopy(head).parameters())
