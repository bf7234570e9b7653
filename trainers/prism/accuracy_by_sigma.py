"""Pairwise accuracy and calibration of a PRISM head on preferences, by dimension and noise level."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

import torch
from torch import Tensor

from ..kernels.prism import accuracy
from ..kernels.prism.preference_loss import TIE
from ..scorers.prism_network import SIGMAS, Scorer
from .data import MISSING, SAME_SIGMA, PreferenceData, Row, clips_at_sigma


@torch.no_grad()
def differences(scorer: Scorer, data: PreferenceData, rows: Sequence[Row], sigma: float, batch: int, seed: int = 0) -> Tensor:
    """Score differences a - b [N, dimensions] of rows at a noise level, on the CPU. batch: clips scored at a time.

    All runs of a prompt get the same noise, so each is scored once, however many rows it is in. Raises PrismDataError
    where sizes differ or a run has no latent for the noise level.
    """
    pairs = [clips_at_sigma(data, row, sigma) for row in rows]
    position = {clip: i for i, clip in enumerate(dict.fromkeys(clip for pair in pairs for clip in pair))}
    # The latents of a batch must have one shape.
    order = sorted(position, key=lambda clip: clip.shape)
    scores: list[Tensor | None] = [None] * len(position)
    for _, group in groupby(order, key=lambda clip: clip.shape):
        group = list(group)
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            x = torch.stack([clip.state(data, sigma, seed) for clip in part])
            words = [data.texts[clip.prompt] for clip in part]
            found = scorer(x, torch.full((len(part),), sigma), words).float().cpu()
            for clip, score in zip(part, found, strict=True):
                scores[position[clip]] = score
    return torch.stack([scores[position[a]] - scores[position[b]] for a, b in pairs])


def accuracies(
    scorer: Scorer,
    data: PreferenceData,
    rows: Sequence[Row],
    tie_rows: Sequence[Row],
    sigmas: Sequence[float],
    batch: int,
    seed: int = 0,
    known_thresholds: dict[str, float] | None = None,
) -> dict:
    """Accuracy with and without ties and calibration error of `rows`, per dimension and noise level.

    The tie threshold of a dimension is fitted on `tie_rows` over all sigmas; where these have no ties it is taken from
    `known_thresholds`, else 0. batch: clips at a time; seed: of the noise. Returns
    {"thresholds": {dimension: float}, "table": [{dimension, sigma, pairs, decided, without_ties, with_ties, calibration}]}
    """
    training = scorer.head.training
    scorer.head.train(False)
    fitted = {}
    if tie_rows:
        fitted = {s: (differences(scorer, data, tie_rows, s, batch, seed), data.outcomes(tie_rows)) for s in sigmas}
    thresholds, table = {}, []
    for d, name in enumerate(data.dimensions):
        pooled = [(diff[:, d][o[:, d] != MISSING], o[:, d][o[:, d] != MISSING]) for diff, o in fitted.values()]
        diff, outcome = (torch.cat(x) for x in zip(*pooled, strict=True)) if pooled else (torch.empty(0), torch.empty(0))
        has_ties = bool((outcome == TIE).any())
        thresholds[name] = accuracy.tie_threshold(diff, outcome) if has_ties else (known_thresholds or {}).get(name, 0.0)
    for s in sigmas:
        diff, outcome = differences(scorer, data, rows, s, batch, seed), data.outcomes(rows)
        for d, name in enumerate(data.dimensions):
            known = outcome[:, d] != MISSING
            found = accuracy.accuracy(diff[known, d], outcome[known, d], thresholds[name])
            error = accuracy.calibration_error(diff[known, d], outcome[known, d])
            entry = {k: v for k, v in asdict(found).items() if k != "threshold"}
            table.append({"dimension": name, "sigma": s, **entry, "calibration": error})
    scorer.head.train(training)
    return {"thresholds": thresholds, "table": table}


def measured_sigmas(
    data: PreferenceData, wanted: Sequence[float] | None, sigma_range: tuple[float, float] = (0.0, 1.0)
) -> list[float]:
    """The noise levels to measure at, descending: `wanted`, else those of the data or SIGMAS that are within sigma_range.

    Raises ValueError where none is.
    """
    low, high = sigma_range
    known = wanted or [s for s in data.sigmas() or SIGMAS if low - SAME_SIGMA <= s <= high + SAME_SIGMA]
    if not known:
        raise ValueError(f"--sigma_range {low:g} {high:g}: the runs have latents at sigma {data.sigmas()}; give --levels")
    return sorted(known, reverse=True)


def format_accuracies(found: dict) -> str:
    """The table of `accuracies` as text."""
    lines = [f"{'dimension':<16} {'sigma':>6} {'pairs':>6} {'without ties':>13} {'with ties':>10} {'calibration':>12}"]
    for row in found["table"]:
        cells = [f"{row[k]:.3f}" if row[k] is not None else "-" for k in ("without_ties", "with_ties", "calibration")]
        lines.append(
            f"{row['dimension']:<16} {row['sigma']:>6.3f} {row['pairs']:>6} {cells[0]:>13} {cells[1]:>10} {cells[2]:>12}"
        )
    return "\n".join(lines)
