"""PRISM Best-of-N: several seeds started, ranked while they are still noisy, and only the best sampled to the end."""

import copy
import math

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.prism import race
from ..kernels.prism.plan import CONTINUE, RESTART, SIGMAS, Plan, make_plan
from . import wan_features
from .prism_score import KEY, parse_sigmas
from .prism_type import Prism, PrismType

TITLE = "PRISM Best-of-N"
# Step caches keep one run's past in the model's options: candidates that take turns would be served each other's.
CACHES = ("easycache", "lazycache")


def parse_levels(text: str) -> list[float]:
    """Noise levels to prune at, from "0.98, 0.95". Raises ValueError."""
    return parse_sigmas(text, f"{TITLE}, input 'checkpoints'")


class Race(comfy.samplers.Sampler):
    """A SAMPLER that runs the candidates of a plan with another sampler and returns the winners as one batch.

    noises: one [B, C, T, H, W] a candidate; seeds: theirs. `outcome` and `spent` tell afterwards what happened.
    """

    def __init__(self, sampler, prism: Prism, noises, seeds, levels, keep: int, finish: str):
        self.sampler, self.prism, self.noises, self.seeds = sampler, prism, noises, seeds
        self.levels, self.keep, self.finish = levels, keep, finish
        self.plan: Plan | None = None
        self.outcome: race.Outcome | None = None
        self.spent = 0.0
        self.evaluations = 0

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        head = self.prism.loaded.head
        net = model_wrap.inner_model.diffusion_model
        passes = passes_of(model_wrap)
        self.plan = make_plan(
            sigmas.tolist(), len(self.seeds), self.keep, self.levels, passes=passes, depth=len(net.blocks),
            tap=max(head.config.taps), finish=self.finish,
        )  # fmt: skip
        bar = comfy.utils.ProgressBar(self.plan.cost.blocks)
        previewer = latent_preview.get_previewer(model_wrap.model_patcher.load_device, model_wrap.inner_model.latent_format)
        leader = [0]

        def go(i: int, guider):
            def watch(step, x0, x, total):
                picture = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer and i == leader[0] else None
                bar.update_absolute(round(self.spent), self.plan.cost.blocks, picture)

            own = {**extra_args, "seed": self.seeds[i]}
            start = self.noises[i].to(noise)
            # uni_pc writes into the schedule that it is given.
            return self.sampler.sample(guider, sigmas.clone(), own, watch, start, latent_image, denoise_mask, True)

        def lead(order):
            leader[0] = order[0]

        self.outcome = race.run(
            self.plan,
            lambda i, stop: go(i, Scored(model_wrap, self, stop)),
            lambda i: go(i, Scored(model_wrap, self, None)),
            lead,
        )
        return torch.cat(self.outcome.results)

    @torch.no_grad()
    def score(self, guider, x, timestep, model_options) -> tuple[float, torch.Tensor]:
        """A candidate's score, mean over its batch and the head's dimensions, and its tokens after the last tap."""
        head = self.prism.loaded.head
        f = wan_features.read(guider.inner_model, guider.conds["positive"], x, timestep, model_options, head.config.taps)
        device = next(head.parameters()).device
        scores = head([v.to(device) for v in f.visual], f.text.to(device), f.mask.to(device), timestep.to(device))
        self.spent += self.plan.tap + 1
        return float(scores.float().mean()), f.visual[-1]


class Scored:
    """Stands in for a guider: counts what is evaluated, and stops at checkpoints with a score."""

    def __init__(self, guider, owner: Race, stop):
        self._guider, self._owner, self._stop = guider, owner, stop
        self._pending = list(owner.plan.checkpoints) if stop is not None else []

    def __getattr__(self, name):
        return getattr(self._guider, name)

    def __call__(self, x, timestep, model_options=None, seed=None):
        options, owner = model_options or {}, self._owner
        plan = owner.plan
        blocks = plan.passes * plan.depth
        if self._pending and float(timestep[0]) <= self._pending[0].sigma + 1e-6:
            self._pending.pop(0)
            score, tokens = owner.score(self._guider, x, timestep, options)
            self._stop(score)
            options = wan_features.go_on_from(options, tokens, plan.tap)
            blocks -= plan.tap + 1
        out = self._guider(x, timestep, model_options=options, seed=seed)
        owner.spent += blocks
        owner.evaluations += plan.passes
        return out


