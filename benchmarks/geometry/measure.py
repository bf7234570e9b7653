"""Scores rigid clips, their corrupted versions and clips without parallax with every geometry scorer, into rows.jsonl.

    python -m benchmarks.geometry.measure --seeds 100 140 --output rows.jsonl

Each row is a clip: its scene's seed, its corruption, every scorer's error (lower is better; null where the scorer's verdict is
undetermined) and, where a box drifts, whether the error map's maximum lies on it. Clips that have a row are not rendered
again, so an interrupted run can be resumed. `benchmarks.geometry.tables` makes the tables.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.toy_world import corruptions, renderer
from benchmarks.toy_world.captions import draw
from benchmarks.toy_world.clips import Labelled
from trainers.kernels.geometry import dense, tracks
from trainers.kernels.geometry.photometric import dssim, luminance
from trainers.kernels.geometry.record import UNDETERMINED, Scored
from trainers.kernels.geometry.views import Views, sample_indices

from . import published, room

RIGID = "rigid"
STILL = ("static", "slow", "zoom", "pan")
ROOM_KINDS = (
    RIGID, "warp 0.5", "warp 1", "warp 2", "warp 4", "walls 0.1", "walls 0.3", "morph 0.1", "morph 0.3", "box 0.2", "box 0.5",
    *STILL,
)  # fmt: skip
TOY_KINDS = (
    RIGID, *(f"{name} {s}" for name in ("warp", "walls", "morph", "box") for s in (0.25, 0.5, 1.0)), "static", "slow", "pan",
)  # fmt: skip
TOY_DEFECTS = {"warp": "rubber_sheet", "walls": "breathing_walls", "morph": "texture_morph", "box": "drifting_object"}
# (frames uint8 [T, H, W, 3], views with true depth and poses, object mask [T, H, W]). Depth is that of each frame's own scene,
# so a scene that changes over time has depth that changes with it.
Rendered = tuple[Tensor, Views, Tensor]


def room_clips(seed: int, frames: int, width: int, height: int, wanted: set[str]) -> Iterator[tuple[str, Rendered]]:
    """(kind, clip) for each wanted kind of one scene of room.py."""
    scene = room.draw_scene(seed, frames=frames, width=width, height=height)
    rigid = room.render(scene)
    changes = {"walls": "breathing", "morph": "morph", "box": "drift"}
    for kind in ROOM_KINDS:
        if kind not in wanted:
            continue
        name, _, amount = kind.partition(" ")
        if kind == RIGID:
            clip = rigid
        elif name == "warp":
            clip = room.warp(rigid, float(amount), seed)[0]
        elif name in changes:
            clip = room.render(replace(scene, **{changes[name]: float(amount)}))
        else:
            clip = room.render(replace(scene, move=kind))
        yield kind, (clip.frames, views_of(clip.frames, clip.depth, clip.K, clip.world_to_camera), clip.object_mask)


def toy_clips(seed: int, wanted: set[str]) -> Iterator[tuple[str, Rendered]]:
    """The same for the toy world: 64x64, 17 frames, the camera moving forward or orbiting the object."""
    generator = torch.Generator().manual_seed(977 * seed + 11)
    attributes = replace(draw(generator), move=("forward", "orbit")[seed % 2], speed="fast")
    scene = renderer.draw_scene(attributes, generator)
    for kind in TOY_KINDS:
        if kind not in wanted:
            continue
        name, _, amount = kind.partition(" ")
        here, frames = scene, None
        if name in TOY_DEFECTS:
            labelled = Labelled(renderer.render(scene), scene, "")
            spoilt = corruptions.corrupt(labelled, TOY_DEFECTS[name], float(amount), seed)
            here, frames = spoilt.scene, spoilt.frames
        elif kind == "static":
            here = replace(scene, attributes=replace(attributes, move="still"))
        elif kind == "pan":
            here = replace(scene, attributes=replace(attributes, move="left"))
        elif kind == "slow":
            here = replace(scene, attributes=replace(attributes, speed="slow"))
        truth = renderer.truth(here)
        frames = renderer.render(here) if frames is None else frames
        yield kind, _toy(frames, truth.depth, truth.K, truth.world_to_camera, truth.object_mask)


def measure(clip: Rendered, kind: str) -> dict:
    """Errors, verdicts, measurements and seconds of all scorers on one clip."""
    frames, views, mask = clip
    row = {}
    start = time.perf_counter()
    free = tracks.score_clip(frames, pictures=kind.startswith("box"))
    row["tracks_seconds"] = time.perf_counter() - start
    row |= _of(free, "tracks")
    start = time.perf_counter()
    row["epipolar_dpo"] = published.epipolar_dpo(frames)
    row["epipolar_dpo_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    full = dense.score_views(views)
    row["dense_seconds"] = time.perf_counter() - start
    row |= _of(full, "dense")
    row["3dcs_mse"], row["3dcs_dssim"] = released(views)
    if kind.startswith("box"):
        row["tracks_points"] = [_points_at(m, mask[i]) for i, m in zip(free.record.frame_indices, free.error_map, strict=True)]
        row["dense_points"] = [_points_at(m, mask[i]) for i, m in zip(views.frame_indices, full.error_map, strict=True)]
        row["object_share"] = float(mask.float().mean())
    return row


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.geometry.measure", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(100, 140), metavar=("FIRST", "END"))
    parser.add_argument("--world", choices=("room", "toy"), default="room", help="room: 832x480; toy: the toy world, 64x64")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--output", type=Path, required=True, metavar="ROWS.jsonl")
    args = parser.parse_args()
    kinds = ROOM_KINDS if args.world == "room" else TOY_KINDS
    done = {}
    if args.output.exists():
        for line in args.output.read_text().splitlines():
            row = json.loads(line)
            done.setdefault(row["seed"], set()).add(row["kind"])
    with tqdm(total=len(kinds) * (args.seeds[1] - args.seeds[0]), unit="clip") as bar, open(args.output, "a") as f:
        for seed in range(*args.seeds):
            wanted = set(kinds) - done.get(seed, set())
            bar.update(len(kinds) - len(wanted))
            if not wanted:
                continue
            clips = (
                room_clips(seed, args.frames, args.width, args.height, wanted)
                if args.world == "room"
                else toy_clips(seed, wanted)
            )
            for kind, clip in clips:
                row = {"world": args.world, "seed": seed, "kind": kind, **measure(clip, kind)}
                f.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
                f.flush()
                bar.update(1)


def _of(scored: Scored, name: str) -> dict:
    record = scored.record
    undetermined = record.verdict == UNDETERMINED
    return {
        name: math.inf if undetermined else record.error, f"{name}_verdict": record.verdict, f"{name}_score": record.score,
        **{f"{name}_{k}": v for k, v in record.measurements.items()},
    }  # fmt: skip


def released(views: Views) -> tuple[float, float]:
    """VideoGPA's 3DCS on true depth and poses: (its MSE term, MSE plus DSSIM in place of LPIPS, which needs weights)."""
    planes = views.images.permute(3, 0, 1, 2).contiguous()

    def unlike(a: Tensor, b: Tensor) -> Tensor:
        return dssim(*(luminance(x.permute(3, 0, 1, 2)) for x in (a, b))).mean()[None]

    found = dense.published(planes, views.depth, views, unlike)
    return found["3dcs"] - found["lpips"], found["3dcs"]


