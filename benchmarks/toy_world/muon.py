"""Muon (Jordan et al. 2024): momentum whose update is replaced by the nearest orthogonal matrix, for weight matrices.

On the toy world's VAE it needed about a third of AdamW's steps.
"""

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions; convolutions count as matrices [out, in * kernel].

    learning_rate: norm of an update's rows, about 0.02 for a fresh network; beta: momentum, Nesterov's.
    """

    def __init__(self, parameters, learning_rate: float = 0.02, beta: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": learning_rate, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                update = orthogonal(p.grad.lerp(momentum, group["beta"]).flatten(1))
                # Tall matrices get larger updates, so that the change of outputs does not depend on the shape.
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def orthogonal(m: Tensor) -> Tensor:
    """[R, C] -> approximately the nearest (semi-)orthogonal matrix: singular values of 0.7 to 1.2 after five Newton-Schulz
    steps."""
    tall = m.shape[0] > m.shape[1]
    x = m.T if tall else m
    x = x / (x.norm() + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x
