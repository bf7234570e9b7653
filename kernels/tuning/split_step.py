"""One preference step with one graph alive: winner and loser are back-propagated one after the other, exactly.

The loss's derivatives by the errors of winner and loser depend on both errors (kernels.tuning.preference_loss). So

  1  the reference's errors, without a graph (adapter off; or from a table of stored ones)
  2  the loser's error of the model in training, without a graph
  3  the winner's forward; now both errors are known, and with them the coefficients; the winner's backward
  4  the loser's forward and backward

Step 2 is the price, one forward of eight units of work (a backward counts as two); keeping the winner's graph until the
loser's error is known would cost no forward and twice the memory. A linear loss and SFT have constant coefficients and skip
step 2. Repeated forwards draw the same dropout: `same_randomness` seeds each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import preference_loss as losses
from .preference_loss import Errors, PreferenceLoss

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NoisyPair:
    """B pairs at one noise level each. winner, loser, noise: [B, C, T, H, W], clean latents and the noise that both sides
    share; sigma: [B] in [0, 1]; first: latent frames at the start that the errors leave out; seed: of the dropout.
    """

    winner: Tensor
    loser: Tensor
    noise: Tensor
    sigma: Tensor
    first: int = 0
    seed: int = 0

    def noisy(self, side: str) -> Tensor:
        """x = sigma noise + (1 - sigma) z of "winner" or "loser"."""
        s = self.sigma.view(-1, 1, 1, 1, 1)
        return s * self.noise + (1 - s) * getattr(self, side)

    def target(self, side: str) -> Tensor:
        """The velocity noise - z of "winner" or "loser"."""
        return self.noise - getattr(self, side)


@dataclass(frozen=True)
class Reference:
    """What is known of the frozen reference, for each pair: errors and motion [B] of both sides, and the velocities
    [B, C, T, H, W] where they were computed now, None where the rest comes from a table.
    """

    winner: Tensor
    loser: Tensor
    winner_motion: Tensor
    loser_motion: Tensor
    winner_velocity: Tensor | None = None
    loser_velocity: Tensor | None = None


@dataclass(frozen=True)
class PairFigures:
    """Figures [B], fp32, detached, of the pairs of a step: loss, d, errors of both models; motion: of the winner's prediction
    by both; deviation: mean squared distance of the winner's velocity to the reference's, NaN where that is not known.
    """

    loss: Tensor
    difference: Tensor
    winner: Tensor
    loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor
    motion: Tensor
    reference_motion: Tensor
    deviation: Tensor


@torch.no_grad()
def measure_reference(velocity: Velocity, pair: NoisyPair) -> Reference:
    """The reference's errors, motion and velocities; velocity: (x, sigma) -> [B, C, T, H, W] of the reference."""
    found = {}
    for side in ("winner", "loser"):
        x = pair.noisy(side)
        v = velocity(x, pair.sigma)
        found[side] = losses.velocity_error(v, pair.target(side), pair.first)
        found[f"{side}_motion"] = losses.motion(losses.predicted_clean(v, x, pair.sigma))
        found[f"{side}_velocity"] = v
    return Reference(**found)


@torch.no_grad()
def measure(velocity: Velocity, pair: NoisyPair, reference: Reference, beta: float, loss: PreferenceLoss) -> PairFigures:
    """The figures of pairs without a gradient, as in evaluation."""
    v_l = velocity(pair.noisy("loser"), pair.sigma)
    e_l = losses.velocity_error(v_l, pair.target("loser"), pair.first)
    v_w = velocity(pair.noisy("winner"), pair.sigma)
    figures, _ = _winner_part(v_w, e_l, pair, reference, beta, loss)
    further = _prediction_term("loser", v_l, pair, reference, beta, loss)
    return _with_loss(figures, further)


