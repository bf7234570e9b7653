"""Alarms: signs that a reward was raised at the cost of the pictures, each with its limit.

A limit counts as passed where the end of the 95 % interval nearer to "no change" is past it, so that one odd pair raises none;
a single pair has no interval, and its value is taken.
"""

import math

from ..kernels.tuning.latent_detail import DETAIL as LOST_DETAIL
from ..kernels.tuning.latent_detail import HIGH_FREQUENCY, HIGH_OVER_LAPLACIAN
from ..reporting.curves import number
from ..reporting.intervals import Interval
from .differences import Details, Difference

# Ratio of Laplacian variance: below, detail is lost; above, it may be noise.
DETAIL = (LOST_DETAIL, 1.5)
DYNAMICS = (0.8, 1.25)
CONTRAST, SATURATION = (0.75, 1.33), (0.75, 1.33)
BRIGHTNESS, EXPOSED = 0.08, 0.02
CHANGE = 1.0
# Clips that only the tuned side loses as undetermined, as a share of the pairs.
UNDETERMINED = 0.1


def of_details(details: Details | None, motion: Interval, tuned: str, base: str) -> list[str]:
    """Sentences, the gravest first; [] without pictures or without alarms. motion: ratio of the point tracks' motion.

    Less noise and less detail also make frames differ less, so that the tracks' motion decides where most pairs have it.
    """
    if details is None:
        return []
    r, s = details.ratios, details.shares
    found = []
    if _above(details.high_over_laplacian, HIGH_OVER_LAPLACIAN) and _above(r["high_frequency"], HIGH_FREQUENCY):
        found.append(
            f"over-optimised: {tuned}'s high-frequency share is {number(r['high_frequency'].mean, 3)} times {base}'s, its "
            f"Laplacian variance {number(r['laplacian'].mean, 3)} times: the added energy is noise or a grid, not detail"
        )
    found += _outside(
        r["laplacian"], DETAIL, f"{tuned} has lost fine detail (blurred)",
        f"{tuned} has far more fine detail, look for noise and over-sharpening", "Laplacian variance", base,
    )  # fmt: skip
    still = f"{tuned} moves less, and a still clip raises many rewards"
    tracked = 2 * motion.n >= r["dynamics"].n
    if tracked:
        found += _outside(motion, (DYNAMICS[0], math.inf), still, "", "motion of point tracks", base)
    limits = (-math.inf if tracked else DYNAMICS[0], DYNAMICS[1])
    more = f"{tuned} changes more between frames, look for flicker"
    found += _outside(r["dynamics"], limits, still, more, "mean frame difference", base)
    if _above(s["exposed"], EXPOSED):
        found.append(
            f"over-exposed: {number(100 * s['exposed'].mean, 3)} % more of {tuned}'s pixels are nearly white than of {base}'s"
        )
    if _above(_absolute(s["brightness"]), BRIGHTNESS):
        found.append(f"brightness shifted by {number(s['brightness'].mean, 3)} of full scale against {base}")
    found += _outside(r["contrast"], CONTRAST, f"{tuned} has lost contrast", f"{tuned} has more contrast", "contrast", base)
    duller, stronger = f"{tuned}'s colours are duller", f"{tuned}'s colours are stronger"
    found += _outside(r["saturation"], SATURATION, duller, stronger, "saturation", base)
    if _above(details.change, CHANGE):
        found.append(
            f"{tuned}'s clips differ from {base}'s by {number(details.change.mean, 3)} times {base}'s contrast: other scenes, "
            "so that ratios of detail compare scenes rather than models"
        )
    return found


def of_rewards(differences: list[Difference], tuned: str, base: str, pairs: int) -> list[str]:
    """An alarm where clips vanish from a reward on the tuned side: what remains is a selection."""
    found = []
    for d in differences:
        before, after = d.undetermined
        if after - before > max(1, UNDETERMINED * pairs):
            found.append(
                f"{d.reward} cannot judge {after} clips of {tuned}, against {before} of {base} (often they move too little): "
                "its difference is of the other pairs only"
            )
    return found


def _outside(ratio: Interval, limits: tuple[float, float], less: str, more: str, what: str, base: str) -> list[str]:
    low, high = limits
    said = less if _below(ratio, low) else more if _above(ratio, high) else None
    return [f"{said}: {what} is {number(ratio.mean, 3)} times {base}'s"] if said else []


def _above(value: Interval, limit: float) -> bool:
    return (value.low if math.isfinite(value.low) else value.mean) > limit


def _below(value: Interval, limit: float) -> bool:
    return (value.high if math.isfinite(value.high) else value.mean) < limit


def _absolute(value: Interval) -> Interval:
    if value.mean >= 0:
        return value
    return Interval(-value.mean, -value.high, -value.low, value.n)
