"""Functions that pause, and the race that is run with them."""

import contextvars
import threading

import pytest
import torch

from trainers.kernels.prism import race
from trainers.kernels.prism.pausing import Dropped, Pausing
from trainers.kernels.prism.plan import PlanError, make_plan


def schedule(steps=10):
    return [1 - i / steps for i in range(steps + 1)]


def plan_of(**options):
    return make_plan(schedule(), **({"candidates": 8, "levels": (0.8, 0.6, 0.4), "depth": 5, "tap": 2} | options))


class Sampler:
    """A sampler with a memory: its result depends on every step that it has taken."""

    def __init__(self, plan, quality):
        self.plan, self.quality, self.steps = plan, quality, []

    def __call__(self, i, stop=None):
        history = []
        points = {p.step for p in self.plan.checkpoints}
        for step in range(self.plan.steps):
            if stop is not None and step in points:
                stop(self.quality[i])
            self.steps.append((i, step))
            history.append(torch.tensor(float(i * 100 + step)))
        return torch.stack(history).cumsum(0)[-1]


class TestPausing:
    def test_it_stops_and_goes_on_with_what_it_remembers(self):
        def function(stop):
            total = 0
            for k in range(3):
                total += k
                stop(total)
            return total * 10

        paused = Pausing(function)
        assert [paused.resume() for _ in range(4)] == [0, 1, 3, 30]
        assert paused.done
        with pytest.raises(RuntimeError, match="returned already"):
            paused.resume()

    def test_one_that_is_dropped_does_not_go_on(self):
        ran, cleaned = [], []

        def function(stop):
            try:
                stop(1)
                ran.append("after")
            except Exception:
                ran.append("caught")
            finally:
                cleaned.append(True)

        paused = Pausing(function)
        paused.resume()
        before = threading.active_count()
        paused.drop()
        paused.drop()
        assert threading.active_count() == before - 1
        assert not ran
        assert cleaned == [True]
        never = Pausing(function)
        never.drop()
        assert cleaned == [True]

    def test_what_it_raises_is_raised_where_it_is_resumed(self):
        def function(stop):
            stop(1)
            raise KeyboardInterrupt("asked")

        paused = Pausing(function)
        paused.resume()
        with pytest.raises(KeyboardInterrupt, match="asked"):
            paused.resume()
        assert paused.done

    def test_context_and_inference_mode_are_the_callers(self):
        variable = contextvars.ContextVar("node", default="none")
        variable.set("sampler")

        def function(stop):
            return variable.get(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        with torch.inference_mode():
            assert Pausing(function).resume() == ("sampler", True, False)
        assert Pausing(function).resume() == ("sampler", False, True)

    def test_only_one_runs_at_a_time(self):
        running, most = [], []

        def function(stop):
            for _ in range(20):
                running.append(1)
                most.append(len(running))
                running.pop()
                stop(None)

        several = [Pausing(function) for _ in range(4)]
        for _ in range(20):
            for one in several:
                one.resume()
        assert max(most) == 1
        for one in several:
            one.drop()

    def test_dropping_is_no_exception_that_a_sampler_would_catch(self):
        assert not issubclass(Dropped, Exception)


class TestRace:
    quality = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]

    def test_the_best_wins_with_the_result_of_its_plain_run(self):
        plan = plan_of()
        sampler = Sampler(plan, self.quality)
        found = race.run(plan, sampler)
        assert found.winners == [5]
        assert torch.equal(found.results[0], Sampler(plan, self.quality)(5))

    def test_exactly_the_plans_steps_are_run(self):
        for options in ({}, {"keep": 2}, {"candidates": 5}, {"levels": (0.7,)}):
            plan = plan_of(**options)
            sampler = Sampler(plan, self.quality)
            race.run(plan, sampler)
            assert len(sampler.steps) * plan.passes == plan.cost.evaluations, options

    def test_a_restart_runs_winners_whole_again(self):
        plan = plan_of(finish="restart", keep=2)
        sampler = Sampler(plan, self.quality)
        found = race.run(plan, sampler, again=lambda i: sampler(i))
        assert found.winners == [5, 7]
        for result, i in zip(found.results, (5, 7), strict=True):
            assert torch.equal(result, Sampler(plan, self.quality)(i))
        assert len(sampler.steps) * plan.passes == plan.cost.evaluations

    def test_the_board_says_who_dropped_when(self):
        plan = plan_of()
        seen = []
        board = race.run(plan, Sampler(plan, self.quality), on_rank=lambda order: seen.append(list(order))).board
        steps = [p.step for p in plan.checkpoints]
        assert {s.index: s.dropped for s in board} == {
            0: steps[0], 1: steps[0], 2: steps[1], 3: steps[0], 4: steps[1], 5: None, 6: steps[0], 7: steps[2],
        }  # fmt: skip
        assert [len(s.scores) for s in board] == [1, 1, 2, 1, 2, 3, 1, 3]
        assert seen == [[5, 7, 4, 2], [5, 7], [5]]

    def test_scores_may_change_on_the_way(self):
        plan = plan_of(candidates=4, levels=(0.8, 0.4), survivors=(2, 1))

        def start(i, stop):
            stop([4, 3, 2, 1][i])
            stop([1, 2, 9, 9][i])
            return i

        assert race.run(plan, start).winners == [1]

    def test_one_candidate_is_run_plainly(self):
        plan = plan_of(candidates=1, levels=())
        sampler = Sampler(plan, self.quality)
        assert race.run(plan, sampler).winners == [0]
        assert len(sampler.steps) == plan.steps

    def test_an_error_or_an_interruption_ends_all_and_leaves_no_thread(self):
        plan = plan_of()
        before = threading.active_count()

        def start(i, stop):
            stop(float(i))
            if i == 6:
                raise KeyboardInterrupt("stop")
            stop(float(i))
            stop(float(i))

        with pytest.raises(KeyboardInterrupt):
            race.run(plan, start)
        assert threading.active_count() == before
        with pytest.raises(PlanError, match="candidate 2 scored NaN"):
            race.run(plan, lambda i, stop: stop(float("nan") if i == 2 else 1.0))
        assert threading.active_count() == before

    def test_a_candidate_that_ends_too_early_is_an_error(self):
        with pytest.raises(RuntimeError, match="candidate 0 ended before"):
            race.run(plan_of(), lambda i, stop: 1.0)
