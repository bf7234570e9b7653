"""The preference objective of Train Preference LoRA: Flow-DPO with one graph alive, inside a sampling run of ComfyUI."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache

import torch

from ..kernels.files.latents import read_one
from ..kernels.tuning import preference_loss as losses
from ..kernels.tuning import split_step
from ..kernels.tuning.auto_beta import AutoBeta, FixedBeta
from ..kernels.tuning.noise_levels import NoiseLevels
from ..kernels.tuning.preference_loss import PreferenceLoss
from ..kernels.tuning.split_step import NoisyPair
from .recorded_pairs import RecordedPair
from .training_guider import LOWEST, Prompts, generator_of

# Of the running mean of the winner's rise.
RISE_DECAY = 0.9
# Of a step: loss, share of pairs whose winner is preferred more than by the base, mean d, gradient factor, beta, errors.
LOSS, RIGHT, DIFFERENCE, FACTOR, BETA, WINNER, LOSER, BASE_WINNER, BASE_LOSER = range(9)
FIGURES = 9


class PreferenceObjective:
    """See training_loop.Objective. count: pairs a step; reference: a context in which the model is the base; max_rise:
    relative rise of the winner's error, as a running mean, that ends the training, 0 for no limit; progress: called after
    each pair.
    """

    def __init__(
        self, pairs: Sequence[RecordedPair], prompts: Prompts, reference: Callable[[], AbstractContextManager],
        levels: NoiseLevels, loss: PreferenceLoss, beta: AutoBeta | FixedBeta, count: int, seed: int, max_rise: float,
        device: torch.device, progress: Callable[[], None],
    ):  # fmt: skip
        self.pairs, self.prompts, self.reference = pairs, prompts, reference
        self.levels, self.loss, self.beta = levels, loss, beta
        self.count, self.seed, self.max_rise, self.device, self.progress = count, seed, max_rise, device, progress
        self.step, self.rise_sum, self.rise_weight = 0, 0.0, 0.0

    @property
    def rise(self) -> float:
        """Running mean of (E_th,w - E_ref,w) / E_ref,w."""
        return self.rise_sum / self.rise_weight if self.rise_weight else 0.0

    @property
    def healthy(self) -> bool:
        return not self.max_rise or self.rise <= self.max_rise / 2

    def accumulate(self, step: int) -> list[float]:
        self.step = step + 1
        rows = []
        for number in range(step * self.count, (step + 1) * self.count):
            recorded, pair = self._draw(number)
            velocity = self.prompts.velocity(recorded.prompt)
            with self.reference():
                base = split_step.measure_reference(velocity, pair)
            found = split_step.backward(velocity, pair, base, self.beta.beta, self.loss, 1 / self.count)
            d = found.difference
            values = {
                LOSS: found.loss, RIGHT: (d > 0).float() + 0.5 * (d == 0).float(), DIFFERENCE: d,
                FACTOR: losses.gradient_factor(d, self.beta.beta), BETA: torch.full_like(d, self.beta.beta),
                WINNER: found.winner, LOSER: found.loser, BASE_WINNER: found.reference_winner,
                BASE_LOSER: found.reference_loser,
            }  # fmt: skip
            rows.append(torch.cat([values[i].float() for i in range(len(values))] + [d.abs().float()]))
            self.progress()
        *figures, self._size = torch.stack(rows).double().mean(dim=0).tolist()
        return figures

    def finish(self, figures: list[float]) -> None:
        self.beta.update(self._size)
        rise = figures[WINNER] / figures[BASE_WINNER] - 1 if figures[BASE_WINNER] else math.nan
        self.rise_sum = RISE_DECAY * self.rise_sum + (1 - RISE_DECAY) * rise
        self.rise_weight = RISE_DECAY * self.rise_weight + (1 - RISE_DECAY)

    def stop_reason(self) -> str | None:
        if not self.max_rise or self.rise <= self.max_rise:
            return None
        return (
            f"Stopped at step {self.step}: the winners' error is {100 * self.rise:.1f} % above the base model's, the limit is "
            f"{100 * self.max_rise:g} % ('max_winner_rise'), so the model is being ruined whatever the accuracy says; lower "
            "'learning_rate', or raise 'winner_anchor'"
        )

    def state_dict(self) -> dict:
        return {"beta": self.beta.state_dict(), "rise": [self.rise_sum, self.rise_weight]}

    def load_state_dict(self, state: dict) -> None:
        self.beta.load_state_dict(state["beta"])
        self.rise_sum, self.rise_weight = map(float, state["rise"])

    def _draw(self, number: int) -> tuple[RecordedPair, NoisyPair]:
        """Pair `number` of the training, each epoch in a new order, at a noise level and with a noise that follow from it."""
        epoch, place = divmod(number, len(self.pairs))
        recorded = self.pairs[_order(self.seed, len(self.pairs), epoch)[place]]
        winner, loser = (read_one(path)[None] for path in (recorded.winner, recorded.loser))
        generator = generator_of(self.seed, f"draw {number}")
        sigma = self.levels.draw(1, generator).clamp(min=LOWEST)
        noise = torch.randn(winner.shape, generator=generator)
        return recorded, NoisyPair(*(t.to(self.device) for t in (winner, loser, noise, sigma)))


# A step asks for one or two epochs, over and over.
@lru_cache(maxsize=4)
def _order(seed: int, count: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator_of(seed, f"epoch {epoch}")).tolist()
