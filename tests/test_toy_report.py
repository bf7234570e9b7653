"""The report's arithmetic: intervals, guidance variants against the pack's own kernels, jobs on disk, tables."""

import json
import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks.toy_world import (
    candidates,
    corruptions,
    guidance,
    jobs,
    judge,
    pipeline,
    plots,
    prism_rows,
    report,
    shell_lcc_rows,
    stack_rows,
    statistics,
    weights,
)
from benchmarks.toy_world.captions import VALUES
from benchmarks.toy_world.clips import clip, scene_of, sibling
from benchmarks.toy_world.guidance import Guidance, SigmaTable
from benchmarks.toy_world.statistics import Estimate
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.manifold import load, save
from trainers.latents import read as latent_data
from trainers.shell_lcc import cli as shell_lcc


@pytest.fixture(scope="module")
def manifold_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("manifold") / "toy.safetensors"
    latents = weights.FOLDER / weights.LATENTS
    command = ["fit", "--latents", latents, "--output", path, "--num_bases", "256", "--held_out", "0.25"]
    assert not shell_lcc.main([str(a) for a in command])
    return path


@pytest.fixture(scope="module")
def manifold(manifold_path):
    return load(manifold_path)


@pytest.fixture(scope="module")
def z(manifold):
    refs = latent_data.list_clips([weights.FOLDER / weights.LATENTS], manifold.space)[:3]
    z = torch.stack([latent_data.read_clip(r) for r in refs])
    return z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))


class TestStatistics:
    def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(self):
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(400, 50, generator=generator)
        held = sum(abs(statistics.mean(row).mean) <= statistics.mean(row).half for row in draws)
        assert 0.91 < held / 400 < 0.98

    def test_pairing_removes_what_clips_share(self):
        generator = torch.Generator().manual_seed(0)
        base = 10 * torch.randn(64, generator=generator)
        better = base + 1 + 0.1 * torch.randn(64, generator=generator)
        change = statistics.difference(better, base)
        assert change.low < 1 < change.high
        assert change.half < 0.1 < statistics.mean(better).half
        assert not statistics.mean(better).apart_from(statistics.mean(base))

    def test_the_jackknife_of_a_mean_is_the_mean(self):
        x = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
        values = statistics.pseudo_values(lambda index: float(x[index].mean()), 64)
        assert statistics.of_pseudo_values(values, 64).mean == pytest.approx(float(x.mean()), abs=1e-9)

    def test_the_jackknife_takes_most_of_a_frechet_distances_bias(self):
        generator = torch.Generator().manual_seed(0)
        reference = torch.randn(2000, 8, generator=generator)
        raw, corrected = [], []
        for _ in range(10):
            x = torch.randn(64, 8, generator=generator)
            raw.append(judge.frechet(x, reference))
            values = statistics.pseudo_values(lambda index, x=x: judge.frechet(x[index], reference), 64)
            corrected.append(statistics.of_pseudo_values(values, 64).mean)
        assert abs(sum(corrected)) < 0.3 * sum(raw)

    def test_too_few_clips_for_a_jackknife_are_refused(self):
        with pytest.raises(ValueError, match="at least 32 clips, found 20"):
            statistics.pseudo_values(lambda index: 0.0, 20)


