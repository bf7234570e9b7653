"""Functions that pause, and the race that is run with them."""

import contextvars
import threading
from dataclasses import dataclass

import pytest
import torch

from trainers.kernels.prism import race
from trainers.kernels.prism.coroutine import Cancelled, Coroutine
from trainers.kernels.prism.plan import PlanError, make_plan


def schedule(steps=10):
    return [1 - i / steps for i in range(steps + 1)]


def plan_of(**options):
    return make_plan(schedule(), **({"candidates": 8, "sigmas": (0.8, 0.6, 0.4), "depth": 5, "scoring": 3} | options))


@dataclass
class Call:
    sigma: float
    who: int
    x: float


class Network:
    """Answers x + 1, scores by a list, and keeps an eye on what it was asked."""

    def __init__(self, quality):
        self.quality, self.seen, self.scored, self.sizes = quality, [], [], []

    def evaluate(self, calls):
        assert len({c.sigma for c in calls}) == 1
        self.sizes.append(len(calls))
        self.seen += [(c.who, round(c.sigma, 6)) for c in calls]
        return [c.x + 1 for c in calls]

    def score(self, calls, checkpoint):
        self.scored += [(c.who, round(c.sigma, 6)) for c in calls]
        return [[self.quality[c.who]] for c in calls]


def sampler(plan):
    """A sampler with a memory: its result depends on every output that it was given."""

    def start(i, ask):
        x, history = float(i), []
        for step in range(plan.steps):
            x = ask(Call(schedule()[step], i, x)) * (1 + 0.01 * len(history))
            history.append(x)
        return torch.tensor(history).cumsum(0)[-1]

    return start


def plain(plan, i):
    """The result of candidate i alone."""
    return sampler(plan)(i, lambda call: call.x + 1)


class TestPausing:
    def test_it_stops_and_goes_on_with_what_it_remembers(self):
        def function(stop):
            total = 0
            for k in range(3):
                total += k
                stop(total)
            return total * 10

        paused = Coroutine(function)
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

        paused = Coroutine(function)
        paused.resume()
        before = threading.active_count()
        paused.cancel()
        paused.cancel()
        assert threading.active_count() == before - 1
        assert not ran
        assert cleaned == [True]
        never = Coroutine(function)
        never.cancel()
        assert cleaned == [True]

    def test_what_it_raises_is_raised_where_it_is_resumed(self):
        def function(stop):
            stop(1)
            raise KeyboardInterrupt("asked")

        paused = Coroutine(function)
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
            assert Coroutine(function).resume() == ("sampler", True, False)
        assert Coroutine(function).resume() == ("sampler", False, True)

    def test_only_one_runs_at_a_time(self):
        running, most = [], []

        def function(stop):
            for _ in range(20):
                running.append(1)
                most.append(len(running))
                running.pop()
                stop(None)

        several = [Coroutine(function) for _ in range(4)]
        for _ in range(20):
            for one in several:
                one.resume()
        assert max(most) == 1
        for one in several:
            one.cancel()

    def test_an_answer_is_what_the_stop_returns(self):
        def function(stop):
            return [stop("first"), stop("second")]

        paused = Coroutine(function)
        assert paused.resume("nobody waits for this") == "first"
        assert paused.resume(1) == "second"
        assert paused.resume(2) == [1, 2]

    def test_dropping_is_no_exception_that_a_sampler_would_catch(self):
        assert not issubclass(Cancelled, Exception)


