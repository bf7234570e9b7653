"""Early Best-of-N (PRISM, arXiv 2606.20310) as a SAMPLER, which runs another sampler for several seeds."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..kernels.prism import race
from ..kernels.prism.plan import Plan, make_plan
from . import step_cache, wan_features
from .latent_thumbnail import thumbnail
from .prism_type import Prism

COUNT = "intrinsic_reward_count"


@dataclass(frozen=True)
class GuiderCall:
    """The arguments of a sampler's call to its guider. uncached: evaluate without a step cache."""

    x: torch.Tensor
    timestep: torch.Tensor
    options: dict
    seed: int | None
    uncached: bool

    @property
    def sigma(self) -> float:
        return float(self.timestep[0])


@dataclass(frozen=True)
class Candidates:
    """noises: one [B, C, T, H, W] per candidate; seeds: one per candidate."""

    noises: list[torch.Tensor]
    seeds: list[int]


@dataclass(frozen=True)
class RaceSettings:
    """sigmas: noise levels at which candidates are dropped, the node's input `checkpoints`; keep: number of winners.

    finish: CONTINUE or RESTART of kernels.prism.plan; chunk: how many candidates are evaluated in one batch.
    """

    sigmas: list[float]
    keep: int
    finish: str
    chunk: int


class GuiderProxy:
    """Replaces the guider in a candidate's sampler and passes its calls to the race."""

    def __init__(self, guider, ask: race.Ask, uncached: bool):
        self._guider, self._ask, self._uncached = guider, ask, uncached

    def __getattr__(self, name):
        return getattr(self._guider, name)

    def __call__(self, x, timestep, model_options=None, seed=None):
        return self._ask(GuiderCall(x, timestep, model_options or {}, seed, self._uncached))


