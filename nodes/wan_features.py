"""Hidden states of a Wan model for a noisy latent, by a conditional forward that ends at the last tapped block."""

import math
from dataclasses import dataclass

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

KEY = "intrinsic_reward_features"
# ComfyUI's label in cond_or_uncond for batch rows of the first conditioning.
POSITIVE = 0


class FeaturesError(ValueError):
    """A model, prompt or latent whose hidden states PRISM cannot read; the message gives the reason."""


@dataclass(frozen=True)
class Features:
    """visual: tokens [B, N, width] after each tap; text: embedded [B, L, width]; mask: bool [B, L], True at words."""

    visual: list[torch.Tensor]
    text: torch.Tensor
    mask: torch.Tensor


class _LastTapRead(Exception):
    """Ends a forward after the last tapped block."""


def read(inner_model, positive, x: torch.Tensor, sigma: torch.Tensor, model_options: dict, taps) -> Features:
    """Features of x [B, C, T, H, W] in model space at sigma [B], under the processed conditioning `positive`.

    Patches, LoRAs and wrappers of other nodes in model_options apply. Raises FeaturesError.
    """
    if len(positive) != 1:
        raise FeaturesError(f"PRISM reads one prompt, found {len(positive)} combined ones; connect a single CLIP Text Encode")
    options = comfy.model_patcher.create_model_options_clone(model_options)
    transformer_options = options.setdefault("transformer_options", {})
    blocks = transformer_options.setdefault("patches_replace", {}).setdefault("dit", {})
    seen: dict = {"visual": {}}

    def tap(index: int):
        previous = blocks.get(("double_block", index))

        def run(args, extra):
            out = previous(args, extra) if previous is not None else extra["original_block"](args)
            seen["visual"][index] = _video_tokens(out["img"], args["transformer_options"])
            seen["text"] = args["txt"]
            if index == max(taps):
                raise _LastTapRead
            return out

        return run

    replacements = {("double_block", index): tap(index) for index in taps}
    blocks.update(replacements)

    def stop_early(executor, x, timestep, context, *args, **kwargs):
        # Wan pads prompts with zeros and attends to the padding; the head ignores it.
        seen["mask"] = (context != 0).any(dim=-1)
        try:
            return executor(x, timestep, context, *args, **kwargs)
        except _LastTapRead:
            return x.new_zeros(x.shape[0], executor.class_obj.out_dim, *x.shape[2:])

    comfy.patcher_extension.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, stop_early, options, is_model_options=True)
    comfy.samplers.calc_cond_batch(inner_model, [positive], x, sigma, options)
    if len(seen["visual"]) != len(taps):
        raise FeaturesError(f"block {max(taps)} did not run: another node replaces the forward, or it is not a Wan model")
    words = seen["mask"].shape[1]
    # Image-to-video models put an image's tokens before the words.
    return Features([seen["visual"][index] for index in taps], seen["text"][:, -words:], seen["mask"])


def resume_from(model_options: dict, tokens: torch.Tensor, tap: int) -> dict:
    """Options for a forward whose conditional rows skip blocks 0 to `tap` and start from `tokens`, found by `read`.

    tokens: [B, N, width], the output of block `tap` for the same x, sigma and prompt. Rows of other prompts run all blocks.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    blocks = options.setdefault("transformer_options", {}).setdefault("patches_replace", {}).setdefault("dit", {})

    def skip(index: int):
        previous = blocks.get(("double_block", index))

        def run(args, extra):
            labels = args["transformer_options"]["cond_or_uncond"]
            size = args["img"].shape[0] // len(labels)
            known = torch.tensor(labels, device=args["img"].device).repeat_interleave(size) == POSITIVE
            img = args["img"].clone()
            if not bool(known.all()):
                part = {**args, **{k: args[k][~known] for k in ("img", "txt", "vec")}}
                out = previous(part, extra) if previous is not None else extra["original_block"](part)
                img[~known] = out["img"]
            if index == tap:
                img[known] = tokens.to(img)
            return {"img": img}

        return run

    blocks.update({("double_block", index): skip(index) for index in range(tap + 1)})
    return options


def _video_tokens(img: torch.Tensor, transformer_options: dict) -> torch.Tensor:
    grid = transformer_options.get("grid_sizes")
    if grid is not None and math.prod(grid) != img.shape[1]:
        raise FeaturesError(
            f"found {img.shape[1]} tokens for a latent of {math.prod(grid)}: reference latents are not supported"
        )
    return img
