"""Early Best-of-N (PRISM, arXiv 2606.20310): rank several seeds while they are noisy, finish only the best."""

import copy

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.prism.plan import CONTINUE, RESTART, SIGMAS
from . import prism_board, saved_metadata
from .prism_race import Candidates, Race, RaceSettings, copy_guider, reserve_memory
from .prism_score import KEY, parse_sigmas
from .prism_type import Prism, PrismType

TITLE = "PRISM Best-of-N"


def parse_checkpoints(text: str) -> list[float]:
    """Sigmas of the checkpoints, from a text such as "0.98, 0.95". Raises ValueError."""
    return parse_sigmas(text, f"{TITLE}, input 'checkpoints'")


def seed_of_candidate(seed: int, index: int) -> int:
    """seed + index; 0 follows the largest seed, 2^64 - 1."""
    return (seed + index) % (1 << 64)


def noise_of_candidate(noise, index: int):
    """A NOISE with the candidate's seed. Raises ValueError for noise without a seed."""
    if index == 0:
        return noise
    if not hasattr(noise, "seed") or type(noise).__name__ == "Noise_EmptyNoise":
        raise ValueError(f"{TITLE}, input 'noise': found noise without a seed: all candidates would be equal; use RandomNoise")
    other = copy.copy(noise)
    other.seed = seed_of_candidate(noise.seed, index)
    return other


def fix_channels(model, latent: dict) -> dict:
    """The LATENT; if it is empty, with the model's channel count, as in core's samplers."""
    return {**latent, "samples": comfy.sample.fix_empty_latent_channels(model, latent["samples"])}


def run(guider, sampler, sigmas, latent: dict, prism: Prism, candidates: Candidates, settings: RaceSettings):
    """(raw samples [keep * B, C, T, H, W], the Race). sigmas: the schedule.

    Raises ValueError, BackboneError, FeaturesError or PlanError.
    """
    m = guider.model_patcher.clone()
    m.set_additional_models(KEY, [*m.get_additional_models_with_key(KEY), prism.patcher])
    reserve_memory(m, min(settings.chunk, len(candidates.seeds)))
    racing = Race(sampler, prism, candidates, settings)
    samples = copy_guider(guider, m).sample(
        candidates.noises[0], latent["samples"], racing, sigmas, denoise_mask=latent.get("noise_mask"), disable_pbar=True,
        seed=candidates.seeds[0],
    )  # fmt: skip
    return samples.to(comfy.model_management.intermediate_device()), racing


