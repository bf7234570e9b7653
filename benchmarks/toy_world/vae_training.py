"""Shared by train_vae and train_decoder: loss, optimisers, learning rates, PSNR, and a training loop that can be resumed."""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.mini_vae import decode

from .clips import as_video
from .muon import Muon
from .weights import write_torch

FIRST_FRAME_WEIGHT = 4.0


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """2 MSE + 0.3 L1 + 0.3 L1 of spatial differences, with a higher weight on the first frame. y, x: [B, 3, T, H, W]."""
    weight = torch.ones(x.shape[2])
    # The first frame is decoded without past frames and is reconstructed worse otherwise.
    weight[0] = FIRST_FRAME_WEIGHT
    weight = (weight / weight.mean()).view(1, 1, -1, 1, 1)
    e = y - x
    edges = (e.diff(dim=-1).abs() * weight).mean() + (e.diff(dim=-2).abs() * weight).mean()
    return (weight * (2 * e.square() + 0.3 * e.abs())).mean() + 0.3 * edges


def schedule(step: int, steps: int) -> float:
    """Learning rate factor: warm-up over 20 steps, cosine decay to a hundredth."""
    return min(1.0, (step + 1) / 20) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def make_optimisers(vae, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions, AdamW for other weights; parameter groups hold their peak learning rate as "peak"."""
    outer = ("conv_in", "conv_out", "quant_conv")
    trained = [(n, p) for n, p in vae.named_parameters() if p.requires_grad]
    inner = [p for n, p in trained if n.endswith("weight") and not any(o in n for o in outer)]
    ids = {id(p) for p in inner}
    rest = [p for _, p in trained if id(p) not in ids]
    optimisers = [Muon(inner, learning_rate), torch.optim.AdamW(rest, lr=0.1 * learning_rate, betas=(0.9, 0.98))]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


@torch.no_grad()
def psnr_per_frame(vae, frames: Tensor) -> Tensor:
    """PSNR in dB [17] of each frame over clips uint8 [N, 17, 3, H, W], decoded from the posterior's mean."""
    errors = []
    for x in as_video(frames):
        y = decode(vae, vae.encode(x[None]).latent_dist.mode())[0].clamp(-1, 1)
        errors.append(((y - x) / 2).square().mean(dim=(0, 2, 3)))
    return -10 * torch.stack(errors).mean(dim=0).log10()


class VaeTraining:
    """Muon and AdamW on the trainable weights of an AutoencoderKLWan, continued from a checkpoint file where there is one.

    args: learning_rate, max_train_steps, log_steps, minutes (None: no limit) and seed. generator draws all random numbers.
    first: the step that training starts from.
    """

    def __init__(self, vae: torch.nn.Module, checkpoint: Path, args: argparse.Namespace):
        self.vae, self.checkpoint, self.args = vae, checkpoint, args
        self.generator = torch.Generator().manual_seed(args.seed)
        self.optimisers = make_optimisers(vae, args.learning_rate)
        self.first = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            vae.load_state_dict(state["vae"])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.generator.set_state(state["generator"])
            self.first = state["step"]

    def run(self, loss_of: Callable[[int], Tensor], held_out: Tensor, watched: int) -> bool:
        """Trains to the last step or until the minutes are over, and returns whether the last step was reached.

        loss_of(step): of a random batch. held_out: clips uint8 [N, 17, 3, H, W] for the printed PSNR, of which only the first
        `watched` are measured before the last step.
        """
        started, running, steps = time.monotonic(), 0.0, self.args.max_train_steps
        for step in range(self.first, steps):
            loss = loss_of(step)
            self._update(loss, step)
            running = loss.item() if step == self.first else 0.98 * running + 0.02 * loss.item()
            spent = (time.monotonic() - started) / 60
            done = step + 1
            stop = self.args.minutes is not None and spent >= self.args.minutes
            if done % self.args.log_steps == 0 or done == steps or stop:
                psnr = psnr_per_frame(self.vae, held_out if done == steps else held_out[:watched])
                frames = " ".join(f"{v:.1f}" for v in psnr[[0, 1, 4, 8, 12, 16]].tolist())
                print(f"step {done} {spent:.1f} min loss {running:.4f} psnr {psnr.mean():.2f} frames {frames}", flush=True)
                self._save(done)
            if stop and done < steps:
                return False
        return True

    def _update(self, loss: Tensor, step: int) -> None:
        self.vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = schedule(step, self.args.max_train_steps) * group["peak"]
            optimiser.step()

    def _save(self, step: int) -> None:
        state = {"vae": self.vae.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers]}
        write_torch(self.checkpoint, state | {"generator": self.generator.get_state(), "step": step})
