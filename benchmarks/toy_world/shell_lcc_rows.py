"""Rows of the report for Shell-LCC: guidance compared with none, with a random push and with the released objective.

All settings sample the same held-out prompts (combinations of attributes no training caption has) with the same seeds.
Sharpness is relative to the VAE's reconstruction of a render of the same caption and scene, because guidance of latents
cannot restore detail that the VAE cannot decode.
"""

from dataclasses import dataclass

from torch import Tensor

from trainers.kernels.shell_lcc.manifold import ShellManifold

from . import judge, statistics
from .captions import VALUES
from .clips import scene_of
from .guidance import Guidance
from .jobs import DAMAGES, Job, as_reading, gather, split_up
from .statistics import Estimate

SPLIT = "unseen"
HEADLINE = {
    "none": None,
    "random push": Guidance("random"),
    "minimise (released objective)": Guidance("minimise"),
    "project": Guidance("project"),
    "band": Guidance("band"),
    "gradient": Guidance("gradient"),
}
SWEEP = {
    "project, strength 0.5": Guidance("project", 0.5),
    "project, first half": Guidance("project", end=0.5),
    "project, second half": Guidance("project", start=0.5),
    "project, sigma's radius": Guidance("project", target="predictions"),
}
# Measured with --extra only.
EXTRA = {"project, 2x2 patches": Guidance("project", patch=2)}
SETTINGS = HEADLINE | SWEEP | EXTRA
# One correction of damaged latents of renders.
REFINE_SETTINGS = {
    "none": None,
    "minimise (released objective)": Guidance("minimise"),
    "project": Guidance("project"),
}
REFINE_CLIPS = 32
# The node's default.
DEFAULT = "project"
COLUMNS = {
    "outside": "outside band",
    "distance": "distance",
    "laplacian": "Laplacian",
    "high_frequency": "high freq.",
    "frechet": "Frechet",
    "frechet_reconstructions": "Frechet to rec.",
    "alignment": "alignment",
    "sharpness": "sharpness",
    "smoothness": "smoothness",
    "dynamics": "dynamics",
    "rigidity": "rigidity",
    "overall": "overall",
    "change": "change",
}
TARGETS = {"frechet": "siblings", "frechet_reconstructions": "sibling reconstructions"}


@dataclass(frozen=True)
class SettingRow:
    """One setting. figures: column -> Estimate; against_base: the same for the change from no guidance."""

    name: str
    figures: dict[str, Estimate]
    against_base: dict[str, Estimate]


def jobs(count: int, settings: dict[str, Guidance | None]) -> dict[str, list[Job]]:
    """The jobs needed, by setting; also "scene" (reconstructions) and the targets of Frechet distances."""
    out = {name: split_up("samples", SPLIT, count, guidance) for name, guidance in settings.items()}
    out["scene"] = split_up("reconstructions", SPLIT, count)
    return out | {kind: split_up(kind, SPLIT, count) for kind in TARGETS.values()}


def refine_jobs() -> dict[tuple[str, str], list[Job]]:
    """The jobs needed, by damage and setting."""
    return {
        (damage, name): split_up(f"refined {damage}", SPLIT, REFINE_CLIPS, guidance)
        for damage in DAMAGES
        for name, guidance in REFINE_SETTINGS.items()
    }


def refine_rows(
    results: dict, plan: dict, scene_jobs: list[Job], target_jobs: list[Job], manifold: ShellManifold
) -> list[dict]:
    """One dict per damage and setting, with Estimates named as in `rows`, and the change against "none"."""
    scene = {k: v[:REFINE_CLIPS] for k, v in gather(results, scene_jobs).items()}
    target = judge.FrechetTarget(gather(results, target_jobs))
    out = []
    for (damage, name), part in plan.items():
        found = gather(results, part)
        base = gather(results, plan[damage, "none"])
        mine, before = (frechet_values(x, target) for x in (found, base))
        d = manifold.distance(found["z"])
        figures = {
            "outside": statistics.mean(manifold.outside_band(d).float().mean(dim=(1, 2, 3))),
            "laplacian": statistics.mean(found["laplacian"] / scene["laplacian"]),
            "high_frequency": statistics.mean(found["high_frequency"] / scene["high_frequency"]),
            "frechet_reconstructions": statistics.of_pseudo_values(mine, REFINE_CLIPS),
            "frechet_change": statistics.of_pseudo_values(mine - before, REFINE_CLIPS),
        }
        out.append({"damage": damage, "name": name, "figures": figures})
    return out


