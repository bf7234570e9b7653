"""Prints what a manifold file holds: sizes, calibration, held-out figures and provenance."""

from pathlib import Path

from ..kernels.shell_lcc.manifold import ShellManifold, load
from ..running.output import format_table
from .metrics_table import metrics_rows

# Entries of a list that are printed.
SHOWN = 8


def add_arguments(parser) -> None:
    parser.add_argument("manifold", metavar="FILE", help="a manifold made by `fit` or `import`")


def run(args) -> int:
    path = Path(args.manifold)
    print(describe(load(path), path))
    return 0


def describe(manifold: ShellManifold, path: Path) -> str:
    """The output of `info`: a table for each part of the file."""
    space = manifold.space
    values = sum(t.numel() for t in manifold.coder.state_dict().values())
    blocks = [
        format_table(
            [
                ("file", f"{path.name}, {path.stat().st_size / 1e6:.2f} MB"),
                ("latent space", f"{space.id}: {space.channels} channels, 1 / {space.spatial_stride} of the pixels"),
                *((k.replace("_", " "), v) for k, v in manifold.coder.config().items()),
                ("values in all", values),
            ],
            "Shell-LCC manifold",
        )
    ]
    if manifold.calibration is None:
        blocks.append("Calibration\n  none: scores have no percentile and there is no band; the radius is the nominal 1")
    else:
        low, high = manifold.band
        blocks.append(
            format_table([("radius", manifold.radius), ("band (5-95 %)", f"{low:.4f} to {high:.4f}")], "Calibration")
        )
    if manifold.metrics:
        fit = manifold.metrics.get("fit", {})
        rows = metrics_rows(manifold.metrics) + [(f"fit: {k.replace('_', ' ')}", v) for k, v in fit.items()]
        blocks.append(format_table(rows, "Held-out figures"))
    if manifold.provenance:
        rows = [(k.replace("_", " "), _short(v)) for k, v in manifold.provenance.items() if v != []]
        blocks.append(format_table(rows, "Provenance"))
    return "\n\n".join(blocks)


def _short(value: object) -> object:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:SHOWN]))
        return shown + (f" and {len(value) - SHOWN} more" if len(value) > SHOWN else "")
    return value