class TestGuidance:
    @pytest.mark.parametrize("method", ["project", "band", "gradient", "minimise"])
    def test_a_hook_does_what_the_node_does(self, manifold, z, method):
        hook = Guidance(method, 0.7).hook(manifold, None, seed=0)
        torch.testing.assert_close(hook(z, 0.5, 3), manifold.pull(z, method, 0.7))
        assert not torch.equal(hook(z, 0.5, 3), z)

    def test_a_window_is_a_share_of_the_shifted_schedule(self, manifold, z):
        path = pipeline.sigmas(pipeline.STEPS, pipeline.SHIFT)[:-1].tolist()
        late, early = (Guidance(start=a, end=b).hook(manifold, None, 0) for a, b in ((0.5, 1.0), (0.0, 0.5)))
        acts = [(not torch.equal(late(z, s, i), z), not torch.equal(early(z, s, i), z)) for i, s in enumerate(path)]
        # The step at the very middle belongs to both.
        assert [a for a, _ in acts] == [i >= 10 for i in range(20)]
        assert [b for _, b in acts] == [i <= 10 for i in range(20)]

    def test_the_random_push_is_as_long_as_projection_and_points_elsewhere(self, manifold, z):
        pushed = Guidance("random").hook(manifold, None, seed=1)(z, 0.5, 0) - z
        projected = Guidance("project").hook(manifold, None, seed=1)(z, 0.5, 0) - z
        torch.testing.assert_close(pushed.norm(dim=1), projected.norm(dim=1), rtol=1e-3, atol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(pushed, projected, dim=1)
        assert cosine.mean().abs() < 0.1

    def test_quantiles_are_matched_clip_by_clip(self, manifold, z):
        before = manifold.distance(z)
        after = manifold.distance(Guidance("quantile", trust=2.0).hook(manifold, None, 0)(z, 0.5, 0))
        wanted = manifold.calibration.token_quantiles[[25, 50, 75]]
        for one, other in zip(before, after, strict=True):
            was, now = (torch.quantile(d.flatten(), torch.tensor([0.25, 0.5, 0.75])) for d in (one, other))
            assert (now - wanted).abs().max() < 0.35 * (was - wanted).abs().max()

    def test_each_sigma_has_a_shell_of_its_own(self, manifold, z, tmp_path):
        sigmas = torch.tensor([0.9, 0.5, 0.1])
        distances = torch.stack([k * manifold.distance(z) for k in (3, 2, 1)])
        SigmaTable.of_distances(sigmas, distances).save(tmp_path / "table.safetensors")
        table = SigmaTable.load(tmp_path / "table.safetensors")
        assert table.nearest(0.85).radius == pytest.approx(3 * calibrate(list(distances[2])).radius, rel=1e-5)
        guided = Guidance(target="predictions", trust=2.0).hook(manifold, table, 0)
        assert manifold.distance(guided(z, 0.9, 0)).mean() > manifold.distance(guided(z, 0.1, 0)).mean()

    def test_patches_come_back_where_they_were(self, z):
        for side in (1, 2, 3):
            squares = guidance.patches(z, side)
            assert squares.shape == (3, 16 * side**2, 5, 9 - side, 9 - side)
            torch.testing.assert_close(guidance.merge(squares, side), z)
        corner = guidance.patches(z, 2)[0, :, 2, 3, 4].view(16, 2, 2)
        torch.testing.assert_close(corner, z[0, :, 2, 3:5, 4:6])

    def test_a_manifold_of_patches_is_fitted_saved_and_followed(self, z, tmp_path):
        refs = latent_data.list_clips([weights.FOLDER / weights.LATENTS])
        clean = torch.stack([latent_data.read_clip(r) for r in refs[:12]])
        fitted = guidance.fit_patch_manifold(clean[:8], clean[8:], 2, 64)
        assert fitted.outside_band(fitted.distance(guidance.patches(clean[8:], 2))).float().mean() == pytest.approx(
            0.1, abs=0.02
        )
        save(fitted, tmp_path / "patches.safetensors")
        again = load(tmp_path / "patches.safetensors")
        hooks = [Guidance("project", patch=2).hook(m, None, 0) for m in (fitted, again)]
        torch.testing.assert_close(*(hook(z, 0.5, 0) for hook in hooks))
        before, after = (again.distance(guidance.patches(x, 2)) for x in (z, hooks[0](z, 0.5, 0)))
        assert (after - again.radius).abs().mean() < (before - again.radius).abs().mean()

    def test_an_unknown_method_is_named(self, manifold, z):
        with pytest.raises(ValueError, match="unknown method 'x'"):
            Guidance("x").hook(manifold, None, 0)(z, 0.5, 0)


class TestJobs:
    def test_clips_are_parted_without_loss(self):
        parts = jobs.split_up("samples", "test", 19, start=5)
        assert [i for p in parts for i in range(p.start, p.start + p.count)] == list(range(5, 24))

    def test_every_setting_has_a_file_of_its_own(self):
        names = {j.name("d") for part in shell_lcc_rows.jobs(32, shell_lcc_rows.SETTINGS).values() for j in part}
        assert len(names) == (len(shell_lcc_rows.SETTINGS) + 3) * 4

    def test_a_finished_job_is_not_done_again(self, toy_judge, manifold_path, tmp_path):
        latents = weights.FOLDER / weights.LATENTS
        others = (tmp_path / "patches", tmp_path / "table", latents, tmp_path / "heads")
        files = jobs.Files(weights.FOLDER, judge.WEIGHTS, manifold_path, *others)
        plan = jobs.split_up("renders", "judge_test", 2)
        first = jobs.run(plan, files, tmp_path / "jobs", 1, "renders")
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "jobs").iterdir()}
        second = jobs.run(plan, files, tmp_path / "jobs", 1, "renders")
        assert len(kept) == 1
        assert kept == {p: p.stat().st_mtime_ns for p in (tmp_path / "jobs").iterdir()}
        reading = toy_judge.read(torch.stack([clip("judge_test", i).frames for i in range(2)]))
        for found in (first, second):
            again = jobs.as_reading(jobs.gather(found, plan), reading.reference)
            torch.testing.assert_close(again.features, reading.features)
            torch.testing.assert_close(again.probabilities, reading.probabilities)


