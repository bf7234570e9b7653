"""Attention of learned queries over projected tokens, computed without projecting the tokens.

Between the norms and the softmax everything is linear, so the query goes to the tokens instead of the tokens to the query:
with x the normalised token, its logit is (W_k W x) . q = x . (W^T W_k^T q), and the attended value is W_v W (sum of a x).
That costs 2 heads * queries products a token instead of 3 * dim, a hundredth at full size, and no keys or values in memory.
`naive.query_attention` is the plain formula.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens that are normalised at a time, so that fp32 copies stay small for long clips.
CHUNK = 4096


def query_attention(head, features: list[Tensor], mask: Tensor) -> Tensor:
    """Equals `naive.query_attention`: [B, queries, dim], fp32, differentiable.

    features: the taps' tokens and the text's, [B, N_i, backbone_dim] each; mask: bool [B, sum of N_i].
    """
    heads, dim = head.config.heads, head.config.dim
    w, b, wk, bk, wv, bv = (_fp32(p, features[0]) for m in (head.project, head.to_k, head.to_v) for p in (m.weight, m.bias))
    query = _fp32(head.query, features[0])
    q = F.linear(query, _fp32(head.to_q.weight, query), _fp32(head.to_q.bias, query))
    q = q.view(-1, heads, dim // heads).transpose(0, 1) / math.sqrt(dim // heads)
    # [heads, queries, dim]: the query in the space of unprojected tokens, and the logit that is equal for all tokens.
    key = q @ wk.view(heads, dim // heads, dim)
    constant = (key @ b + (q @ bk.view(heads, -1, 1))[..., 0]).flatten()
    key = (key @ w).flatten(0, 1)
    affine = [(_fp32(n.weight, query), _fp32(n.bias, query)) for n in head.norms]
    logits = torch.cat(
        [
            F.linear(_normalise(part, norm), key * g, key @ shift + constant)
            for x, norm, (g, shift) in zip(features, head.norms, affine, strict=True)
            for part in x.split(CHUNK, dim=1)
        ],
        dim=1,
    )
    weight = logits.masked_fill(~mask[..., None], -math.inf).softmax(dim=1)
    attended = _weighted_sum(features, head.norms, affine, weight)
    # The weights sum to one, so the biases are added once.
    projected = F.linear(attended, w, b).view(len(mask), heads, -1, dim)
    value = torch.einsum("bhqc,hdc->bqhd", projected, wv.view(heads, dim // heads, dim)).flatten(2) + bv
    return query + F.linear(value, _fp32(head.to_out.weight, query), _fp32(head.to_out.bias, query))


def masked_mean(head, features: list[Tensor], mask: Tensor) -> Tensor:
    """Equals `naive.masked_mean`: [B, 1, dim], fp32; the mean is projected instead of the tokens."""
    weight = mask.float()[..., None]
    weight = weight / weight.sum(dim=1, keepdim=True)
    affine = [(_fp32(n.weight, weight), _fp32(n.bias, weight)) for n in head.norms]
    mean = _weighted_sum(features, head.norms, affine, weight)
    return F.linear(mean, _fp32(head.project.weight, mean), _fp32(head.project.bias, mean))


def _weighted_sum(features: list[Tensor], norms, affine, weight: Tensor) -> Tensor:
    """Sum of the normalised tokens by weights [B, M, K]: [B, K, backbone_dim]."""
    total, start = 0.0, 0
    for x, norm, (g, shift) in zip(features, norms, affine, strict=True):
        for part in x.split(CHUNK, dim=1):
            w = weight[:, start : start + part.shape[1]].transpose(1, 2)
            total = total + (w @ _normalise(part, norm)) * g + w.sum(dim=-1, keepdim=True) * shift
            start += part.shape[1]
    return total


def _normalise(x: Tensor, norm) -> Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), eps=norm.eps)


def _fp32(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device, torch.float32)
