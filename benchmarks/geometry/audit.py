"""Audit of the geometry scorers: corrupted scenes, cheats, clips without depth and nuisances (cheats.py), as rows and tables.

    python -m benchmarks.geometry.audit rows --seeds 1000 1060 --output rows.jsonl
    python -m benchmarks.geometry.audit tables --rows rows.jsonl ... --output_dir benchmarks/geometry/results

`rows` scores every kind of every scene by point tracks (ours), by Epipolar-DPO as published and by VideoGPA's 3DCS with the
renderer's depth and poses at half of the resolution (MSE + DSSIM: its LPIPS weights were not available); `--backends` scores
by both trackers. Clips that have a row are not scored again. A clip whose verdict is undetermined never wins. Intervals are
Wilson's, 95 %."""

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.geometry import tracks
from trainers.kernels.geometry.record import CONSISTENT, INCONSISTENT, UNDETERMINED
from trainers.kernels.geometry.views import Views

from . import cheats, measure, published, room

SCORERS = {"ours": "ours, no weights", "epipolar_dpo": "Epipolar-DPO as published", "3dcs": "3DCS, true geometry"}
# Kinds for which the depth and poses of the rigid clip, or of the rendered scene, are what a perfect geometry model would
# find.
NO_GEOMETRY = ("dissolve", "cut", "still", "cards", "garbage")
# Of a row, what audit.json keeps.
KEPT = (
    "seed", "kind", "verdict", "ours", "raw_error", "epipolar_dpo", "3dcs", "torch_verdict", "residual", "noise", "moving",
    "parallax", "unexplained", "layers", "replaced", "exchanged", "sudden", "coverage", "lost",
)  # fmt: skip
AUDITED = (
    "static", "slow", "still slides 20", "still slides and zooms", "still tilts", "cards", "turn 2.7", "garbage between keys",
    "melt 20", "boil 20", "swap", "box jumps 0.5",
)  # fmt: skip


def score(kind: str, clip: room.Clip, backends: bool) -> dict:
    """Errors (lower is better, null where a scorer has none), verdict and measurements of one clip."""
    start = time.perf_counter()
    record = tracks.score_clip(clip.frames, "opencv", pictures=False).record
    row = {
        "ours": None if record.verdict == UNDETERMINED else record.error, "verdict": record.verdict, "reason": record.reason,
        "score": record.score, "raw_error": record.error, "seconds": time.perf_counter() - start,
        **{k: v for k, v in record.measurements.items() if k != "error"},
    }  # fmt: skip
    found = published.epipolar_dpo(clip.frames)
    row["epipolar_dpo"] = None if found < 0 else found
    row["3dcs"] = None
    if not kind.startswith(NO_GEOMETRY):
        row["3dcs"] = measure.released(halved(measure.views_of(clip.frames, clip.depth, clip.K, clip.world_to_camera)))[1]
    if backends:
        other = tracks.score_clip(clip.frames, "torch", pictures=False).record
        row |= {"torch_verdict": other.verdict, "torch_error": other.error}
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}


def halved(views: Views) -> Views:
    """Views at half of the resolution: 416x240 are about as many pixels as half of VideoGPA's 518x518, in a quarter of the
    time."""
    images = F.avg_pool2d(views.images.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).contiguous()
    K = views.K.clone()
    # Centres of pixels are at integers, and every second pixel's depth is kept.
    K[:, :2] /= 2
    return replace(views, images=images, depth=views.depth[:, ::2, ::2].contiguous(), K=K)


def make_rows(args: argparse.Namespace) -> None:
    done = defaultdict(set)
    if args.output.exists():
        for line in args.output.read_text().splitlines():
            row = json.loads(line)
            done[row["seed"]].add(row["kind"])
    kinds = args.kinds or cheats.KINDS
    with tqdm(total=len(kinds) * (args.seeds[1] - args.seeds[0]), unit="clip") as bar, open(args.output, "a") as f:
        for seed in range(*args.seeds):
            wanted = set(kinds) - done[seed]
            bar.update(len(kinds) - len(wanted))
            for kind, clip in cheats.clips(seed, wanted, frames=args.frames) if wanted else ():
                f.write(json.dumps({"seed": seed, "kind": kind, **score(kind, clip, args.backends)}) + "\n")
                f.flush()
                bar.update(1)


