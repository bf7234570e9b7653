"""Preference losses of a flow model, as functions of errors: Flow-DPO (arXiv 2501.13918), after Diffusion-DPO (2311.12908).

For a clip z, noise e and a level s, x = s e + (1 - s) z, and E is the *mean* squared error of the velocity, mean (v(x, s) -
(e - z))^2, over the positions that are not masked. With E_th of the model in training and E_ref of the frozen reference, same
e and s for both clips of a pair and both models,

    d = (E_ref_w - E_th_w) - (E_ref_l - E_th_l)

is positive where the model prefers the winner more than the reference does. The loss of a pair is

    preference(beta, d) + unit(beta) * (sft * E_th_w + anchor * relu(E_th_w - E_ref_w) + reference * D + static * S)

unit is the preference term's slope at d = 0 (beta / 2 for the sigmoid). In this unit a weight means the same for any beta,
clip size and length: an anchor of 2 outweighs a preference that pushes with its whole beta.

The anchor is linear. A squared one is flat where it begins: with errors that change by .005, its slope at weight 100 is 1,
against a preference's of 50 to 100, so it gives way until the winner is already lost. The linear one answers the first rise.

D is the mean squared distance of the model's velocity to the reference's. S = relu(M_ref - M_th) is the loss of motion of the
predicted clean latent x0 = x - s v, with M = 0.7 Var_t(x0) + 0.3 mean (x0[t+1] - x0[t])^2. The published static penalty
(Epipolar-DPO) is -M, which rewards motion without limit, and so flicker; here the reference's motion is the limit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMOID, IPO, LINEAR, SFT = "sigmoid", "ipo", "linear", "sft"
LOSSES = (SIGMOID, IPO, LINEAR, SFT)


class LossError(ValueError):
    """The loss's settings do not fit together; the message says which and what to do."""


@dataclass(frozen=True)
class PreferenceLoss:
    """Which loss, and the weights of its terms.

    kind: SIGMOID -logsigmoid(beta d); IPO (d - 1 / (2 beta))^2 (arXiv 2310.12036); LINEAR -beta d; SFT: no preference, the
    winner's error alone (unit 1, `sft` 1 unless it is given). smoothing: share of labels taken for wrong, in [0, 0.5), for
    SIGMOID. sft, anchor, reference, static: weights >= 0 as in the module's docstring. Raises LossError.
    """

    kind: str = SIGMOID
    smoothing: float = 0.0
    sft: float = 0.0
    anchor: float = 1.0
    reference: float = 0.0
    static: float = 0.1

    def __post_init__(self):
        if self.kind not in LOSSES:
            raise LossError(f"loss '{self.kind}': is unknown; expected {', '.join(LOSSES)}")
        if not 0 <= self.smoothing < 0.5:
            raise LossError(f"label smoothing must be 0 or more and below 0.5, got {self.smoothing:g}")
        if self.smoothing and self.kind != SIGMOID:
            raise LossError(f"label smoothing is defined for the sigmoid loss only, not for {self.kind}")
        for name in ("sft", "anchor", "reference", "static"):
            if not getattr(self, name) >= 0:
                raise LossError(f"the weight '{name}' must be 0 or more, got {getattr(self, name):g}")

    @property
    def sft_weight(self) -> float:
        return 1.0 if self.kind == SFT and self.sft == 0 else self.sft

    @property
    def needs_reference_velocity(self) -> bool:
        """Whether the reference's velocities themselves are needed, not only errors and motion, which can be stored."""
        return self.reference > 0

    @property
    def slope_is_constant(self) -> bool:
        """Whether dL/dE_l does not depend on the errors, so that the loser's need not be known in advance."""
        return self.kind in (LINEAR, SFT)

    def unit(self, beta: float) -> float:
        """The preference term's slope |dL/dd| at d = 0, without smoothing; 1 for SFT."""
        return {SIGMOID: beta / 2, IPO: 1 / beta if beta else 0.0, LINEAR: beta, SFT: 1.0}[self.kind]


@dataclass(frozen=True)
class Errors:
    """Errors [B] of the velocity, fp32: of the model in training for winner and loser, and of the reference."""

    winner: Tensor
    loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor

    @property
    def difference(self) -> Tensor:
        """d [B] of the module's docstring."""
        return (self.reference_winner - self.winner) - (self.reference_loser - self.loser)

    def detached(self) -> "Errors":
        return Errors(*(e.detach() for e in (self.winner, self.loser, self.reference_winner, self.reference_loser)))


