"""EasyCache (arXiv 2507.02860): sampling with a step cache that skips forwards whose output would hardly change.

The change of the output since the last computed forward is estimated from the change of the input by their last known ratio.
While the accumulated change is under a threshold, the output is the input plus the network's last output minus its input.
Steps are skipped for each clip separately. Defaults are those of ComfyUI's node.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

THRESHOLD, START, END = 0.2, 0.15, 0.95


def draft(
    denoiser_of: Callable[[int], object],
    x: Tensor,
    path: Sequence[float],
    threshold: float = THRESHOLD,
    start: float = START,
    end: float = END,
) -> tuple[Tensor, Tensor]:
    """(latents [N, ...] after the Euler steps of path, number of computed steps [N]).

    denoiser_of(n): a trainers.wan.sampling.Denoiser for n clips of the caption. start, end: shares of the steps between
    which forwards may be skipped.
    """
    n, steps = len(x), len(path) - 1
    denoisers: dict[int, object] = {}
    taken = torch.zeros(n, dtype=torch.long)
    before, velocity, added = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    rate, total = torch.full((n,), float("nan")), torch.zeros(n)
    for step, (sigma, following) in enumerate(zip(path, path[1:], strict=False)):
        moved = size(x - before)
        total = total + rate * moved / size(velocity).clamp(min=1e-12)
        may = (step >= start * steps) & (step < end * steps)
        skip = (total < threshold) & rate.isfinite() & torch.tensor(may)
        v = x + added
        todo = (~skip).nonzero()[:, 0]
        if len(todo):
            count = len(todo)
            if count not in denoisers:
                denoisers[count] = denoiser_of(count)
            v[todo] = denoisers[count].velocity(x[todo], sigma)
            taken[todo] += 1
            if step:
                rate[todo] = size(v[todo] - velocity[todo]) / moved[todo].clamp(min=1e-12)
            total[todo] = 0.0
            added[todo], before[todo], velocity[todo] = v[todo] - x[todo], x[todo], v[todo]
        x = x + (following - sigma) * v
    return x, taken


def size(x: Tensor) -> Tensor:
    """Mean absolute value of each clip, [N]."""
    return x.abs().flatten(1).mean(dim=1)
