"""Early Best-of-N (PRISM, arXiv 2606.20310) as a SAMPLER, which runs another sampler for several seeds."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP

from ..kernels.prism import race
from ..kernels.prism.plan import Checkpoint, Plan, make_plan
from ..kernels.rewards.reward import FINISHED, Reward
from ..kernels.rewards.schedule import at
from .guider_view import GuiderView, decoder
from .latent_thumbnail import thumbnail
from .patch_state import PatchState

COUNT = "intrinsic_reward_count"
# Relative difference between a candidate evaluated alone and in a batch that rounding explains.
ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
ROUNDING_FULL = 1e-5


@dataclass(frozen=True)
class GuiderCall:
    """The arguments of a sampler's call to its guider. x0: the candidate's latest prediction, None before its first step."""

    candidate: int
    x: torch.Tensor
    timestep: torch.Tensor
    options: dict
    seed: int | None
    x0: torch.Tensor | None

    @property
    def sigma(self) -> float:
        return float(self.timestep[0])


class Candidates(Protocol):
    """noises: one [B, C, T, H, W] per candidate; seeds: one per candidate; random_states: of the CPU's global generator
    after each noise was drawn, where the candidate's sampler goes on drawing. See ordinary_run.CandidateNoises."""

    noises: list[torch.Tensor]
    seeds: list[int]
    random_states: list[torch.Tensor]


class Watcher(Protocol):
    """Is told how a race goes on; see live_race.LiveRace."""

    def begin(self, plan: Plan) -> None: ...

    def step(self, candidate: int, step: int, x0: torch.Tensor, latent_format) -> None: ...

    def preview(self, candidate: int, x0: torch.Tensor, latent_format) -> None: ...

    def ranked(self, board: Sequence[race.CandidateResult]) -> None: ...


@dataclass(frozen=True)
class RaceSettings:
    """How a race is run.

    checkpoints: noise levels at which candidates are dropped, as the function `sigmas_of` of a schedule; keep: number of
    winners; finish: CONTINUE or RESTART of kernels.prism.plan; chunk: how many candidates are evaluated in one batch;
    finalists: how many are sampled to the end and scored there, at least keep.
    """

    checkpoints: Callable[[Sequence[float]], list[float]]
    keep: int
    finish: str
    chunk: int = 1
    finalists: int = 1


class ForwardCounter:
    """Counts the batch rows of forwards, as a wrapper of the diffusion model.

    Called inside a step cache that was added before, so that skipped forwards are not counted.
    """

    def __init__(self):
        self.rows = 0

    def __call__(self, executor, x, *args, **kwargs):
        self.rows += x.shape[0]
        return executor(x, *args, **kwargs)

    def add_to(self, patcher) -> None:
        """Adds the wrapper to a clone of a model."""
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, COUNT, self)


class CandidateStates:
    """Gives every candidate its own state of the model's patches and of the random generators."""

    def __init__(self, state: PatchState, random_states: Sequence[torch.Tensor]):
        self.state, self.random_states = state, random_states
        self.base, self.saved, self.current = state.save(), {}, None

    def enter(self, candidate: int) -> None:
        """Makes the candidate's state the current one. A candidate begins with the state at the start of the race."""
        if candidate == self.current:
            return
        if self.current is not None:
            self.saved[self.current] = self.state.save()
        first = candidate not in self.saved
        self.state.restore(self.saved.pop(candidate, self.base))
        if first:
            torch.set_rng_state(self.random_states[candidate])
        self.current = candidate

    def keep_only(self, racing: Sequence[int]) -> None:
        """Frees the states of all other candidates."""
        self.saved = {i: saved for i, saved in self.saved.items() if i in racing}
        if self.current not in racing:
            self.current = None

    def end(self) -> None:
        """Puts back the state at the start of the race."""
        self.state.restore(self.base)
        self.saved.clear()


