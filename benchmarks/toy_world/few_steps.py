"""Shell-LCC guidance where it may be worth something: few sampling steps and higher cfg (tables of a batch of captions).

The reference of a sample is the solution of its own seed and cfg with 50 steps. Guidance that brings a few-step sample nearer
to it saves discretisation error; one that only moves tokens does not.
"""

import torch
from torch import Tensor

from trainers.kernels.shell_lcc.manifold import ShellManifold

from . import judge
from .clips import scene_of
from .guidance import Guidance

# Captions that no earlier figure used.
FIRST = 30_000
STEPS = (3, 4, 6, 10, 20)
CFGS = (2.0, 5.0, 8.0)
REFERENCE_STEPS = 50
METHODS = {
    "none": None,
    "random push": Guidance("random"),
    "minimise (released objective)": Guidance("minimise"),
    "project": Guidance("project"),
    "band": Guidance("band"),
    "project, strength 0.5": Guidance("project", 0.5),
}


@torch.no_grad()
def run(world, j: judge.Judge, manifold: ShellManifold, split: str, start: int, count: int, cfg: float) -> dict[str, Tensor]:
    """Tables [N] of the clips start to start + count, by "<steps>/<method>/": error, the mean squared difference of the latent
    from the reference; outside, the share of tokens outside the band; psnr in dB of the decoded frames to those of the
    reference; overall, the judge's score; and what a Frechet distance needs, as reading.<name>."""
    from .jobs import flatten

    index = range(start, start + count)
    captions = [scene_of(split, i)[1] for i in index]
    truth = [scene_of(split, i)[0].attributes for i in index]
    seeds = list(index)
    reference = world.sample(captions, seeds, steps=REFERENCE_STEPS, cfg=cfg)
    shown = world.decode(reference)
    out = _judged("reference", j, shown, truth, flatten)
    for steps in STEPS:
        for name, guidance in METHODS.items():
            hook = None if guidance is None else guidance.hook(manifold, None, seed=start)
            z = world.sample(captions, seeds, hook, steps=steps, cfg=cfg)
            frames, key = world.decode(z), f"{steps}/{name}"
            out[f"{key}/error"] = (z - reference).square().mean(dim=(1, 2, 3, 4))
            out[f"{key}/outside"] = manifold.outside_band(manifold.distance(z)).float().mean(dim=(1, 2, 3))
            difference = (frames.float() - shown.float()).square().mean(dim=(1, 2, 3, 4))
            out[f"{key}/psnr"] = 10 * (255.0**2 / difference.clamp_min(1e-3)).log10()
            out |= _judged(key, j, frames, truth, flatten)
    return out


def _judged(key: str, j: judge.Judge, frames: Tensor, truth: list, flatten) -> dict[str, Tensor]:
    reading = j.read(frames)
    found = {f"{key}/reading.{k}": v for k, v in flatten(reading).items()}
    return found | {f"{key}/overall": reading.scores(truth)["overall"]}
