"""Hidden states of a Wan model for a noisy latent, by a conditional forward that ends at the last tapped block."""

import math
from dataclasses import dataclass

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..kernels.rewards.reward import RewardError
from . import step_cache

KEY = "intrinsic_reward_features"


class FeaturesError(RewardError):
    """A model, prompt or latent whose hidden states PRISM cannot read; the message gives the reason."""


@dataclass(frozen=True)
class Features:
    """visual: tokens [B, N, width] after each tap; text: embedded [B, L, width]; mask: bool [B, L], True at words."""

    visual: list[torch.Tensor]
    text: torch.Tensor
    mask: torch.Tensor


class _LastTapRead(Exception):
    """Ends a forward after the last tapped block."""


def conditioning_of(guider, name: str) -> list[dict]:
    """The processed conditioning that a sampling guider calls "positive" or "negative". Raises FeaturesError without it."""
    found = guider.conds.get(name)
    if not found:
        names = ", ".join(sorted(k for k, v in guider.conds.items() if v)) or "none"
        raise FeaturesError(f"{type(guider).__name__} has no {name} conditioning (it has: {names}); use CFGGuider")
    return found


def require_readable(model_options: dict) -> None:
    """Raises FeaturesError where the model samples a clip in several windows, which no forward sees as a whole."""
    handler = model_options.get("context_handler")
    if handler is not None:
        raise FeaturesError(
            f"the model samples in several context windows ({type(handler).__name__}), and this reward reads a clip in one "
            "forward; remove the Context Windows node, or use a reward that reads frames"
        )


def active_at(conds: list[dict], sigma: float) -> dict:
    """The one conditioning that is used at this noise level.

    Raises FeaturesError where there is none (prompts with a time range), several, or one for a part of the picture only.
    """
    found = [c for c in conds if c.get("timestep_end", -math.inf) <= sigma <= c.get("timestep_start", math.inf)]
    if not found:
        ranges = ", ".join(f"{c.get('timestep_start', 1.0):.3f} to {c.get('timestep_end', 0.0):.3f}" for c in conds)
        raise FeaturesError(
            f"no prompt is active at sigma {sigma:.3f}: the time ranges of the conditioning are sigma {ranges}; "
            "score at another noise level, or widen the range (ConditioningSetTimestepRange)"
        )
    if len(found) > 1:
        raise FeaturesError(
            f"the reward reads one prompt, found {len(found)} combined ones at sigma {sigma:.3f}; connect a single CLIP Text "
            "Encode"
        )
    if "area" in found[0]:
        raise FeaturesError("the prompt has an area, and the reward reads the whole picture; connect a prompt without one")
    return found[0]


def read(inner_model, positive, x: torch.Tensor, sigma: torch.Tensor, model_options: dict, taps) -> Features:
    """Features of x [B, C, T, H, W] in model space at sigma [B], under the processed conditioning `positive`.

    Patches, LoRAs and wrappers of other nodes in model_options apply, except step caches. Raises FeaturesError.
    """
    require_readable(model_options)
    prompt = active_at(positive, float(sigma[0]))
    options = comfy.model_patcher.create_model_options_clone(step_cache.without(model_options))
    transformer_options = options.setdefault("transformer_options", {})
    blocks = transformer_options.setdefault("patches_replace", {}).setdefault("dit", {})
    visual: dict[int, torch.Tensor] = {}
    text: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []

    def tap(index: int):
        previous = blocks.get(("double_block", index))

        def run(args, extra):
            out = previous(args, extra) if previous is not None else extra["original_block"](args)
            visual[index] = _video_tokens(out["img"], args["transformer_options"])
            text.append(args["txt"])
            if index == max(taps):
                raise _LastTapRead
            return out

        return run

    replacements = {("double_block", index): tap(index) for index in taps}
    blocks.update(replacements)

    def stop_early(executor, x, timestep, context, *args, **kwargs):
        # Wan pads prompts with zeros and attends to the padding; the head ignores it.
        masks.append((context != 0).any(dim=-1))
        if len(masks) > 1:
            raise FeaturesError("another node runs the model several times for one evaluation: PRISM reads one forward")
        try:
            return executor(x, timestep, context, *args, **kwargs)
        except _LastTapRead:
            return x.new_zeros(x.shape[0], executor.class_obj.out_dim, *x.shape[2:])

    comfy.patcher_extension.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, stop_early, options, is_model_options=True)
    comfy.samplers.calc_cond_batch(inner_model, [[prompt]], x, sigma, options)
    if len(visual) != len(taps):
        raise FeaturesError(f"block {max(taps)} did not run: another node replaces the forward, or it is not a Wan model")
    words = masks[0].shape[1]
    # Image-to-video models put an image's tokens before the words.
    return Features([visual[index] for index in taps], text[-1][:, -words:], masks[0])


def _video_tokens(img: torch.Tensor, transformer_options: dict) -> torch.Tensor:
    grid = transformer_options.get("grid_sizes")
    if grid is not None and math.prod(grid) != img.shape[1]:
        raise FeaturesError(
            f"found {img.shape[1]} tokens for a latent of {math.prod(grid)}: reference latents are not supported"
        )
    return img