def refine_table(found: list[dict]) -> str:
    """As markdown."""
    shown = ("outside", "laplacian", "high_frequency", "frechet_reconstructions", "frechet_change")
    titles = [COLUMNS.get(k, "its change") for k in shown]
    lines = ["| latent | correction | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(shown)]
    for row in found:
        cells = [row["figures"][k].text(2 if "frechet" in k else 3) for k in shown]
        lines.append(f"| {row['damage']} | {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rows(results: dict, plan: dict[str, list[Job]], manifold: ShellManifold, reference: dict[str, Tensor]) -> list[SettingRow]:
    """reference: the judge's mean sharpness of renders, as `Judge.reference`."""
    scene = gather(results, plan["scene"])
    truth = [scene_of(SPLIT, i)[0].attributes for i in range(len(scene["laplacian"]))]
    targets = {k: judge.FrechetTarget(gather(results, plan[kind])) for k, kind in TARGETS.items()}
    settings = {name: gather(results, plan[name]) for name in plan if name in SETTINGS}
    base = settings["none"]
    values = {name: per_clip(found, base, scene, truth, manifold, reference) for name, found in settings.items()}
    out = []
    for name, found in settings.items():
        figures = {k: statistics.mean(v) for k, v in values[name].items()}
        change = {k: statistics.difference(v, values["none"][k]) for k, v in values[name].items()}
        for k, target in targets.items():
            mine, others = (frechet_values(x, target) for x in (found, base))
            figures[k] = statistics.of_pseudo_values(mine, len(truth))
            change[k] = statistics.of_pseudo_values(mine - others, len(truth))
        out.append(SettingRow(name, figures, change))
    return out


def per_clip(found, base, scene, truth, manifold: ShellManifold, reference) -> dict[str, Tensor]:
    """All figures but the Frechet distances, [N] each."""
    d = manifold.distance(found["z"])
    reading = as_reading(found, reference)
    return {
        "outside": manifold.outside_band(d).float().mean(dim=(1, 2, 3)),
        "distance": d.mean(dim=(1, 2, 3)),
        "laplacian": found["laplacian"] / scene["laplacian"],
        "high_frequency": found["high_frequency"] / scene["high_frequency"],
        **reading.scores(truth),
        "change": (found["z"] - base["z"]).flatten(1).norm(dim=1) / base["z"].flatten(1).norm(dim=1),
        **{f"right.{k}": right(reading, truth, k) for k in VALUES},
    }


def right(reading: judge.Reading, truth, attribute: str) -> Tensor:
    """[M], 1 where the attribute is classified correctly and 0 elsewhere, over clips that have it."""
    return reading.correct(truth, attribute).float()


def frechet_values(found: dict[str, Tensor], target: judge.FrechetTarget) -> Tensor:
    """Jackknife pseudo-values of the Frechet distance of N clips."""
    x = target.normalise(judge.signature(found))
    return statistics.pseudo_values(lambda index: target.distance(x[index]), len(x))


def table(found: list[SettingRow]) -> str:
    """The settings as markdown: figures with 95% intervals."""
    shown = ("outside", "laplacian", "high_frequency", "frechet", "overall", "change")
    lines = ["| guidance | " + " | ".join(COLUMNS[k] for k in shown) + " |", "|---|" + "---|" * len(shown)]
    for row in found:
        lines.append(f"| {row.name} | " + " | ".join(row.figures[k].text() for k in shown) + " |")
    return "\n".join(lines)


def change_table(found: list[SettingRow]) -> str:
    """Changes against no guidance, paired by prompt and seed, as markdown."""
    shown = [k for k in COLUMNS if k not in ("change", "distance")]
    lines = ["| guidance | " + " | ".join(COLUMNS[k] for k in shown) + " |", "|---|" + "---|" * len(shown)]
    for row in found:
        if row.name == "none":
            continue
        cells = []
        for k in shown:
            e = row.against_base[k]
            sure = "**" if abs(e.mean) > e.half else ""
            cells.append(f"{sure}{e.mean:+.3f} ± {e.half:.3f}{sure}")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(found: list[SettingRow], default: str) -> str:
    """One sentence that compares the default's Frechet distance with those of no guidance and of plain minimisation."""
    by_name = {row.name: row.figures["frechet"] for row in found}
    mine = by_name[default]
    parts = []
    for other in ("none", "minimise (released objective)"):
        theirs = by_name[other]
        word = "lower than" if mine.mean < theirs.mean else "higher than"
        apart = "intervals apart" if mine.apart_from(theirs) else "intervals overlap"
        parts.append(f"{word} with {other} ({theirs.text(2)}; {apart})")
    return f"Frechet distance with the default, {default}: {mine.text(2)}, " + " and ".join(parts) + "."


def as_json(found: list[SettingRow]) -> list[dict]:
    def plain(figures: dict[str, Estimate]) -> dict:
        return {k: [e.mean, e.half] for k, e in figures.items()}

    return [
        {"name": r.name, "n": r.figures["outside"].n, "figures": plain(r.figures), "against_base": plain(r.against_base)}
        for r in found
    ]


def sigma_table_jobs(count: int) -> list[Job]:
    """Predictions for `count` held-out latents at every sampling sigma."""
    return split_up("predictions", "bundled", count)
