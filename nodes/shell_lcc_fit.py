"""Fit a Shell-LCC manifold (arXiv 2606.30248) in the graph: k-means anchors, closed-form coder, on the CPU."""

import logging
from datetime import datetime, timezone

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from server import PromptServer

from ..kernels import held_out as held_out_groups
from ..kernels.files.latents import digest
from ..kernels.latent_space import KNOWN, LatentSpace
from ..kernels.shell_lcc.calibration import calibrate
from ..kernels.shell_lcc.evaluation import draw_tokens, evaluate, held_out_split, quotas, score, split_frames
from ..kernels.shell_lcc.fit_anchors import fit_anchors
from ..kernels.shell_lcc.manifold import ShellManifold
from ..kernels.version import CREATED_BY
from .latents import AUTO, SOURCES, choose_space, normalised_warning, read_raw
from .shell_lcc_type import ShellLCCType, for_wire

# With a smaller AUROC (real against blurred or noisy tokens) a manifold is hardly useful.
WEAK_AUROC = 0.6

Clips = list[tuple[str, torch.Tensor]]


def normalised_clips(latents: list[dict], choice: str) -> tuple[LatentSpace, Clips, list[str], list[str]]:
    """(space, normalised clips [C, T, h, w] fp32 by id, the file of each, warnings) of a list of LATENT batches.

    A clip that is of no known file has its own id in the file's place.
    """
    space = choose_space(latents[0]["samples"].shape[1], choice, "Fit Shell-LCC, input 'latents'")
    clips, files, warnings = [], [], []
    for number, latent in enumerate(latents, start=1):
        source = f"Fit Shell-LCC, input 'latents', batch {number}"
        raw = read_raw(latent, space, source).float().cpu()
        if warning := normalised_warning(raw, space, source):
            warnings.append(warning)
        names = [f"{number}.{item}" for item in range(1, len(raw) + 1)]
        clips += zip(names, space.normalise(raw), strict=True)
        known = latent.get(SOURCES, ())
        files += known if len(known) == len(raw) else names
    return space, clips, files, warnings


def split(clips: Clips, files: list[str], share: float, seed: int) -> tuple[Clips, Clips, str]:
    """(clips to fit on, held-out clips, a description of the held-out part).

    files: the file of each clip. Clips of one file and equal clips are on one side. Where all clips are of one file only equal
    ones are, and where all are equal the first is split in time.
    """
    equal = [[digest(z)] for _, z in clips]
    groups = held_out_groups.linked_names(files, equal)
    if len(set(groups)) == 1:
        groups = [clips[first][0] for first in held_out_groups.linked(equal)]
    if len(set(groups)) == 1:
        name, z = clips[0]
        fit, held = split_frames(z)
        return [(name, fit)], [(name, held)], f"the last {held.shape[1]} of {z.shape[1]} latent frames of the only clip"
    fit, held = held_out_split(groups, share, seed)
    return [clips[i] for i in fit], [clips[i] for i in held], f"{len(held)} of {len(clips)} clips"


def describe(manifold: ShellManifold, tokens: int, held_out: str) -> str:
    """A text on the fit and its held-out metrics."""
    figures = manifold.metrics
    distance, codebook = figures["distance"], figures["codebook"]
    blurred, noisy = figures["auroc_clean_over_blurred"], figures["auroc_noisy_over_clean"]
    error = figures["reconstruction"]["relative"]
    low, high = manifold.band
    lines = [
        f"{codebook['bases']} anchors in latent space '{manifold.space.id}', fitted on {tokens} tokens; held out: {held_out}",
        f"Held-out distance: median {distance['median']:.3f}, radius {manifold.radius:.3f}, band {low:.3f} to {high:.3f}",
        f"Skeleton error {100 * error:.1f} % of the variance; {codebook['dead']} anchors unused",
        f"Tells real from blurred {blurred:.2f}, noisy from real {noisy:.2f} (1 is always, 0.5 is chance)",
    ]
    if min(blurred, noisy) < WEAK_AUROC:
        lines.append("Weak: give more, longer and more varied clips of good quality, or another number of anchors")
    return "\n".join(lines)


