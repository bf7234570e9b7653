"""Inputs and checks shared by the nodes that pull a latent towards a manifold's shell."""

import logging

import torch
from comfy_api.latest import io
from server import PromptServer

from ..kernels.shell_lcc.manifold import METHODS, ShellManifold

AUTO, CUSTOM = "auto", "custom"
BANDED = ("band", "gradient")
# The band holds this share of real tokens. With more than three times as many outside as of real clips, a manifold does not
# know the content: on the half of a real clip that it was not fitted on, 67 % were outside, and detail was taken away.
IN_BAND, FAR = 0.9, 3.0
OUTSIDE_UNIT = "% of tokens outside the band"


def outside_report(manifold: ShellManifold, distance: torch.Tensor, what: str) -> tuple[str, bool]:
    """(a sentence on the share of tokens outside the band, whether it is far above that of real clips).

    distance: [B, T, H, W] of a calibrated manifold; what: such as "of the latent".
    """
    share = float(manifold.outside_band(distance).float().mean())
    text = f"{100 * share:.0f} % of the tokens {what} are outside the band that holds {100 * IN_BAND:.0f} % of real ones"
    if share <= FAR * (1 - IN_BAND):
        return text, False
    return (
        f"{text}: manifold '{manifold.name}' does not know such content, and a correction may take detail away; fit one on "
        "clips like these, or use less strength"
    ), True


def shares_by_frame(manifold: ShellManifold, distance: torch.Tensor) -> list[float]:
    """Percent of tokens outside the band in each latent frame of distances [T, H, W] of a calibrated manifold."""
    return (100 * manifold.outside_band(distance).float().mean(dim=(1, 2))).tolist()


def show_outside(manifold: ShellManifold, z: torch.Tensor, what: str, node: str, node_id: str | None) -> None:
    """Shows on the node, and logs, the share of tokens outside the band of normalised latents z; nothing if uncalibrated."""
    if manifold.calibration is None:
        return
    text, far = outside_report(manifold, manifold.distance(z), what)
    logging.log(logging.WARNING if far else logging.INFO, "%s: %s", node, text)
    PromptServer.instance.send_progress_text(text, node_id)


def method_inputs(default: str = "project") -> list[io.Input]:
    """method, target and radius. default: of the method."""
    return [
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default=default,
            tooltip=(
                "project: every token onto the shell's radius, in closed form. band: only tokens outside the central "
                "90 % of real tokens, to the band's edge; changes least. gradient: as band, by gradient steps; slower. "
                "minimise: towards the skeleton, through the shell; the original reward, for comparison: it smooths "
                "detail away."
            ),
        ),
        io.Combo.Input(
            "target",
            options=[AUTO, CUSTOM],
            default=AUTO,
            tooltip="auto: the radius and band measured on held-out real clips, stored in the file. custom: the radius below.",
        ),
        io.Float.Input(
            "radius",
            default=1.0,
            min=0.01,
            max=10.0,
            step=0.01,
            tooltip="Used when target is custom, not by minimise. Larger keeps more detail and noise; a band scales with it.",
        ),
    ]


def trust_input() -> io.Input:
    """trust."""
    return io.Float.Input(
        "trust",
        default=0.2,
        min=0.01,
        max=2.0,
        step=0.01,
        advanced=True,
        tooltip="Largest change of a token, relative to its length: 0.2 is 20 %. Limits the correction of outliers.",
    )


def pull_settings(manifold: ShellManifold, method: str, target: str, radius: float, strength: float, trust: float) -> dict:
    """Keyword arguments for ShellManifold.pull. Raises UncalibratedError before sampling, where `pull` would raise it."""
    if method in BANDED:
        manifold.calibrated(f"the band of method '{method}'")
    return {"method": method, "strength": strength, "radius": radius if target == CUSTOM else None, "trust": trust}
