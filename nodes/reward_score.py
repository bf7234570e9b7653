"""Reward Score and Flow Residual Score: score finished latents by a reward."""

from dataclasses import dataclass

import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.latent_space import from_comfy
from ..kernels.rewards.flow_residual import FlowResidual
from ..kernels.rewards.reward import FINISHED, Reward
from ..kernels.rewards.schedule import at
from . import saved_metadata
from .best_of_n import with_patchers
from .guider_view import Scoring, measure_finished
from .latents import read_raw
from .reward_type import ScoredBy, as_reward, reward_input
from .rewards import RESIDUAL, draw_inputs, model_reward


@dataclass(frozen=True)
class Scored:
    """figures, scores: [B], as the reward's description and with higher better; blocks: run per clip."""

    figures: torch.Tensor
    scores: torch.Tensor
    blocks: int


def score(model, scored_by: ScoredBy, positive, negative, raw: torch.Tensor, vae=None) -> Scored:
    """Scores raw latents [B, C, T, H, W] under a prompt. negative: None for rewards that need none. Raises RewardError."""
    guider = comfy.samplers.CFGGuider(with_patchers(model.clone(), scored_by))
    guider.set_conds(positive, positive if negative is None else negative)
    if negative is None:
        guider.original_conds.pop("negative")
    reward = at(scored_by.reward, FINISHED)
    scoring = Scoring(reward, vae, comfy.utils.ProgressBar(len(raw)).update)
    figures = measure_finished(guider, raw, scoring)
    return Scored(figures[:, 0], reward.scores(figures), scoring.blocks // len(raw))


def report(reward: Reward, found: Scored, title: str, warning: str | None) -> str:
    """What the figures mean, the figure of every clip, and the best."""
    info = at(reward, FINISHED).info
    lines = [f"{title}, {info.direction}: {info.meaning}."]
    lines += [] if info.typical is None else [f"Good clips have {info.typical[0]:g} to {info.typical[1]:g}."]
    lines += [] if warning is None else [warning]
    # The figures of a mix have no meaning without the other clips.
    shown = found.figures if not hasattr(reward, "parts") else found.scores
    lines += [f"Clip {i}: {float(v):.4g}" for i, v in enumerate(shown, 1)]
    if len(shown) > 1:
        # Clips that cannot be judged share the lowest score.
        best = (found.scores == found.scores.max()).nonzero()[:, 0].tolist()
        names = ", ".join(str(i + 1) for i in best)
        lines.append(f"Best: clip {names}" if len(best) == 1 else f"Equal best: clips {names}")
    lines.append(f"{found.blocks} transformer blocks per clip")
    return "\n".join(lines)


def outputs(cls, title: str, scored_by: ScoredBy, found: Scored, warning: str | None) -> io.NodeOutput:
    if not bool(torch.isfinite(found.scores).all()):
        raise ValueError(f"{title}: scores are NaN or infinite; fp16 may overflow: load the model as bf16 or fp32")
    text = report(scored_by.reward, found, title, warning)
    PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
    plain = {"node": title, "reward": scored_by.reward.info.name, "scores": found.scores.tolist()}
    saved_metadata.add(cls, plain)
    return io.NodeOutput(float(found.scores.mean()), found.scores.tolist(), text, ui=ui.PreviewText(text))


def score_outputs() -> list[io.Output]:
    return [
        io.Float.Output(display_name="score", tooltip="Mean over the clips; higher is better."),
        io.Float.Output(
            display_name="clip_scores", is_output_list=True,
            tooltip="The score of each clip as a list, for Select Top-K; higher is better, so minus the figure of a residual.",
        ),
        io.String.Output(display_name="report", tooltip="What the figures mean, and the figure of each clip."),
    ]  # fmt: skip


class RewardScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_RewardScore",
            display_name="Reward Score",
            category="model/latent/advanced",
            description="Scores finished video latents by any reward: of the model, a PRISM head, geometry, or a mix of them.",
            search_aliases=["score", "rank", "aesthetic", "rank latents", "reward", "video quality", "intrinsic reward"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the clips were made with, with its LoRAs."),
                reward_input("reward", "A reward, a PRISM head or a Shell-LCC manifold."),
                io.Conditioning.Input("positive", tooltip="The prompt of the clips, a single one."),
                io.Latent.Input("latent", tooltip="Video latents, one or a batch, from a sampler or VAE Encode."),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt, for the prompt gap."),
                io.Vae.Input("vae", optional=True, tooltip="For rewards that read decoded frames."),
            ],
            outputs=score_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, reward, positive, latent, negative=None, vae=None) -> io.NodeOutput:
        title, scored_by = "Reward Score", as_reward(reward)
        warning = scored_by.require_model(model)
        raw = read_raw(latent, from_comfy(model.get_model_object("latent_format")), f"{title}, input 'latent'")
        return outputs(cls, title, scored_by, score(model, scored_by, positive, negative, raw, vae), warning)


class FlowResidualScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_FlowResidualScore",
            display_name="Flow Residual Score",
            category="model/latent/advanced",
            description=(
                "Scores finished video latents by how well the model's own velocity explains them (Proprio). Needs no "
                "training, no file and no decoder. Drops bad clips; it does not tell the best from a good one."
            ),
            search_aliases=["flow residual", "proprio", "training free", "reward", "rank latents", "intrinsic reward"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the clips were made with, with its LoRAs."),
                io.Conditioning.Input("positive", tooltip="The prompt of the clips, a single one."),
                io.Latent.Input("latent", tooltip="Video latents of one prompt and size, from a sampler or VAE Encode."),
                *draw_inputs(),
            ],
            outputs=score_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, positive, latent, draws, draw_seed, sigmas, motion) -> io.NodeOutput:
        title = "Flow Residual Score"
        reward: FlowResidual = model_reward(RESIDUAL, draws, draw_seed, sigmas, motion, title)
        raw = read_raw(latent, from_comfy(model.get_model_object("latent_format")), f"{title}, input 'latent'")
        found = score(model, ScoredBy(reward), positive, None, raw)
        return outputs(cls, title, ScoredBy(reward), found, None)


NODES = [RewardScore, FlowResidualScore]