class FitShellLCC(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_FitShellLCC",
            display_name="Fit Shell-LCC",
            category="model/training",
            description=(
                "Fits a Shell-LCC manifold on latents of real video: anchors by k-means, the shell's thickness in "
                "closed form, radius and band on clips that were held out. Runs on the CPU and takes seconds to "
                "minutes. Needs faiss-cpu."
            ),
            search_aliases=["shell lcc", "fit manifold", "train manifold", "intrinsic reward", "calibrate"],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input(
                    "latents",
                    tooltip=(
                        "Latents of good real clips (raw, as VAE Encode gives them): a batch, or a list of batches of "
                        "different sizes. A few dozen varied clips are a start."
                    ),
                ),
                io.Int.Input(
                    "anchors",
                    default=1024,
                    min=64,
                    max=65536,
                    step=64,
                    tooltip=(
                        "Points that the manifold is spanned by. More follow the data closer and need more clips and "
                        "time."
                    ),
                ),
                io.Int.Input(
                    "neighbours",
                    default=16,
                    min=1,
                    max=64,
                    tooltip="Nearest anchors that code a token. Fewer make a thinner manifold that is stricter on detail.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0x7FFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides which clips are held out, which tokens are drawn and where k-means starts.",
                ),
                io.Float.Input(
                    "held_out",
                    default=0.2,
                    min=0.01,
                    max=0.9,
                    step=0.01,
                    tooltip=(
                        "Share of the clips kept out of the fit, to measure radius, band and quality on; at least one. "
                        "With a single clip its last latent frames are held out, which flatters the figures."
                    ),
                ),
                io.Combo.Input(
                    "latent_space",
                    options=[AUTO, *KNOWN],
                    default=AUTO,
                    tooltip="The VAE that the latents come from. auto: 16 channels are wan21, 48 are wan22.",
                ),
                io.Float.Input(
                    "locality",
                    default=0.2,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Penalty on distant anchors when a token is coded. Larger makes the skeleton smoother.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=1000000,
                    min=1024,
                    max=100000000,
                    advanced=True,
                    tooltip=(
                        "Tokens to fit on at most, drawn evenly from the clips. A token is one position of one latent "
                        "frame."
                    ),
                ),
            ],
            outputs=[
                ShellLCCType.Output(display_name="manifold", tooltip="The fitted, calibrated manifold; save it to keep it."),
                io.String.Output(
                    display_name="report", tooltip="What was fitted and how well it tells real from damaged video."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, latents, anchors, neighbours, seed, held_out, latent_space, locality, max_tokens
    ) -> io.NodeOutput:
        # Every input is a list here; widgets have one value.
        anchors, neighbours, seed, held_out = anchors[0], neighbours[0], seed[0], held_out[0]
        with torch.inference_mode(False):
            space, clips, files, warnings = normalised_clips(latents, latent_space[0])
            fit, held, how = split(clips, files, held_out, seed)
            counts = quotas([z[0].numel() for _, z in fit], max_tokens[0])
            tokens = torch.cat([draw_tokens(name, z, n, seed) for (name, z), n in zip(fit, counts, strict=True)])

            # Scoring a held-out clip and measuring it in three variants takes about four passes over its tokens.
            rest = 4 * sum(z[0].numel() for _, z in held)
            bar = comfy.utils.ProgressBar(len(tokens) + rest)

            def advance(done):
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(done)

            coder = fit_anchors(
                tokens, anchors, neighbours, locality[0], seed, lambda share: advance(round(share * len(tokens)))
            )
            manifold = ShellManifold(coder, space, name="fitted here")
            maps = []
            for _, z in held:
                maps.append(score(manifold, z))
                advance(bar.current + z[0].numel())
            manifold.calibration = calibrate(maps)
            per_clip = 3 * rest // (4 * len(held))
            manifold.metrics = evaluate(manifold, held, seed=seed, on_clip=lambda _: advance(bar.current + per_clip))
            manifold.provenance = {
                "created_by": CREATED_BY,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": "Fit Shell-LCC node",
                "seed": seed,
                "clips": len(clips),
                "tokens": len(tokens),
                "held_out": how,
            }
            for warning in warnings:
                logging.warning(warning)
            text = "\n".join([*warnings, describe(manifold, len(tokens), how)])
            PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
            return io.NodeOutput(for_wire(manifold), text)


NODES = [FitShellLCC]
