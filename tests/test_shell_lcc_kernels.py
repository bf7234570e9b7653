"""Shell-LCC's fast paths against its plain formulas: values, gradients, odd shapes, layouts and dtypes."""

import pytest
import torch

from benchmarks.sheets import sheet_clips
from trainers.kernels.files import header as formats
from trainers.kernels.latent_space import WAN21, WAN22
from trainers.kernels.shell_lcc import anchors as anchors_module
from trainers.kernels.shell_lcc import coder as streamed
from trainers.kernels.shell_lcc import naive
from trainers.kernels.shell_lcc import predictor as predictor_module
from trainers.kernels.shell_lcc.anchors import FLOOR, Anchors
from trainers.kernels.shell_lcc.calibration import LEVELS, calibrate, percentile, quantiles
from trainers.kernels.shell_lcc.diagnostics import add_noise, auroc, blur, half_blur, high_frequency_share
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors, region_thickness
from trainers.kernels.shell_lcc.kmeans import kmeans, kmeans_naive
from trainers.kernels.shell_lcc.knn import knn, knn_naive
from trainers.kernels.shell_lcc.manifold import METHODS, ShellManifold, UncalibratedError, load, save
from trainers.kernels.shell_lcc.predictor import Predictor
from trainers.kernels.shell_lcc.pull import descend, project


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(clips):
    return torch.cat([c.flatten(1).t() for c in clips])


def make_predictor(bases=37, hidden=24, channels=16, seed=3):
    """A predictor with BatchNorm statistics and a surface head that are not at their trivial start."""
    torch.manual_seed(seed)
    coder = Predictor(channels, bases, hidden).train(False)
    coder.predictor[1].running_mean.normal_(0, 0.3)
    coder.predictor[1].running_var.uniform_(0.5, 2)
    for p in coder.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return coder.requires_grad_(False)


def make_anchors(count=64, neighbours=6, channels=16):
    return Anchors(rand(count, channels), rand(count, channels, seed=1).abs() + 0.3, neighbours, 0.2)


def reference(coder):
    """The coder's plain formula: z -> (skeleton, thickness)."""
    if isinstance(coder, Predictor):
        state = {k: v.detach() for k, v in coder.state_dict().items()}
        return lambda z: naive.predictor_code(z, state)
    return lambda z: naive.anchors_code(
        z, coder.anchors, coder.region_thickness, coder.neighbours, coder.locality, FLOOR
    )


CODERS = {
    "predictor": make_predictor,
    "predictor-one-basis": lambda: make_predictor(bases=1, hidden=5),
    "predictor-3-channels": lambda: make_predictor(bases=11, hidden=7, channels=3),
    "anchors": make_anchors,
    "anchors-grouped": lambda: make_anchors(count=16 * 40, neighbours=16),
    "anchors-odd": lambda: make_anchors(count=53, neighbours=5),
    "anchors-one-neighbour": lambda: make_anchors(count=20, neighbours=1),
    "anchors-more-neighbours-than-channels": lambda: make_anchors(count=30, neighbours=30),
}


@pytest.fixture(params=CODERS)
def coder(request, monkeypatch):
    """Every coder, with chunks so small that each test crosses several and ends in a broken one."""
    monkeypatch.setattr(anchors_module, "CPU_CHUNK_TOKENS", 7)
    monkeypatch.setattr(predictor_module.Predictor, "chunk_tokens", lambda self, device: 7)
    return CODERS[request.param]()


def channels_of(coder):
    return coder.config()["embedding_dim"]