class GuiderNetwork:
    """Evaluates the calls of candidates with a guider, and scores them.

    guider: while it samples, with its model loaded; plan: gives the network's depth and the tap.
    evaluations, blocks: forwards and transformer blocks that really ran, counted per candidate.
    """

    def __init__(self, guider, head: torch.nn.Module, plan: Plan, progress):
        self.guider, self.head, self.plan, self.progress = guider, head, plan, progress
        self.evaluations, self.blocks, self.rows = 0, 0, 0
        # Stays lowered after an out-of-memory error.
        self.max_batch = math.inf

    def count(self, executor, x, *args, **kwargs):
        """A wrapper of the diffusion model, which counts the batch rows that a forward really ran for."""
        self.rows += x.shape[0]
        return executor(x, *args, **kwargs)

    def evaluate(self, calls: Sequence[GuiderCall], features: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """As race.Network. After an out-of-memory error, this and all later batches are halved."""
        if len(calls) > self.max_batch:
            half = -(-len(calls) // 2)
            return [*self.evaluate(calls[:half], features[:half]), *self.evaluate(calls[half:], features[half:])]
        try:
            return self._evaluate(calls, features)
        except Exception as e:
            if len(calls) == 1 or not comfy.model_management.is_oom(e):
                raise
            self.max_batch = len(calls) // 2
        logging.warning("PRISM Best-of-N: out of memory at %d candidates per batch, now %d", len(calls), self.max_batch)
        return self.evaluate(calls, features)

    def _evaluate(self, calls, features) -> list[torch.Tensor]:
        first = calls[0]
        options = step_cache.without(first.options) if first.uncached else first.options
        known = [f for f in features if f is not None]
        if known:
            options = wan_features.resume_from(options, torch.cat(known), self.plan.tap)
        guider, own = self.guider, self.guider.model_options
        before = self.rows
        try:
            if first.uncached:
                guider.model_options = step_cache.without(own)
            out = guider(
                torch.cat([c.x for c in calls]), torch.cat([c.timestep for c in calls]), model_options=options, seed=first.seed
            )
        finally:
            guider.model_options = own
        passes = (self.rows - before) // first.x.shape[0]
        self.evaluations += passes
        self.blocks += passes * self.plan.depth - (len(known) * (self.plan.tap + 1) if passes else 0)
        self.progress(self.blocks)
        return list(out.split([len(c.x) for c in calls]))

    @torch.no_grad()
    def score(self, calls: Sequence[GuiderCall]) -> list[tuple[float, torch.Tensor]]:
        """As race.Network: (mean over a candidate's batch and the head's dimensions, its tokens after the last tap)."""
        out = []
        # Not in a batch: this is a partial forward of the positive conditioning only.
        for call in calls:
            options, inner = step_cache.without(call.options), self.guider.inner_model
            f = wan_features.read(inner, self.guider.conds["positive"], call.x, call.timestep, options, self.head.config.taps)
            device = next(self.head.parameters()).device
            visual = [v.to(device) for v in f.visual]
            scores = self.head(visual, f.text.to(device), f.mask.to(device), call.timestep.to(device))
            self.blocks += self.plan.tap + 1
            self.progress(self.blocks)
            # Stored off the GPU: the tokens of one candidate take 96 MiB at 832x480x81 with the 1.3B model.
            out.append((float(scores.float().mean()), f.visual[-1].to(comfy.model_management.intermediate_device())))
        return out


class Race(comfy.samplers.Sampler):
    """A SAMPLER that runs the candidates of a plan with another sampler and returns the winners as one batch.

    After sampling, plan, outcome, network and thumbnails (candidate -> uint8 [h, w, 3]) hold the results.
    """

    def __init__(self, sampler, prism: Prism, candidates: Candidates, settings: RaceSettings):
        self.sampler, self.prism, self.candidates, self.settings = sampler, prism, candidates, settings
        self.plan: Plan | None = None
        self.outcome: race.RaceResult | None = None
        self.network: GuiderNetwork | None = None
        self.thumbnails: dict[int, torch.Tensor] = {}

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        head, inner = self.prism.loaded.head, model_wrap.inner_model
        self.plan = make_plan(
            sigmas.tolist(), len(self.candidates.seeds), self.settings.keep, self.settings.sigmas,
            passes=passes_of(model_wrap), depth=len(inner.diffusion_model.blocks), tap=max(head.config.taps),
            finish=self.settings.finish,
        )  # fmt: skip
        total = self.plan.cost.blocks
        bar = comfy.utils.ProgressBar(total)
        self.network = GuiderNetwork(model_wrap, head, self.plan, lambda done: bar.update_absolute(min(done, total), total))
        previewer = latent_preview.get_previewer(model_wrap.model_patcher.load_device, inner.latent_format)
        # The latest x0 of each candidate; the best one is shown as the preview.
        best, latest = 0, {}
        cached = step_cache.is_used(extra_args["model_options"])

        def run_candidate(i: int, ask, uncached: bool):
            def on_step(step, x0, x, steps):
                latest[i] = x0
                if previewer and i == best:
                    done = min(self.network.blocks, total)
                    bar.update_absolute(done, total, previewer.decode_latent_to_preview_image("JPEG", x0))

            own = {**extra_args, "seed": self.candidates.seeds[i]}
            if cached:
                own["model_options"] = step_cache.with_fresh_state(own["model_options"], inner.model_sampling)
            start = self.candidates.noises[i].to(noise)
            # uni_pc writes into its schedule.
            return self.sampler.sample(
                GuiderProxy(model_wrap, ask, uncached), sigmas.clone(), own, on_step, start, latent_image, denoise_mask, True
            )

        def draw_thumbnails(racing: Sequence[int]) -> None:
            for i in [i for i in latest if i not in racing]:
                self.thumbnails[i] = thumbnail(latest.pop(i), inner.latent_format)

        def on_rank(order: Sequence[int]) -> None:
            nonlocal best
            best = order[0]
            draw_thumbnails(order)

        # Added last and so called inside a step cache: skipped evaluations are not counted.
        add_wrapper_with_key(
            WrappersMP.DIFFUSION_MODEL, COUNT, self.network.count, extra_args["model_options"], is_model_options=True
        )
        self.outcome = race.run(
            self.plan,
            lambda i, ask: run_candidate(i, ask, False),
            self.network,
            lambda i, ask: run_candidate(i, ask, True),
            on_rank,
            # A step cache skips or runs a whole batch, and has one state.
            1 if cached else self.settings.chunk,
        )
        draw_thumbnails(())
        return torch.cat(self.outcome.results)


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