def _points_at(error: Tensor, mask: Tensor) -> bool | None:
    """Whether the map's maximum lies on the object, give or take a fortieth of the picture; None if it is not visible."""
    if float(mask.float().mean()) < 0.005 or not torch.isfinite(error).any():
        return None
    error = F.interpolate(error[None, None], mask.shape, mode="nearest")[0, 0]
    # The maximum of single pixels would be noise: the map is first averaged over a twentieth of the picture.
    side = max(1, min(mask.shape) // 20) | 1
    known = torch.isfinite(error).float()
    total = F.avg_pool2d(torch.nan_to_num(error)[None, None], side, 1, side // 2)[0, 0]
    share = F.avg_pool2d(known[None, None], side, 1, side // 2)[0, 0]
    smooth = torch.where(share > 0.2, total / share.clamp(min=1e-6), -1.0)
    wide = F.max_pool2d(mask[None, None].float(), side, 1, side // 2)[0, 0] > 0
    return bool(wide.flatten()[smooth.argmax()])


def views_of(frames: Tensor, depth: Tensor, K: Tensor, poses: Tensor) -> Views:
    at = sample_indices(len(frames))
    return Views(
        images=frames[at].float() / 255, depth=depth[at], K=K[at], world_to_camera=poses[at], confidence=None,
        frame_indices=list(at), frames=len(frames), notes=[],
    )  # fmt: skip


def _toy(frames: Tensor, depth: Tensor, K: Tensor, poses: Tensor, mask: Tensor) -> Rendered:
    K = K.clone()
    # The toy world's first pixel has its centre at 0.5.
    K[:2, 2] -= 0.5
    frames = frames.permute(0, 2, 3, 1).contiguous()
    return frames, views_of(frames, depth, K.expand(len(frames), 3, 3), poses), mask


def _plain(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
