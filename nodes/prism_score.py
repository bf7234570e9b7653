"""PRISM Score (arXiv 2606.20310): score an existing latent with a head on the model's own features."""

import math
from dataclasses import asdict, dataclass

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.rewards.prism import PrismReward
from . import saved_metadata
from .guider_view import Scoring, measure_finished
from .latents import read_raw
from .prism_type import Prism, PrismType

KEY = "intrinsic_reward_prism"
SOURCE = "PRISM Score, input 'latent'"
AUTO = "auto"


def parse_sigmas(text: str, source: str = "PRISM Score, input 'sigmas'") -> list[float]:
    """Noise levels from a text such as "0.1, 0.2". Raises ValueError naming `source` unless all are numbers in [0, 1]."""
    parts = text.replace(",", " ").split()
    if not parts:
        raise ValueError(f"{source}: found no number, expected noise levels such as 0.1, 0.2, 0.3")
    try:
        sigmas = [float(p) for p in parts]
    except ValueError:
        raise ValueError(f"{source}: found {text!r}, expected numbers such as 0.1, 0.2, 0.3") from None
    bad = [s for s in sigmas if not 0 <= s <= 1]
    if bad:
        raise ValueError(f"{source}: {bad[0]:g} is no noise level, expected 0 (clean) to 1 (noise)")
    return sigmas


@dataclass(frozen=True)
class ScoreSettings:
    """sigmas: noise levels to score at; draws: noise samples per latent and sigma; seed: of the first noise sample."""

    sigmas: list[float]
    draws: int
    seed: int


class HeadFigures:
    """All scores of a head for a finished clip: what Scoring measures for PRISM Score."""

    def __init__(self, head: torch.nn.Module, settings: ScoreSettings, progress):
        self.head, self.settings, self.progress = head, settings, progress

    def measure(self, view) -> torch.Tensor:
        """[B, draws * sigmas * dimensions]."""
        head, z, found = self.head, view.clean(), []
        device = next(head.parameters()).device
        for draw in range(self.settings.draws):
            noise = comfy.sample.prepare_noise(z[:1].cpu(), self.settings.seed + draw).to(z)
            for sigma in self.settings.sigmas:
                visual, text, mask = view.features(sigma * noise + (1 - sigma) * z, sigma, head.config.taps)
                level = torch.full((len(z),), sigma, device=device)
                found.append(head([v.to(device) for v in visual], text.to(device), mask.to(device), level).float().cpu())
                self.progress(1)
        return torch.cat(found, dim=1)


def measure(model, prism: Prism, positive, raw: torch.Tensor, settings: ScoreSettings) -> torch.Tensor:
    """Scores [draws, sigmas, B, dimensions] of raw latents [B, C, T, H, W]; items of a batch share their noise."""
    m = model.clone()
    m.set_additional_models(KEY, [*m.get_additional_models_with_key(KEY), prism.patcher])
    guider = comfy.samplers.CFGGuider(m)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    shape = (settings.draws, len(settings.sigmas))
    bar = comfy.utils.ProgressBar(math.prod(shape) * len(raw))
    figures = measure_finished(guider, raw, Scoring(HeadFigures(prism.loaded.head, settings, bar.update)))
    return figures.view(len(raw), *shape, -1).permute(1, 2, 0, 3)


def report(prism: Prism, scores: torch.Tensor, sigmas: list[float], warning: str | None) -> str:
    """A few lines on scores [draws, sigmas, B, dimensions]."""
    names = prism.loaded.head.config.dimensions
    info = PrismReward(prism.loaded).info
    lines = [f"PRISM Score, {info.direction}: {info.meaning}."]
    lines += [] if warning is None else [warning]
    low, high = prism.loaded.sigmas
    outside = [s for s in sigmas if not low - 1e-3 <= s <= high + 1e-3]
    if outside:
        lines.append(f"Head '{prism.loaded.name}' was trained on sigma {low:g} to {high:g}; {outside[0]:g} lies outside.")
    mean, spread = scores.mean(dim=(0, 1)), scores.mean(dim=1).std(dim=0, unbiased=False)
    for i, item in enumerate(mean):
        cells = [f"{n} {float(v):.3f} +- {float(s):.3f}" for n, v, s in zip(names, item, spread[i], strict=True)]
        lines.append(f"Clip {i + 1}: {', '.join(cells)}")
        if len(sigmas) > 1:
            by_sigma = scores.mean(dim=0)[:, i].mean(dim=1)
            lines.append("  by sigma: " + ", ".join(f"{s:g}: {float(v):.3f}" for s, v in zip(sigmas, by_sigma, strict=True)))
    if len(mean) > 1:
        lines.append(f"Best: clip {int(mean.mean(dim=1).argmax()) + 1}")
    return "\n".join(lines)


class PrismScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_PrismScore",
            display_name="PRISM Score",
            category="model/latent/advanced",
            description=(
                "Scores video latents with a PRISM head: noise is added, the model runs up to the head's block, and the head "
                "scores its hidden states. Higher is better; only scores of one head, prompt and set of sigmas are comparable."
            ),
            search_aliases=["prism", "reward", "video quality score", "intrinsic reward", "rank latents"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the head was trained on, with or without LoRAs."),
                PrismType.Input("head", tooltip="From Load PRISM Head."),
                io.Conditioning.Input("positive", tooltip="The prompt of the clips, a single one."),
                io.Latent.Input("latent", tooltip="Video latents, one or a batch, from a sampler or VAE Encode."),
                io.String.Input(
                    "sigmas",
                    default=AUTO,
                    tooltip=(
                        "Noise levels to score at, 0 (clean) to 1 (noise), such as 0.1, 0.2. auto: those of 0.1, 0.2 and 0.3 "
                        "that the head was trained on, else its lowest."
                    ),
                ),
                io.Int.Input(
                    "draws",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Noise samples per latent; scores are averaged. More is steadier, and the cost is proportional.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise, which all clips of a batch share.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="Mean over the batch, sigmas, draws and dimensions."),
                io.Float.Output(
                    display_name="clip_scores", is_output_list=True, tooltip="The score of each clip of the batch, as a list."
                ),
                io.String.Output(display_name="report", tooltip="All scores as text, by dimension and by sigma."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, head, positive, latent, sigmas, draws, seed) -> io.NodeOutput:
        levels = PrismReward(head.loaded).finished_sigmas if sigmas.strip().lower() == AUTO else parse_sigmas(sigmas)
        settings = ScoreSettings(list(levels), draws, seed)
        warning = head.require_model(model)
        raw = read_raw(latent, head.loaded.space, SOURCE)
        scores = measure(model, head, positive, raw, settings)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("PRISM Score: scores are NaN or infinite; fp16 may overflow: load the model as bf16 or fp32")
        text = report(head, scores, settings.sigmas, warning)
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        clips = scores.mean(dim=(0, 1, 3))
        found = {"node": "PRISM Score", "head": head.loaded.name, **asdict(settings), "scores": clips.tolist()}
        saved_metadata.add(cls, found)
        return io.NodeOutput(float(clips.mean()), clips.tolist(), text, ui=ui.PreviewText(text))


NODES = [PrismScore]
