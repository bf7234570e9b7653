"""The Shell-LCC objective of a training run: draws, one-step predictions, and the held-out figure that ends the run.

Held-out clips are measured every few steps (trainers.shell_reward.held_out). The parameters of the best measurement are kept;
the run ends after `patience` measurements without a better one, or at once where the clips' detail shows over-optimisation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.shell_lcc.manifold import ShellManifold
from ..kernels.tuning import latent_detail
from ..kernels.tuning import shell_objective as shell
from ..kernels.tuning.shell_objective import BAND, DISTANCE, ShellTarget, SigmaTargets
from ..kernels.tuning.split_step import same_randomness
from .draws import Draw, Draws
from .held_out import Summary, summary
from .predict import OneStep

STOP, WARN, OFF = "stop", "warn", "off"
ALARMS = (STOP, WARN, OFF)
SUMS = ("items", "loss", "distance", "violation", "above", "below", "anchor", "sigma")


@dataclass(frozen=True)
class ShellSettings:
    """objective: of shell_objective.OBJECTIVES; targets: a band for each noise level, None for the manifold's own;
    anchor_weight: of max(0, mean squared distance of x0 to the base's - anchor_margin), 0 for none.
    """

    objective: str = BAND
    targets: SigmaTargets | None = None
    anchor_weight: float = 0.0
    anchor_margin: float = 0.05

    def target(self, manifold: ShellManifold, sigma: Tensor) -> ShellTarget | None:
        """Of clips at noise levels sigma [B], on its device; None where no calibration is known. Raises UncalibratedError."""
        if self.targets is not None:
            return self.targets.at(sigma)
        if manifold.calibration is None and self.objective == DISTANCE:
            return None
        calibration = manifold.calibrated(f"--objective {self.objective}")
        return shell.target_of([calibration] * len(sigma)).to(sigma.device)


@dataclass(frozen=True)
class Stopping:
    """every: steps between two measurements, 0 for none; patience: measurements without a better one that end the run, 0: go
    on; alarm: one of ALARMS; last: the run's planned end, where is measured, too.
    """

    every: int = 10
    patience: int = 5
    alarm: str = STOP
    last: int = 0


@dataclass
class Best:
    """The best measurement so far: step 0 is the base. rows: {step, summary's figures} of all measurements."""

    step: int = 0
    figure: float = math.inf
    worse: int = 0
    rows: list[dict] = field(default_factory=list)


class ShellObjective:
    """See trainers.tuning.loop.Objective. measure: step -> rows of held_out.figures_of, the same on every process, None for no
    measurements; base: those of the base; keep: called with the step, on every process, when the parameters are the best so
    far; batch: items at a time; rank, world: of this process.
    """

    def __init__(
        self, manifold: ShellManifold, settings: ShellSettings, draws: Draws, one_step: OneStep, *, batch: int = 1,
        rank: int = 0, world: int = 1, measure: Callable[[int], list[dict]] | None = None, base: Sequence[dict] = (),
        stopping: Stopping | None = None, keep: Callable[[int], None] = lambda step: None,
    ):  # fmt: skip
        self.manifold, self.settings, self.draws, self.one_step = manifold, settings, draws, one_step
        self.batch, self.rank, self.world = batch, rank, world
        self.measure, self.base, self.stopping, self.keep = measure, list(base), stopping or Stopping(0), keep
        self.best, self.stopped, self.alarms = Best(), None, []
        # The loop keeps copies of healthy parameters; here `keep` does, for the steps that are measured.
        self.healthy = True
        if measure is not None:
            found = summary(self.base, self.base)
            self.best = Best(0, found.figure, 0, [{"step": 0} | found.to_json()])

    @property
    def can_stop(self) -> bool:
        """Whether a measurement can end the run; the parameters to be written are those of `keep` either way."""
        return False if self.measure is None else bool(self.stopping.patience) or self.stopping.alarm == STOP

    def accumulate(self, step: int) -> dict[str, float]:
        """Item j of the step belongs to process j % world."""
        mine = self.draws.of_step(step)[self.rank :: self.world]
        sums = dict.fromkeys(SUMS, 0.0)
        for i in range(0, len(mine), self.batch):
            for name, value in self._backward(mine[i : i + self.batch]).items():
                sums[name] += value
        return sums

    def finish(self, step: int, sums: dict[str, float], applied: bool) -> dict[str, float]:
        n = sums["items"]
        figures = {name: sums[name] / n for name in SUMS if name != "items"} | {"change_norm": self.one_step.network.change()}
        if self.settings.anchor_weight == 0:
            del figures["anchor"]
        due = self.stopping.every and (step % self.stopping.every == 0 or step == self.stopping.last)
        if self.measure is not None and due:
            figures |= self._judge(step, summary(self.measure(step), self.base))
        return figures

    def stop_reason(self) -> str | None:
        return self.stopped

    def state_dict(self) -> dict:
        b = self.best
        return {"best": [b.step, b.figure, b.worse], "rows": b.rows, "alarms": self.alarms}

    def load_state_dict(self, state: dict) -> None:
        step, figure, worse = state["best"]
        self.best = Best(int(step), float(figure), int(worse), list(state["rows"]))
        self.alarms = list(state["alarms"])

    def _backward(self, group: Sequence[Draw]) -> dict[str, float]:
        """Adds the group's gradient and returns its sums."""
        s = self.settings
        network = self.one_step.network
        with same_randomness(group[0].seed % 2**31, network.device):
            x0, sigma = self.one_step.predict(group)
        target = s.target(self.manifold, sigma)
        loss, d = shell.shell_loss(self.manifold, x0, s.objective, target)
        anchor = torch.zeros_like(loss)
        if s.anchor_weight:
            with torch.no_grad(), network.reference():
                base = self.one_step.predict(group)[0]
            far = (x0 - base).square().mean(dim=(1, 2, 3, 4))
            anchor = (far - s.anchor_margin).clamp(min=0)
            loss = loss + s.anchor_weight * anchor
        (loss.sum() / self.draws.count).backward()
        nothing = torch.full_like(loss, math.nan)
        sigma = sigma.to(loss.device)
        values = {
            "items": torch.ones_like(loss), "loss": loss.detach(), "distance": d.flatten(1).mean(1), "sigma": sigma,
            "violation": nothing, "above": nothing, "below": nothing, "anchor": anchor.detach(),
        }  # fmt: skip
        if target is not None:
            low, high = (v.view(-1, 1, 1, 1) for v in (target.low, target.high))
            values["violation"] = shell.violation(d, target).flatten(1).mean(1)
            values["above"], values["below"] = (m.float().flatten(1).mean(1) for m in (d > high, d < low))
        return dict(zip(SUMS, torch.stack([values[k].float().sum() for k in SUMS]).tolist(), strict=True))

    def _judge(self, step: int, found: Summary) -> dict[str, float]:
        """Takes in a measurement: keeps the parameters, or ends the run."""
        b, s = self.best, self.stopping
        row = {"step": step} | found.to_json()
        b.rows.append(row)
        said = None if s.alarm == OFF else latent_detail.alarm(found.laplacian_ratio, found.high_frequency_ratio)
        if said is not None:
            self.alarms.append({"step": step, "alarm": said})
        if found.figure < b.figure and (said is None or s.alarm == WARN):
            b.step, b.figure, b.worse = step, found.figure, 0
            self.keep(step)
        else:
            b.worse += 1
        kept = f"the best step is {b.step}" if b.step else "no step was better than the base"
        if said is not None and s.alarm == STOP:
            self.stopped = f"stopped at step {step}, over-optimised: {said}; {kept}"
        elif s.patience and b.worse >= s.patience:
            self.stopped = (
                f"stopped at step {step}: the held-out violation is {found.figure:.4f} and has not fallen below the "
                f"{b.figure:.4f} of step {b.step} in {b.worse} measurements (--patience); {kept}"
            )
        return {f"held_out/{k}": v for k, v in row.items() if k not in ("step", "clips") and v is not None}
