"""Tables of rewards that need no training, for candidates of one caption: on finished clips, drafts and predictions.

Settings are fixed here; they were chosen on 128 other captions (indices 5000 to 5127 of the same split).
"""

import time

import torch
from torch import Tensor

from trainers.kernels.rewards.flow_residual import PUBLISHED_SIGMAS, FlowResidual
from trainers.kernels.rewards.prompt_gap import PromptGap
from trainers.kernels.rewards.reward import Reward
from trainers.scorers.latent_view import ConditionalNetwork, LatentView
from trainers.wan.sampling import euler

from . import candidates, judge, pipeline

COUNT = 8
# Captions that no earlier figure used: the report's other parts read indices below 1000.
FIRST = 20_000
DRAFT_STEPS = 6
# Before these steps predictions are scored, with fewer draws than at the end.
PREDICTED = (3, 8)
PREDICTED_DRAWS = 2


def rewards(seed: int) -> dict[str, Reward]:
    """The rewards of clean latents, with their defaults. seed: of their draws, another for each caption."""
    return {
        "flow residual, published levels": FlowResidual(PUBLISHED_SIGMAS, seed=seed),
        "flow residual": FlowResidual(seed=seed),
        "prompt gap": PromptGap(seed=seed),
    }


@torch.no_grad()
def run(world, j: judge.Judge, heads: candidates.Heads, split: str, index: int, count: int) -> dict[str, Tensor]:
    """Tables [N] of one caption, each higher is better: oracle.<dimension>; <reward>/finished, <reward>/draft;

    prompt gap/<step> and judge/<step> of predictions; <head>/finished, and <head>/<step> of noisy latents before PREDICTED.
    """
    caption = candidates.caption_of(world, split, index)
    schedule = pipeline.schedule()
    noise = pipeline.initial_noise(candidates.seeds(index, count))
    denoiser = world.denoiser([caption.text] * count)
    states: dict[int, Tensor] = {}
    predictions: list[Tensor] = []

    def keep(x0: Tensor, sigma: float, step: int) -> Tensor:
        predictions.append(x0)
        return x0

    z = euler(denoiser, noise, schedule, keep, lambda x, sigma, step: states.__setitem__(step, x))
    draft = euler(denoiser, noise, pipeline.sigmas(DRAFT_STEPS, pipeline.SHIFT).tolist())
    (negative,) = world.text.words([""])
    network = ConditionalNetwork(world.dit, caption.words, negative)

    def score(reward: Reward, latents: Tensor) -> Tensor:
        return reward.scores(reward.measure(LatentView(network, latents)))

    out = {}
    for name, reward in rewards(index).items():
        out[f"{name}/finished"], out[f"{name}/draft"] = score(reward, z), score(reward, draft)
    early = PromptGap(noises=PREDICTED_DRAWS, seed=index)
    for step in PREDICTED:
        # The prediction that a race has before a step is that of the step before.
        prediction = predictions[step - 1]
        out[f"prompt gap/{step}"] = score(early, prediction)
        out[f"judge/{step}"] = j.read(world.decode(prediction)).scores([caption.attributes] * count)["overall"]
        found = candidates.scores(heads, states[step], schedule[step], caption)
        out |= {f"{name}/{step}": values for name, values in found.items()}
    out |= {f"{name}/finished": values for name, values in candidates.finished(heads, z, caption, index).items()}
    return out | candidates.of_reading(j.read(world.decode(z)), caption)


@torch.no_grad()
def clock(world, split: str, captions: int = 6) -> tuple[float, float]:
    """Seconds of sampling COUNT candidates in full, and of drafts ranked by the prompt gap, on one thread, alternating."""
    schedule, short = pipeline.schedule(), pipeline.sigmas(DRAFT_STEPS, pipeline.SHIFT).tolist()
    (negative,) = world.text.words([""])
    full = drafts = 0.0
    for index in range(FIRST, FIRST + captions):
        caption = candidates.caption_of(world, split, index)
        noises = pipeline.initial_noise(candidates.seeds(index, COUNT)).split(1)
        denoiser = world.denoiser([caption.text])
        began = time.perf_counter()
        for noise in noises:
            euler(denoiser, noise, schedule)
        full, began = full + time.perf_counter() - began, time.perf_counter()
        reward, network = PromptGap(seed=index), ConditionalNetwork(world.dit, caption.words, negative)
        scores = torch.cat([reward.measure(LatentView(network, euler(denoiser, noise, short))) for noise in noises])
        euler(denoiser, noises[int(scores.argmax())], schedule)
        drafts += time.perf_counter() - began
    return full, drafts
