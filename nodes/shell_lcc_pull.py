"""Inputs and checks shared by the nodes that pull a latent towards a manifold's shell."""

from comfy_api.latest import io

from ..kernels.shell_lcc.manifold import METHODS, ShellManifold

AUTO, CUSTOM = "auto", "custom"
BANDED = ("band", "gradient")


def method_inputs() -> list[io.Input]:
    """method, target and radius."""
    return [
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default="project",
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
