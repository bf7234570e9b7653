"""Rows of the report on the stack itself: reconstruction by the VAE, and the judge's readings of renders and samples."""

from dataclasses import dataclass

from torch import Tensor

from . import judge, statistics
from .captions import VALUES
from .clips import scene_of
from .jobs import Job, as_reading, gather, split_up
from .shell_lcc_rows import frechet_values
from .statistics import Estimate

KINDS = {
    "renders": ("renders", "test"),
    "reconstructions": ("reconstructions", "test"),
    "samples": ("samples", "test"),
    "samples, held-out combinations": ("samples", "unseen"),
}


@dataclass(frozen=True)
class KindRow:
    """The judge's readings of one kind of clip. right: attribute -> share classified correctly; scores, relative: see
    judge.Reading."""

    name: str
    right: dict[str, Estimate]
    scores: dict[str, Estimate]
    relative: dict[str, Estimate]
    frechet: Estimate


def jobs(count: int) -> dict[str, list[Job]]:
    """The jobs needed, by kind of clip, and by split the targets of Frechet distances."""
    out = {name: split_up(kind, split, count) for name, (kind, split) in KINDS.items()}
    return out | {split: split_up("siblings", split, count) for _, split in KINDS.values()}


def rows(results: dict, plan: dict[str, list[Job]], reference: dict[str, Tensor]) -> list[KindRow]:
    targets = {split: judge.FrechetTarget(gather(results, plan[split])) for _, split in KINDS.values()}
    out = []
    for name, (_, split) in KINDS.items():
        found = gather(results, plan[name])
        reading = as_reading(found, reference)
        n = len(reading.rigid)
        truth = [scene_of(split, i)[0].attributes for i in range(n)]
        values = frechet_values(found, targets[split])
        out.append(
            KindRow(
                name,
                {k: statistics.mean(reading.correct(truth, k).float()) for k in VALUES},
                {k: statistics.mean(v) for k, v in reading.scores(truth).items()},
                {k: statistics.mean(reading.relative(truth, k)) for k in judge.REFERENCE},
                statistics.of_pseudo_values(values, n),
            )
        )
    return out


def psnr_per_frame(results: dict, plan: dict[str, list[Job]]) -> list[float]:
    """PSNR in dB of each of the 17 frames of the reconstructions."""
    error = gather(results, plan["reconstructions"])["squared_error"]
    return (-10 * error.mean(dim=0).log10()).tolist()


def followed(found: list[KindRow]) -> dict[str, float]:
    """Per attribute, the share of samples classified correctly over that of reconstructions."""
    by_name = {row.name: row.right for row in found}
    return {k: by_name["samples"][k].mean / by_name["reconstructions"][k].mean for k in VALUES}


def table(found: list[KindRow]) -> str:
    """As markdown, one column per kind."""
    lines = ["| | chance | " + " | ".join(row.name for row in found) + " | samples / reconstructions |"]
    lines.append("|---|" + "---|" * (len(found) + 2))
    share = followed(found)
    for k, values in VALUES.items():
        cells = [row.right[k].text(2) for row in found]
        lines.append(f"| {k}, read right | {1 / len(values):.2f} | " + " | ".join(cells) + f" | {share[k]:.2f} |")
    for k in found[0].scores:
        lines.append(f"| {k} | | " + " | ".join(row.scores[k].text(2) for row in found) + " | |")
    for k in judge.REFERENCE:
        lines.append(f"| {k}, relative to renders | | " + " | ".join(row.relative[k].text(2) for row in found) + " | |")
    lines.append("| Frechet distance to renders | | " + " | ".join(row.frechet.text(2) for row in found) + " | |")
    return "\n".join(lines)


def as_json(found: list[KindRow]) -> list[dict]:
    def plain(figures: dict[str, Estimate]) -> dict:
        return {k: [e.mean, e.half] for k, e in figures.items()}

    return [
        {
            "name": row.name,
            "n": row.frechet.n,
            "right": plain(row.right),
            "scores": plain(row.scores),
            "relative": plain(row.relative),
            "frechet": [row.frechet.mean, row.frechet.half],
        }
        for row in found
    ]