def invented(plan, seed, offset=0.0):
    """Results of a plan as a judge might give them: {job: tensors}."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for job in (j for part in plan.values() for j in part):
        n, more = job.count * jobs.SIBLINGS.get(job.kind, 1), {}
        if job.kind == "samples" or job.kind.startswith("refined"):
            more["z"] = torch.randn(n, 16, 5, 8, 8, generator=generator)
        if job.kind.endswith("reconstructions"):
            more["squared_error"] = 0.01 * torch.rand(n, 17, generator=generator) + 1e-3
        figures = ("rigid", "laplacian", "high_frequency", "roughness", "dynamics")
        plain = {k: offset + torch.rand(n, generator=generator) + 0.1 for k in figures}
        features = torch.randn(n, 64, generator=generator)
        read = {f"probability.{k}": torch.rand(n, len(v), generator=generator).softmax(-1) for k, v in VALUES.items()}
        out[job] = plain | more | read | {"features": features}
    return out


def test_the_frechet_distance_grows_with_every_defect(toy_judge):
    """Of a signature in which blur counts although the judge's networks look through it."""
    n = 32
    siblings = torch.stack([sibling("unseen", i, k).frames for i in range(n) for k in range(3)])
    target = judge.FrechetTarget(jobs.flatten(toy_judge.read(siblings)))
    material = [clip("unseen", i) for i in range(n)]

    def distance(frames):
        return target.distance(target.normalise(judge.signature(jobs.flatten(toy_judge.read(torch.stack(frames))))))

    clean = distance([c.frames for c in material])
    for defect in ("blur", "noise", "over_smoothing", "jitter", "freeze"):
        half, whole = (distance([corruptions.corrupt(c, defect, s).frames for c in material]) for s in (0.5, 1.0))
        assert clean < half < whole, defect


def test_a_sibling_shows_the_same_caption_in_another_scene():
    one, other = clip("unseen", 3), sibling("unseen", 3, 0)
    assert one.caption == other.caption
    assert one.scene.attributes == other.scene.attributes
    assert one.scene != other.scene
    assert sibling("unseen", 3, 1).scene != other.scene
    assert torch.equal(other.frames, sibling("unseen", 3, 0).frames)


REFERENCE = {k: torch.ones(4) for k in judge.REFERENCE}


