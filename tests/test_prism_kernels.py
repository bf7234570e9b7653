"""PRISM's mathematics: head against plain formulas, loss against Rao and Kupper's, accuracies, the pruning plan."""

import math

import pytest
import torch

from trainers.kernels.prism import accuracy as acc
from trainers.kernels.prism import naive, plan
from trainers.kernels.prism.head import HeadConfig, PrismHead, frequencies
from trainers.kernels.prism.plan import Checkpoint, PlanError, halving, make_plan, rank, step_at
from trainers.kernels.prism.preference_loss import LOSS, TIE, WIN, probabilities, rao_kupper
from trainers.kernels.prism.query_attention import masked_mean, query_attention


def made(seed=0, **options):
    torch.manual_seed(seed)
    head = PrismHead(HeadConfig(48, **({"dim": 32, "heads": 4} | options)))
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return head


def features(taps=1, dtype=torch.float32, batch=3, n=37, words=11):
    g = torch.Generator().manual_seed(1)
    visual = [3 * torch.randn(batch, n, 48, generator=g) + 1 for _ in range(taps)]
    # One channel far larger than the others, as in a DiT's residual stream.
    for v in visual:
        v[..., 5] *= 50
    text = torch.randn(batch, words, 48, generator=g)
    mask = torch.arange(words)[None] < torch.tensor([[words], [4], [1]])[:batch]
    return [v.to(dtype) for v in visual], text.to(dtype), mask


