"""The preference objective of Train Preference LoRA: Flow-DPO with one graph alive, inside a sampling run of ComfyUI."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache

import comfy.conds
import comfy.model_management
import comfy.samplers
import torch

from ..kernels.files.latents import read_one
from ..kernels.tuning import preference_loss as losses
from ..kernels.tuning import split_step
from ..kernels.tuning.auto_beta import AutoBeta, FixedBeta
from ..kernels.tuning.noise_levels import NoiseLevels
from ..kernels.tuning.preference_loss import PreferenceLoss
from ..kernels.tuning.split_step import NoisyPair
from . import step_cache
from .recorded_pairs import RecordedPair

# Of the running mean of the winner's rise.
RISE_DECAY = 0.9
# The velocity is (x - x0) / sigma.
LOWEST = 1e-3
# Of a step: loss, share of pairs whose winner is preferred more than by the base, mean d, gradient factor, beta, errors.
LOSS, RIGHT, DIFFERENCE, FACTOR, BETA, WINNER, LOSER, BASE_WINNER, BASE_LOSER = range(9)


class Guided:
    """The velocity of a MODEL while core's guider has it loaded. inner: the BaseModel; prompt: one processed conditioning;
    words: {prompt: embedded words [L, width]}, padded to `length` by zeros as the text encoder does.
    """

    def __init__(self, inner, prompt: dict, options: dict, words: dict[str, torch.Tensor], length: int):
        self.inner, self.prompt, self.options = inner, prompt, step_cache.without(options)
        self.words, self.length = words, length

    def velocity(self, prompt: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """(x [1, C, T, H, W], sigma [1]) -> velocity, fp32, differentiable in the adapters, under a prompt."""
        words = self.words[prompt]
        text = torch.nn.functional.pad(words, (0, 0, 0, self.length - len(words)))[None]
        known = self.prompt["model_conds"]

        def velocity(x, sigma):
            # Layers look for an interruption as well, but not while a graph is walked backwards.
            comfy.model_management.throw_exception_if_processing_interrupted()
            own = known | {"c_crossattn": comfy.conds.CONDRegular(text.to(x.device))}
            (x0,) = comfy.samplers.calc_cond_batch(
                self.inner, [[self.prompt | {"model_conds": own}]], x, sigma, self.options
            )
            return (x - x0) / sigma.view(-1, 1, 1, 1, 1)

        return velocity


class PreferenceObjective:
    """See training_loop.Objective. count: pairs a step; reference: a context in which the model is the base; max_rise:
    relative rise of the winner's error, as a running mean, that ends the training, 0 for no limit; progress: called after
    each pair.
    """

    def __init__(
        self, pairs: Sequence[RecordedPair], guided: Guided, reference: Callable[[], AbstractContextManager],
        levels: NoiseLevels, loss: PreferenceLoss, beta: AutoBeta | FixedBeta, count: int, seed: int, max_rise: float,
        device: torch.device, progress: Callable[[], None],
    ):  # fmt: skip
        self.pairs, self.guided, self.reference = pairs, guided, reference
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
            velocity = self.guided.velocity(recorded.prompt)
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
        self.rise_sum, self.rise_weight = state["rise"]

    def _draw(self, number: int) -> tuple[RecordedPair, NoisyPair]:
        """Pair `number` of the training, each epoch in a new order, at a noise level and with a noise that follow from it."""
        epoch, place = divmod(number, len(self.pairs))
        recorded = self.pairs[_order(self.seed, len(self.pairs), epoch)[place]]
        winner, loser = (read_one(path)[None] for path in (recorded.winner, recorded.loser))
        generator = _generator(self.seed, f"draw {number}")
        sigma = self.levels.draw(1, generator).clamp(min=LOWEST)
        noise = torch.randn(winner.shape, generator=generator)
        return recorded, NoisyPair(*(t.to(self.device) for t in (winner, loser, noise, sigma)))


class Training(comfy.samplers.Sampler):
    """A SAMPLER that samples nothing: it trains, while core's guider holds the model loaded. train: (guider, options) -> any.
    """

    def __init__(self, train: Callable):
        self.train = train
        self.outcome = None

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        with torch.enable_grad():
            self.outcome = self.train(model_wrap, extra_args["model_options"])
        return torch.zeros_like(latent_image)


# A step asks for one or two epochs, over and over.
@lru_cache(maxsize=4)
def _order(seed: int, count: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=_generator(seed, f"epoch {epoch}")).tolist()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
