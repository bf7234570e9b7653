"""Tables of the results of benchmarks.geometry.measure, as markdown and JSON.

python -m benchmarks.geometry.tables --rows ROWS.jsonl ... --output_dir benchmarks/geometry/results
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.geometry.record import CONSISTENT, UNDETERMINED

from .measure import RIGID, STILL

SCORERS = {
    "epipolar_dpo": "Epipolar-DPO as published",
    "3dcs_mse": "3DCS, true geometry (MSE term)",
    "3dcs_dssim": "3DCS, true geometry (MSE + DSSIM)",
    "dense": "ours, dense, true geometry",
    "tracks": "ours, no weights",
}
SIZES = {"room": "832x480, 49 frames (room.py)", "toy": "64x64, 17 frames (toy world)"}


def errors(row: dict, scorer: str) -> float:
    """A clip's error; infinite where it is undetermined, so that the clip never wins. Epipolar-DPO's -1 is undetermined."""
    value = row[scorer]
    return math.inf if value is None or (scorer == "epipolar_dpo" and value < 0) else value


def share(answers: list[bool]) -> dict:
    """{"right": number of true answers, "of": number of answers}."""
    return {"right": sum(answers), "of": len(answers)}


def rigid_wins(scenes: dict[int, dict[str, dict]], kind: str, scorer: str) -> dict:
    """How often a scene's rigid clip has a smaller error than its corrupted version of this kind."""
    pairs = [(s[RIGID], s[kind]) for s in scenes.values() if RIGID in s and kind in s]
    return share([errors(a, scorer) < errors(b, scorer) for a, b in pairs])


def still_wins(scenes: dict[int, dict[str, dict]], kind: str, scorer: str) -> dict:
    """How often a clip with little or no parallax has a smaller error than a rigid moving clip of any scene."""
    rigid = [s[RIGID] for s in scenes.values() if RIGID in s]
    return share([errors(s[kind], scorer) < errors(r, scorer) for s in scenes.values() if kind in s for r in rigid])


def gate(scenes: dict[int, dict[str, dict]], scorer: str) -> dict[str, dict]:
    """How often the scorer's measurability gate is right: moving clips pass, clips without parallax are undetermined."""
    rows = [row for s in scenes.values() for row in s.values()]
    judged = [r[f"{scorer}_verdict"] != UNDETERMINED for r in rows if r["kind"] not in STILL]
    out = {"moving clips are judged": share(judged)}
    for kind in ("static", "zoom", "pan", "slow"):
        answers = [r[f"{scorer}_verdict"] == UNDETERMINED for r in rows if r["kind"] == kind]
        if answers:
            out[f"{kind} clips are undetermined"] = share(answers)
    return out


def verdicts(scenes: dict[int, dict[str, dict]], kind: str, scorer: str) -> dict:
    """How often clips of a kind are found consistent, of those with a verdict."""
    found = [s[kind][f"{scorer}_verdict"] for s in scenes.values() if kind in s]
    return share([v == CONSISTENT for v in found if v != UNDETERMINED])


def pointing(scenes: dict[int, dict[str, dict]], scorer: str) -> dict:
    """How often an error map's maximum lies on the drifting box, over frames in which it is visible."""
    rows = [row for s in scenes.values() for row in s.values() if f"{scorer}_points" in row]
    return share([hit for row in rows for hit in row[f"{scorer}_points"] if hit is not None])


