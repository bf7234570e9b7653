"""Shell-LCC refinement (arXiv 2606.30248): corrects a finished latent once, before decoding."""

import torch
from comfy_api.latest import io

from ..kernels.shell_lcc.manifold import ShellManifold
from . import timeline
from .latents import read_raw
from .shell_lcc_pull import OUTSIDE_UNIT, method_inputs, pull_settings, shares_by_frame, show_outside, trust_input
from .shell_lcc_type import ShellLCCType, load_to_device


class ShellLCCRefine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_ShellLCCRefine",
            display_name="Shell-LCC Refine",
            category="model/latent/advanced",
            description=(
                "Pulls the tokens of a finished video latent to the manifold's shell once, before decoding. Takes much "
                "less time than a sampling step. The whole latent is corrected: a noise mask is passed on, not "
                "applied."
            ),
            search_aliases=["shell lcc", "latent refine", "intrinsic reward", "sharpen", "latent denoise"],
            inputs=[
                io.Latent.Input("latent", tooltip="A video latent from a sampler or VAE Encode."),
                ShellLCCType.Input("manifold", tooltip="From Load Shell-LCC Manifold or Fit Shell-LCC."),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="0 returns the latent unchanged, 1 pulls all the way to the target, above 1 overshoots.",
                ),
                *method_inputs(),
                trust_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The corrected latent, with all other entries of the input.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, latent, manifold, strength, method, target, radius, trust) -> io.NodeOutput:
        if strength == 0:
            return io.NodeOutput(latent)
        shell = manifold.manifold
        settings = pull_settings(shell, method, target, radius, strength, trust)
        raw = read_raw(latent, shell.space, "Shell-LCC Refine, input 'latent'")
        load_to_device(manifold, raw)
        z = shell.space.normalise(raw.float())
        show_outside(shell, z, "of the latent", "Shell-LCC Refine", cls.hidden.unique_id)
        corrected = shell.pull(z, **settings)
        refined = shell.space.denormalise(corrected)
        return io.NodeOutput({**latent, "samples": refined.to(raw.dtype)}, ui=comparison(shell, z, corrected))


def comparison(shell: ShellManifold, before: torch.Tensor, after: torch.Tensor) -> dict:
    """The node's panel: clips before and after, normalised [B, C, T, h, w], and their tokens outside the band by frame."""
    clips = []
    for i, pair in enumerate(zip(before.split(1), after.split(1), strict=True)):
        if i == timeline.MOST_CLIPS:
            break
        series = [] if shell.calibration is None else [
            timeline.Series(name, range(z.shape[2]), shares_by_frame(shell, shell.distance(z)[0]))
            for name, z in zip(("before", "after"), pair, strict=True)
        ]  # fmt: skip
        pictures = [timeline.pictures(z, shell.space) for z in pair]
        clips.append(timeline.TimelineClip(f"Clip {i + 1}", before.shape[2], series, *pictures))
    return {timeline.PANEL: [timeline.state(clips, OUTSIDE_UNIT)]}


NODES = [ShellLCCRefine]
