"""Prompts through a CLIP, once, so that it need not stay in memory while a model trains."""

from collections.abc import Iterable

import comfy.model_management
import torch


def embed(clip, prompts: Iterable[str], source: str) -> tuple[dict[str, torch.Tensor], int]:
    """({prompt: words [L, width], fp32, on the CPU, without padding}, length that prompts are padded to by zeros).

    The CLIP is moved off the GPU afterwards. Raises ValueError, naming `source`, where an embedding is not finite.
    """
    words, longest = {}, 0
    for prompt in dict.fromkeys(prompts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found = clip.encode_from_tokens(clip.tokenize(prompt))
        # A copy made outside the executor's inference mode can take part in autograd.
        text = found.detach().to("cpu", torch.float32, copy=True)[0].clone()
        if not bool(text.isfinite().all()):
            raise ValueError(f"{source}: the embedding of '{prompt[:60]}' has NaN or infinite values; load the CLIP in fp32")
        used = (text != 0).any(dim=-1).nonzero()
        words[prompt] = text[: int(used[-1]) + 1].clone() if len(used) else text[:1].clone()
        longest = max(longest, len(text))
    comfy.model_management.free_memory(1e30, clip.patcher.load_device)
    return words, longest
