"""Folding of Wan's zero padding into one token: the same cross-attention up to rounding, at a fraction of the cost.

Wan attends to the zero tokens that pad a text to 512. They are identical, so softmax gives the same result for one zero
token with the logarithm of their number added to its attention logit.
"""

import math

import torch
from torch import Tensor

# Tokens that Wan pads texts to.
LENGTH = 512


def fold_padding(words: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Texts [L_i, D] -> (text [B, max L + 1, D], zero-padded; bias [B, 1, 1, max L + 1]; mask bool [B, max L + 1]).

    bias: to be added to cross-attention logits; mask: True at words. Texts longer than LENGTH tokens are truncated.
    """
    words = [w[:LENGTH] for w in words]
    longest = max(len(w) for w in words)
    text = torch.zeros(len(words), longest + 1, words[0].shape[1], dtype=words[0].dtype, device=words[0].device)
    bias = torch.full((len(words), 1, 1, longest + 1), -math.inf, device=text.device)
    for i, w in enumerate(words):
        text[i, : len(w)] = w
        bias[i, ..., : len(w)] = 0.0
        if len(w) < LENGTH:
            bias[i, ..., -1] = math.log(LENGTH - len(w))
    mask = torch.arange(longest + 1, device=text.device) < torch.tensor([[len(w)] for w in words], device=text.device)
    return text, bias, mask


def use_bias(dit: torch.nn.Module, bias: Tensor | None) -> None:
    """Makes `dit`, a diffusers WanTransformer3DModel, add `bias` to its cross-attention logits; None restores the default."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class FoldedPadding(WanAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return super().__call__(attn, hidden_states, encoder_hidden_states, bias.to(hidden_states.dtype), rotary_emb)

    processor = WanAttnProcessor() if bias is None else FoldedPadding()
    for block in dit.blocks:
        block.attn2.set_processor(processor)
