"""PRISM's rows of the report: accuracies and choices against hand-made tables, and a real pruned search against the tables."""

import time

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.toy_world import (
    candidates,
    easy_cache,
    pipeline,
    prism_collect,
    prism_heads,
    prism_rows,
    search,
    statistics,
    weights,
)
from benchmarks.toy_world.pipeline import SHIFT, STEPS, sigmas
from trainers.kernels.prism.files import LoadedHead
from trainers.kernels.prism.head import HeadConfig, PrismHead
from trainers.prism import train_loop as prism_train
from trainers.wan import dit as wan_dit
from trainers.wan import sampling as wan_sampling


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(128, dim=32, heads=2, layers=2, taps=(7,))).train(False)
    for p in head.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return prism_train.Scorer(wan_dit.load(weights.FOLDER / weights.DIT, 7), head)


def oracle(captions=6, count=16, seed=0):
    return torch.rand(captions, count, generator=torch.Generator().manual_seed(seed))


def pool_of(scores, truth):
    """Tables in which one head gives `scores` [captions, N] at every level."""
    return {
        "oracle.overall": truth, "finished.query": scores,
        "score.query": scores[..., None].expand(-1, -1, len(candidates.STEPS)).contiguous(),
    }  # fmt: skip


class TestAccuracy:
    def test_of_a_perfect_a_reversed_and_a_silent_scorer(self):
        truth = oracle()
        assert torch.equal(prism_rows.accuracy(truth, truth), torch.ones(6, dtype=torch.float64))
        assert torch.equal(prism_rows.accuracy(-truth, truth), torch.zeros(6, dtype=torch.float64))
        assert torch.equal(prism_rows.accuracy(0 * truth, truth), torch.full((6,), 0.5, dtype=torch.float64))

    def test_ties_are_left_out(self):
        truth = torch.tensor([[0.5, 0.51, 0.9]])
        assert float(prism_rows.accuracy(torch.tensor([[2.0, 1.0, 3.0]]), truth)) == 1.0
        assert bool(prism_rows.accuracy(torch.rand(1, 3), torch.full((1, 3), 0.5)).isnan())

    def test_levels_and_the_judges_own_look(self):
        truth = oracle()
        seen = truth[:, :8, None].expand(-1, -1, len(candidates.JUDGED_STEPS))
        judged = {f"judge.{k}": seen for k in ("noisy", "prediction")}
        found = prism_rows.accuracies(pool_of(truth, truth), judged)
        assert [len(v.accuracy) for v in found] == [3 if s in candidates.JUDGED_STEPS else 1 for s in candidates.STEPS] + [1]
        assert all(e.mean == 1 for v in found for e in v.accuracy.values())
        assert "| judge, noisy |" in prism_rows.accuracy_table(found).splitlines()[0]


