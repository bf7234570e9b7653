"""A race of candidates inside ComfyUI: a SAMPLER that runs another one for several seeds, with one network for all."""

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
    """What a sampler calls its guider with. whole: without a step cache."""

    x: torch.Tensor
    timestep: torch.Tensor
    options: dict
    seed: int | None
    whole: bool

    @property
    def sigma(self) -> float:
        return float(self.timestep[0])


class Asking:
    """Stands in for a guider in a candidate's sampler: hands its calls to the race."""

    def __init__(self, guider, ask: race.Ask, whole: bool):
        self._guider, self._ask, self._whole = guider, ask, whole

    def __getattr__(self, name):
        return getattr(self._guider, name)

    def __call__(self, x, timestep, model_options=None, seed=None):
        return self._ask(GuiderCall(x, timestep, model_options or {}, seed, self._whole))


class GuiderNetwork:
    """Answers candidates' calls with a guider, and scores them. evaluations, blocks: of one candidate each, as they ran.

    guider: at work, its model loaded; plan: for the network's depth and the tap.
    """

    def __init__(self, guider, head: torch.nn.Module, plan: Plan, progress):
        self.guider, self.head, self.plan, self.progress = guider, head, plan, progress
        self.evaluations, self.blocks, self.rows = 0, 0, 0
        # Lowered for good once memory has run out.
        self.most = math.inf

    def count(self, executor, x, *args, **kwargs):
        """A wrapper of the network: the rows of a batch that a forward is really run for."""
        self.rows += x.shape[0]
        return executor(x, *args, **kwargs)

    def evaluate(self, calls: Sequence[GuiderCall], features: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """As race.Network; in halves, and from then on in smaller parts, where memory runs out."""
        if len(calls) > self.most:
            half = -(-len(calls) // 2)
            return [*self.evaluate(calls[:half], features[:half]), *self.evaluate(calls[half:], features[half:])]
        try:
            return self._evaluate(calls, features)
        except Exception as e:
            if len(calls) == 1 or not comfy.model_management.is_oom(e):
                raise
            self.most = len(calls) // 2
        logging.warning("PRISM Best-of-N: out of memory with %d candidates at a time, going on with %d", len(calls), self.most)
        return self.evaluate(calls, features)

    def _evaluate(self, calls, features) -> list[torch.Tensor]:
        first = calls[0]
        options = step_cache.without(first.options) if first.whole else first.options
        known = [f for f in features if f is not None]
        if known:
            options = wan_features.go_on_from(options, torch.cat(known), self.plan.tap)
        guider, own = self.guider, self.guider.model_options
        before = self.rows
        try:
            if first.whole:
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
        """As race.Network: the mean over a candidate's batch and the head's dimensions, and its tokens after the last tap."""
        out = []
        # One by one: this is a part of a forward, and it has no classifier-free guidance that could share it.
        for call in calls:
            options, inner = step_cache.without(call.options), self.guider.inner_model
            f = wan_features.read(inner, self.guider.conds["positive"], call.x, call.timestep, options, self.head.config.taps)
            device = next(self.head.parameters()).device
            visual = [v.to(device) for v in f.visual]
            scores = self.head(visual, f.text.to(device), f.mask.to(device), call.timestep.to(device))
            self.blocks += self.plan.tap + 1
            self.progress(self.blocks)
            # As many as there are candidates would crowd the GPU: 96 MiB each at 832x480x81 with the 1.3B model.
            out.append((float(scores.float().mean()), f.visual[-1].to(comfy.model_management.intermediate_device())))
        return out


class Race(comfy.samplers.Sampler):
    """A SAMPLER that runs the candidates of a plan with another sampler and returns the winners as one batch.

    noises: one [B, C, T, H, W] a candidate; seeds: theirs; chunk: how many are evaluated together. plan, outcome, network
    and thumbnails (candidate -> uint8 [h, w, 3]) tell afterwards what happened.
    """

    def __init__(self, sampler, prism: Prism, noises, seeds, levels, keep: int, finish: str, chunk: int):
        self.sampler, self.prism, self.noises, self.seeds = sampler, prism, noises, seeds
        self.levels, self.keep, self.finish, self.chunk = levels, keep, finish, chunk
        self.plan: Plan | None = None
        self.outcome: race.RaceResult | None = None
        self.network: GuiderNetwork | None = None
        self.thumbnails: dict[int, torch.Tensor] = {}

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        head, inner = self.prism.loaded.head, model_wrap.inner_model
        self.plan = make_plan(
            sigmas.tolist(), len(self.seeds), self.keep, self.levels, passes=passes_of(model_wrap),
            depth=len(inner.diffusion_model.blocks), tap=max(head.config.taps), finish=self.finish,
        )  # fmt: skip
        total = self.plan.cost.blocks
        bar = comfy.utils.ProgressBar(total)
        self.network = GuiderNetwork(model_wrap, head, self.plan, lambda done: bar.update_absolute(min(done, total), total))
        previewer = latent_preview.get_previewer(model_wrap.model_patcher.load_device, inner.latent_format)
        leader, seen = [0], {}
        cached = step_cache.is_used(extra_args["model_options"])

        def go(i: int, ask, whole: bool):
            def watch(step, x0, x, steps):
                seen[i] = x0
                if previewer and i == leader[0]:
                    done = min(self.network.blocks, total)
                    bar.update_absolute(done, total, previewer.decode_latent_to_preview_image("JPEG", x0))

            own = {**extra_args, "seed": self.seeds[i]}
            if cached:
                own["model_options"] = step_cache.with_memory_of_its_own(own["model_options"], inner.model_sampling)
            start = self.noises[i].to(noise)
            # uni_pc writes into the schedule that it is given.
            return self.sampler.sample(
                Asking(model_wrap, ask, whole), sigmas.clone(), own, watch, start, latent_image, denoise_mask, True
            )

        def keep_pictures(racing: Sequence[int]) -> None:
            for i in [i for i in seen if i not in racing]:
                self.thumbnails[i] = thumbnail(seen.pop(i), inner.latent_format)

        def lead(order):
            leader[0] = order[0]
            keep_pictures(order)

        # Last of the wrappers, so inside of a step cache: what is skipped is not counted.
        add_wrapper_with_key(
            WrappersMP.DIFFUSION_MODEL, COUNT, self.network.count, extra_args["model_options"], is_model_options=True
        )
        self.outcome = race.run(
            self.plan,
            lambda i, ask: go(i, ask, False),
            self.network,
            lambda i, ask: go(i, ask, True),
            lead,
            # A step cache decides for a whole batch whether to skip, and remembers one.
            1 if cached else self.chunk,
        )
        keep_pictures(())
        return torch.cat(self.outcome.results)


def passes_of(guider) -> int:
    """Forwards of a candidate and step: one without classifier-free guidance."""
    conds = sum(1 for c in guider.conds.values() if c)
    if conds < 2:
        return 1
    both = guider.model_options.get("disable_cfg1_optimization", False)
    return 1 if math.isclose(getattr(guider, "cfg", 0.0), 1.0) and not both else conds


def reserve_for(patcher, chunk: int) -> None:
    """Makes ComfyUI reckon with a batch of `chunk` candidates when it makes room for sampling."""
    if chunk < 2:
        return

    def room(executor, model, noise_shape, *args, **kwargs):
        return executor(model, [chunk * noise_shape[0], *noise_shape[1:]], *args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, COUNT, room)


def copy_guider(guider, patcher):
    """The guider on another clone of its model."""
    guider = copy.copy(guider)
    guider.model_patcher, guider.model_options = patcher, {**guider.model_options, **patcher.model_options}
    return guider
