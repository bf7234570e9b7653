"""Verdict of the score without weights: its thresholds, and the sentence that explains it."""

from .overlays import Overlays
from .record import CONSISTENT, INCONSISTENT, UNDETERMINED

# Chosen on seeds 600 to 609 of benchmarks/geometry/cheats.py. Motion: % of the diagonal per key frame; parallax, layers, noise
# and residuals: px at 480 lines; others: shares, see record.UNITS.
LEAST_MOTION = 0.15
# Minimum, and what is added to it for each pixel of noise, which no homography explains either.
LEAST_PARALLAX, LEAST_LAYERS = (0.4, 0.5), (0.16, 0.4)
# Consistent clips of the audit lose up to 17 %; real footage that loses more than 28 % is tracked inexactly.
MOST_LOST = 0.25
MOST_NOISE = 1.0
MOST_REPLACED = 0.04
# A dissolve exchanges most of the points within a third of the clip, a cut in one step.
MOST_EXCHANGED, MOST_SUDDEN = 0.7, 0.4
MOST_MOVING = 0.25
MOST_FLOWING = 0.06
# Frames of which this share or more is plain (flashes, smears) cannot be judged.
MOST_PLAIN = 0.2
# A rigid rest may leave MOST_RESIDUAL plus NOISE_SHARE times the noise: compression errs alike in neighbouring tracks.
MOST_RESIDUAL, NOISE_SHARE = 0.32, 0.5
MOST_ERROR = 0.75
# Share of the tracks from which those that move by themselves are mentioned; number of frames that are listed.
MENTIONED, LISTED = 0.01, 8


def judge(
    measured: dict[str, float], cuts: list[int], overlays: Overlays, broken: list[int], when: int, px: float
) -> tuple[str, str]:
    """Verdict and one sentence. broken: frames that do not show the scene; when: the frame at which most is replaced; px:
    factor from pixels to pixels at 480 lines."""
    if cuts:
        where = ", ".join(map(str, cuts))
        return UNDETERMINED, f"cut at frame {where}: the clip is not one continuous shot (measurements are of the longest one)"
    if overlays.stands:
        return UNDETERMINED, f"{overlays.static:.0%} of the picture stands still: the camera does not move"
    m = measured
    if m["lost"] > MOST_LOST:
        return (
            UNDETERMINED,
            f"{m['lost']:.0%} of the points are lost from key frame to key frame: too blurred or too noisy to judge",
        )
    if m["motion"] < LEAST_MOTION:
        return UNDETERMINED, f"too little motion ({m['motion']:.2f} % of the diagonal per key frame, minimum {LEAST_MOTION})"
    if broken:
        return INCONSISTENT, f"frame{_listed(broken)} not show the scene of the frames around"
    if m["plain"] >= MOST_PLAIN:
        return UNDETERMINED, f"{m['plain']:.0%} of the frames between key frames are plain (flashes, fades or smears)"
    if m["noise"] > MOST_NOISE:
        return UNDETERMINED, f"the tracks are too noisy to judge ({m['noise']:.2f} px, maximum {MOST_NOISE})"
    if m["exchanged"] > MOST_EXCHANGED or m["sudden"] > MOST_SUDDEN:
        return UNDETERMINED, "most of the points are exchanged within a third of the clip: a cut, a dissolve, or much blur"
    if m["replaced"] > MOST_REPLACED:
        return INCONSISTENT, f"{m['replaced']:.0%} of the picture is replaced at once before frame {when}"
    unexplained, layers = m["unexplained"], m["layers"]
    least = LEAST_PARALLAX[0] + LEAST_PARALLAX[1] * m["noise"]
    # Windows that straddle two layers move in between; they are larger in a small picture.
    least_layers = LEAST_LAYERS[0] * px + LEAST_LAYERS[1] * m["noise"]
    if unexplained < least:
        return UNDETERMINED, (
            f"no depth can be seen ({unexplained:.2f} px that no homography explains, minimum {least:.2f}): a camera "
            "that only turns or zooms, a flat scene or a sliding still picture"
        )
    if layers < least_layers:
        return UNDETERMINED, (
            f"all that is seen lies in two flat layers ({layers:.2f} px beyond two planes, minimum {least_layers:.2f}): too "
            "little depth to judge"
        )
    share = f"residual {m['residual']:.2f} px, parallax {m['parallax']:.1f} px"
    if m["residual"] > MOST_RESIDUAL + NOISE_SHARE * m["noise"] or m["rest_error"] > MOST_ERROR:
        return INCONSISTENT, f"no rigid scene explains the clip ({share})"
    if m["moving"] > MOST_MOVING:
        return UNDETERMINED, f"{m['moving']:.0%} of the picture moves by itself: too little is left to judge the scene by"
    if m["flowing"] + m["unstable"] > MOST_FLOWING:
        return UNDETERMINED, (
            f"{m['flowing'] + m['unstable']:.0%} of the picture flows or boils: water, smoke and melting cannot be told apart"
        )
    alone = f"; {m['moving']:.0%} of the picture moves by itself" if m["moving"] >= MENTIONED else ""
    return CONSISTENT, f"one rigid scene explains the clip ({share}{alone})"


def _listed(broken: list[int]) -> str:
    some = ", ".join(map(str, broken[:LISTED]))
    more = f" and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
    return f" {some} does" if len(broken) == 1 else f"s {some}{more} do"