def passes_of(guider) -> int:
    """Forwards of a candidate and step: one without classifier-free guidance."""
    conds = sum(1 for c in guider.conds.values() if c)
    if conds < 2:
        return 1
    both = guider.model_options.get("disable_cfg1_optimization", False)
    return 1 if math.isclose(getattr(guider, "cfg", 0.0), 1.0) and not both else conds


def seeded(noise, index: int):
    """The NOISE of candidate `index`: that of the seed + index. Raises ValueError for noise that has no seed."""
    if index == 0:
        return noise
    if not hasattr(noise, "seed") or type(noise).__name__ == "Noise_EmptyNoise":
        raise ValueError(f"{TITLE}, input 'noise': found noise without a seed, so candidates would be alike; use RandomNoise")
    other = copy.copy(noise)
    other.seed = noise.seed + index
    return other


def fitting(model, latent: dict) -> dict:
    """The LATENT with an empty one's channels made the model's, as stock samplers do."""
    return {**latent, "samples": comfy.sample.fix_empty_latent_channels(model, latent["samples"])}


def run(guider, sampler, sigmas, latent: dict, noises, seeds, prism: Prism, levels, keep: int, finish: str):
    """(samples [keep * B, ...] raw, the Race). Raises ValueError, BackboneError, FeaturesError or PlanError."""
    used = guider.model_options.get("transformer_options", {})
    found = [c for c in CACHES if c in used]
    if found:
        raise ValueError(f"{TITLE}: the model carries {found[0]}, whose memory candidates would share; connect it without")
    m = guider.model_patcher.clone()
    m.set_additional_models(KEY, [*m.get_additional_models_with_key(KEY), prism.patcher])
    guider = copy.copy(guider)
    guider.model_patcher, guider.model_options = m, {**guider.model_options, **m.model_options}
    racing = Race(sampler, prism, noises, seeds, levels, keep, finish)
    image = latent["samples"]
    samples = guider.sample(
        noises[0], image, racing, sigmas, denoise_mask=latent.get("noise_mask"), disable_pbar=True, seed=seeds[0]
    )
    return samples.to(comfy.model_management.intermediate_device()), racing


def report(racing: Race, warning: str | None) -> str:
    """The score board and the cost, in words."""
    plan, lines = racing.plan, [] if warning is None else [warning]
    full = plan.full_cost
    winners = ", ".join(str(racing.seeds[i]) for i in racing.outcome.winners)
    lines.append(f"Best of {plan.candidates}: seed {winners}")
    lines.append(
        f"{racing.evaluations} evaluations, {round(racing.spent)} blocks: "
        f"{100 * racing.spent / full.blocks:.1f} % of plain Best-of-{plan.candidates} ({full.blocks})"
    )
    for point in plan.checkpoints:
        lines.append(f"Step {point.step} (sigma {point.sigma:.3f}): {point.survivors} stay")
    for s in racing.outcome.board:
        scores = ", ".join(f"{v:.3f}" for v in s.scores.values())
        state = "kept" if s.dropped is None else f"dropped at step {s.dropped}"
        lines.append(f"  seed {racing.seeds[s.index]}: {scores or 'not scored'}; {state}")
    return "\n".join(lines)


def outputs(cls, latent: dict, samples: torch.Tensor, racing: Race, warning: str | None) -> io.NodeOutput:
    out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    out["samples"] = samples
    if racing.plan.keep > 1:
        # Of one item each in the batch that went in; winners repeat it.
        for key in ("batch_index", "noise_mask"):
            out.pop(key, None)
    last = [list(racing.outcome.board[i].scores.values())[-1:] for i in racing.outcome.winners]
    text = report(racing, warning)
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    scores = [s[0] if s else 0.0 for s in last]
    seeds = [racing.seeds[i] for i in racing.outcome.winners]
    return io.NodeOutput(out, scores, seeds, text, ui=ui.PreviewText(text))


def plan_inputs() -> list[io.Input]:
    """candidates, keep, checkpoints and finish."""
    return [
        io.Int.Input(
            "candidates",
            default=8,
            min=1,
            max=1024,
            tooltip="How many seeds to start: the seed, the seed + 1, and so on, each as in an ordinary run.",
        ),
        io.Int.Input("keep", default=1, min=1, max=64, tooltip="How many winners to sample to the end, best first."),
        io.String.Input(
            "checkpoints",
            default=", ".join(f"{s:g}" for s in SIGMAS),
            tooltip=(
                "Noise levels at which the worse half drops out. Levels and not steps: they mean the same under any "
                "scheduler, shift and number of steps."
            ),
        ),
        io.Combo.Input(
            "finish",
            options=[CONTINUE, RESTART],
            default=CONTINUE,
            tooltip=(
                "continue: winners go on from the last checkpoint. restart: they are sampled again from their seeds, "
                "bit for bit the ordinary run, for as many evaluations more."
            ),
        ),
    ]


