"""Rows of the rewards' report for Shell-LCC guidance at few steps (see `few_steps`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import few_steps, judge, statistics
from .shell_lcc_rows import frechet_values
from .statistics import Estimate


@dataclass(frozen=True)
class GuidanceRow:
    """One method at one cfg and number of steps. error, outside, psnr, overall, frechet: figures; changes: against none,

    paired by prompt and seed; None for none itself.
    """

    cfg: float
    steps: int
    method: str
    figures: dict[str, Estimate]
    changes: dict[str, Estimate] | None


FIGURES = ("error", "psnr", "outside", "overall")


def rows(tables: dict[float, dict[str, Tensor]], siblings: dict[str, Tensor]) -> list[GuidanceRow]:
    """tables: cfg -> the gathered tables of few_steps; siblings: readings of other renders of the same captions."""
    target, out = judge.FrechetTarget(siblings), []
    for cfg, found in tables.items():
        for steps in few_steps.STEPS:
            base = _values(found, f"{steps}/none", target)
            for method in few_steps.METHODS:
                values = _values(found, f"{steps}/{method}", target)
                n = len(found[f"{steps}/none/error"])
                figures = {k: _estimate(k, v, n) for k, v in values.items()}
                changes = {k: _estimate(k, v - base[k], n) for k, v in values.items()}
                out.append(GuidanceRow(cfg, steps, method, figures, None if method == "none" else changes))
    return out


def _values(found: dict[str, Tensor], key: str, target: judge.FrechetTarget) -> dict[str, Tensor]:
    values = {k: found[f"{key}/{k}"].double() for k in FIGURES}
    reading = {k.removeprefix(f"{key}/reading."): v for k, v in found.items() if k.startswith(f"{key}/reading.")}
    return values | {"frechet": frechet_values(reading, target)}


def _estimate(name: str, values: Tensor, n: int) -> Estimate:
    return statistics.of_pseudo_values(values, n) if name == "frechet" else statistics.mean(values)


def table(found: Sequence[GuidanceRow]) -> str:
    """As markdown: figures without guidance, and the changes by each method."""
    lines = [
        "| cfg | steps | method | latent error | PSNR, dB | tokens outside the band | judge, overall | Frechet distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        if r.changes is None:
            f = r.figures
            cells = [
                f["error"].text(),
                f["psnr"].text(2),
                f"{100 * f['outside'].mean:.1f} %",
                f["overall"].text(),
                f["frechet"].text(2),
            ]
        else:
            c = r.changes
            cells = [_change(c["error"]), _change(c["psnr"], 2), f"{100 * r.figures['outside'].mean:.1f} %"]
            cells += [_change(c["overall"]), _change(c["frechet"], 2)]
        lines.append(f"| {r.cfg:g} | {r.steps} | {r.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _change(e: Estimate, digits: int = 3) -> str:
    text = f"{e.mean:+.{digits}f} ± {e.half:.{digits}f}"
    return f"**{text}**" if abs(e.mean) > e.half else text


def gather(results: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tables of several jobs, one after another."""
    return {k: torch.cat([r[k] for r in results]) for k in results[0]}
