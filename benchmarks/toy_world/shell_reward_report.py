"""Tables and curves of `shell_reward_rows`.

    python -m benchmarks.toy_world.shell_reward_report outputs/toy_world/shell_reward/shell_reward.json --output_dir results

writes shell_reward.md, tables only, and shell_reward.png, the figures over training steps, into the folder.
"""

import json
from pathlib import Path

import matplotlib

from benchmarks.command_line import make_parser
from trainers.kernels.files.atomic import write_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (the backend is chosen first)

# Figure -> (title, digits, whether a change against the base).
FIGURES = {
    "violation": ("violation", 3, False), "outside": ("outside", 3, False), "distance": ("distance", 2, False),
    "frechet_change": ("Frechet, change", 1, True), "overall": ("judge, change", 3, True),
    "alignment": ("alignment, change", 3, True), "laplacian_ratio": ("Laplacian", 2, False),
    "high_frequency_ratio": ("high freq.", 2, False), "latent.laplacian_ratio": ("latent Laplacian", 2, False),
}  # fmt: skip
PANELS = ("violation", "frechet_change", "overall", "latent.laplacian_ratio")


def table(rows: list[dict], key: str) -> str:
    """One line for each arm and step of clips sampled as `key` says; bold: changes whose interval leaves out zero."""
    lines = ["| arm | step | " + " | ".join(t for t, _, _ in FIGURES.values()) + " |", "|---|---|" + "---|" * len(FIGURES)]
    for row in rows:
        if key in row:
            cells = [_cell(*row[key][k], digits, change) for k, (_, digits, change) in FIGURES.items()]
            lines.append(f"| {row['arm']} | {row['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def predictions(rows: list[dict]) -> str:
    """Mean distances of one-step predictions: of the base, and of every arm at its last step."""
    last = {r["arm"]: r for r in rows}
    levels = list(rows[0]["predictions"]["noise"])
    lines = ["| arm, step | " + " | ".join(f"{kind}, {s}" for kind in ("noise", "noised") for s in levels) + " |"]
    lines.append("|---|" + "---|" * 2 * len(levels))
    for r in last.values():
        cells = [f"{r['predictions'][kind][s]:.2f}" for kind in ("noise", "noised") for s in levels]
        lines.append(f"| {r['arm']}, {r['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], sampling: dict, path: Path) -> None:
    """A row of panels for each way of sampling, a line for each arm."""
    keys = list(sampling)
    figure, axes = plt.subplots(len(keys), len(PANELS), figsize=(13, 3 * len(keys)), layout="constrained", squeeze=False)
    for line, key in zip(axes, keys, strict=True):
        base = next(r for r in rows if r["arm"] == "base")
        for ax, name in zip(line, PANELS, strict=True):
            for arm in dict.fromkeys(r["arm"] for r in rows if r["arm"] != "base"):
                seen = [base, *(r for r in rows if r["arm"] == arm and key in r)]
                steps = [max(4, r["step"]) for r in seen]
                mean, half = zip(*(r[key][name] for r in seen), strict=True)
                ax.errorbar(steps, mean, yerr=half, label=arm, marker="o", markersize=3, capsize=2)
            ax.axhline(base[key][name][0], color="0.6", linewidth=1)
            ax.set_xscale("log", base=2)
            ax.set_title(f"{FIGURES[name][0]}; {sampling[key][0]} steps, cfg {sampling[key][1]:g}", fontsize="small")
            if name == "frechet_change":
                ax.set_yscale("symlog", linthresh=5)
    axes[-1][0].set_xlabel("training steps (leftmost: the base)")
    axes[0][-1].legend(fontsize="x-small")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def markdown(found: dict) -> str:
    """The tables."""
    s, rows = found["settings"], found["rows"]
    ways = {k: f"{n} steps, cfg {cfg:g}" for k, (n, cfg) in s["sampling"].items()}
    parts = [
        f"{s['clips']} held-out captions, one seed each; LoRA of rank {s['rank']}, batch {s['batch']}, AdamW "
        f"{s['learning_rate']:g}, sigma {s['sigma'][0]:g} to {s['sigma'][1]:g}, {s['training_captions']} training captions, "
        f"seed {s['seed']}. Manifold: band {s['band'][0]:.3f} to {s['band'][1]:.3f}, radius {s['radius']:.3f}, tau "
        f"{s['tau']:.3f}. Figures are the mean ± half of the 95 % interval; changes are paired with the base, ratios are of "
        "the base's. violation: mean distance of tokens outside the band.",
        "## Useful windows, in steps",
        "| arm | " + " | ".join(ways.values()) + " |\n|---|" + "---|" * len(ways) + "\n" + "\n".join(
            f"| {arm} | " + " | ".join(str(w[k]) for k in ways) + " |" for arm, w in found["windows"].items()
        ),
        *(f"## Clips of {way}\n\n{table(rows, key)}" for key, way in ways.items()),
        f"## Mean distance of one-step predictions without guidance, by start and sigma\n\n{predictions(rows)}",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _cell(mean: float, half: float, digits: int, change: bool) -> str:
    text = f"{mean:{'+' if change else ''}.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if change and abs(mean) > half else text


def main(argv=None) -> None:
    parser = make_parser("benchmarks.toy_world.shell_reward_report", __doc__)
    parser.add_argument("rows", type=Path, help="shell_reward.json")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    found = json.loads(args.rows.read_text(encoding="utf-8"))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    path = args.output_dir / "shell_reward.md"
    write_atomic(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))
    plot(found["rows"], found["settings"]["sampling"], args.output_dir / "shell_reward.png")


if __name__ == "__main__":
    main()