def velocity_error(velocity: Tensor, target: Tensor, first: int = 0) -> Tensor:
    """E [B], fp32, differentiable: mean squared error of velocity against target = noise - z, both [B, C, T, H, W].

    first: latent frames at the start that do not count, 1 for image-to-video, whose first frame is given.
    """
    return (velocity.float() - target.float())[:, :, first:].square().mean(dim=(1, 2, 3, 4))


def motion(x0: Tensor) -> Tensor:
    """M [B], fp32, differentiable: 0.7 times the variance over time plus 0.3 times the mean squared difference of neighbouring
    latent frames of x0 [B, C, T, H, W]; 0 for a single frame.
    """
    x0 = x0.float()
    if x0.shape[2] < 2:
        return x0.sum(dim=(1, 2, 3, 4)) * 0.0
    variance = x0.var(dim=2, correction=0).mean(dim=(1, 2, 3))
    return 0.7 * variance + 0.3 * x0.diff(dim=2).square().mean(dim=(1, 2, 3, 4))


def preference(difference: Tensor, beta: float, loss: PreferenceLoss) -> Tensor:
    """The preference term [B] for d [B]; 0 for SFT."""
    d = difference.float()
    if loss.kind == SIGMOID:
        return -(1 - loss.smoothing) * F.logsigmoid(beta * d) - loss.smoothing * F.logsigmoid(-beta * d)
    if loss.kind == IPO:
        return (d - 1 / (2 * beta)).square()
    return -beta * d if loss.kind == LINEAR else torch.zeros_like(d)


def preference_slope(difference: Tensor, beta: float, loss: PreferenceLoss) -> Tensor:
    """d preference / dd [B], at most 0 except for IPO and with smoothing."""
    d = difference.float()
    if loss.kind == SIGMOID:
        return -beta * ((1 - loss.smoothing) * torch.sigmoid(-beta * d) - loss.smoothing * torch.sigmoid(beta * d))
    if loss.kind == IPO:
        return 2 * (d - 1 / (2 * beta))
    return torch.full_like(d, -beta) if loss.kind == LINEAR else torch.zeros_like(d)


def gradient_factor(difference: Tensor, beta: float) -> Tensor:
    """sigmoid(-beta d) [B]: .5 for a pair that nothing was learnt of, towards 0 for one that is learnt."""
    return torch.sigmoid(-beta * difference.float())


def of_errors(errors: Errors, beta: float, loss: PreferenceLoss) -> Tensor:
    """The loss [B] without D and S, which `of_prediction` adds; differentiable."""
    rise = F.relu(errors.winner - errors.reference_winner)
    further = loss.sft_weight * errors.winner + loss.anchor * rise
    return preference(errors.difference, beta, loss) + loss.unit(beta) * further


def coefficients(errors: Errors, beta: float, loss: PreferenceLoss) -> tuple[Tensor, Tensor]:
    """(dL/dE_w, dL/dE_l), each [B], detached, of the loss `of_errors`: exact.

    sum (dL/dE_w * E_w) and sum (dL/dE_l * E_l) have together the gradient of the sum of losses, and can be back-propagated
    one after the other, so that one graph is alive at a time.
    """
    e = errors.detached()
    slope = preference_slope(e.difference, beta, loss)
    rising = (e.winner > e.reference_winner).float()
    winner = -slope + loss.unit(beta) * (loss.sft_weight + loss.anchor * rising)
    return winner, slope


def of_prediction(
    velocity: Tensor, x: Tensor, sigma: Tensor, reference_motion: Tensor, reference: Tensor | None, beta: float,
    loss: PreferenceLoss, first: int = 0,
) -> Tensor:  # fmt: skip
    """One clip's part [B] of the terms D and S, half of each: they are means over winner and loser. Differentiable.

    velocity, x: [B, C, T, H, W]; sigma: [B]; reference_motion: M [B] of the reference's prediction; reference: its velocity,
    None where loss.reference is 0; first: latent frames that do not count in D. S looks at all frames.
    """
    total = torch.zeros(len(x), device=velocity.device)
    if loss.reference:
        total = total + loss.reference * velocity_error(velocity, reference, first)
    if loss.static:
        lost = F.relu(reference_motion - motion(predicted_clean(velocity, x, sigma)))
        total = total + loss.static * lost
    return 0.5 * loss.unit(beta) * total


def predicted_clean(velocity: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x - sigma v, fp32, for velocity and x [B, C, T, H, W] and sigma [B]."""
    return x.float() - sigma.float().view(-1, 1, 1, 1, 1) * velocity.float()