def backward(
    velocity: Velocity, pair: NoisyPair, reference: Reference, beta: float, loss: PreferenceLoss, share: float
) -> PairFigures:
    """Adds the gradient of share * (sum of the pairs' losses) to the parameters' .grad, and returns the figures.

    velocity: (x, sigma) -> [B, C, T, H, W], differentiable, of the model in training. share: 1 / pairs of the whole step.
    """
    device = pair.winner.device
    e_l = None
    if not loss.slope_is_constant:
        with torch.no_grad(), same_randomness(pair.seed, device):
            v = velocity(pair.noisy("loser"), pair.sigma)
            e_l = losses.velocity_error(v, pair.target("loser"), pair.first)
            del v
    with same_randomness(pair.seed + 1, device):
        v = velocity(pair.noisy("winner"), pair.sigma)
    # Where the slope is constant, the loser's error does not matter yet; its figures are filled in below.
    figures, objective = _winner_part(v, reference.loser if e_l is None else e_l, pair, reference, beta, loss)
    (share * objective.sum()).backward()
    del v, objective
    errors = Errors(figures.winner, figures.loser, figures.reference_winner, figures.reference_loser)
    _, slope = losses.coefficients(errors, beta, loss)
    if loss.kind == losses.SFT and not (loss.reference or loss.static):
        with torch.no_grad(), same_randomness(pair.seed, device):
            v = velocity(pair.noisy("loser"), pair.sigma)
            e_l = losses.velocity_error(v, pair.target("loser"), pair.first)
        return _with_loser(figures, e_l, beta, loss)
    with same_randomness(pair.seed, device):
        v = velocity(pair.noisy("loser"), pair.sigma)
    error = losses.velocity_error(v, pair.target("loser"), pair.first)
    further = _prediction_term("loser", v, pair, reference, beta, loss)
    (share * (slope * error + further).sum()).backward()
    figures = figures if e_l is not None else _with_loser(figures, error.detach(), beta, loss)
    return _with_loss(figures, further.detach())


@contextmanager
def same_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, random numbers of the CPU and of `device` follow from the seed; afterwards they go on as before."""
    kind = device.type
    index = device.index if device.index is not None or kind in ("cpu", "mps") else getattr(torch, kind).current_device()
    devices = [] if kind in ("cpu", "mps") else [index]
    with torch.random.fork_rng(devices=devices, device_type=kind if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _winner_part(
    v: Tensor, e_l: Tensor, pair: NoisyPair, reference: Reference, beta: float, loss: PreferenceLoss
) -> tuple[PairFigures, Tensor]:
    """(figures without the loser's part of the loss, the winner's objective [B] with a graph)."""
    error = losses.velocity_error(v, pair.target("winner"), pair.first)
    errors = Errors(error, e_l, reference.winner, reference.loser).detached()
    coefficient, _ = losses.coefficients(errors, beta, loss)
    further = _prediction_term("winner", v, pair, reference, beta, loss)
    with torch.no_grad():
        motion = losses.motion(losses.predicted_clean(v, pair.noisy("winner"), pair.sigma))
        deviation = torch.full_like(motion, torch.nan)
        if reference.winner_velocity is not None:
            deviation = losses.velocity_error(v, reference.winner_velocity, pair.first)
        value = losses.of_errors(errors, beta, loss) + further
    figures = PairFigures(
        value, errors.difference, errors.winner, errors.loser, errors.reference_winner, errors.reference_loser, motion,
        reference.winner_motion, deviation,
    )  # fmt: skip
    return figures, coefficient * error + further


def _prediction_term(
    side: str, v: Tensor, pair: NoisyPair, reference: Reference, beta: float, loss: PreferenceLoss
) -> Tensor:
    return losses.of_prediction(
        v, pair.noisy(side), pair.sigma, getattr(reference, f"{side}_motion"), getattr(reference, f"{side}_velocity"), beta,
        loss, pair.first,
    )  # fmt: skip


def _with_loser(figures: PairFigures, e_l: Tensor, beta: float, loss: PreferenceLoss) -> PairFigures:
    """The figures of a loss with a constant slope, once the loser's error is known."""
    known = {f.name: getattr(figures, f.name) for f in fields(PairFigures)}
    before = Errors(figures.winner, figures.loser, figures.reference_winner, figures.reference_loser)
    after = Errors(figures.winner, e_l, figures.reference_winner, figures.reference_loser)
    value = figures.loss + losses.of_errors(after, beta, loss) - losses.of_errors(before, beta, loss)
    return PairFigures(**known | {"loss": value, "loser": e_l, "difference": after.difference})


def _with_loss(figures: PairFigures, more: Tensor) -> PairFigures:
    known = {f.name: getattr(figures, f.name) for f in fields(PairFigures)}
    return PairFigures(**known | {"loss": figures.loss + more})
