"""Reference formulas of the head's attention and of its loss, which tests compare the fast code with."""

import math

import torch
from torch import Tensor


def query_attention(head, features: list[Tensor], mask: Tensor) -> Tensor:
    """Norm, project every token, keys and values of every token, softmax, output, residual: [B, queries, dim].

    features: the taps' tokens and the text's, [B, N_i, backbone_dim] each; mask: bool [B, sum of N_i].
    """
    tokens = project(head, features)
    query, heads = head.query[None].to(tokens), head.config.heads
    q, k, v = head.to_q(query), head.to_k(tokens), head.to_v(tokens)
    outs = []
    for h in range(heads):
        part = slice(h * q.shape[-1] // heads, (h + 1) * q.shape[-1] // heads)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(q.shape[-1] // heads)
        weight = logits.masked_fill(~mask[:, None], -math.inf).softmax(dim=-1)
        outs.append(weight @ v[..., part])
    return query + head.to_out(torch.cat(outs, dim=-1))


def masked_mean(head, features: list[Tensor], mask: Tensor) -> Tensor:
    """Mean of the projected tokens that count: [B, 1, dim]."""
    tokens = project(head, features)
    return torch.stack([t[m].mean(dim=0, keepdim=True) for t, m in zip(tokens, mask, strict=True)])


def project(head, features: list[Tensor]) -> Tensor:
    """[B, sum of N_i, dim]."""
    return head.project(torch.cat([norm(x) for norm, x in zip(head.norms, features, strict=True)], dim=1))


def rao_kupper_probabilities(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """[N, 3] of A better, tie, B better from strengths exp(a), exp(b) [N], as Rao and Kupper (1967) wrote them."""
    p, q = a.double().exp(), b.double().exp()
    win, loss = p / (p + eta * q), q / (q + eta * p)
    tie = (eta**2 - 1) * p * q / ((p + eta * q) * (q + eta * p))
    return torch.stack([win, tie, loss], dim=-1)