def result_outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="latent", tooltip="The winners as one batch, best first."),
        io.Float.Output(display_name="scores", is_output_list=True, tooltip="Each winner's score at the last checkpoint."),
        io.Int.Output(display_name="seeds", is_output_list=True, tooltip="Each winner's seed, for an ordinary run."),
        io.String.Output(display_name="report", tooltip="The score board: who dropped out when, and what it cost."),
    ]


class PrismBestOfN(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_PrismBestOfN",
            display_name="PRISM Best-of-N",
            category="model/sampling/samplers",
            description=(
                "Starts several seeds, scores them with a PRISM head while they are still noisy, and samples only the best to "
                "the end. Takes the place of SamplerCustomAdvanced; with one candidate it gives the very same latent."
            ),
            search_aliases=["prism", "best of n", "early pruning", "seed search", "intrinsic reward"],
            inputs=[
                io.Noise.Input("noise", tooltip="RandomNoise; candidate i has its seed + i."),
                io.Guider.Input("guider", tooltip="CFGGuider or BasicGuider on the model that the head was trained on."),
                io.Sampler.Input("sampler", tooltip="Any sampler: candidates keep their history at checkpoints."),
                io.Sigmas.Input("sigmas", tooltip="The schedule."),
                io.Latent.Input("latent_image", tooltip="An empty video latent, or one to start from."),
                PrismType.Input("head", tooltip="From Load PRISM Head."),
                *plan_inputs(),
            ],
            outputs=result_outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, noise, guider, sampler, sigmas, latent_image, head, candidates, keep, checkpoints, finish
    ) -> io.NodeOutput:
        warning = head.require_model(guider.model_patcher)
        latent = fitting(guider.model_patcher, latent_image)
        sources = [seeded(noise, i) for i in range(candidates)]
        noises = [source.generate_noise(latent) for source in sources]
        seeds = [source.seed for source in sources]
        samples, racing = run(guider, sampler, sigmas, latent, noises, seeds, head, parse_levels(checkpoints), keep, finish)
        return outputs(cls, latent, samples, racing, warning)


class PrismKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_PrismKSampler",
            display_name="PRISM Best-of-N KSampler",
            category="model/sampling/samplers",
            description=(
                "KSampler with a race of seeds: several are started, scored with a PRISM head while they are still noisy, and "
                "only the best is sampled to the end. With one candidate it gives KSampler's very latent."
            ),
            search_aliases=["prism", "best of n", "ksampler", "early pruning", "seed search", "intrinsic reward"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the head was trained on, with or without LoRAs and guidance."),
                PrismType.Input("head", tooltip="From Load PRISM Head."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Of the first candidate; the others follow, one by one.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg", default=6.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Classifier-free guidance scale."
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="uni_pc",
                    tooltip="Any sampler: candidates keep their history at checkpoints.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="The noise schedule."
                ),
                io.Conditioning.Input("positive", tooltip="The prompt, a single one."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="An empty video latent, or one to start from."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="1 from pure noise; less keeps the latent's structure.",
                ),
                *plan_inputs(),
            ],
            outputs=result_outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, head, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, candidates,
        keep, checkpoints, finish,
    ) -> io.NodeOutput:  # fmt: skip
        warning = head.require_model(model)
        latent = fitting(model, latent_image)
        settings = comfy.samplers.KSampler(
            model, steps=steps, device=model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise,
            model_options=model.model_options,
        )  # fmt: skip
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        seeds = [seed + i for i in range(candidates)]
        noises = [comfy.sample.prepare_noise(latent["samples"], s, latent.get("batch_index")) for s in seeds]
        sampler = comfy.samplers.sampler_object(settings.sampler)
        levels = parse_levels(checkpoints)
        samples, racing = run(guider, sampler, settings.sigmas, latent, noises, seeds, head, levels, keep, finish)
        return outputs(cls, latent, samples, racing, warning)


NODES = [PrismBestOfN, PrismKSampler]