class TestChoices:
    def rows(self, scores, truth):
        drafts = {"finished.query": scores[:, : prism_rows.DRAFTED], "evaluations": torch.full((6 * 8,), 10)}
        return {(r.size, r.name): r for r in prism_rows.rows(pool_of(scores, truth), drafts, {"query": 7})}

    def test_a_head_that_knows_the_oracle_gets_what_the_oracle_gets(self):
        truth = oracle()
        rows = self.rows(truth, truth)
        for size in prism_rows.SIZES:
            best = rows[size, "oracle, full"]
            for kind in ("full", "halving", "one early prune"):
                row = rows[size, f"query, {kind}"]
                assert row.oracle == best.oracle
                assert row.share.mean == pytest.approx(1.0)
                assert row.share.half == pytest.approx(0.0, abs=1e-9)
        assert rows[16, "oracle, full"].oracle.mean == pytest.approx(float(truth.max(dim=1).values.mean()))
        assert rows[16, "random seed"].oracle.mean == pytest.approx(float(truth.mean()))
        assert rows[4, "query, cached drafts"].share.mean == pytest.approx(1.0)

    def test_a_head_that_knows_nothing_gains_nothing(self):
        many = {"finished.query": oracle(200, 8, 1), "evaluations": torch.full((1600,), 10)}
        rows = prism_rows.rows_of(8, pool_of(oracle(200, seed=1), oracle(200)), many, {"query": 7})
        row = next(r for r in rows if r.name == "query, halving")
        assert abs(row.gain.mean) < 2 * row.gain.half < 0.1

    def test_costs_are_the_plans(self):
        rows = self.rows(oracle(), oracle())
        plan = prism_rows.plan_of(8, prism_rows.HALVING, 7)
        assert [p.survivors for p in plan.checkpoints] == [4, 2, 1]
        row = rows[8, "query, halving"]
        assert (row.evaluations, row.blocks) == (plan.cost.evaluations, plan.cost.blocks)
        assert row.blocks_share == plan.share < 0.35
        assert rows[8, "query, full"].evaluations == 8 * 2 * STEPS
        assert rows[8, "query, cached drafts"].evaluations == 2 * (8 * 10 + STEPS)
        assert rows[16, "query, halving"].blocks_share < 0.35

    def test_halving_can_lose_what_is_best_only_at_the_end(self):
        scores = torch.zeros(4, len(candidates.STEPS))
        scores[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
        scores[:, 1:] = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
        plan = prism_rows.make_plan(sigmas(STEPS, SHIFT).tolist(), 4, 1, (0.984, 0.9), (2, 1), depth=12, scoring=8)
        assert prism_rows.play(plan, scores) == 1

    def test_subsets_are_the_same_every_time_and_all_of_all(self):
        assert prism_rows.subsets(16, 16, 3) == [list(range(16))]
        some = prism_rows.subsets(4, 16, 3)
        assert some == prism_rows.subsets(4, 16, 3) != prism_rows.subsets(4, 16, 4)
        assert all(len(set(s)) == 4 for s in some)


def test_the_interval_of_a_ratio_holds_the_truth():
    g = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(300):
        base = 1 + torch.rand(60, generator=g)
        found = statistics.ratio(0.8 * base + 0.3 * torch.randn(60, generator=g), base, draws=300)
        held += found.low < 0.8 < found.high
    assert 0.9 < held / 300 < 0.985


class TestDrafts:
    def denoiser_of(self, toy_world):
        return lambda n: toy_world.denoiser(["a red ball in a wood room, fast orbit"] * n)

    def test_a_threshold_of_zero_leaves_nothing_out(self, toy_world):
        path = sigmas(6, SHIFT).tolist()
        noise = pipeline.initial_noise([1, 2])
        with torch.no_grad():
            z, taken = easy_cache.draft(self.denoiser_of(toy_world), noise, path, threshold=0.0)
            plain = wan_sampling.euler(self.denoiser_of(toy_world)(2), noise, path)
        assert taken.tolist() == [6, 6]
        torch.testing.assert_close(z, plain, atol=1e-4, rtol=1e-4)

    def test_a_higher_one_leaves_out_more_and_changes_more(self, toy_world):
        path = sigmas(10, SHIFT).tolist()
        noise = pipeline.initial_noise([1, 2])
        with torch.no_grad():
            plain = wan_sampling.euler(self.denoiser_of(toy_world)(2), noise, path)
            found = [easy_cache.draft(self.denoiser_of(toy_world), noise, path, threshold=t) for t in (0.1, 0.4, 5.0)]
        steps = [int(taken.sum()) for _, taken in found]
        errors = [float((z - plain).norm()) for z, _ in found]
        assert 20 > steps[0] > steps[1] > steps[2]
        assert 0 < errors[0] < errors[2]

    def test_every_clip_decides_for_itself(self, toy_world):
        path = sigmas(10, SHIFT).tolist()
        with torch.no_grad():
            together = easy_cache.draft(self.denoiser_of(toy_world), pipeline.initial_noise([1, 2]), path)
            alone = [easy_cache.draft(self.denoiser_of(toy_world), pipeline.initial_noise([s]), path) for s in (1, 2)]
        assert together[1].tolist() == [int(a[1]) for a in alone]
        torch.testing.assert_close(together[0], torch.cat([a[0] for a in alone]), atol=1e-4, rtol=1e-4)


def test_a_real_search_finds_what_the_tables_say(toy_world, toy_judge, scorer):
    count = 4
    tables = candidates.run(toy_world, toy_judge, {"query": scorer}, prism_rows.SPLIT, 0, count)
    caption = candidates.caption_of(toy_world, prism_rows.SPLIT, 0)
    plan = prism_rows.plan_of(count, prism_rows.HALVING, 7)
    with torch.no_grad():
        found = search.search(toy_world, scorer, caption, 0, plan)
        whole = search.full(toy_world, scorer, caption, 0, count)
    assert found.winner == prism_rows.play(plan, tables["score.query"])
    torch.testing.assert_close(found.z[0], tables["z"][found.winner], atol=1e-3, rtol=1e-3)
    assert found.blocks == plan.cost.blocks
    assert whole.winner == int(tables["finished.query"].argmax())
    torch.testing.assert_close(whole.z[0], tables["z"][whole.winner], atol=1e-3, rtol=1e-3)
    assert whole.blocks == plan.full_cost.blocks


def test_searches_are_timed_in_turn(toy_world, scorer, monkeypatch):
    # By this process's own time: what other processes do meanwhile must not decide which search was the faster one.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    found = prism_rows.clock(toy_world, scorer, captions=1, size=2)
    plan = prism_rows.plan_of(2, prism_rows.HALVING, 7)
    assert (found.full_blocks, found.halving_blocks) == (plan.full_cost.blocks, plan.cost.blocks)
    assert 0 < found.halving_s < found.full_s


def test_prompts_of_the_heads_are_the_training_captions(tmp_path):
    from benchmarks.toy_world.clips import scene_of
    from trainers.kernels.files import header as formats

    prism_collect.write_prompts(tmp_path / "p.safetensors", weights.FOLDER, "train", range(3))
    texts, header = formats.read(tmp_path / "p.safetensors", "texts")
    assert sorted(texts) == ["negative", "train-0000", "train-0001", "train-0002"]
    assert header.config["prompts"]["train-0001"] == scene_of("train", 1)[1]
    assert header.config["prompts"]["negative"] == ""


def synthetic_runs(captions=3, per=2, seed=0):
    """Random latents and scores; every caption has its own words."""
    g = torch.Generator().manual_seed(seed)
    n = captions * per
    return prism_heads.Runs(
        torch.randn(n, 16, 5, 8, 8, generator=g).half(), torch.randn(n, 2, 16, 5, 8, 8, generator=g).half(), [0.9, 0.75],
        torch.rand(n, 4, generator=g), torch.arange(captions).repeat_interleave(per), [f"p-{i}" for i in range(captions)],
        [torch.randn(5 + i, 256, generator=g) for i in range(captions)],
    )  # fmt: skip


class TestHeads:
    def test_motion_is_the_geometric_mean_of_three_scores(self):
        scores = {"alignment": 0.9, "sharpness": 0.3, "smoothness": 1.0, "dynamics": 0.5, "rigidity": 0.25, "overall": 0.7}
        found = prism_collect.by_dimension({k: torch.tensor([v]) for k, v in scores.items()})
        assert list(found) == list(prism_collect.DIMENSIONS)
        assert float(found["motion"]) == pytest.approx(0.5)
        assert float(found["visual"]) == pytest.approx(0.3)

    def test_outcomes_have_a_tie_for_each_dimension(self):
        gap = torch.tensor([[0.03, -0.03, 0.015, 0.01], [-0.5, 0.02, -0.01, 0.0]])
        assert prism_heads.outcomes(gap, prism_collect.DIMENSIONS).tolist() == [[1, -1, 1, 0], [-1, 0, 0, 0]]
        assert prism_heads.outcomes(gap, ("visual",)).tolist() == [[1], [0]]

    def test_accuracy_counts_the_pairs_that_are_allowed(self):
        truth, predicted = torch.tensor([[0.1, 0.5, 0.9]]), torch.tensor([[0.0, 2.0, 1.0]])
        assert float(prism_heads.accuracy(predicted, truth, 0.02)) == pytest.approx(2 / 3)
        only = torch.zeros(3, 3, dtype=torch.bool)
        only[2, 1] = only[1, 2] = True
        assert float(prism_heads.accuracy(predicted, truth, 0.02, only)) == 0
        assert bool(prism_heads.accuracy(predicted, truth, 1.0).isnan())

    def test_noise_is_common_to_a_captions_clips_or_not(self):
        runs = synthetic_runs()
        for what, equal in ((prism_heads.COMMON, True), (prism_heads.INDEPENDENT, False)):
            x, sigmas = prism_heads.latents_of(runs, [2, 3], what)
            assert sigmas == list(prism_heads.BETWEEN)
            s = sigmas[0]
            noise = [(x[i, 0] - (1 - s) * runs.z[2 + i].float()) / s for i in (0, 1)]
            assert torch.allclose(*noise, atol=1e-4) == equal
            assert float(noise[0].std()) == pytest.approx(1, abs=0.05)

    def test_features_on_disk_are_those_of_the_backbone(self, tmp_path, monkeypatch):
        """Also those that a tuned backbone computes before its first step."""
        runs, backbone = synthetic_runs(), weights.FOLDER / weights.DIT
        monkeypatch.setattr(prism_heads, "CHUNK", 4)
        monkeypatch.setattr(prism_heads, "TAPS", (1,))
        monkeypatch.setattr(prism_heads, "load_runs", lambda *_: runs)
        part = prism_heads.Part("train-late", prism_heads.WITHIN, None, None)
        jobs = [prism_heads.FeatureJob(tmp_path, tmp_path, backbone, part, i) for i in (0, 4)]
        for job in jobs:
            prism_heads.compute_features(job)
        key = ("train-late", prism_heads.WITHIN)
        material = prism_heads.Material({key: runs}, {key: {1: prism_heads.Features(jobs, 1)}},
                                        {key: prism_heads.text_features(runs, backbone)})  # fmt: skip
        run = prism_heads.HeadRun("x", captions=3, taps=(1,), batch=2, steps=2, dim=16)
        batch = prism_heads.draw_batch(run, material, torch.Generator().manual_seed(0))
        assert len(batch.pairs) == 2
        stored, words, mask = batch.features(material, (1,))
        dit = wan_dit.load(backbone, 1)
        with torch.no_grad():
            computed, own_words, own_mask = prism_heads.online_features(batch, material, dit, (1,))
        assert torch.allclose(stored[0], computed[0], atol=2e-2)
        length = own_mask.shape[1]
        assert torch.equal(mask[:, :length], own_mask)
        assert torch.allclose(words[:, :length][own_mask], own_words[own_mask], atol=1e-4)
        head = prism_heads.train_head(run, material)
        assert prism_heads.scores_of(head, material, key, [0, 2]).shape == (2, 2, 3, 4)

    def test_a_head_learns_what_features_show(self, monkeypatch):
        """Synthetic features whose mean is the score: held-out captions are ordered right."""
        runs, key = synthetic_runs(captions=60, per=4), ("train-late", prism_heads.WITHIN)
        runs.scores[:] = runs.scores[:, :1]

        class Shown:
            def read(self, clips, levels):
                noise = torch.randn(len(clips), 8, 128, generator=torch.Generator().manual_seed(len(clips)))
                shown = torch.zeros(128)
                shown[:16] = 4.0
                return noise + runs.scores[clips, 0].view(-1, 1, 1) * shown

        texts = (torch.zeros(60, 2, 128), torch.ones(60, 2, dtype=torch.bool))
        material = prism_heads.Material({key: runs}, {key: {8: Shown()}}, {key: texts})
        run = prism_heads.HeadRun("x", captions=50, batch=8, steps=120, dim=32, dropout=0.0)
        head = prism_heads.train_head(run, material)
        scores = prism_heads.scores_of(head, material, key, range(50, 60))
        right = prism_heads.accuracy(scores[:, :, 0, 3], prism_heads.truth_of(runs, range(50, 60))[:, :, 3], 0.02)
        assert float(right.mean()) > 0.8

    def test_one_dimension_of_a_head_scores_as_the_whole_does(self):
        head = PrismHead(HeadConfig(128, dim=16, heads=2, layers=2, dimensions=prism_collect.DIMENSIONS)).train(False)
        table = [{"dimension": d, "sigma": 0.9} for d in prism_collect.DIMENSIONS]
        loaded = LoadedHead(head, None, None, (0.2, 0.9), dict.fromkeys(prism_collect.DIMENSIONS, 0.1), {"accuracy": table})
        found = prism_heads.only(loaded, "visual")
        x, words = torch.randn(3, 6, 128), torch.randn(3, 2, 128)
        torch.testing.assert_close(found.head([x], words), head([x], words)[:, 2:3])
        assert found.head.config.dimensions == ("visual",)
        assert found.metrics["accuracy"] == table[2:3]