def outputs(cls, latent: dict, samples: torch.Tensor, racing: Race, warning: str | None) -> io.NodeOutput:
    if racing.outcome is None:
        return _unchanged(cls, latent, samples, racing, warning)
    out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    out["samples"] = samples
    if racing.plan.keep > 1:
        # These have one entry per item of the input batch, which the output repeats for every winner.
        for key in ("batch_index", "noise_mask"):
            out.pop(key, None)
    last = [list(racing.outcome.board[i].scores.values())[-1:] for i in racing.outcome.winners]
    text, board = prism_board.as_text(racing, warning), prism_board.as_image(racing)
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    saved_metadata.add(cls, prism_board.as_metadata(racing))
    scores = [s[0] if s else 0.0 for s in last]
    seeds = [racing.candidates.seeds[i] for i in racing.outcome.winners]
    shown = {**ui.PreviewImage(board, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
    return io.NodeOutput(out, scores, seeds, text, board, ui=shown)


def _unchanged(cls, latent: dict, samples: torch.Tensor, racing: Race, warning: str | None) -> io.NodeOutput:
    """The output for a schedule without steps (denoise 0, or empty sigmas), for which ComfyUI returns the latent as it is."""
    keep, seeds = racing.settings.keep, racing.candidates.seeds
    if keep > len(seeds):
        raise ValueError(f"{TITLE}, input 'keep': {keep} of {len(seeds)} candidates; lower keep, or start more candidates")
    text = "No steps to sample (denoise 0, or an empty schedule): the latent is unchanged, no candidate was scored"
    text = text if warning is None else f"{warning}\n{text}"
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    out = {**latent, "samples": torch.cat([samples] * keep)}
    if keep > 1:
        for key in ("batch_index", "noise_mask"):
            out.pop(key, None)
    board = torch.zeros(1, 64, 64, 3)
    return io.NodeOutput(out, [0.0] * keep, seeds[:keep], text, board, ui=ui.PreviewText(text))


def plan_inputs() -> list[io.Input]:
    """candidates, keep, checkpoints and finish."""
    return [
        io.Int.Input(
            "candidates",
            default=8,
            min=1,
            max=1024,
            tooltip="Number of seeds to start: seed, seed + 1, and so on, each as in an ordinary run.",
        ),
        io.Int.Input("keep", default=1, min=1, max=64, tooltip="Number of winners to sample to the end, best first."),
        io.String.Input(
            "checkpoints",
            default=", ".join(f"{s:g}" for s in SIGMAS),
            tooltip=(
                "Sigmas at which the worse half is dropped. Sigmas, not steps, mean the same under any scheduler, shift "
                "and number of steps."
            ),
        ),
        io.Combo.Input(
            "finish",
            options=[CONTINUE, RESTART],
            default=CONTINUE,
            tooltip=(
                "continue: winners continue from the last checkpoint. restart: they are sampled again from their seeds, "
                "bit for bit the ordinary run, at the cost of a full run each. With EasyCache on the model, candidates "
                "are drafts sampled with the cache, and restart samples the winners without it."
            ),
        ),
        io.Int.Input(
            "chunk",
            default=1,
            min=1,
            max=64,
            optional=True,
            tooltip=(
                "Candidates per batch. 1: each is bit for bit its ordinary run. More is faster if one candidate does not "
                "fill the GPU, and differs by rounding only; it is lowered automatically when memory runs out."
            ),
        ),
    ]


def result_outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="latent", tooltip="The winners as one batch, best first."),
        io.Float.Output(display_name="scores", is_output_list=True, tooltip="Each winner's score at the last checkpoint."),
        io.Int.Output(display_name="seeds", is_output_list=True, tooltip="Each winner's seed, for an ordinary run."),
        io.String.Output(display_name="report", tooltip="Every candidate's scores, when it was dropped, and the cost."),
        io.Image.Output(display_name="board", tooltip="The score board as an image: the last prediction of each candidate."),
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
                "the end. Replaces SamplerCustomAdvanced; with one candidate it gives exactly the same latent."
            ),
            search_aliases=["prism", "best of n", "early pruning", "seed search", "intrinsic reward"],
            inputs=[
                io.Noise.Input("noise", tooltip="RandomNoise; candidate i uses its seed + i."),
                io.Guider.Input("guider", tooltip="CFGGuider or BasicGuider on the model that the head was trained on."),
                io.Sampler.Input("sampler", tooltip="Any sampler: candidates keep their history at checkpoints."),
                io.Sigmas.Input("sigmas", tooltip="The noise schedule."),
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
        latent = fix_channels(guider.model_patcher, latent_image)
        sources = [noise_of_candidate(noise, i) for i in range(candidates)]
        started = Candidates([source.generate_noise(latent) for source in sources], [source.seed for source in sources])
        settings = RaceSettings(parse_checkpoints(checkpoints), keep, finish, chunk)
        samples, racing = run(guider, sampler, sigmas, latent, head, started, settings)
        return outputs(cls, latent, samples, racing, warning)


class PrismKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_PrismKSampler",
            display_name="PRISM Best-of-N KSampler",
            category="model/sampling/samplers",
            description=(
                "KSampler for several seeds: all are started, scored with a PRISM head while they are still noisy, and only "
                "the best is sampled to the end. With one candidate it gives exactly KSampler's latent."
            ),
            search_aliases=["prism", "best of n", "ksampler", "early pruning", "seed search", "intrinsic reward"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the head was trained on, with or without LoRAs and guidance."),
                PrismType.Input("head", tooltip="From Load PRISM Head."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of the first candidate; the others use seed + 1, seed + 2, and so on.",
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
                    tooltip="1: from pure noise; less keeps the latent's structure.",
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
        latent = fix_channels(model, latent_image)
        stock = comfy.samplers.KSampler(
            model, steps=steps, device=model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise,
            model_options=model.model_options,
        )  # fmt: skip
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        seeds = [seed_of_candidate(seed, i) for i in range(candidates)]
        noises = [comfy.sample.prepare_noise(latent["samples"], s, latent.get("batch_index")) for s in seeds]
        sampler = comfy.samplers.sampler_object(stock.sampler)
        settings = RaceSettings(parse_checkpoints(checkpoints), keep, finish, chunk)
        samples, racing = run(guider, sampler, stock.sigmas, latent, head, Candidates(noises, seeds), settings)
        return outputs(cls, latent, samples, racing, warning)


NODES = [PrismBestOfN, PrismKSampler]