class TestRace:
    quality = (3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0)

    @pytest.mark.parametrize("chunk", [1, 3, 8])
    def test_the_best_wins_with_the_result_of_its_plain_run(self, chunk):
        plan, network = plan_of(), Network(self.quality)
        found = race.run(plan, sampler(plan), network, chunk=chunk)
        assert found.winners == [5]
        assert torch.equal(found.results[0], plain(plan, 5))
        assert max(network.sizes) == chunk

    @pytest.mark.parametrize("chunk", [1, 3])
    def test_exactly_the_plans_calls_are_answered(self, chunk):
        for options in ({}, {"keep": 2}, {"candidates": 5}, {"sigmas": (0.7,)}):
            plan, network = plan_of(**options), Network(self.quality)
            race.run(plan, sampler(plan), network, chunk=chunk)
            assert len(network.seen) * plan.passes == plan.cost.evaluations, options
            assert len(set(network.seen)) == len(network.seen)
            assert len(network.scored) == plan.cost.scorings

    def test_candidates_run_one_after_another_by_default(self):
        plan, network = plan_of(candidates=2, sigmas=(0.8,)), Network(self.quality)
        race.run(plan, sampler(plan), network)
        assert [who for who, _ in network.seen][:4] == [0, 0, 1, 1]

    @pytest.mark.parametrize("chunk", [1, 4])
    def test_a_plan_that_restarts_ends_at_its_last_checkpoint(self, chunk):
        plan, network = plan_of(finish="restart", keep=2), Network(self.quality)
        found = race.run(plan, sampler(plan), network, chunk=chunk)
        assert found.winners == [5, 7]
        assert found.results == []
        assert min(sigma for _, sigma in network.seen) > plan.checkpoints[-1].sigma
        again = 2 * plan.steps
        assert (len(network.seen) + again) * plan.passes == plan.cost.evaluations

    def test_a_candidate_of_several_clips_is_ranked_by_their_mean(self):
        plan = plan_of(candidates=2, sigmas=(0.8,))

        class Clips(Network):
            def score(self, calls, checkpoint):
                return [[(1.0, 3.0), (0.0, 5.0)][c.who] for c in calls]

        found = race.run(plan, sampler(plan), Clips(()))
        assert found.winners == [1]
        step = plan.checkpoints[0].step
        assert [c.clip_scores[step] for c in found.board] == [[1.0, 3.0], [0.0, 5.0]]
        assert [c.scores[step] for c in found.board] == [2.0, 2.5]

    def test_the_board_says_who_dropped_when(self):
        plan = plan_of()
        seen = []
        watch = lambda order, board: seen.append(list(order))  # noqa: E731
        board = race.run(plan, sampler(plan), Network(self.quality), on_rank=watch).board
        steps = [p.step for p in plan.checkpoints]
        assert {s.index: s.dropped for s in board} == {
            0: steps[0], 1: steps[0], 2: steps[1], 3: steps[0], 4: steps[1], 5: None, 6: steps[0], 7: steps[2],
        }  # fmt: skip
        assert [len(s.scores) for s in board] == [1, 1, 2, 1, 2, 3, 1, 3]
        assert seen == [[5, 7, 4, 2], [5, 7], [5]]

    def test_scores_may_change_on_the_way(self):
        plan = plan_of(candidates=4, sigmas=(0.8, 0.4), survivors=(2, 1))

        class Fickle(Network):
            def score(self, calls, checkpoint):
                scores = (1, 2, 9, 9) if calls[0].sigma < 0.5 else (4, 3, 2, 1)
                return [[scores[c.who]] for c in calls]

        assert race.run(plan, sampler(plan), Fickle(())).winners == [1]

    def test_one_candidate_is_run_plainly(self):
        plan, network = plan_of(candidates=1, sigmas=()), Network(self.quality)
        assert race.run(plan, sampler(plan), network).winners == [0]
        assert len(network.seen) == plan.steps
        assert not network.scored

    def test_samplers_of_their_own_step_size_are_answered_apart(self):
        plan, network = plan_of(candidates=2, sigmas=(0.5,)), Network(self.quality)

        def start(i, ask):
            for sigma in ((1.0, 0.7, 0.5, 0.2), (1.0, 0.9, 0.8, 0.5))[i]:
                ask(Call(sigma, i, 0.0))
            return i

        race.run(plan, start, network, chunk=2)
        assert network.seen == [
            (0, 1.0), (1, 1.0), (1, 0.9), (1, 0.8), (0, 0.7), (0, 0.5), (0, 0.2),
        ]  # fmt: skip

    @pytest.mark.parametrize("chunk", [1, 4])
    def test_an_error_or_an_interruption_ends_all_and_leaves_no_thread(self, chunk):
        plan = plan_of()
        before = threading.active_count()

        def start(i, ask):
            for step in range(plan.steps):
                ask(Call(schedule()[step], i, 0.0))
                if i == 5 and step == 5:
                    raise KeyboardInterrupt("stop")

        with pytest.raises(KeyboardInterrupt):
            race.run(plan, start, Network(self.quality), chunk=chunk)
        assert threading.active_count() == before
        with pytest.raises(PlanError, match="candidate 2 scored NaN"):
            race.run(plan, sampler(plan), Network((1.0, 1.0, float("nan"), *[1.0] * 5)), chunk=chunk)
        assert threading.active_count() == before

        class Broken(Network):
            def evaluate(self, calls):
                raise MemoryError

        with pytest.raises(MemoryError):
            race.run(plan, sampler(plan), Broken(self.quality), chunk=chunk)
        assert threading.active_count() == before

    def test_a_candidate_that_ends_too_early_is_an_error(self):
        with pytest.raises(PlanError, match="candidate 0 ended before the checkpoint at sigma 0.8"):
            race.run(plan_of(), lambda i, ask: 1.0, Network(self.quality))
