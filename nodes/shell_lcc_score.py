"""Shell-LCC Score (arXiv 2606.30248): distance of a latent's tokens to the manifold, with report and heat map."""

import logging

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.colours import heat_map_colour
from ..kernels.shell_lcc.calibration import BAND
from ..kernels.shell_lcc.heat_map import heat_map, position
from ..kernels.shell_lcc.manifold import ShellManifold
from . import sprite_sheet, timeline
from .latents import normalised_warning, read_raw
from .shell_lcc_pull import outside_report
from .shell_lcc_type import ShellLCCType, load_to_device

LATENT_FRAMES, VIDEO_FRAMES = "latent frames", "video frames"
NO_PERCENTILE = -1.0
SOURCE = "Shell-LCC Score, input 'latent'"


def measure(manifold: ShellManifold, z: torch.Tensor) -> torch.Tensor:
    """Distances [B, T, H, W] of normalised latents, one item of the batch at a time. Raises ValueError unless all are finite.
    """
    maps = []
    for item in z.split(1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        maps.append(manifold.distance(item))
    distance = torch.cat(maps)
    if not bool(distance.isfinite().all()):
        raise ValueError(
            f"Shell-LCC Score: manifold '{manifold.name}' gives distances that are NaN or infinite; fit it again, or check "
            "the latent"
        )
    return distance


def meaning(manifold: ShellManifold) -> str:
    """What the scores mean, in words."""
    return (
        f"Distance from the latents of real video; near {manifold.radius:.3f} is best: lower is smoother than real clips, "
        "higher is noisier or broken."
    )


def report(manifold: ShellManifold, distance: torch.Tensor) -> str:
    """A text on distances [B, T, H, W]: the manifold, and the scores of every item and frame."""
    lines = [f"Manifold '{manifold.name}' ({manifold.space.id}), radius {manifold.radius:.3f}"]
    if manifold.calibration is None:
        lines[0] += "; not calibrated, so there are no percentiles"
    else:
        low, high = manifold.band
        lines[0] += f", band {low:.3f} to {high:.3f} (90 % of real tokens)"
    for index, item in enumerate(distance):
        line = f"Clip {index + 1}: score {float(item.mean()):.3f}"
        if manifold.calibration is not None:
            smooth, noisy = (100 * float(share.float().mean()) for share in (item < low, item > high))
            percentile = 100 * float(manifold.frame_percentile(item.mean()))
            line += f", percentile {percentile:.0f}; tokens smoother than the band {smooth:.1f} %, noisier {noisy:.1f} %"
        lines.append(line)
        lines.append("  frames: " + " ".join(f"{float(frame.mean()):.3f}" for frame in item))
    return "\n".join(lines)


def panel(manifold: ShellManifold, z: torch.Tensor, distance: torch.Tensor) -> dict:
    """The node's timeline of latents z [B, C, T, H, W] and their distances [B, T, H, W]: distance by latent frame."""
    clips = []
    for i, (item, d) in enumerate(zip(z.split(1)[: timeline.MOST_CLIPS], distance, strict=False)):
        # One pixel a token: the browser enlarges.
        heat = sprite_sheet.as_bytes(heat_map_colour(position(manifold, d)))
        series = [timeline.Series("distance", range(len(d)), d.mean(dim=(1, 2)).tolist())]
        clips.append(timeline.TimelineClip(f"Clip {i + 1}: {float(d.mean()):.3f}", len(d), series,
                                           timeline.pictures(item, manifold.space), heat))  # fmt: skip
    low, high = BAND
    typical = None
    if manifold.calibration is not None:
        quantiles = manifold.calibration.frame_quantiles
        typical = tuple(float(quantiles[round(q * (len(quantiles) - 1))]) for q in (low, high))
    legend = timeline.Legend("smoother than real video", "noisier", diverging=True)
    return timeline.state(clips, "distance to the manifold", legend, ("clip", "distances"), typical)


class ShellLCCScore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_ShellLCCScore",
            display_name="Shell-LCC Score",
            category="model/latent/advanced",
            description=(
                "Measures how far a video latent lies from the latents of real video. A score near the manifold's "
                "radius is what real clips have; lower means over-smoothed, higher means noisy or broken. The heat map "
                "shows where: blue is smoother than real video, red noisier, dark ordinary."
            ),
            search_aliases=["shell lcc", "latent score", "intrinsic reward", "video quality", "heat map", "manifold distance"],
            inputs=[
                io.Latent.Input("latent", tooltip="A video latent from a sampler or VAE Encode (raw, not normalised)."),
                ShellLCCType.Input("manifold", tooltip="From Load Shell-LCC Manifold or Fit Shell-LCC."),
                io.Combo.Input(
                    "frames",
                    options=[LATENT_FRAMES, VIDEO_FRAMES],
                    default=LATENT_FRAMES,
                    tooltip=(
                        "Images of the heat map. latent frames: one for each frame of the latent. video frames: as "
                        "many as the decoded clip has, at its size, to blend with it."
                    ),
                ),
            ],
            outputs=[
                io.Float.Output(display_name="score", tooltip="Mean distance of all tokens of the batch."),
                io.Float.Output(
                    display_name="percentile",
                    tooltip=(
                        "Share (0 to 100) of held-out real frames with a smaller score; -1 when the manifold is not "
                        "calibrated."
                    ),
                ),
                io.Float.Output(
                    display_name="clip_scores", is_output_list=True, tooltip="The score of each clip of the batch, as a list."
                ),
                io.Float.Output(
                    display_name="frame_scores",
                    is_output_list=True,
                    tooltip="The score of each latent frame, clip after clip, as a list.",
                ),
                io.Image.Output(
                    display_name="heat_map", tooltip="Blue: smoother than real video, red: noisier, dark: ordinary."
                ),
                io.String.Output(display_name="report", tooltip="All results as text."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent, manifold, frames) -> io.NodeOutput:
        shell = manifold.manifold
        raw = read_raw(latent, shell.space, SOURCE)
        load_to_device(manifold, raw)
        z = shell.space.normalise(raw.float())
        distance = measure(shell, z)
        score = distance.mean()
        percentile = NO_PERCENTILE if shell.calibration is None else 100 * float(shell.frame_percentile(score))
        text = report(shell, distance)
        text = f"{meaning(shell)}\n{text}"
        if shell.calibration is not None:
            outside, far = outside_report(shell, distance, "of the latent")
            if far:
                logging.warning("Shell-LCC Score: %s", outside)
                text = f"{text}\n{outside}"
        warning = normalised_warning(raw, shell.space, SOURCE)
        if warning is not None:
            logging.warning(warning)
            text = f"{warning}\n{text}"
        PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
        heat = heat_map(shell, distance, frames == VIDEO_FRAMES)
        return io.NodeOutput(
            float(score),
            percentile,
            distance.mean(dim=(1, 2, 3)).tolist(),
            distance.mean(dim=(2, 3)).flatten().tolist(),
            heat.to(comfy.model_management.intermediate_device()),
            text,
            ui={**ui.PreviewText(text).as_dict(), timeline.PANEL: [panel(shell, z, distance)]},
        )


NODES = [ShellLCCScore]
