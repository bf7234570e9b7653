"""Dense geometry score under the errors of a depth network: noisy depth and cameras, a wrong focal length, grain, flicker.

    python -m benchmarks.geometry.dense_noise --seeds 700 740 --rows rows.jsonl

Clips are those of room.py at 518x300, 49 frames, of which 10 evenly spaced ones are the views. The clip's true depth and
cameras get the errors of a row (see CONDITIONS), with another seed for every clip. Clips that have a row in the file are not
scored again, so an interrupted run can be resumed.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.geometry import dense
from trainers.kernels.geometry.record import CONSISTENT, INCONSISTENT, UNDETERMINED
from trainers.kernels.geometry.views import Views, sample_indices

from . import room

RIGID = "rigid"
WARPS = ("warp 0.5", "warp 1", "warp 2", "warp 4")
DEFECTS = (*WARPS, "walls 0.3", "box 0.5")
STILL = ("static", "slow", "zoom", "pan")
KINDS = (RIGID, *DEFECTS, *STILL)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Condition:
    """Errors added to true geometry and to frames.

    depth: root mean square of each view's smooth relative depth error, and of its scale error; 30% of it is added as white
    noise; pose: of the rotation about each axis in radians, and of the translation along each axis as a share of the median
    depth; focal: relative error of the focal length in all views; grain: sigma of the noise of frames in grey levels;
    flicker: sigma of each frame's brightness factor.
    """

    depth: float = 0.0
    pose: float = 0.0
    focal: float = 0.0
    grain: float = 0.0
    flicker: float = 0.0


CONDITIONS = {
    "none": Condition(),
    "depth .5 %, pose .1 %": Condition(0.005, 0.001),
    "depth 1 %, pose .2 %": Condition(0.01, 0.002),
    "depth 2 %, pose .4 %": Condition(0.02, 0.004),
    "focal 2 %": Condition(focal=0.02),
    "grain 8": Condition(grain=8),
    "flicker 15 %": Condition(flicker=0.15),
}


def clips(seed: int, wanted: set[str], width: int, height: int) -> Iterator[tuple[str, Views]]:
    """(kind, views with true geometry) for each wanted kind of one scene."""
    scene = room.draw_scene(seed, frames=49, width=width, height=height)
    rigid = room.render(scene) if wanted & {RIGID, *WARPS} else None
    changes = {"walls": "breathing", "box": "drift"}
    for kind in KINDS:
        if kind not in wanted:
            continue
        name, _, amount = kind.partition(" ")
        if kind == RIGID:
            clip = rigid
        elif name == "warp":
            clip = warped(rigid, float(amount), seed)
        elif name in changes:
            clip = room.render(replace(scene, **{changes[name]: float(amount)}))
        else:
            clip = room.render(replace(scene, move=kind))
        at = sample_indices(len(clip.frames))
        images, geometry = clip.frames[at].float() / 255, (clip.depth[at], clip.K[at], clip.world_to_camera[at])
        yield kind, Views(images, *geometry, None, at, len(clip.frames))


def warped(clip: room.Clip, pixels: float, seed: int) -> room.Clip:
    """room.warp of the frames, with depth maps warped in the same way: what a network would see in the warped frames."""
    t, h, w, _ = clip.frames.shape
    generator = torch.Generator().manual_seed(15485863 * seed + 3)
    coarse = torch.randn(1, 2, max(3, t // 8), 4, 6, generator=generator)
    # The displacement that room.warp draws.
    field = F.interpolate(coarse, (t, h // 8, w // 8), mode="trilinear", align_corners=True)[0].transpose(0, 1)
    field = field * (pixels * h / 480 / field.square().sum(1).mean().sqrt())
    y, x = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    depth = clip.depth.clone()
    for i in sample_indices(t):
        shift = F.interpolate(field[i : i + 1], (h, w), mode="bicubic", align_corners=True)[0]
        at = torch.stack([(x + shift[0]) * (2 / (w - 1)) - 1, (y + shift[1]) * (2 / (h - 1)) - 1], dim=-1)
        depth[i] = F.grid_sample(clip.depth[i][None, None], at[None], padding_mode="border", align_corners=True)[0, 0]
    return replace(room.warp(clip, pixels, seed)[0], depth=depth)


def with_errors(views: Views, condition: Condition, seed: int) -> Views:
    """The views with a network's errors in depth and cameras, and with changed frames."""
    generator = torch.Generator().manual_seed(seed)
    s, h, w = views.depth.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    smooth = F.interpolate(normal(s, 1, 7, 7), (h, w), mode="bicubic", align_corners=True)[:, 0]
    smooth = smooth / smooth.square().mean().sqrt()
    error = condition.depth * (smooth + 0.3 * normal(s, h, w) + normal(s, 1, 1))
    middle = float(views.depth.median())
    poses = views.world_to_camera.clone()
    skew = torch.zeros(s, 3, 3)
    for (row, column), values in zip(((2, 1), (0, 2), (1, 0)), (condition.pose * normal(3, s)), strict=True):
        skew[:, row, column], skew[:, column, row] = values, -values
    poses[:, :3] = torch.linalg.matrix_exp(skew) @ poses[:, :3]
    poses[:, :3, 3] += condition.pose * middle * normal(s, 3)
    K = views.K.clone()
    K[:, 0, 0] *= 1 + condition.focal
    K[:, 1, 1] *= 1 + condition.focal
    images = views.images * (1 + condition.flicker * normal(s, 1, 1, 1)).clamp(min=0.2)
    images = ((images + condition.grain / 255 * normal(*images.shape)).clamp(0, 1) * 255).round() / 255
    return replace(views, images=images, depth=views.depth * (1 + error), K=K, world_to_camera=poses)


