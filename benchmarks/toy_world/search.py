"""Best-of-N over a caption's candidates, timed: early, by a plan and a PRISM head, and plain, every candidate to its end."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.kernels.prism.plan import Plan
from trainers.scorers import early_best_of_n
from trainers.scorers.prism_network import Scorer
from trainers.wan.sampling import euler

from . import pipeline
from .candidates import Caption, finished, seeds


@dataclass(frozen=True)
class TimedSearch:
    """winner: index of the candidate; z: its latent [1, 16, 5, 8, 8]; blocks: transformer blocks that were run."""

    winner: int
    z: Tensor
    seconds: float
    blocks: int


def search(world: pipeline.ToyWorld, scorer: Scorer, caption: Caption, index: int, plan: Plan) -> TimedSearch:
    """Early Best-of-N by a plan. index: of the caption, from which the candidates' seeds follow."""
    (negative,) = world.text.words([""])
    network = early_best_of_n.GuidedNetwork(world.dit, scorer, caption.words, negative, pipeline.CFG)
    sigmas = pipeline.schedule()
    noises = pipeline.initial_noise(seeds(index, plan.candidates)).split(1)
    began = time.perf_counter()
    found = early_best_of_n.search(plan, network, noises, sigmas)
    seconds = time.perf_counter() - began
    return TimedSearch(found.winners[0], found.results[0], seconds, network.blocks)


def full(world: pipeline.ToyWorld, scorer: Scorer, caption: Caption, index: int, count: int) -> TimedSearch:
    """Plain Best-of-N: every candidate runs to its end, scored as PRISM Score does. Time and blocks are those of sampling."""
    sigmas = pipeline.schedule()
    began = time.perf_counter()
    denoiser = world.denoiser([caption.text])
    z = [euler(denoiser, x, sigmas) for x in pipeline.initial_noise(seeds(index, count)).split(1)]
    seconds = time.perf_counter() - began
    scores = torch.cat([finished({"head": scorer}, one, caption, index)["head"] for one in z])
    winner = int(scores.argmax())
    return TimedSearch(winner, z[winner], seconds, 2 * len(world.dit.blocks) * pipeline.STEPS * count)