class GuiderProxy:
    """Replaces the guider in a candidate's sampler and passes its calls to the race."""

    def __init__(self, guider, ask: race.Ask, candidate: int, states: CandidateStates, latest: dict):
        self._guider, self._ask, self._candidate, self._states, self._latest = guider, ask, candidate, states, latest

    def __getattr__(self, name):
        return getattr(self._guider, name)

    def __call__(self, x, timestep, model_options=None, seed=None):
        x0 = self._latest.get(self._candidate)
        out = self._ask(GuiderCall(self._candidate, x, timestep, model_options or {}, seed, x0))
        # Other candidates may have run in the meantime; the sampler goes on with its own random numbers.
        self._states.enter(self._candidate)
        return out


class GuiderNetwork:
    """Evaluates the calls of candidates with a guider, and scores them with a reward.

    guider: while it samples, with its model loaded; plan: gives the network's depth; vae: for rewards that read frames.
    evaluations, blocks: forwards and transformer blocks that really ran, counted per candidate.
    one_by_one: why candidates are evaluated one by one although batches were asked for, or None.
    """

    def __init__(
        self, guider, reward: Reward, plan: Plan, states: CandidateStates, counter: ForwardCounter, progress, vae=None
    ):  # fmt: skip
        self.guider, self.reward, self.plan, self.states = guider, reward, plan, states
        self.counter, self.progress, self.vae = counter, progress, vae
        self.evaluations, self.blocks = 0, 0
        self.one_by_one: str | None = None
        self.stateful: list[str] = []
        self._tried = self._compared = False
        # Stays lowered after an out-of-memory error.
        self.max_batch = math.inf

    def evaluate(self, calls: Sequence[GuiderCall]) -> list[torch.Tensor]:
        """As race.Network. After an out-of-memory error, this and all later batches are halved."""
        if not self._tried:
            first, *rest = calls
            return [self._try(first), *(self.evaluate(rest) if rest else [])]
        if self.one_by_one is not None:
            return [self._alone(call) for call in calls]
        out: dict[int, torch.Tensor] = {}
        for group in _by_options(calls):
            out |= zip([c.candidate for c in group], self._together(group), strict=True)
        return [out[call.candidate] for call in calls]

    def _try(self, call: GuiderCall) -> torch.Tensor:
        """Evaluates the first call of the race and finds out whether the patches keep state."""
        self.states.enter(call.candidate)
        before = self.states.state.save()
        out = self._alone(call)
        self.stateful = self.states.state.changed_since(before)
        if self.stateful:
            keeps = "keeps" if len(self.stateful) == 1 else "keep"
            self.one_by_one = f"{', '.join(self.stateful)} {keeps} state between steps"
        self._tried = True
        return out

    def _alone(self, call: GuiderCall) -> torch.Tensor:
        self.states.enter(call.candidate)
        return self._forward([call])[0]

    def _together(self, calls: Sequence[GuiderCall]) -> list[torch.Tensor]:
        if len(calls) == 1:
            return [self._alone(calls[0])]
        if len(calls) > self.max_batch:
            half = -(-len(calls) // 2)
            return [*self._together(calls[:half]), *self._together(calls[half:])]
        try:
            out = self._forward(calls)
        except Exception as e:
            if not comfy.model_management.is_oom(e):
                if self._compared:
                    raise
                # A patch may expect one clip; if it is not that, the error comes again.
                self.one_by_one = f"a patch of the model fails on a batch ({type(e).__name__}: {e})"
                return [self._alone(call) for call in calls]
            self.max_batch = -(-len(calls) // 2)
            logging.warning("Best-of-N: out of memory at %d candidates per batch, now %d", len(calls), self.max_batch)
            return self._together(calls)
        return out if self._compared else self._compare(calls, out)

    def _compare(self, calls: Sequence[GuiderCall], together: list[torch.Tensor]) -> list[torch.Tensor]:
        """Compares the first batch with its first candidate alone: a patch may look at the whole batch (Mahiro does)."""
        self._compared = True
        alone = self._alone(calls[0])
        limit = ROUNDING.get(self.guider.inner_model.get_dtype(), ROUNDING_FULL)
        difference = float((together[0] - alone).norm() / alone.norm().clamp_min(1e-12))
        if difference <= limit:
            return together
        share = f"{100 * difference:.2g} %"
        self.one_by_one = f"together their results differ by {share}: a patch of the model looks at the whole batch"
        return [alone, *(self._alone(call) for call in calls[1:])]

    def _forward(self, calls: Sequence[GuiderCall]) -> list[torch.Tensor]:
        """One call of the guider. The calls' options are the same."""
        first, before, single = calls[0], self.counter.rows, len(calls) == 1
        # A single call is passed on as it is: random numbers that a sampler draws may depend on the strides of its tensors.
        x = first.x if single else torch.cat([c.x for c in calls])
        timestep = first.timestep if single else torch.cat([c.timestep for c in calls])
        out = self.guider(x, timestep, model_options=first.options, seed=first.seed)
        passes = (self.counter.rows - before) // first.x.shape[0]
        self.evaluations += passes
        self.blocks += passes * self.plan.depth
        self.progress(self.blocks)
        if single:
            return [out]
        # With the strides that each would have alone, for the same reason.
        parts = out.split([len(c.x) for c in calls])
        return [torch.empty_like(c.x, dtype=out.dtype).copy_(part) for c, part in zip(calls, parts, strict=True)]

    @torch.no_grad()
    def score(self, calls: Sequence[GuiderCall], checkpoint: Checkpoint) -> list[list[float]]:
        """As race.Network: the scores of each candidate's clips. Leaves no trace in the state of the patches."""
        reward, found = at(self.reward, checkpoint.sigma), []
        for call in calls:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.states.enter(call.candidate)
            saved = self.states.state.save()
            # A cache of another pack belongs to the steps of a candidate: scoring starts with the patches' first state.
            self.states.state.restore(self.states.base, keyframes=False)
            # A sampler with its own step sizes may be below the checkpoint.
            view = GuiderView(self.guider, call.options, call.x, call.x0, call.sigma, decoder(self.vae, self.guider))
            try:
                found.append(reward.measure(view))
            finally:
                self.states.state.restore(saved)
            self.blocks += view.blocks
            self.progress(self.blocks)
        scores = reward.scores(torch.cat(found))
        return [part.tolist() for part in scores.split([len(f) for f in found])]


class Race(comfy.samplers.Sampler):
    """A SAMPLER that runs the candidates of a plan with another sampler.

    It returns the finalists as one batch, or with the finish RESTART the input, since they are sampled again elsewhere.
    After sampling, plan, outcome, network and thumbnails (candidate -> uint8 [h, w, 3]) hold the results.
    """

    def __init__(
        self, sampler, reward: Reward, candidates: Candidates, settings: RaceSettings, counter: ForwardCounter, vae=None,
        watcher: Watcher | None = None,
    ):  # fmt: skip
        self.sampler, self.reward, self.candidates, self.settings = sampler, reward, candidates, settings
        self.counter, self.vae, self.watcher = counter, vae, watcher
        self.plan: Plan | None = None
        self.outcome: race.RaceResult | None = None
        self.network: GuiderNetwork | None = None
        self.thumbnails: dict[int, torch.Tensor] = {}

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        inner = model_wrap.inner_model
        schedule, depth = sigmas.tolist(), len(inner.diffusion_model.blocks)
        self.plan = make_plan(
            schedule, len(self.candidates.seeds), self.settings.keep, self.settings.checkpoints(schedule),
            passes=passes_of(model_wrap), depth=depth, scoring=lambda s: at(self.reward, s).info.cost(depth),
            finish=self.settings.finish, finalists=self.settings.finalists,
            final_scoring=at(self.reward, FINISHED).info.cost(depth),
        )  # fmt: skip
        total = self.plan.cost.blocks
        bar = comfy.utils.ProgressBar(total)
        ignored = (ForwardCounter, GuiderNetwork, Race)
        states = CandidateStates(PatchState(model_wrap, ignored), self.candidates.random_states)
        self.network = GuiderNetwork(
            model_wrap, self.reward, self.plan, states, self.counter,
            lambda done: bar.update_absolute(min(done, total), total), self.vae,
        )  # fmt: skip
        if self.watcher is not None:
            self.watcher.begin(self.plan)
        previewer = latent_preview.get_previewer(model_wrap.model_patcher.load_device, inner.latent_format)
        # The latest x0 of each candidate; the best one is shown as the preview.
        best, latest = 0, {}

        def run_candidate(i: int, ask):
            def on_step(step, x0, x, steps):
                # A copy: some samplers add noise to the tensor that they report.
                latest[i] = x0.clone()
                if self.watcher is not None:
                    self.watcher.step(i, step, latest[i], inner.latent_format)
                if previewer and i == best:
                    done = min(self.network.blocks, total)
                    bar.update_absolute(done, total, previewer.decode_latent_to_preview_image("JPEG", x0))

            states.enter(i)
            options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
            own = {**extra_args, "seed": self.candidates.seeds[i], "model_options": options}
            start = self.candidates.noises[i].to(noise)
            # uni_pc writes into its schedule.
            proxy = GuiderProxy(model_wrap, ask, i, states, latest)
            return self.sampler.sample(proxy, sigmas.clone(), own, on_step, start, latent_image, denoise_mask, True)

        def draw_thumbnails(racing: Sequence[int]) -> None:
            for i in [i for i in latest if i not in racing]:
                self.thumbnails[i] = thumbnail(latest.pop(i), inner.latent_format)

        def on_rank(order: Sequence[int], board: Sequence[race.CandidateResult]) -> None:
            nonlocal best
            best = order[0]
            if self.watcher is not None:
                for i, x0 in latest.items():
                    self.watcher.preview(i, x0, inner.latent_format)
                self.watcher.ranked(board)
            draw_thumbnails(order)
            states.keep_only(order)

        try:
            self.outcome = race.run(self.plan, run_candidate, self.network, on_rank, self.settings.chunk)
        finally:
            states.end()
        if self.watcher is not None:
            for i, x0 in latest.items():
                self.watcher.preview(i, x0, inner.latent_format)
        draw_thumbnails(())
        return noise if self.plan.restarts else torch.cat(self.outcome.results)

def _by_options(calls: Sequence[GuiderCall]) -> list[list[GuiderCall]]:
    """The calls in groups whose options are the same: a sampler may add its own to those of one candidate (*_cfg_pp)."""
    groups: list[list[GuiderCall]] = []
    for call in calls:
        for group in groups:
            if _same_options(group[0].options, call.options):
                group.append(call)
                break
        else:
            groups.append([call])
    return groups


def _same_options(a, b) -> bool:
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_options(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same_options(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, int | float | str) and type(a) is type(b) and a == b


def passes_of(guider) -> int:
    """Forwards per candidate and step: 1 without classifier-free guidance, else one per conditioning."""
    conds = sum(1 for c in guider.conds.values() if c)
    if conds < 2:
        return 1
    both = guider.model_options.get("disable_cfg1_optimization", False)
    return 1 if math.isclose(getattr(guider, "cfg", 0.0), 1.0) and not both else conds


def reserve_memory(patcher, chunk: int) -> None:
    """Makes ComfyUI reserve memory for a batch of `chunk` candidates before sampling."""
    if chunk < 2:
        return

    def prepare(executor, model, noise_shape, *args, **kwargs):
        return executor(model, [chunk * noise_shape[0], *noise_shape[1:]], *args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, COUNT, prepare)


def copy_guider(guider, patcher):
    """A copy of the guider that uses `patcher`, another clone of its model."""
    guider = copy.copy(guider)
    guider.model_patcher, guider.model_options = patcher, {**guider.model_options, **patcher.model_options}
    return guider