@pytest.mark.parametrize("count", [1, 7, 40])
def test_streamed_value_and_gradient_equal_the_formula(coder, count):
    z = rand(count, channels_of(coder), seed=5)
    expected_d, expected_g = naive.distance_and_gradient(z, reference(coder))
    d, g = streamed.distance_and_gradient(coder, z)
    torch.testing.assert_close(d, expected_d, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(g, expected_g, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(streamed.distance(coder, z), expected_d, rtol=2e-5, atol=2e-5)
    assert g.abs().max() > 1e-3


def test_gradient_against_finite_differences(coder):
    """In fp64 and without any autograd: the analytic gradient is the slope of the value."""
    if isinstance(coder, Anchors) and coder.neighbours > channels_of(coder):
        pytest.skip("the ridge's floor makes fp64 differences of an almost exact code meaningless")
    coder, z = coder.double(), rand(9, channels_of(coder), seed=5).double()
    direction, step = rand(9, channels_of(coder), seed=8).double(), 1e-6
    _, g = streamed.distance_and_gradient(coder, z)
    slope = (streamed.distance(coder, z + step * direction) - streamed.distance(coder, z - step * direction)) / (2 * step)
    torch.testing.assert_close((g * direction).sum(dim=1), slope, rtol=1e-4, atol=1e-5)


def test_gradient_check_can_fail(coder, monkeypatch):
    """A pullback that forgets the coder's own dependence on z is found out."""
    honest = type(coder).code

    def forgetful(self, z, workspace=None):
        blind = honest(self, z, workspace)
        return blind._replace(pullback=lambda grad_skeleton, grad_thickness: torch.zeros_like(grad_skeleton))

    monkeypatch.setattr(type(coder), "code", forgetful)
    z = rand(7, channels_of(coder), seed=5)
    _, g = streamed.distance_and_gradient(coder, z)
    _, expected = naive.distance_and_gradient(z, reference(coder))
    if coder.config()["num_bases"] > 1 and coder.config().get("neighbours") != 1:
        assert (g - expected).abs().max() > 1e-2


def test_non_contiguous_tokens(coder):
    z = rand(channels_of(coder), 19, seed=6).t()
    d, g = streamed.distance_and_gradient(coder, z)
    again_d, again_g = streamed.distance_and_gradient(coder, z.contiguous())
    torch.testing.assert_close(d, again_d)
    torch.testing.assert_close(g, again_g, rtol=1e-4, atol=1e-5)


def test_anchors_sum_to_one_and_reproduce_the_plane():
    """Tokens in the affine hull of their neighbours, with no locality term, are coded exactly."""
    basis = rand(3, 16)
    neighbours = rand(20, 8, 3, seed=2) @ basis
    z = (torch.softmax(rand(20, 8, seed=3), dim=1)[:, :, None] * neighbours).sum(dim=1)
    w = naive.local_coordinates(z.double(), neighbours.double(), 0.0, 1e-9)
    torch.testing.assert_close(w.sum(dim=1), torch.ones(20).double())
    torch.testing.assert_close((w[:, :, None] * neighbours.double()).sum(dim=1), z.double(), rtol=0, atol=1e-4)


def test_locality_prefers_near_neighbours():
    z = torch.zeros(1, 4)
    neighbours = torch.stack([torch.eye(4)[0] * 0.1, torch.eye(4)[1] * 2.0])[None]
    w = naive.local_coordinates(z, neighbours, 1.0, 1e-6)
    assert w[0, 0] > 0.95


def test_token_on_an_anchor_is_coded_by_it():
    coder = make_anchors()
    code = coder.code(coder.anchors[:5].clone())
    torch.testing.assert_close(code.skeleton, coder.anchors[:5], rtol=0, atol=1e-2)
    d, g = streamed.distance_and_gradient(coder, coder.anchors[:5].clone())
    assert torch.isfinite(g).all()
    assert (d < 0.1).all()


@pytest.mark.parametrize("count", [16 * 3, 16 * 40, 53, 640])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_knn_is_exact(count, k):
    anchors, z = rand(count, 16), rand(101, 16, seed=1)
    found = knn(z, anchors, 0.5 * anchors.square().sum(1), k)
    exact = knn_naive(z, anchors, k)
    assert [len(set(row.tolist())) for row in found] == [k] * 101
    near = torch.cdist(z, anchors)
    torch.testing.assert_close(near.gather(1, found), near.gather(1, exact), rtol=1e-4, atol=1e-4)


def test_kmeans_is_as_good_as_lloyd_and_repeatable():
    data = rand(720, 4)
    found = kmeans(data, 30, seed=4)
    assert torch.equal(found, kmeans(data, 30, seed=4))

    def error(centroids):
        return float(torch.cdist(data, centroids).amin(dim=1).square().mean())

    plain = [error(kmeans_naive(data, data[torch.randperm(720)[:30]], 20)) for _ in range(5)]
    assert error(found) < 1.1 * max(plain)
    assert error(found) < 0.7 * error(data[:30])
    steps = []
    kmeans(data, 30, iterations=3, on_iteration=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="found 720"):
        kmeans(data, 1000)


@pytest.mark.parametrize("shape", [(1, 16, 1, 1, 1), (2, 16, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_manifold_distance_map(coder, shape, dtype):
    if channels_of(coder) != 16:
        pytest.skip("latents of wan21 have 16 channels")
    manifold = ShellManifold(coder, WAN21)
    z = rand(*shape).to(dtype)
    d = manifold.distance(z)
    assert d.shape == (shape[0], *shape[2:])
    assert d.dtype == torch.float32
    expected = naive.distance(*(lambda t: (t, *reference(coder)(t)))(z.float().movedim(1, -1).reshape(-1, 16)))
    torch.testing.assert_close(d.flatten(), expected, rtol=1e-4, atol=1e-4)


def test_trainable_parameters_are_no_obstacle():
    coder, z = make_predictor().requires_grad_(True), rand(9, 16, seed=5)
    d, g = streamed.distance_and_gradient(coder, z)
    assert not d.requires_grad
    assert not g.requires_grad
    assert not project(coder, z.requires_grad_(True), 1.0, 1.0, 1.0, 0.2).requires_grad


def test_manifold_distance_is_differentiable():
    manifold = ShellManifold(make_predictor(), WAN21)
    z = rand(2, 16, 2, 3, 4).requires_grad_(True)
    manifold.distance(z).square().mean().backward()
    leaf = z.detach().clone().requires_grad_(True)
    tokens = leaf.movedim(1, -1).reshape(-1, 16)
    naive.distance(tokens, *reference(manifold.coder)(tokens)).square().mean().backward()
    torch.testing.assert_close(z.grad, leaf.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("edges", [(1.0, 1.0), (0.7, 1.4), (0.0, 0.0)])
@pytest.mark.parametrize("trust", [0.05, 10.0])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_pull_equals_the_formula(coder, edges, trust, strength):
    z = rand(23, channels_of(coder), seed=9)
    torch.testing.assert_close(
        project(coder, z, *edges, strength, trust),
        naive.project(z, reference(coder), *edges, strength, trust), rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    fast = descend(coder, z, *edges, strength, trust, 1)
    torch.testing.assert_close(fast, naive.descend(z, reference(coder), *edges, strength, trust, 1), rtol=1e-3, atol=2e-3)


def test_trust_region_bounds_every_token(coder):
    z = rand(23, channels_of(coder), seed=9)
    for moved in (project(coder, z, 3.0, 3.0, 1.0, 0.1), descend(coder, z, 3.0, 3.0, 1.0, 0.1)):
        change = (moved - z).norm(dim=1) / z.norm(dim=1)
        assert (change <= 0.1 + 1e-5).all()
        assert change.max() > 0.05


@pytest.fixture(scope="module")
def fitted():
    """A manifold of sheet clips with held-out calibration, and clips that neither saw."""
    clips = sheet_clips(14, (3, 16, 16))
    coder = fit_anchors(tokens_of(clips[:8]), 160)
    bare = ShellManifold(coder, WAN21)
    held = [bare.distance(c[None])[0] for c in clips[8:11]]
    return ShellManifold(coder, WAN21, calibrate(held), "sheet"), clips[11:]


def test_thickness_puts_the_mean_square_distance_at_one():
    clips = sheet_clips(4, (3, 12, 12))
    tokens = tokens_of(clips)
    coder = fit_anchors(tokens, 32)
    assert float(streamed.distance(coder, tokens).square().mean()) == pytest.approx(1.0, abs=0.05)


def test_radius_keeps_the_energy_of_long_tailed_residuals():
    """At the median, the tokens with most detail, which hold most of the energy, would all be pulled in."""
    d = rand(4, 30, 30).exp()
    calibration = calibrate(list(d[:, None]))
    assert calibration.radius**2 == pytest.approx(float(d.square().mean()), rel=1e-4)
    assert calibration.radius > 1.5 * calibration.token_quantile(0.5)


def test_calibration_reads_back_as_its_own_quantiles(fitted):
    manifold, clips = fitted
    d = manifold.distance(torch.stack(clips))
    assert float(manifold.token_percentile(d).median()) == pytest.approx(0.5, abs=0.06)
    assert float(manifold.outside_band(d).float().mean()) == pytest.approx(0.1, abs=0.05)
    assert manifold.band[0] < manifold.radius < manifold.band[1]


@pytest.mark.parametrize("method", METHODS)
def test_methods_do_what_they_say(fitted, method):
    manifold, clips = fitted
    z = torch.stack([half_blur(clips[0]), clips[1], add_noise(clips[2])])
    before, moved = manifold.distance(z), manifold.pull(z, method)
    after = manifold.distance(moved)
    assert moved.shape == z.shape
    assert moved.is_contiguous()
    if method == "minimise":
        assert after.mean() < 0.6 * before.mean()
    else:
        outside = [manifold.outside_band(d).float().mean() for d in (before, after)]
        assert outside[1] < 0.35 * outside[0]
        assert after[0].mean() > before[0].mean()
        assert after[2].mean() < before[2].mean()
    if method == "band":
        inside = ~manifold.outside_band(before)
        margin = 0.06 * (manifold.band[1] - manifold.band[0])
        deep = inside & (before > manifold.band[0] + margin) & (before < manifold.band[1] - margin)
        change = (moved - z).norm(dim=1)
        assert change[deep].max() < 1e-5
        assert change[~inside].mean() > 1e-2


def test_strength_zero_is_the_very_latent(fitted):
    z = torch.stack(fitted[1])
    assert fitted[0].pull(z, strength=0.0) is z


def test_custom_radius_moves_the_shell(fitted):
    manifold, clips = fitted
    z = torch.stack(clips)
    means = [float(manifold.distance(manifold.pull(z, "project", radius=r, trust=5.0)).mean()) for r in (0.5, 1.0, 1.5)]
    assert means[0] < means[1] < means[2]
    bands = [float(manifold.distance(manifold.pull(z, "band", radius=r, trust=5.0)).mean()) for r in (0.5, 1.5)]
    assert bands[0] < bands[1]


def test_projection_restores_detail_where_minimising_destroys_it(fitted):
    """The reason for a shell: over-smoothing lies inside it, noise outside, and only a radius tells which way to go."""
    manifold, clips = fitted
    for clip in clips:
        soft, noisy = half_blur(clip), add_noise(clip)
        share = {n: high_frequency_share(z) for n, z in (("soft", soft), ("noisy", noisy))}
        pulled = {
            (n, m): high_frequency_share(manifold.pull(z[None], m)[0])
            for n, z in (("soft", soft), ("noisy", noisy)) for m in ("project", "minimise")
        }  # fmt: skip
        assert pulled["soft", "project"] > share["soft"]
        assert pulled["noisy", "project"] < share["noisy"]
        assert pulled["soft", "minimise"] < share["soft"]
        assert pulled["noisy", "minimise"] < share["noisy"]


def test_every_held_out_clip_is_ordered(fitted):
    manifold, clips = fitted
    for clip in clips:
        d = [float(manifold.distance(z[None]).mean()) for z in (blur(clip), clip, add_noise(clip))]
        assert d[0] < d[1] < d[2]


def test_one_latent_does_not_depend_on_its_batch(fitted):
    manifold, clips = fitted
    z = torch.stack(clips)
    torch.testing.assert_close(manifold.pull(z)[1], manifold.pull(z[1:2])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pull_keeps_the_dtype(fitted, dtype):
    z = torch.stack(fitted[1]).to(dtype)
    moved = fitted[0].pull(z)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved.float(), fitted[0].pull(z.float()), rtol=2e-2, atol=2e-2)


def test_inference_mode_is_no_obstacle(fitted):
    z = torch.stack(fitted[1])
    with torch.inference_mode():
        inside = {m: fitted[0].pull(z.clone(), m) for m in METHODS}
    for method, moved in inside.items():
        torch.testing.assert_close(moved, fitted[0].pull(z, method))


@pytest.mark.parametrize("make", [make_predictor, make_anchors])
@pytest.mark.parametrize("calibrated", [True, False])
def test_save_and_load(tmp_path, make, calibrated):
    table = calibrate([rand(3, 8, 8).abs()]) if calibrated else None
    manifold = ShellManifold(make(), WAN21, table, "m")
    manifold.metrics, manifold.provenance = {"auroc": 0.5}, {"seed": 3}
    save(manifold, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    z = rand(1, 16, 2, 4, 4)
    assert torch.equal(again.distance(z), manifold.distance(z))
    assert (again.metrics, again.provenance, again.name) == (manifold.metrics, manifold.provenance, "m")
    assert again.radius == manifold.radius
    assert (again.calibration is None) is not calibrated


def test_uncalibrated_manifolds_say_so():
    manifold = ShellManifold(make_predictor(), WAN21, name="bare")
    assert manifold.radius == 1.0
    assert manifold.pull(rand(1, 16, 1, 2, 2), "project").shape == (1, 16, 1, 2, 2)
    for ask in (lambda: manifold.band, lambda: manifold.pull(rand(1, 16, 1, 2, 2), "band"),
                lambda: manifold.token_percentile(torch.ones(1))):  # fmt: skip
        with pytest.raises(UncalibratedError, match="'bare' has no calibration.*--calibrate LATENTS"):
            ask()


def stored(tmp_path, tensors, config, space=WAN21):
    formats.write(tmp_path / "m.safetensors", tensors, formats.Header("shell_lcc", space, config))
    return tmp_path / "m.safetensors"


def test_damaged_manifolds_are_refused(tmp_path):
    coder = make_anchors()
    good, config = dict(coder.state_dict()), coder.config()
    nan = {**good, "anchors": good["anchors"] * float("nan")}
    table = torch.linspace(0, 1, LEVELS)
    cases = [
        (nan, config, WAN21, "'anchors' has NaN"),
        ({"anchors": good["anchors"]}, config, WAN21, "tensors do not match coder 'anchors'"),
        (good, {**config, "coder": "diffusion"}, WAN21, "found coder 'diffusion'"),
        (good, config, WAN22, "16 channels, its latent space 48"),
        ({**good, "token_quantiles": table, "frame_quantiles": table}, config, WAN21, "calibration is damaged"),
        ({**good, "token_quantiles": table}, config, WAN21, "calibration is damaged"),
        ({**good, "token_quantiles": table[:5], "frame_quantiles": table}, config, WAN21, "calibration is damaged"),
        (dict(make_predictor().state_dict()), config, WAN21, "tensors do not match coder 'anchors'"),
        (good, {"coder": "predictor"}, WAN21, "tensors do not match coder 'predictor'"),
    ]
    for tensors, header, space, message in cases:
        with pytest.raises(formats.FormatError, match=message):
            load(stored(tmp_path, tensors, header, space))


@pytest.mark.parametrize("bad", [{"method": "push"}, {"trust": 0.0}, {"strength": -1.0}, {"radius": 0.0}])
def test_pull_refuses_bad_settings(bad):
    with pytest.raises(ValueError, match="unknown method|must be"):
        ShellManifold(make_anchors(), WAN21).pull(rand(1, 16, 1, 2, 2), **bad)


def test_quantiles_and_percentile_are_inverse():
    values = rand(5000).exp()
    table = quantiles(values)
    torch.testing.assert_close(table, torch.quantile(values, torch.linspace(0, 1, LEVELS)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(percentile(table, table), torch.linspace(0, 1, LEVELS), rtol=0, atol=1e-5)
    assert percentile(torch.tensor([-1.0, 1e9]), table).tolist() == [0.0, 1.0]


def test_percentile_of_coinciding_quantiles_is_finite():
    table = torch.full((LEVELS,), 2.0)
    assert percentile(torch.tensor([1.0, 2.0, 3.0]), table).tolist() == [0.0, 0.0, 1.0]


def test_calibrate_needs_a_clip():
    with pytest.raises(ValueError, match="at least one held-out clip"):
        calibrate([])


def test_auroc_by_counting_pairs():
    a, b = rand(40).round(decimals=1), rand(30, seed=1).round(decimals=1) + 0.3
    wins = (b[:, None] > a[None]).double() + 0.5 * (b[:, None] == a[None]).double()
    assert auroc(a, b) == pytest.approx(float(wins.mean()))
    assert auroc(a, a) == pytest.approx(0.5)


def test_high_frequency_share_of_known_waves():
    x = torch.arange(32) * 2 * torch.pi / 32
    slow, fast = torch.sin(2 * x).expand(1, 1, 32, 32), torch.sin(12 * x).expand(1, 1, 32, 32)
    assert high_frequency_share(slow) < 1e-6
    assert high_frequency_share(fast) > 1 - 1e-6
    assert high_frequency_share(slow + fast) == pytest.approx(0.5, abs=1e-3)


class TestChunks:
    """One memory budget for both coders; a chunk's size changes no result."""

    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    @staticmethod
    def of(kind, bases):
        """chunk_tokens of a coder of that many bases, without its memory."""
        if kind == "predictor":
            with torch.device("meta"):
                return predictor_module.Predictor(16, bases, 8).chunk_tokens
        return Anchors(torch.zeros(bases, 16), torch.ones(bases, 16)).chunk_tokens

    @pytest.mark.parametrize(("kind", "on_cpu", "on_gpu"), [("predictor", 2048, 8192), ("anchors", 1024, 16384)])
    def test_sizes_at_4096_bases(self, kind, on_cpu, on_gpu):
        assert self.of(kind, 4096)(self.cpu) == on_cpu
        assert self.of(kind, 4096)(self.gpu) == on_gpu

    @pytest.mark.parametrize(("kind", "matrices"), [("predictor", 2), ("anchors", 1)])
    def test_they_shrink_with_the_bases_and_stay_within_the_budget(self, kind, matrices):
        for device, budget in ((self.cpu, streamed.CPU_CHUNK_BYTES), (self.gpu, streamed.GPU_CHUNK_BYTES)):
            sizes = [self.of(kind, bases)(device) for bases in (4096, 16384, 65536)]
            assert sizes[0] > sizes[2] >= streamed.LEAST_CHUNK_TOKENS
            assert sizes == sorted(sizes, reverse=True)
            assert matrices * 4 * 65536 * sizes[2] <= budget

    def test_many_neighbours_count_too(self):
        few, many = (Anchors(torch.zeros(512, 48), torch.ones(512, 48), k).chunk_tokens(self.cpu) for k in (16, 256))
        assert many < few == 1024
        assert many * 4 * 256 * 256 <= streamed.CPU_CHUNK_BYTES

    @pytest.mark.parametrize("make", [make_predictor, make_anchors])
    def test_the_budget_changes_no_result(self, make, monkeypatch):
        coder = make()
        z = rand(200, channels_of(coder), seed=3)
        whole = streamed.distance_and_gradient(coder, z)
        monkeypatch.setattr(streamed, "CPU_CHUNK_BYTES", 1)
        assert coder.chunk_tokens(self.cpu) == streamed.LEAST_CHUNK_TOKENS
        for found, expected in zip(streamed.distance_and_gradient(coder, z), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tensors_are_made_on_the_inputs_device():
    """With another default device, whatever is made without stating one does not go with the inputs."""
    tokens = rand(300, 16)
    coder = make_anchors()
    expected = region_thickness(coder, tokens), quantiles(tokens)
    with torch.device("meta"):
        found = region_thickness(coder, tokens), quantiles(tokens)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