class TestHead:
    @pytest.mark.parametrize(("taps", "queries"), [((11,), 1), ((3, 7, 11), 4)])
    def test_attention_equals_the_plain_formula_in_value_and_gradient(self, taps, queries):
        head = made(taps=taps, queries=queries)
        visual, text, words = features(len(taps))
        mask = torch.cat([torch.ones(3, 37 * len(taps), dtype=torch.bool), words], dim=1)
        gradients = []
        for attend in (query_attention, naive.query_attention):
            inputs = [v.clone().requires_grad_() for v in (*visual, text)]
            out = attend(head, inputs, mask)
            head.zero_grad()
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            gradients.append(
                [out.detach(), *(x.grad for x in inputs), *(p.grad for p in head.parameters() if p.grad is not None)]
            )
        for fast, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-3, atol=2e-5 * float(plain.abs().max().clamp_min(1)))

    def test_the_mean_equals_the_plain_formula(self):
        head = made(pooling="mean")
        visual, text, words = features()
        mask = torch.cat([torch.ones(3, 37, dtype=torch.bool), words], dim=1)
        torch.testing.assert_close(masked_mean(head, [*visual, text], mask), naive.masked_mean(head, [*visual, text], mask))

    def test_tokens_beyond_a_chunk_count_alike(self, monkeypatch):
        head, (visual, text, words) = made(), features()
        whole = head(visual, text, words)
        monkeypatch.setattr("trainers.kernels.prism.query_attention.CHUNK", 5)
        torch.testing.assert_close(head(visual, text, words), whole)

    def test_half_precision_and_strides_change_little(self):
        head, (visual, text, words) = made(), features()
        whole = head(visual, text, words)
        strided = [torch.stack([v, v], dim=-1)[..., 0] for v in visual]
        assert not strided[0].is_contiguous()
        torch.testing.assert_close(head(strided, text, words), whole)
        half, text_half, _ = features(dtype=torch.bfloat16)
        torch.testing.assert_close(head(half, text_half, words), whole, rtol=0.05, atol=0.05)

    def test_padding_is_not_read(self):
        head, (visual, text, words) = made(), features()
        other = torch.where(words[..., None], text, text.flip(-1))
        torch.testing.assert_close(head(visual, other, words), head(visual, text, words))
        assert not torch.allclose(head(visual, other), head(visual, text))

    def test_an_item_of_a_batch_scores_as_alone(self):
        head, (visual, text, words) = made(), features()
        alone = torch.cat([head([visual[0][i : i + 1]], text[i : i + 1], words[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(head(visual, text, words), alone)

    def test_the_full_size_has_about_22_million_weights(self):
        with torch.device("meta"):
            head = PrismHead(HeadConfig(1536))
        count = sum(p.numel() for p in head.parameters())
        assert 20.5e6 < count < 22.5e6

    def test_time_does_nothing_until_trained_and_then_depends_on_sigma(self):
        torch.manual_seed(0)
        head, (visual, text, words) = PrismHead(HeadConfig(48, dim=32, heads=4, time=True)), features()
        low, high = (torch.full((3,), s) for s in (0.1, 0.9))
        torch.testing.assert_close(head(visual, text, words, low), head(visual, text, words, high))
        torch.nn.init.normal_(head.time.weight)
        assert not torch.allclose(head(visual, text, words, low), head(visual, text, words, high))
        with pytest.raises(ValueError, match="give sigma"):
            head(visual, text, words)

    def test_each_level_has_a_temperature(self):
        head, (visual, text, words) = made(sigmas=(0.1, 0.9)), features()
        head.log_temperature.data = torch.tensor([0.0, math.log(4.0)])
        cold, warm = (head(visual, text, words, torch.full((3,), s)) for s in (0.2, 0.95))
        torch.testing.assert_close(cold, 4 * warm)

    def test_several_dimensions_are_scored_at_once(self):
        head, (visual, text, words) = made(dimensions=("quality", "motion", "text")), features()
        assert head(visual, text, words).shape == (3, 3)

    def test_frequencies_part_neighbouring_noise_levels(self):
        a, b = frequencies(torch.tensor([0.5, 0.501]))
        assert (a - b).norm() > 0.1

    def test_a_config_survives_json(self):
        config = HeadConfig(48, dim=32, heads=4, taps=(3, 11), dimensions=("a", "b"), sigmas=(0.1, 0.5))
        assert HeadConfig.from_json({k: list(v) if isinstance(v, tuple) else v for k, v in config.to_json().items()}) == config
        assert config.to_json()["levels"] == (0.1, 0.5)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v, t, m: (v * 2, t, m), "reads 1 taps"),
            (lambda v, t, m: ([v[0][..., :40]], t, m), "another backbone"),
            (lambda v, t, m: (v, t[:2], m), "reads features"),
            (lambda v, t, m: (v, t, m[:, :3]), "text mask"),
        ],
    )
    def test_what_does_not_fit_is_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            made()(*change(*features()))

    def test_impossible_configs_are_refused(self):
        for bad in ({"dim": 30}, {"pooling": "max"}, {"taps": (5, 3)}, {"dimensions": ()}):
            with pytest.raises(ValueError):
                HeadConfig(48, **({"dim": 32, "heads": 4} | bad))


class TestLoss:
    def test_the_loss_is_rao_and_kuppers(self):
        g = torch.Generator().manual_seed(0)
        a, b = torch.randn(50, generator=g), torch.randn(50, generator=g)
        for eta in (1.5, 5.0):
            p = naive.rao_kupper_probabilities(a, b, eta)
            torch.testing.assert_close(probabilities(a - b, eta).double(), p, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(p.sum(dim=-1), torch.ones(50, dtype=torch.float64))
            for i, outcome in enumerate((WIN, TIE, LOSS)):
                loss = rao_kupper(a - b, torch.full((50,), outcome), eta)
                torch.testing.assert_close(loss.double(), -p[:, i].log(), rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_the_formula_even_far_out(self):
        d = torch.tensor([-200.0, -3.0, 0.0, 3.0, 200.0], requires_grad=True)
        for outcome in (WIN, TIE, LOSS):
            (g,) = torch.autograd.grad(rao_kupper(d, torch.full((5,), outcome)).sum(), d)
            assert bool(torch.isfinite(g).all())
            step = 1e-2
            numeric = (rao_kupper(d + step, torch.full((5,), outcome)) - rao_kupper(d - step, torch.full((5,), outcome))) / (
                2 * step
            )
            torch.testing.assert_close(g, numeric.detach(), rtol=1e-2, atol=2e-3)

    def test_swapping_a_pair_swaps_its_outcome(self):
        d = torch.linspace(-4, 4, 9)
        torch.testing.assert_close(rao_kupper(d, torch.ones(9)), rao_kupper(-d, -torch.ones(9)))

    def test_eta_must_leave_room_for_ties(self):
        with pytest.raises(ValueError, match="eta 1"):
            rao_kupper(torch.zeros(1), torch.zeros(1), eta=1.0)


class TestAccuracy:
    d = torch.tensor([2.0, -1.0, 0.1, 0.0, -3.0, 0.2])
    o = torch.tensor([1, -1, 0, 1, 1, -1])

    def test_accuracies_by_hand(self):
        found = acc.accuracy(self.d, self.o, threshold=0.15)
        assert (found.pairs, found.decided) == (6, 5)
        assert found.without_ties == pytest.approx((1 + 1 + 0.5 + 0 + 0) / 5)
        assert found.with_ties == pytest.approx((1 + 1 + 1 + 0 + 0 + 0) / 6)

    def test_the_threshold_is_the_best_there_is(self):
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            d = torch.randn(60, generator=g).round(decimals=1)
            o = torch.randint(-1, 2, (60,), generator=g)
            best = max(acc.accuracy(d, o, t).with_ties for t in (0.0, *(torch.arange(0, 40) / 10 + 0.05).tolist()))
            assert acc.accuracy(d, o, acc.tie_threshold(d, o)).with_ties == pytest.approx(best)

    def test_the_threshold_is_found_on_the_inputs_device(self):
        """With another default device, whatever is made without stating one does not go with the inputs."""
        expected = acc.tie_threshold(self.d, self.o), acc.calibration_error(self.d, self.o)
        with torch.device("meta"):
            assert (acc.tie_threshold(self.d, self.o), acc.calibration_error(self.d, self.o)) == expected

    def test_a_scale_spoils_the_calibration(self):
        g = torch.Generator().manual_seed(0)
        d = 2 * torch.randn(4000, generator=g)
        o = torch.where(torch.rand(4000, generator=g) < d.sigmoid(), 1, -1)
        assert acc.calibration_error(d, o) < 0.03 < acc.calibration_error(5 * d, o)

    def test_single_classes_and_nothing_at_all(self):
        ties = torch.zeros(4)
        found = acc.accuracy(torch.randn(4), ties, 0.5)
        assert found.without_ties is None
        assert acc.calibration_error(torch.randn(4), ties) is None
        assert acc.accuracy(torch.empty(0), torch.empty(0), 0.0).with_ties is None
        with pytest.raises(ValueError, match="at least one pair"):
            acc.tie_threshold(torch.empty(0), torch.empty(0))

    def test_nan_scores_are_refused(self):
        with pytest.raises(ValueError, match="1 of 2 score differences are NaN"):
            acc.accuracy(torch.tensor([1.0, math.nan]), torch.tensor([1, 1]), 0.0)


def schedule(steps, shift):
    t = [1 - i / steps for i in range(steps + 1)]
    return [shift * x / (1 + (shift - 1) * x) for x in t]


class TestPlan:
    def test_the_default_halves_at_the_steps_that_the_literature_names(self):
        made = make_plan(schedule(50, 8), 8)
        assert [(p.step, p.survivors) for p in made.checkpoints] == [(5, 4), (10, 2), (20, 1)]
        # 27.5 % of the steps, and 12 of 60 blocks more for each of the 8 + 4 + 2 scorings.
        assert made.share == pytest.approx(0.275 + 14 * 12 / (8 * 50 * 60), abs=1e-9)

    def test_reusing_the_blocks_of_scorings_would_save_little(self):
        """Each of the 4 + 2 + 1 survivors' next steps would start after the 12 blocks that its scoring ran."""
        blocks = make_plan(schedule(50, 8), 8).cost.blocks
        assert blocks == 6768
        assert 7 * 12 / blocks == pytest.approx(0.0124, abs=1e-4)

    def test_fewer_rounds_than_levels_use_the_lowest(self):
        made = make_plan(schedule(50, 8), 2)
        assert [(p.step, p.survivors) for p in made.checkpoints] == [(20, 1)]
        assert made.notes == tuple(f"sigma {s} is not used: 2 candidates take 1 of 3 rounds" for s in (0.987, 0.97))
        assert [p.step for p in make_plan(schedule(50, 8), 4).checkpoints] == [10, 20]
        assert not make_plan(schedule(50, 8), 8).notes

    def test_finalists_are_scored_at_the_end(self):
        made = make_plan(schedule(50, 8), 8, finalists=2, final_scoring=100, scoring=lambda sigma: 7 if sigma > 0.98 else 12)
        assert [(p.survivors, p.scoring) for p in made.checkpoints] == [(4, 12), (2, 12)]
        evaluations = 2 * (8 * 10 + 4 * 10 + 2 * 30)
        assert made.cost.evaluations == evaluations
        assert made.cost.scorings == 8 + 4 + 2
        assert made.cost.blocks == evaluations * 30 + 12 * 12 + 2 * 100
        with pytest.raises(PlanError, match="9 finalists of 8"):
            make_plan(schedule(50, 8), 8, finalists=9)

    def test_noise_levels_and_not_steps_decide(self):
        for steps in (20, 50, 100):
            for shift in (3.0, 5.0, 8.0):
                sigmas = schedule(steps, shift)
                for p in make_plan(sigmas, 8, sigmas=(0.95, 0.8)).checkpoints:
                    level = 0.95 if p.survivors == 4 else 0.8
                    assert sigmas[p.step] <= level + 1e-6 < sigmas[p.step - 1] + 2e-6

    @pytest.mark.parametrize("finish", ["continue", "restart"])
    def test_the_cost_is_what_running_the_plan_takes(self, finish):
        made = make_plan(schedule(12, 3), 7, keep=2, sigmas=(0.95, 0.85, 0.7), depth=30, scoring=12, finish=finish)
        left, evaluations, scorings, blocks = 7, 0, 0, 0
        points = {p.step: p.survivors for p in made.checkpoints}
        for step in range(12):
            if step in points:
                survivors = points[step]
                stop = finish == "restart" and step == max(points)
                scorings, blocks, left = scorings + left, blocks + left * 12, survivors
                if stop:
                    evaluations, blocks = evaluations + 2 * 12 * 2, blocks + 2 * 12 * 2 * 30
                    break
            evaluations, blocks = evaluations + 2 * left, blocks + 2 * left * 30
        assert (made.cost.evaluations, made.cost.scorings, made.cost.blocks) == (evaluations, scorings, blocks)
        assert made.full_cost.blocks == 7 * 12 * 2 * 30

    def test_halving(self):
        assert halving(8, 1, 3) == (4, 2, 1)
        assert halving(8, 1, 2) == (4, 1)
        assert halving(8, 1, 1) == (1,)
        assert halving(7, 2, 9) == (4, 2)
        assert halving(3, 3, 2) == ()
        assert halving(16, 1, 3) == (8, 4, 1)

    def test_levels_on_one_step_are_one_checkpoint(self):
        made = make_plan(schedule(4, 3), 8, sigmas=(0.89, 0.88, 0.87))
        assert made.checkpoints == (Checkpoint(2, schedule(4, 3)[2], 1, 12),)

    def test_one_candidate_is_a_plain_run(self):
        made = make_plan(schedule(20, 3), 1, sigmas=())
        assert made.checkpoints == ()
        assert made.share == 1

    def test_everyone_is_alive_until_the_first_checkpoint(self):
        made = make_plan(schedule(50, 8), 8)
        assert [made.alive(s) for s in (0, 4, 5, 9, 10, 19, 20, 49)] == [8, 8, 4, 4, 2, 2, 1, 1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"candidates": 4, "keep": 5}, "keep 5 of 4"),
            ({"candidates": 4, "sigmas": (0.01,)}, "no step starts at or below sigma 0.01"),
            ({"candidates": 4, "sigmas": ()}, "no checkpoint"),
            ({"candidates": 4, "sigmas": (0.9, 0.8), "survivors": (2,)}, "one each"),
            ({"candidates": 4, "sigmas": (0.9, 0.8), "survivors": (2, 3)}, "3 survivors at sigma 0.8"),
            ({"candidates": 4, "sigmas": (0.9,), "survivors": (2,)}, "2 candidates are left"),
            ({"candidates": 4, "finish": "stop"}, "unknown finish"),
            ({"candidates": 4, "passes": 0}, "0 forwards per step"),
        ],
    )
    def test_impossible_plans_are_refused(self, options, message):
        with pytest.raises(PlanError, match=message):
            make_plan(schedule(20, 3), **options)

    def test_a_schedule_must_descend(self):
        with pytest.raises(PlanError, match="descend"):
            make_plan([0.5, 1.0, 0.0], 4)

    def test_step_at_never_is_the_first_step(self):
        assert step_at([1.0, 0.5, 0.0], 1.0) == 1
        assert step_at([1.0, 0.5, 0.0], 0.2) == 2

    def test_ranking_is_stable_and_refuses_nan(self):
        assert rank([1.0, 3.0, 3.0, 2.0], 3) == [1, 2, 3]
        with pytest.raises(PlanError, match="candidate 1 scored NaN"):
            rank([1.0, math.nan], 1)


def test_the_plan_needs_no_torch():
    assert "torch" not in vars(plan)
