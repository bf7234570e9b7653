"""Speed and peak memory of the dense geometry score compared with the published splat and score.

    python -m benchmarks.geometry.dense_speed [--views 10] [--size 518x518] [--threads 2] [--repeats 3] [--naive 96x96]

Times are medians over rounds; in a round every implementation runs once, so that other load on the machine slows all of them.
Memory is the growth of the process's peak resident set during one call (Linux), or of the CUDA allocator's peak. The scene is
a bumpy wall seen by a camera that moves sideways; the cost does not depend on the scene.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.speed_and_memory import extra_peak, median_speedup, print_table, timed_in_turn
from trainers.kernels.geometry import naive
from trainers.kernels.geometry.dense import published, score_views
from trainers.kernels.geometry.splat import splat
from trainers.kernels.geometry.views import Views


def make_views(count: int, height: int, width: int, device: torch.device) -> Views:
    """Noise texture on a bumpy wall, in overlapping views of cameras in a row."""
    g = torch.Generator().manual_seed(0)
    v, u = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 9, width), indexing="ij")
    depth = 3 + 0.3 * (u.sin() + v.cos()) + 0.01 * torch.rand(count, height, width, generator=g)
    K = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1.0]]).repeat(count, 1, 1)
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[:, 0, 3] = torch.linspace(-0.4, 0.4, count)
    images = torch.rand(count, height, width, 3, generator=g)
    return Views(images.to(device), depth.to(device), K, poses, None, list(range(count)), count)


def sorted_splat(images: torch.Tensor, depth: torch.Tensor, views: Views) -> torch.Tensor:
    """The published splat: all points projected into each camera, sorted by depth, written with repeated indices.

    Which of two points in one pixel is kept is undefined, so only its time is compared, not its result.
    """
    s, h, w = depth.shape
    points = naive.unproject(depth, views.K, views.world_to_camera).reshape(-1, 3)
    colours = (images.reshape(-1, 3) * 255).clamp(0, 255).to(torch.uint8)
    drawn = []
    for target in range(s):
        u, v, z = naive.project(points, views.K[target].to(depth), views.world_to_camera[target])
        u, v = u.round().long(), v.round().long()
        keep = (u >= 0) & (u < w) & (v >= 0) & (v < h) & (z > 0)
        u, v, z, c = u[keep], v[keep], z[keep], colours[keep]
        order = torch.argsort(z, descending=True)
        canvas = torch.zeros(h, w, 3, dtype=torch.uint8, device=depth.device)
        canvas[v[order], u[order]] = c[order]
        drawn.append(canvas)
    return torch.stack(drawn).float() / 255


def implementations(views: Views) -> dict[str, Callable[[], object]]:
    """Name -> call, the published splat first."""
    depth, images = views.depth, views.images
    planes = images.permute(3, 0, 1, 2).contiguous()
    count = len(depth)

    def packed() -> list[torch.Tensor]:
        seen = (splat(depth, views.K, views.world_to_camera, target, range(count)) for target in range(count))
        return [one.gather(planes, 0.0) for one in seen]

    return {
        "published splat, all views (sort and write)": lambda: sorted_splat(images, depth, views),
        "packed splat, all views": packed,
        "packed splat and 3DCS without LPIPS": lambda: published(planes, depth, views, lambda a, b: a.new_zeros(1)),
        "whole dense score (MSE, DSSIM, depth, maps)": lambda: score_views(views),
    }


def run(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> list[tuple[str, float, float, float]]:
    """Rows of (name, median seconds, times as fast as the first, extra peak in bytes)."""
    memory = {name: extra_peak(call, device) for name, call in calls.items()}
    seconds = timed_in_turn(calls, device, repeats)
    base = seconds[next(iter(calls))]
    return [(name, statistics.median(found), median_speedup(base, found), memory[name]) for name, found in seconds.items()]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--size", nargs="+", default=["518x518", "832x480"], help="width x height")
    parser.add_argument("--naive", default="96x96", help="size for the per-point reference, which takes minutes at 518x518")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    for size in args.size:
        width, height = (int(n) for n in size.split("x"))
        views = make_views(args.views, height, width, device)
        print(f"\n{args.views} views of {size}, {device.type}, {args.threads} threads")
        print_table(run(implementations(views), device, args.repeats))
        first, again = score_views(views), score_views(views)
        same = torch.equal(first.error_map.nan_to_num(-1), again.error_map.nan_to_num(-1))
        chance = (sorted_splat(views.images, views.depth, views) != sorted_splat(views.images, views.depth, views)).any(dim=-1)
        print(f"two runs give the same bits: ours {same}; published splat differs in {int(chance.sum())} pixels")
    width, height = (int(n) for n in args.naive.split("x"))
    views = make_views(3, height, width, torch.device("cpu"))
    planes = views.images.permute(3, 0, 1, 2).contiguous()
    zero = lambda a, b: a.new_zeros(len(a))  # noqa: E731
    print(f"\n3 views of {args.naive}, point by point (the reference of the tests)")
    calls = {
        "reference": lambda: naive.score_3dcs(views.images, views.depth, views.K, views.world_to_camera, zero),
        "ours": lambda: published(planes, views.depth, views, zero),
    }
    print_table(run(calls, torch.device("cpu"), 1))
    gap = abs(calls["reference"]()[0] - calls["ours"]()["3dcs"])
    print(f"difference of the two scores: {gap:.1e}")


if __name__ == "__main__":
    main()
