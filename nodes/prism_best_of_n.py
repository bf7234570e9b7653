"""PRISM Best-of-N: several seeds started, ranked while they are still noisy, and only the best sampled to the end."""

import copy

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.prism.plan import CONTINUE, RESTART, SIGMAS
from . import prism_board, saved_metadata
from .prism_race import Race, copy_guider, reserve_for
from .prism_score import KEY, parse_sigmas
from .prism_type import Prism, PrismType

TITLE = "PRISM Best-of-N"


def parse_levels(text: str) -> list[float]:
    """Noise levels to prune at, from "0.98, 0.95". Raises ValueError."""
    return parse_sigmas(text, f"{TITLE}, input 'checkpoints'")


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


def run(guider, sampler, sigmas, latent: dict, noises, seeds, prism: Prism, levels, keep: int, finish: str, chunk: int):
    """(samples [keep * B, ...] raw, the Race). Raises ValueError, BackboneError, FeaturesError or PlanError."""
    m = guider.model_patcher.clone()
    m.set_additional_models(KEY, [*m.get_additional_models_with_key(KEY), prism.patcher])
    reserve_for(m, min(chunk, len(seeds)))
    racing = Race(sampler, prism, noises, seeds, levels, keep, finish, chunk)
    samples = copy_guider(guider, m).sample(
        noises[0], latent["samples"], racing, sigmas, denoise_mask=latent.get("noise_mask"), disable_pbar=True, seed=seeds[0]
    )
    return samples.to(comfy.model_management.intermediate_device()), racing


def outputs(cls, latent: dict, samples: torch.Tensor, racing: Race, warning: str | None) -> io.NodeOutput:
    out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    out["samples"] = samples
    if racing.plan.keep > 1:
        # Of one item each in the batch that went in; winners repeat it.
        for key in ("batch_index", "noise_mask"):
            out.pop(key, None)
    last = [list(racing.outcome.board[i].scores.values())[-1:] for i in racing.outcome.winners]
    text, board = prism_board.as_text(racing, warning), prism_board.as_image(racing)
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    saved_metadata.note(cls, prism_board.as_notes(racing))
    scores = [s[0] if s else 0.0 for s in last]
    seeds = [racing.seeds[i] for i in racing.outcome.winners]
    shown = {**ui.PreviewImage(board, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
    return io.NodeOutput(out, scores, seeds, text, board, ui=shown)


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
                "bit for bit the ordinary run, for as many evaluations more. With EasyCache on the model candidates are "
                "drafts under the cache, and a restart samples the winners without it."
            ),
        ),
        io.Int.Input(
            "chunk",
            default=1,
            min=1,
            max=64,
            optional=True,
            tooltip=(
                "How many candidates to evaluate at a time. 1: each is bit for bit what it is alone. More is faster where one "
                "does not fill the GPU, and equal to rounding; it is lowered where memory runs out."
            ),
        ),
    ]


def result_outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="latent", tooltip="The winners as one batch, best first."),
        io.Float.Output(display_name="scores", is_output_list=True, tooltip="Each winner's score at the last checkpoint."),
        io.Int.Output(display_name="seeds", is_output_list=True, tooltip="Each winner's seed, for an ordinary run."),
        io.String.Output(display_name="report", tooltip="The score board: who dropped out when, and what it cost."),
        io.Image.Output(display_name="board", tooltip="The score board as a picture: each candidate as it was last seen."),
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
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, noise, guider, sampler, sigmas, latent_image, head, candidates, keep, checkpoints, finish, chunk=1
    ) -> io.NodeOutput:
        warning = head.require_model(guider.model_patcher)
        latent = fitting(guider.model_patcher, latent_image)
        sources = [seeded(noise, i) for i in range(candidates)]
        noises = [source.generate_noise(latent) for source in sources]
        seeds = [source.seed for source in sources]
        levels = parse_levels(checkpoints)
        samples, racing = run(guider, sampler, sigmas, latent, noises, seeds, head, levels, keep, finish, chunk)
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
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, head, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, candidates,
        keep, checkpoints, finish, chunk=1,
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
        samples, racing = run(guider, sampler, settings.sigmas, latent, noises, seeds, head, levels, keep, finish, chunk)
        return outputs(cls, latent, samples, racing, warning)


NODES = [PrismBestOfN, PrismKSampler]
