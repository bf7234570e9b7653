"""Rows of the report on rewards: searches are simulated as a race runs, costs are the plans', tables say what is sure."""

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.toy_world import few_steps, few_steps_rows, jobs, rewards_report, rewards_rows, training_free
from benchmarks.toy_world.rewards_rows import MIX, RUN
from benchmarks.toy_world.statistics import Estimate


def one_caption(seed, perfect=False):
    g = torch.Generator().manual_seed(seed)
    oracle = torch.rand(8, generator=g)
    scores = {"oracle.overall": oracle}
    for name in (*training_free.rewards(0), "query", "mean"):
        for stage in ("finished", "draft", 3, 8):
            scores[f"{name}/{stage}"] = oracle if perfect else torch.rand(8, generator=g)
    return scores | {f"judge/{s}": oracle for s in (3, 8)}


def test_a_perfect_reward_gains_all_and_a_random_one_nothing():
    perfect = rewards_rows.tables([one_caption(i, perfect=True) for i in range(24)])
    random = rewards_rows.tables([one_caption(i) for i in range(200)])
    best = next(r for r in rewards_rows.reward_rows(perfect) if r.name == "oracle")
    for row in rewards_rows.reward_rows(perfect):
        assert row.single.mean == pytest.approx(best.single.mean, abs=1e-6), row.name
        assert row.accuracy.mean == 1.0
    for row in rewards_rows.reward_rows(random):
        if row.name != "oracle" and not row.name.startswith("judge"):
            assert abs(row.single.mean) < 2 * row.single.half, row.name
    taps = {"query": 11, "mean": 11}
    races = {r.name: r for r in rewards_rows.race_rows(perfect, taps)}
    kept = races.pop("its best half at step 3, restart")
    assert races.pop("random seed").gain.mean < kept.gain.mean < best.single.mean
    for row in races.values():
        assert row.gain.mean == pytest.approx(best.single.mean, abs=1e-6), row.name


def test_costs():
    found = rewards_rows.tables([one_caption(i) for i in range(4)])
    rows = {r.name: r.share for r in rewards_rows.race_rows(found, {"query": 11, "mean": 11})}
    forwards = {"flow residual": 12, "prompt gap": 8}
    for name, reward in training_free.rewards(0).items():
        assert rewards_rows.FORWARDS[name] == reward.info.forwards
    assert rewards_rows.FORWARDS["mix"] == sum(forwards[name] for name in MIX)
    # Eight candidates run three steps and are scored by four forwards each, then one runs 20 steps.
    assert rows["prompt gap, one prune at step 3, restart"] == pytest.approx((8 * (3 * 24 + 48) + 480) / (8 * RUN))
    assert rows["drafts of 6 steps by prompt gap"] == pytest.approx((8 * (6 * 24 + 96) + 480) / (8 * RUN))
    assert rows["prompt gap, all in full"] == pytest.approx(1.2)
    assert rows["PRISM head (query), halved at step 3, one at 8, restart"] == pytest.approx(
        (8 * 3 * 24 + 4 * 5 * 24 + 12 * 12 + 480) / (8 * RUN)
    )


def test_no_job_uses_captions_of_another_figure():
    plan = rewards_report.jobs_of(128, 64)
    starts = {kind: (min(j.start for j in part), max(j.start + 1 for j in part)) for kind, part in plan.items()}
    assert starts["training free"] == (20_000, 20_128)
    assert all(starts[kind] == (30_000, 30_057) for kind in (*jobs.FEW_STEPS, "siblings"))
    assert set(jobs.FEW_STEPS.values()) == set(few_steps.CFGS)


def test_what_is_sure_is_bold():
    assert rewards_rows.sure(Estimate(0.03, 0.02, 9)) == "**+0.030 ± 0.020**"
    assert rewards_rows.sure(Estimate(-0.01, 0.02, 9)) == "-0.010 ± 0.020"
    names = ("error", "psnr", "outside", "overall", "frechet")
    plain, change = ({k: Estimate(v, 0.1, 9) for k in names} for v in (0.5, -0.2))
    few = {"outside": Estimate(0.1, 0.0, 9)}
    rows = [few_steps_rows.GuidanceRow(5.0, 4, "none", plain, None), few_steps_rows.GuidanceRow(5.0, 4, "band", few, change)]
    text = few_steps_rows.table(rows)
    assert "| 5 | 4 | none | 0.500 ± 0.100 | 0.50 ± 0.10 | 50.0 % |" in text
    assert "| 5 | 4 | band | **-0.200 ± 0.100** | **-0.20 ± 0.10** | 10.0 % |" in text