def rounded(value):
    """A figure with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def error(row: dict, scorer: str) -> float:
    return math.inf if row[scorer] is None else row[scorer]


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    p, n = right / of, of
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def share(answers: list[bool]) -> str:
    """Like "0.95 [0.84, 0.99]" with the Wilson interval; empty without answers."""
    if not answers:
        return ""
    low, high = wilson(sum(answers), len(answers))
    return f"{sum(answers) / len(answers):.2f} [{low:.2f}, {high:.2f}]"


def pooled(value: list[bool]) -> str:
    """A share over all pairs of scenes, which are not independent: no interval."""
    return f"{sum(value) / len(value):.3f}" if value else ""


def rigid_wins(scenes: dict, kind: str, scorer: str) -> list[bool]:
    """Whether a scene's rigid clip has a smaller error than its clip of this kind; a tie of two undetermined ones is no
    win."""
    pairs = [(s["rigid"], s[kind]) for s in scenes.values() if kind in s and "rigid" in s]
    if scorer == "3dcs":
        # There is no true geometry of this kind.
        pairs = [(a, b) for a, b in pairs if b[scorer] is not None]
    known = [(a, b) for a, b in pairs if scorer == "ours" or a[scorer] is not None or b[scorer] is not None]
    return [error(a, scorer) < error(b, scorer) for a, b in known]


def beats_rigid(scenes: dict, kind: str, scorer: str) -> list[bool]:
    """Whether a clip of this kind has a smaller error than a rigid moving clip, for all pairs of scenes."""
    rigid = [s["rigid"] for s in scenes.values() if "rigid" in s]
    clips = [s[kind] for s in scenes.values() if kind in s]
    if scorer != "ours" and all(c[scorer] is None for c in clips):
        return []
    return [error(c, scorer) < error(r, scorer) for c in clips for r in rigid]


def counted(answers: list[bool]) -> str:
    """`share` with the numbers behind it; empty without answers."""
    return f"{share(answers)} ({sum(answers)} of {len(answers)})" if answers else ""


def verdicts(rows: list[dict]) -> str:
    found = Counter(r["verdict"] for r in rows)
    return " / ".join(str(found[v]) for v in (CONSISTENT, INCONSISTENT, UNDETERMINED))


def nuisance(scenes: dict, kind: str) -> dict:
    """Verdicts of a nuisance where the rigid clip is consistent, and its order with its own 2 px warp."""
    pairs = [s for s in scenes.values() if kind in s and s["rigid"]["verdict"] == CONSISTENT]
    both = [(s[kind], s[f"{kind}, warp 2"]) for s in pairs if f"{kind}, warp 2" in s]
    judged = [(a, b) for a, b in both if a["ours"] is not None and b["ours"] is not None]
    return {
        "kept": [s[kind]["verdict"] != INCONSISTENT for s in pairs],
        "consistent": [s[kind]["verdict"] == CONSISTENT for s in pairs],
        "order": [a["ours"] < b["ours"] for a, b in judged],
        "raw": [a["raw_error"] < b["raw_error"] for a, b in both],
    }


def compose(scenes: dict, title: str) -> str:
    """The report as markdown."""
    rows = [row for s in scenes.values() for row in s.values()]
    lines = ["# Audit of the geometry scorers\n", "`rows` " + __doc__.partition("`rows`")[2].strip() + "\n", title + "\n"]
    undecided = sum(s["rigid"]["verdict"] == UNDETERMINED for s in scenes.values() if "rigid" in s)
    lines.append(
        f"{len(rows)} clips of {len(scenes)} scenes. Rigid clips: {verdicts([s['rigid'] for s in scenes.values()])} "
        f"consistent / inconsistent / undetermined. The {undecided} undetermined rigid clips win against nothing.\n"
    )
    lines += ["## How often the rigid clip beats the corrupted one of its scene\n"]
    lines += ["| kind | " + " | ".join(SCORERS.values()) + " | verdicts of the corrupted clips |", "|---" * 5 + "|"]
    for kind in (*cheats.CORRUPTED, *cheats.CHEATS):
        if any(kind in s for s in scenes.values()):
            cells = [share(rigid_wins(scenes, kind, scorer)) for scorer in SCORERS]
            found = verdicts([s[kind] for s in scenes.values() if kind in s])
            lines.append(f"| {kind} | " + " | ".join(cells) + f" | {found} |")
    lines += ["\nThe same, all kinds of a group together; ours of the scenes whose rigid clip can be judged:\n"]
    lines += ["| group | " + " | ".join(SCORERS.values()) + " |", "|---" * 4 + "|"]
    able = {k: s for k, s in scenes.items() if s["rigid"]["verdict"] != UNDETERMINED}
    groups = {
        "warps of 1 px and more, walls, textures, swaps, dissolves": [
            "warp 1", "warp 2", "warp 4", "walls 0.1", "walls 0.3", "morph 0.1", "morph 0.3", "swap", "dissolve",
        ],
        "boxes that drift, grow or jump": ["box drifts 0.5", "box grows 0.3", "box jumps 0.5"],
        "cheats": list(cheats.CHEATS),
    }  # fmt: skip
    for name, kinds in groups.items():
        cells = []
        for scorer in SCORERS:
            answers = [a for kind in kinds for a in rigid_wins(able if scorer == "ours" else scenes, kind, scorer)]
            cells.append(counted(answers))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["\n## How often a clip without depth beats a rigid moving clip (all pairs of scenes)\n"]
    lines += ["| kind | " + " | ".join(SCORERS.values()) + " | verdicts |", "|---" * 5 + "|"]
    still = tuple(k for k in cheats.CHEATS if k.startswith(("still", "cards", "freeze")))
    for kind in (*cheats.FLAT, *still):
        if any(kind in s for s in scenes.values()):
            cells = [pooled(beats_rigid(scenes, kind, scorer)) for scorer in SCORERS]
            found = verdicts([s[kind] for s in scenes.values() if kind in s])
            lines.append(f"| {kind} | " + " | ".join(cells) + f" | {found} |")
    for name, kinds in (("all of a real scene", cheats.FLAT), ("all of stills and cards", still)):
        answers = {scorer: [a for kind in kinds for a in beats_rigid(scenes, kind, scorer)] for scorer in SCORERS}
        cells = [f"{pooled(found)} ({len(found)} pairs)" if found else "" for found in answers.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " | |")
    lines += [
        "\n## Nuisances: rigid clips that were consistent, and their order with their own 2 px warp\n",
        "not inconsistent: still consistent, or undetermined. order: of the pairs of which both are judged. order by error: "
        "of all pairs, whatever the verdict.\n",
        "| nuisance | not inconsistent | consistent | order kept | order by error kept |",
        "|---" * 5 + "|",
    ]
    for kind in cheats.NUISANCES:
        if any(kind in s for s in scenes.values()):
            found = nuisance(scenes, kind)
            lines.append(f"| {kind} | " + " | ".join(share(found[k]) for k in ("kept", "consistent", "order", "raw")) + " |")
    every = [nuisance(scenes, kind) for kind in cheats.NUISANCES]
    totals = [counted([a for found in every for a in found[k]]) for k in ("kept", "consistent", "order", "raw")]
    lines.append("| all | " + " | ".join(totals) + " |")
    lines += [
        "\n## Reward audit: ten and more ways to cheat\n",
        "Share of all pairs of scenes in which the cheat beats an honest rigid clip, by each scorer; for ours, the verdict "
        "that most of the cheats got and the reason.\n",
        "| cheat | " + " | ".join(SCORERS.values()) + " | most frequent verdict and reason |",
        "|---" * 5 + "|",
    ]
    for kind in AUDITED:
        clips = [s[kind] for s in scenes.values() if kind in s]
        if clips:
            verdict = Counter(c["verdict"] for c in clips).most_common(1)[0][0]
            reason = next(c["reason"] for c in clips if c["verdict"] == verdict)
            cells = [pooled(beats_rigid(scenes, kind, scorer)) for scorer in SCORERS]
            lines.append(f"| {kind} | " + " | ".join(cells) + f" | {verdict}: {reason} |")
    agreed = [r["verdict"] == r["torch_verdict"] for r in rows if "torch_verdict" in r]
    if agreed:
        apart = [
            (r["seed"], r["kind"], r["verdict"], r["torch_verdict"])
            for r in rows
            if r.get("torch_verdict", r["verdict"]) != r["verdict"]
        ]
        lines += [
            f"\n## Trackers\n\nOpenCV and torch agree in the verdict of clips: {counted(agreed)}."
        ]
        lines += [f"- seed {seed}, {kind}: {a} by OpenCV, {b} by torch" for seed, kind, a, b in apart]
    return "\n".join(lines) + "\n"


def make_tables(args: argparse.Namespace) -> None:
    scenes: dict[int, dict[str, dict]] = defaultdict(dict)
    for path in args.rows:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            scenes[row["seed"]].setdefault(row["kind"], {}).update(row)
    scenes = {seed: found for seed, found in sorted(scenes.items()) if "rigid" in found}
    title = (
        f"Seeds {min(scenes)} to {max(scenes)} of cheats.py, 832x480, 49 frames; thresholds were fixed on seeds 600 to 613, "
        "1000 to 1004 and 1050 to 1056, and those of lost points on real footage, before these were rendered. Commands: "
        "`python -m benchmarks.geometry.audit rows`, then `tables`."
    )
    text = compose(scenes, title)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [{k: rounded(row[k]) for k in KEPT if k in row} for s in scenes.values() for row in s.values()]
    plain = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    for name, content in (("audit.md", text), ("audit.json", plain)):
        write_atomic(args.output_dir / name, lambda partial, c=content: Path(partial).write_text(c, encoding="utf-8"))
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.geometry.audit", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("--seeds", type=int, nargs=2, default=(1000, 1060), metavar=("FIRST", "END"))
    rows.add_argument("--frames", type=int, default=49)
    rows.add_argument("--kinds", nargs="+", choices=cheats.KINDS)
    rows.add_argument("--backends", action="store_true", help="score by both trackers")
    rows.add_argument("--output", type=Path, required=True, metavar="ROWS.jsonl")
    rows.set_defaults(run=make_rows)
    tables = commands.add_parser("tables")
    tables.add_argument("--rows", type=Path, nargs="+", required=True, metavar="ROWS.jsonl")
    tables.add_argument("--output_dir", type=Path, required=True)
    tables.set_defaults(run=make_tables)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