def summarise(rows: list[dict]) -> dict:
    """All figures of one world."""
    scenes: dict[int, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        scenes[row["seed"]][row["kind"]] = row
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    spoilt = [k for k in kinds if k not in (RIGID, *STILL)]
    still = [k for k in kinds if k in STILL]
    boxes = [row["object_share"] for row in rows if "object_share" in row]
    return {
        "scenes": len(scenes), "clips": len(rows),
        "rigid wins": {s: {k: rigid_wins(scenes, k, s) for k in spoilt} for s in SCORERS},
        "still wins": {s: {k: still_wins(scenes, k, s) for k in still} for s in SCORERS},
        "gate": {s: gate(scenes, s) for s in ("tracks", "dense")},
        "consistent": {s: {k: verdicts(scenes, k, s) for k in (RIGID, *spoilt)} for s in ("tracks", "dense")},
        "pointing": {s: pointing(scenes, s) for s in ("tracks", "dense")},
        "object share": sum(boxes) / len(boxes) if boxes else math.nan,
    }  # fmt: skip


def cell(found: dict) -> str:
    """Like "0.98 (39/40)"; four digits without the counts from 1000 answers on."""
    if not found["of"]:
        return ""
    value = found["right"] / found["of"]
    return f"{value:.2f} ({found['right']}/{found['of']})" if found["of"] < 1000 else f"{value:.4f}"


def table(title: str, figures: dict[str, dict[str, dict]]) -> str:
    """Markdown with one row per scorer and one column per kind."""
    kinds = list(next(iter(figures.values())))
    lines = [f"| {title} | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    lines += [f"| {SCORERS[s]} | " + " | ".join(cell(row[k]) for k in kinds) + " |" for s, row in figures.items()]
    return "\n".join(lines)


def compose(worlds: dict[str, dict]) -> str:
    """The report as markdown."""
    parts = [
        "# Geometry scorers, measured\n",
        "`python -m benchmarks.geometry.measure`, then `python -m benchmarks.geometry.tables`. Ground truth is the "
        "renderer's. Errors are compared, lower is better; a clip whose verdict is undetermined never wins. 3DCS is given "
        "true depth and poses; its LPIPS weights were not available, so its MSE term is shown alone and with DSSIM. warp: "
        "root mean square displacement in pixels at 480 lines (at 64x64 the toy world's strength); walls: metres by which "
        "they swing; morph: metres by which textures flow; box: metres by which a box slides over the clip. Constants were "
        "tuned by hand on seeds 0 to 35 of room.py (tracks) and 0 to 9 of the toy world (dense), none of which is used here. "
        "In the toy world slow is the lower of its two speeds, a third of the higher, and not 15 %; Epipolar-DPO finds "
        "too few matches in its frames to give a score. Speed: tracks_speed.md and dense_speed.md.\n",
    ]
    for name, found in worlds.items():
        parts += [
            f"## {SIZES[name]}\n",
            f"{found['clips']} clips of {found['scenes']} scenes.\n",
            "How often the rigid clip beats its corrupted version on the same camera path:\n",
            table("", found["rigid wins"]) + "\n",
            "How often a clip with little or no parallax beats a rigid moving clip of any scene (all pairs):\n",
            table("", found["still wins"]) + "\n",
            "How often the verdict is consistent, of the clips that have a verdict:\n",
            table("", found["consistent"]) + "\n",
            "Measurability gate: " + "; ".join(
                f"{SCORERS[s]}: " + ", ".join(f"{k} {cell(v)}" for k, v in row.items()) for s, row in found["gate"].items()
            ) + ".\n",
            "Pointing game: how often the error map's maximum lies on the drifting box (which covers "
            f"{found['object share']:.1%} of the frame): "
            + ", ".join(f"{SCORERS[s]} {cell(v)}" for s, v in found["pointing"].items()) + ".\n",
        ]  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.geometry.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", required=True, metavar="ROWS.jsonl")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for path in args.rows for line in path.read_text().splitlines()]
    worlds = {name: summarise(found) for name in SIZES if (found := [r for r in rows if r["world"] == name])}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in (("geometry.md", compose(worlds)), ("geometry.json", json.dumps(worlds, indent=1) + "\n")):
        write_atomic(args.output_dir / name, lambda partial, text=text: Path(partial).write_text(text, encoding="utf-8"))
    print(compose(worlds))


if __name__ == "__main__":
    main()
