"""Table rows for the held-out figures of a manifold."""

from ..running.output import format_value


def metrics_rows(metrics: dict) -> list[tuple[str, object]]:
    """(label, value) rows for `metrics`, the dict of kernels.shell_lcc.evaluation.evaluate; absent figures are left out."""
    rows: list[tuple[str, object]] = []
    if "tokens" in metrics:
        rows.append(("held-out", f"{metrics['tokens']} tokens of {metrics['clips']} clips"))
    d = metrics.get("distance", {})
    if d:
        rows.append(("distance mean", d["mean"]))
        rows.append(("distance p01 p05 p25", "  ".join(format_value(d[k]) for k in ("p01", "p05", "p25"))))
        rows.append(("distance median", d["median"]))
        rows.append(("distance p75 p95 p99", "  ".join(format_value(d[k]) for k in ("p75", "p95", "p99"))))
    if "reconstruction" in metrics:
        r = metrics["reconstruction"]
        rows.append(("reconstruction error", f"{format_value(r['mse'])}, {format_value(r['relative'])} of the variance"))
    if "codebook" in metrics:
        c = metrics["codebook"]
        rows.append(("codebook perplexity", f"{c['perplexity']:.1f} of {c['bases']} bases, {c['dead']} dead"))
    for key, label in (
        ("auroc_clean_over_blurred", "AUROC clean over blurred"),
        ("auroc_noisy_over_clean", "AUROC noisy over clean"),
        ("ordered", "clips blurred < clean < noisy"),
        ("outside_band", "outside the 5-95 % band"),
    ):
        if metrics.get(key) is not None:
            rows.append((label, metrics[key]))
    return rows