def measure(seeds: range, kinds: list[str], path: Path, width: int, height: int) -> list[dict]:
    """Rows of all clips of the scenes in all conditions; those that are not in the file yet are appended to it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["seed"], r["kind"], r["condition"]) for r in rows}
    with open(path, "a") as f:
        for seed in tqdm(seeds, unit="scene"):
            wanted = {k for k in kinds if any((seed, k, c) not in done for c in CONDITIONS)}
            for kind, views in clips(seed, wanted, width, height) if wanted else ():
                for number, (name, condition) in enumerate(CONDITIONS.items()):
                    if (seed, kind, name) in done:
                        continue
                    draw = 1000 * seed + 17 * KINDS.index(kind) + number
                    record = dense.score_views(with_errors(views, condition, draw)).record
                    row = {
                        "seed": seed, "kind": kind, "condition": name, "verdict": record.verdict, "score": record.score,
                        **record.to_json()["measurements"],
                    }  # fmt: skip
                    rows.append(row)
                    f.write(json.dumps(row) + "\n")
                    f.flush()
    return [r for r in rows if r["seed"] in seeds and r["kind"] in kinds]


def _error(row: dict) -> float:
    return math.inf if row["error"] is None else row["error"]


def summarise(rows: list[dict]) -> dict[str, dict]:
    """Figures of each condition. Errors of undetermined clips count as infinite, so that such a clip never wins."""
    found = {}
    for name in CONDITIONS:
        scenes = defaultdict(dict)
        for row in rows:
            if row["condition"] == name:
                scenes[row["seed"]][row["kind"]] = row
        rigid = [s[RIGID] for s in scenes.values() if RIGID in s]
        if not rigid:
            continue

        figures = {
            "rigid, not inconsistent": [r["verdict"] != INCONSISTENT for r in rigid],
            "rigid, consistent": [r["verdict"] == CONSISTENT for r in rigid],
            "rigid, undetermined": [r["verdict"] == UNDETERMINED for r in rigid],
        }
        for kind in DEFECTS:
            pairs = [(s[RIGID], s[kind]) for s in scenes.values() if RIGID in s and kind in s]
            figures[f"rigid beats {kind}"] = [_error(a) < _error(b) for a, b in pairs]
        for kind in DEFECTS:
            figures[f"{kind}, consistent"] = [s[kind]["verdict"] == CONSISTENT for s in scenes.values() if kind in s]
        for kind in STILL:
            figures[f"{kind} wins"] = [_error(s[kind]) < _error(r) for s in scenes.values() if kind in s for r in rigid]
        found[name] = {k: {"right": sum(v), "of": len(v)} for k, v in figures.items()}
        for key in ("error", "noise", "kept"):
            found[name][f"median {key}"] = statistics.median(_error(r) if key == "error" else r[key] for r in rigid)
    return found


def table(found: dict[str, dict], columns: dict[str, str]) -> str:
    """Markdown with one row for each condition. columns: title -> figure."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in found.items():
        cells = []
        for key in columns.values():
            value = figures[key]
            if isinstance(value, dict):
                share = value["right"] / max(value["of"], 1)
                cells.append(f"{value['right']}/{value['of']}" if value["of"] < 1000 else f"{share:.2%}")
            else:
                cells.append(f"{value:.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compose(found: dict[str, dict], command: str) -> str:
    """The report as markdown."""
    first = {t: t for t in ("rigid, not inconsistent", "rigid, consistent", "rigid, undetermined")}
    medians = {f"rigid: {k}": k for k in ("median error", "median noise", "median kept")}
    return "\n\n".join([
        "# Dense score under the errors of a depth network",
        f"`{command}`. Clips of room.py at 518x300, 49 frames, 10 views. Depth: root mean square of each view's smooth "
        "relative error (correlated over a sixth of the image) and of its scale error; 30 % of it is added as white noise. "
        "Pose: rotation about each axis in radians, translation along each axis as a share of the median depth. warp: root "
        "mean square displacement in px at 480 lines; the depth map is warped like the frame. Constants were tuned on seeds "
        "0 to 9.",
        "Verdicts of rigid clips; the median of their error, of the corrections (noise, px at 480 lines) and of the share of "
        "pixels that were compared:",
        table(found, first | medians),
        "How often the rigid clip has a smaller error than its corrupted version; undetermined clips count as infinite:",
        table(found, {k: f"rigid beats {k}" for k in DEFECTS}),
        "How often the corrupted version is called consistent:",
        table(found, {k: f"{k}, consistent" for k in DEFECTS}),
        "How often a clip with little or no parallax beats a rigid clip of any scene:",
        table(found, {k: f"{k} wins" for k in STILL}),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.geometry.dense_noise", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(700, 740), metavar=("FIRST", "END"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--height", type=int, default=300)
    parser.add_argument("--rows", type=Path, default=Path("dense_noise.jsonl"), metavar="ROWS.jsonl")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="of dense_noise.md and .json")
    args = parser.parse_args()
    rows = measure(range(*args.seeds), args.kinds, args.rows, args.width, args.height)
    found = summarise(rows)
    command = f"python -m benchmarks.geometry.dense_noise --seeds {args.seeds[0]} {args.seeds[1]}"
    text = compose(found, command)
    outputs = ("dense_noise.md", text), ("dense_noise.json", json.dumps(found, indent=1) + "\n")
    for name, content in outputs:
        write_atomic(args.output_dir / name, lambda partial, content=content: Path(partial).write_text(content))
    print(text)


if __name__ == "__main__":
    main()