class TestRows:
    def test_shell_lcc_rows_compare_with_no_guidance(self, manifold, tmp_path):
        plan = shell_lcc_rows.jobs(32, shell_lcc_rows.HEADLINE)
        results = invented(plan, 0)
        found = shell_lcc_rows.rows(results, plan, manifold, REFERENCE)
        assert [r.name for r in found] == list(shell_lcc_rows.HEADLINE)
        base, pushed = found[0], found[1]
        assert all(e.mean == 0 for k, e in base.against_base.items() if not math.isnan(e.mean))
        d = manifold.distance(jobs.gather(results, plan["random push"])["z"])
        assert pushed.figures["outside"].mean == pytest.approx(float(manifold.outside_band(d).float().mean()), abs=1e-6)
        assert shell_lcc_rows.table(found).count("\n") == len(found) + 1
        assert "minimise" in shell_lcc_rows.verdict(found, "project")
        plots.shell_lcc(found, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000

    def test_refined_latents_are_compared_with_the_damaged_ones(self, manifold):
        plan, shell = shell_lcc_rows.refine_jobs(), shell_lcc_rows.jobs(32, shell_lcc_rows.HEADLINE)
        results = invented(plan, 0) | invented(shell, 1)
        found = shell_lcc_rows.refine_rows(results, plan, shell["scene"], shell["sibling reconstructions"], manifold)
        assert len(found) == 2 * len(shell_lcc_rows.REFINE_SETTINGS)
        for row in found:
            assert (row["figures"]["frechet_change"].mean == 0) == (row["name"] == "none")
        assert shell_lcc_rows.refine_table(found).count("\n") == len(found) + 1

    def test_stack_rows_state_what_toy_judge_reads(self, tmp_path):
        plan = stack_rows.jobs(32)
        results = invented(plan, 1)
        found = stack_rows.rows(results, plan, REFERENCE)
        truth = [scene_of("unseen", i)[0].attributes for i in range(32)]
        read = jobs.gather(results, plan["samples, held-out combinations"])["probability.colour"].argmax(dim=1)
        share = sum(int(i) == VALUES["colour"].index(a.colour) for i, a in zip(read, truth, strict=True)) / 32
        assert found[-1].right["colour"].mean == pytest.approx(share)
        assert len(stack_rows.psnr_per_frame(results, plan)) == 17
        assert set(stack_rows.followed(found)) == set(VALUES)
        plots.stack(found, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_the_report_is_written_whole(monkeypatch, tmp_path, capsys):
    """Everything but the clips themselves, which are invented: fit, rows, plots, files."""

    def run(every, files, folder, processes, title):
        found = invented({"all": every}, 0)
        for job in every:
            if job.kind == "predictions":
                found[job] = {"distance": 1 + torch.rand(job.count, pipeline.STEPS, 5, 8, 8)}
            elif job.kind in jobs.TABLES:
                found[job] = tables(job.count)
        return found

    def tables(count):
        """Candidates as a pool, drafts and the judge's early looks at once."""
        oracle = torch.rand(count)
        told = oracle[:, None] + 0.3 * torch.randn(count, len(candidates.STEPS))
        names = candidates.HEADS
        out = {"oracle.overall": oracle, "evaluations": torch.full((count,), 9)}
        out |= {f"score.{n}": told for n in names} | {f"finished.{n}": told[:, -1] for n in names}
        return out | {f"judge.{k}": told[:, : len(candidates.JUDGED_STEPS)] for k in ("noisy", "prediction")}

    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(candidates, "taps", lambda folder: dict.fromkeys(candidates.HEADS, 11))
    timed = prism_rows.Clocked(8, 2, 10.0, 3.2, 3840, 1200, Estimate(1.02, 0.01, 2))
    monkeypatch.setattr(report, "clock", lambda files: timed)
    assert report.main(["--clips", "32", "--captions", "6", "--extra", "--output_dir", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in (*shell_lcc_rows.SETTINGS, *shell_lcc_rows.REFINE_SETTINGS, *stack_rows.KINDS):
        assert f"| {name} |" in text or f" {name} |" in text, name
    assert "Frechet distance with the default" in text
    figures = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in figures["shell_lcc"]] == list(shell_lcc_rows.SETTINGS)
    assert len(figures["predictions"]) == pipeline.STEPS
    for kind in ("random seed", "oracle, full", "query, halving", "query, one early prune", "query, cached drafts"):
        assert f"| 8 | {kind} |" in text, kind
    assert "what its blocks predict: 1.020" in text
    assert figures["clocked"]["ratio"] == [1.02, 0.01]
    assert "6 held-out captions, 16 seeds each" in text
    assert {row["n"] for row in figures["prism"]["best_of_n"]} == {4, 8, 16}
    assert len(figures["prism"]["accuracy"]) == len(candidates.STEPS) + 1
    for picture in ("stack.png", "shell_lcc.png", "prism.png"):
        assert (tmp_path / picture).stat().st_size > 5_000
    assert "report.md" in capsys.readouterr().out


def test_too_few_clips_are_refused(capsys):
    with pytest.raises(SystemExit):
        report.main(["--clips", "8"])
    assert "at least 32" in capsys.readouterr().err
