"""The preference objective of a training run: draws pairs, runs the split step, follows beta, watches the winner's error."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ..kernels.tuning import preference_loss as losses
from ..kernels.tuning import split_step
from ..kernels.tuning.auto_beta import AutoBeta, FixedBeta
from ..kernels.tuning.preference_loss import PreferenceLoss
from ..kernels.tuning.split_step import NoisyPair, Reference, Velocity
from ..wan.text_padding import fold_padding
from .data import PairData
from .draws import Draw, Draws, by_shape, image_of, noisy_pair
from .reference_table import ReferenceTable

# Of the running mean of the winner's rise.
RISE_DECAY = 0.9


@dataclass(frozen=True)
class Network:
    """The model in training. velocity: (x, sigma, text, bias, image) -> [B, C, T, H, W] in fp32; reference: a context in which
    it is the frozen reference, None where that is another model and only a table of errors is known; change: its norm.
    """

    velocity: Callable
    reference: Callable[[], AbstractContextManager] | None
    change: Callable[[], float]
    device: torch.device


class DpoObjective:
    """See trainers.tuning.loop.Objective. rank, world: of this process; batch: pairs at a time; table: of reference errors,
    None to compute them in every step; max_rise: relative rise of the winner's error, as a running mean, that ends the run, 0
    for no limit.
    """

    def __init__(
        self, data: PairData, draws: Draws, network: Network, loss: PreferenceLoss, beta: AutoBeta | FixedBeta, *,
        batch: int = 1, rank: int = 0, world: int = 1, table: ReferenceTable | None = None, first: int = 0,
        max_rise: float = 0.0,
    ):  # fmt: skip
        self.data, self.draws, self.network, self.loss, self.beta = data, draws, network, loss, beta
        self.batch, self.rank, self.world, self.table, self.first = batch, rank, world, table, first
        self.max_rise, self.step, self.rise_sum, self.rise_weight = max_rise, 0, 0.0, 0.0

    @property
    def rise(self) -> float:
        """Running mean of (E_th,w - E_ref,w) / E_ref,w."""
        return self.rise_sum / self.rise_weight if self.rise_weight else 0.0

    @property
    def can_stop(self) -> bool:
        return self.max_rise > 0

    @property
    def healthy(self) -> bool:
        return not self.can_stop or self.rise <= self.max_rise / 2

    def accumulate(self, step: int) -> dict[str, float]:
        """Pair j of the step belongs to process j % world."""
        mine = self.draws.of_step(step)[self.rank :: self.world]
        sums = dict.fromkeys(SUMS, 0.0)
        for group in by_shape(mine, self.batch):
            pair = noisy_pair(self.data, group, self.network.device, self.first)
            velocity = self.velocity_of(group)
            reference = self.reference_of(group, pair, velocity)
            figures = split_step.backward(velocity, pair, reference, self.beta.beta, self.loss, 1 / self.draws.count)
            for name, value in _sums(figures, self.beta.beta).items():
                sums[name] += value
        return sums

    def finish(self, step: int, sums: dict[str, float], applied: bool) -> dict[str, float]:
        self.step, n = step, sums["items"]
        rise = (sums["winner"] - sums["reference_winner"]) / sums["reference_winner"] if sums["reference_winner"] else math.nan
        figures = {
            "loss": sums["loss"] / n, "rewards/accuracies": sums["right"] / n, "rewards/margins": sums["difference"] / n,
            "rewards/margins_by_beta": self.beta.beta * sums["difference"] / n, "gradient_factor": sums["factor"] / n,
            "beta": self.beta.beta, "winner_error": (sums["winner"] - sums["reference_winner"]) / n,
            "loser_error": (sums["loser"] - sums["reference_loser"]) / n,
            "winner_error_relative": rise, "reference_error": sums["reference_winner"] / n,
            "dynamics": sums["motion"] / sums["reference_motion"] if sums["reference_motion"] else math.nan,
            "deviation": sums["deviation"] / n, "change_norm": self.network.change(),
        }  # fmt: skip
        if applied:
            self.beta.update(sums["size"] / n)
            self.rise_sum = RISE_DECAY * self.rise_sum + (1 - RISE_DECAY) * rise
            self.rise_weight = RISE_DECAY * self.rise_weight + (1 - RISE_DECAY)
        return figures

    def stop_reason(self) -> str | None:
        if not self.can_stop or self.rise <= self.max_rise:
            return None
        return (
            f"stopped at step {self.step}: the winners' error is {100 * self.rise:.1f} % above the reference's, the limit is "
            f"{100 * self.max_rise:g} % (--max_winner_rise), so the model is being ruined whatever the accuracy says; lower "
            "--learning_rate, or raise --winner_anchor or --beta_min"
        )

    def state_dict(self) -> dict:
        return {"beta": self.beta.state_dict(), "rise": [self.rise_sum, self.rise_weight]}

    def load_state_dict(self, state: dict) -> None:
        self.beta.load_state_dict(state["beta"])
        self.rise_sum, self.rise_weight = map(float, state["rise"])

    def velocity_of(self, group: Sequence[Draw]) -> Velocity:
        """(x, sigma) -> velocity under the prompts of a group of draws."""
        text, bias, _ = fold_padding([self.data.texts[d.row.prompt] for d in group])
        image = image_of(self.data, group)
        return lambda x, sigma: self.network.velocity(x, sigma, text, bias, image)

    @torch.no_grad()
    def reference_of(self, group: Sequence[Draw], pair: NoisyPair, velocity: Velocity) -> Reference:
        """From the table, or computed with the reference."""
        if self.table is not None:
            return self.table.of(group, pair.winner.device)
        with self.network.reference():
            return split_step.measure_reference(velocity, pair)


SUMS = ("items", "loss", "difference", "size", "right", "factor", "winner", "loser", "reference_winner", "reference_loser",
        "motion", "reference_motion", "deviation")  # fmt: skip


def _sums(figures: split_step.PairFigures, beta: float) -> dict[str, float]:
    d = figures.difference
    values = {
        "items": torch.ones_like(d), "size": d.abs(), "right": (d > 0).float() + 0.5 * (d == 0).float(),
        "factor": losses.gradient_factor(d, beta),
    }  # fmt: skip
    sums = [values[name] if name in values else getattr(figures, name) for name in SUMS]
    return dict(zip(SUMS, torch.stack([v.float().sum() for v in sums]).tolist(), strict=True))
