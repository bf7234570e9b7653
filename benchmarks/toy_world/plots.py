"""Plots of the report."""

from pathlib import Path

import matplotlib
import numpy as np

from .captions import VALUES

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen first)

PANELS = {
    "outside": "tokens outside the band",
    "laplacian": "Laplacian variance / reconstruction",
    "high_frequency": "high-frequency share / reconstruction",
    "frechet": "Frechet distance to renders",
    "overall": "oracle, overall",
}
GREY, BLUE, ORANGE = "0.55", "tab:blue", "tab:orange"


def stack(rows, path: Path) -> None:
    """Share of attributes that the judge classifies correctly, by kind of clip."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    place = np.arange(len(VALUES))
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        mean, half = zip(*((row.right[k].mean, row.right[k].half) for k in VALUES), strict=True)
        axes.bar(place + (i - (len(rows) - 1) / 2) * width, mean, width, yerr=half, label=row.name, capsize=2)
    for x, values in zip(place, VALUES.values(), strict=True):
        axes.hlines(1 / len(values), x - 0.45, x + 0.45, colors="black", linestyles="dotted")
    axes.set(xticks=place, xticklabels=list(VALUES), ylabel="read right", ylim=(0, 1.05))
    axes.legend(ncols=2, fontsize="small", loc="lower left")
    _save(figure, path)


def shell_lcc(rows, path: Path) -> None:
    """One panel per figure, one line per setting; the shaded band is the interval without guidance."""
    size = (3.1 * len(PANELS), 0.32 * len(rows) + 1.2)
    figure, axes = plt.subplots(1, len(PANELS), figsize=size, sharey=True, layout="constrained")
    place = np.arange(len(rows))[::-1]
    for ax, (key, title) in zip(axes, PANELS.items(), strict=True):
        base = rows[0].figures[key]
        ax.axvspan(base.low, base.high, color=GREY, alpha=0.3)
        for y, row in zip(place, rows, strict=True):
            e = row.figures[key]
            colour = GREY if row.name in ("none", "random push") else ORANGE if "minimise" in row.name else BLUE
            ax.errorbar(e.mean, y, xerr=e.half, fmt="o", color=colour, capsize=2, markersize=4)
        ax.set_title(title, fontsize="small")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(place, [row.name for row in rows])
    _save(figure, path)


def prism(levels, rows, path: Path) -> None:
    """Left: accuracy by noise level and scorer. Right: gain over a random seed by cost, one line per choice, points by N."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in sorted({n for level in levels for n in level.accuracy}):
        seen = [(level.sigma, level.accuracy[name]) for level in levels[:-1] if name in level.accuracy]
        left.errorbar(
            [s for s, _ in seen], [e.mean for _, e in seen], yerr=[e.half for _, e in seen], label=name, capsize=2, marker="o",
            markersize=3, linestyle="dotted" if "judge" in name else "solid",
        )  # fmt: skip
    left.axhline(0.5, color=GREY, linewidth=1)
    left.set(xlabel="sigma", ylabel="pairs of seeds ordered right", xlim=(1.0, 0.2))
    left.legend(fontsize="small")
    for name in dict.fromkeys(r.name for r in rows if r.name != "random seed" and not r.name.startswith("mean")):
        seen = [r for r in rows if r.name == name]
        right.errorbar(
            [r.evaluations / 40 for r in seen], [r.gain.mean for r in seen], yerr=[r.gain.half for r in seen], label=name,
            capsize=2, marker="o", markersize=4,
        )  # fmt: skip
        for r in seen:
            right.annotate(str(r.size), (r.evaluations / 40, r.gain.mean), fontsize="x-small")
    right.axhline(0, color=GREY, linewidth=1)
    right.set(xlabel="cost, in runs of one clip", ylabel="oracle score over a random seed's", xscale="log")
    right.legend(fontsize="small")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
