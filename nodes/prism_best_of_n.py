"""The nodes PRISM Best-of-N (arXiv 2606.20310): rank several seeds while they are noisy, finish only the best."""

import copy

import comfy.samplers
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.prism.plan import CONTINUE, RESTART, SIGMAS
from . import race_board, saved_metadata
from .best_of_n import MOST_CANDIDATES, MOST_KEPT, PLANS, TITLE, Settings, search, wrong_plan
from .live_race import PANEL, LiveRace
from .ordinary_run import AdvancedRun, KSamplerRun
from .prism_type import PrismType
from .race_board import Outcome
from .reward_type import RewardType, as_reward, reward_input
from .shell_lcc_type import ShellLCCType


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


def run(cls, stock, head, settings: Settings, vae) -> io.NodeOutput:
    """Searches, shows the race board while it does, and returns the node's outputs."""
    scored_by = as_reward(head)
    watcher = LiveRace(cls.hidden.unique_id, [source.seed for source in stock.sources], scored_by.reward)
    outcome = search(stock, scored_by, settings, vae, watcher)
    return outputs(cls, outcome, watcher)


def outputs(cls, outcome: Outcome, watcher: LiveRace) -> io.NodeOutput:
    out = dict(outcome.latents[0])
    if len(outcome.latents) > 1:
        out["samples"] = torch.cat([latent["samples"] for latent in outcome.latents])
    if len(outcome.winners) > 1:
        # These have one entry per item of the input batch, which the output repeats for every winner.
        for key in ("batch_index", "noise_mask"):
            out.pop(key, None)
    text, board = race_board.as_text(outcome), race_board.as_image(outcome)
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    saved_metadata.add(cls, race_board.as_metadata(outcome))
    # One entry per clip: a candidate is a batch of them.
    clips = out["samples"].shape[0] // len(outcome.winners)
    scores, seeds = [], []
    for i in outcome.winners:
        scored = list(outcome.board[i].clip_scores.values())
        scores += scored[-1] if scored else [0.0] * clips
        seeds += [outcome.seeds[i]] * clips
    # The panel of web/js/race_board.js shows the state; the image is for clients without it.
    shown = {
        **ui.PreviewImage(board, cls=cls).as_dict(), **ui.PreviewText(text).as_dict(),
        PANEL: [watcher.state(outcome.board, outcome.winners, outcome.plan)],
    }  # fmt: skip
    return io.NodeOutput(out, scores, seeds, text, board, ui=shown)


def head_input() -> io.Input:
    """head: the reward. It is named after the only reward of the first version."""
    return reward_input(
        "head",
        "What candidates are ranked by: any reward, such as Model Reward (needs no file), a PRISM head or a mix.",
        types=[PrismType, RewardType, ShellLCCType],
    )


def plan_inputs() -> list[io.Input]:
    """candidates, keep, checkpoints, finish, chunk, plan, finalists, draft_steps and vae."""
    return [
        io.Int.Input(
            "candidates",
            default=8,
            min=1,
            max=MOST_CANDIDATES,
            tooltip="Number of seeds to start: seed, seed + 1, and so on, each as in an ordinary run.",
        ),
        io.Int.Input("keep", default=1, min=1, max=MOST_KEPT, tooltip="Number of winners to sample to the end, best first."),
        io.String.Input(
            "checkpoints",
            default=", ".join(f"{s:g}" for s in SIGMAS),
            tooltip=(
                "Sigmas at which the worse half is dropped, or shares of the steps such as 15 %, 40 %. Sigmas mean the same "
                "under any scheduler, shift and number of steps."
            ),
        ),
        io.Combo.Input(
            "finish",
            options=[CONTINUE, RESTART],
            default=RESTART,
            tooltip=(
                "restart: winners are sampled again from their seeds by the stock sampler: exactly the ordinary run, whatever "
                "patches the model, at the cost of a full run each. continue: they continue from the last checkpoint, which "
                "is cheaper and as exact unless a patch keeps state that ComfyUI nodes cannot see. With EasyCache on the "
                "model, candidates are drafts sampled with the cache, and restart samples the winners without it."
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
        io.Combo.Input(
            "plan",
            options=list(PLANS),
            default=PLANS[0],
            optional=True,
            tooltip=(
                "checkpoints: as the input above says. fast: one round after 15 % of the steps. balanced: rounds after 15 "
                "and 40 %. careful: after 15, 40 and 65 %. drafts: every candidate is sampled to its end with draft_steps, or "
                "under EasyCache, and the best again in full; for rewards of finished clips."
            ),
        ),
        io.Int.Input(
            "finalists",
            default=0,
            min=0,
            max=64,
            optional=True,
            tooltip=(
                "Candidates that are sampled to the end and scored there, from which the winners are chosen. 0: as many as "
                "are kept, not scored again."
            ),
        ),
        io.Int.Input(
            "draft_steps",
            default=6,
            min=0,
            max=10000,
            optional=True,
            tooltip="Steps of a draft, for the plan drafts. 0: all steps, under EasyCache on the model.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="Decodes candidates for rewards that read frames."),
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
                head_input(),
                *plan_inputs(),
            ],
            outputs=result_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, noise, guider, sampler, sigmas, latent_image, head, candidates, keep, checkpoints, finish, chunk=1,
        plan=PLANS[0], finalists=0, draft_steps=6, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        sources = [noise_of_candidate(noise, i) for i in range(candidates)]
        settings = Settings(checkpoints, keep, finish, chunk, plan, finalists, draft_steps)
        stock = AdvancedRun(guider, sampler, sigmas, latent_image, sources)
        return run(cls, stock, head, settings, vae)

    @classmethod
    def validate_inputs(cls, candidates=None, keep=None, checkpoints=None, plan=PLANS[0]):
        return wrong_plan(candidates, keep, checkpoints, plan) or True


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
            search_aliases=["wan", "prism", "best of n", "ksampler", "early pruning", "seed search", "intrinsic reward"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the head was trained on, with or without LoRAs and guidance."),
                head_input(),
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
        keep, checkpoints, finish, chunk=1, plan=PLANS[0], finalists=0, draft_steps=6, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        seeds = [seed_of_candidate(seed, i) for i in range(candidates)]
        arguments = {
            "steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler, "positive": positive,
            "negative": negative, "denoise": denoise,
        }  # fmt: skip
        settings = Settings(checkpoints, keep, finish, chunk, plan, finalists, draft_steps)
        return run(cls, KSamplerRun(model, arguments, latent_image, seeds), head, settings, vae)

    @classmethod
    def validate_inputs(cls, candidates=None, keep=None, checkpoints=None, plan=PLANS[0], steps=None):
        return wrong_plan(candidates, keep, checkpoints, plan, steps) or True


NODES = [PrismBestOfN, PrismKSampler]
