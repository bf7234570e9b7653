"""Speed and peak memory of the geometry score without weights compared with Epipolar-DPO's published scorer.

    python -m benchmarks.geometry.tracks_speed [--size 832x480] [--frames 49 81] [--threads 1] [--clips 3] [--rounds 3]

Clips are rendered first (benchmarks.geometry.room). Times are medians over rounds and clips; in each, every implementation
runs once, so that other load slows all of them. Memory is the growth of the process's peak resident set (Linux). "as the node
runs it" takes floats, as VAE Decode gives them, and includes the preview and the heat map of every frame.
"""

import argparse

import cv2
import torch

from benchmarks.speed_and_memory import extra_peak, print_table, timed
from trainers.kernels.geometry.heat_map import full_error, heat_map
from trainers.kernels.geometry.tracks import score_clip

from . import published, room


def implementations(frames: torch.Tensor) -> dict:
    """Name -> call on frames uint8 [T, H, W, 3], the published scorer first."""
    floats = frames.float() / 255
    return {
        "Epipolar-DPO as published (SIFT, OpenCV)": lambda: published.epipolar_dpo(frames),
        "ours, OpenCV backend": lambda: score_clip(frames, "opencv", pictures=False),
        "ours as the node runs it, OpenCV": lambda: as_the_node(floats, "opencv"),
        "ours as the node runs it, torch": lambda: as_the_node(floats, "torch"),
        "ours, pure torch": lambda: score_clip(frames, "torch", pictures=False),
    }


def as_the_node(frames: torch.Tensor, backend: str) -> torch.Tensor:
    """Score, preview and heat map of frames [T, H, W, 3] in [0, 1]."""
    scored = score_clip(frames, backend)
    maps = [scored.error_map]
    full = full_error(maps, scored.record.scorer)
    return heat_map(frames, scored.error_map, scored.record.frame_indices, full, scored.greys)


def agreement(clips: list[torch.Tensor]) -> tuple[int, float]:
    """(number of clips with the same verdict from both backends, largest relative difference of their residuals)."""
    same, apart = 0, 0.0
    for frames in clips:
        ours, theirs = (score_clip(frames, backend, pictures=False).record for backend in ("torch", "opencv"))
        same += ours.verdict == theirs.verdict
        apart = max(apart, abs(ours.measurements["residual"] / theirs.measurements["residual"] - 1))
    return same, apart


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="832x480", help="width x height")
    parser.add_argument("--frames", type=int, nargs="+", default=[49, 81])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clips", type=int, default=3, help="number of scenes, each with a different camera move (3)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    width, height = (int(n) for n in args.size.split("x"))
    device = torch.device("cpu")
    for count in args.frames:
        sizes = {"frames": count, "width": width, "height": height}
        rendered = [room.render(room.draw_scene(200 + i, **sizes)) for i in range(args.clips)]
        calls = [implementations(clip.frames) for clip in rendered]
        memory = {name: extra_peak(call, device) for name, call in calls[0].items()}
        seconds = {name: [] for name in calls[0]}
        for _ in range(args.rounds):
            for clip in calls:
                for name, call in clip.items():
                    seconds[name].append(timed(call, device))
        median = {name: sorted(found)[len(found) // 2] for name, found in seconds.items()}
        base = next(iter(median.values()))
        print(f"\n{count} frames of {args.size}, {args.threads} threads, {args.clips} clips, {args.rounds} rounds")
        print_table([(name, s, base / s, memory[name]) for name, s in median.items()])
        spoilt = [frames for i, clip in enumerate(rendered) for frames in (clip.frames, room.warp(clip, 1.0, i)[0].frames)]
        agreed, apart = agreement(spoilt)
        print(f"backends: {agreed} of {len(spoilt)} verdicts agree (rigid clips and 1 px warps), residuals within {apart:.1%}")


if __name__ == "__main__":
    main()
