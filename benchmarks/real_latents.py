"""Shell-LCC on a real generation in Wan2.1's latent space: what a manifold separates, what its corrections repair and damage.

    python -m benchmarks.real_latents --latents test_latents_wan.pth

The clip is divided into 8 tiles, 2 rows of 4, of all frames. Each tile is reported by manifolds that have not seen it:

  same content    fitted on 6 of the other tiles, calibrated on the seventh
  other half      fitted on 3 tiles of the other row of the picture, calibrated on the fourth
  toy world       fitted and calibrated on latents of small renders by another VAE, normalised alike: content of no use

Repair is measured by the error to the clean latent: its root mean square after a correction over that before it, below 1 where
the correction repairs. A random push moves every token by the length that `project` moves it, in a random direction. Means and
95 % intervals are over the tiles, which are of one clip, so the intervals say nothing about other clips.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.toy_world import weights
from trainers.kernels.latent_space import WAN21
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.diagnostics import add_noise, auroc, blur, half_blur, high_frequency_share
from trainers.kernels.shell_lcc.evaluation import score, tokens
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import METHODS, ShellManifold
from trainers.latents.read import list_clips, read_clip

ROWS, COLUMNS = 2, 4
TOKENS_PER_ANCHOR = 40
VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {"clean": lambda z: z, "half blurred": half_blur, "noisy": add_noise}
PUSH = "random push"
SEPARATION = NOISY, BLURRED, OUTSIDE = (
    "noisy tokens above clean ones, AUROC", "clean tokens above blurred ones, AUROC", "share of clean tokens outside the band",
)  # fmt: skip
# Clips of the toy world for its manifold.
TOY = 128


def tiles_of(z: Tensor) -> list[Tensor]:
    """ROWS x COLUMNS tiles of a clip [C, T, h, w], row by row."""
    return [t for row in z.tensor_split(ROWS, dim=2) for t in row.tensor_split(COLUMNS, dim=3)]


def manifold_of(fit: list[Tensor], calibrated: list[Tensor]) -> ShellManifold:
    found = torch.cat([tokens(z) for z in fit])
    manifold = ShellManifold(fit_anchors(found, max(16, len(found) // TOKENS_PER_ANCHOR // 16 * 16)), WAN21)
    manifold.calibration = calibrate([score(manifold, z) for z in calibrated])
    return manifold


def unlike(tiles: list[Tensor], reported: int) -> dict[str, ShellManifold]:
    """{name: manifold} for a tile, of the module's docstring, without the toy world's."""
    others = [i for i in range(len(tiles)) if i != reported]
    after = others[reported % len(others)]
    far = [i for i in others if i // COLUMNS != reported // COLUMNS]
    return {
        "same content": manifold_of([tiles[i] for i in others if i != after], [tiles[after]]),
        "other half": manifold_of([tiles[i] for i in far[:-1]], [tiles[far[-1]]]),
    }


def toy_manifold() -> ShellManifold:
    refs = list_clips([weights.FOLDER / "toy_latents.safetensors"], WAN21)
    clips = [read_clip(r) for r in refs[:TOY]]
    return manifold_of(clips[: TOY - 16], clips[TOY - 16 :])


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def pushed(x: Tensor, like: Tensor, seed: int = 1) -> Tensor:
    """x [C, T, h, w] with every token moved in a random direction, by as much as in `like`."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + direction / direction.norm(dim=0, keepdim=True) * (like - x).norm(dim=0, keepdim=True)


def corrections(manifold: ShellManifold, x: Tensor) -> dict[str, Tensor]:
    found = {m: manifold.pull(x[None], m)[0] for m in METHODS}
    return found | {PUSH: pushed(x, found["project"])}


def figures(manifold: ShellManifold, z: Tensor) -> dict[str, float]:
    """All figures of a tile z: separation, error ratios, and ratios of the share of high frequencies."""
    distances = {"clean": score(manifold, z), "blurred": score(manifold, blur(z)), "noisy": score(manifold, add_noise(z))}
    found = {
        NOISY: auroc(distances["clean"], distances["noisy"]),
        BLURRED: auroc(distances["blurred"], distances["clean"]),
        OUTSIDE: float(manifold.outside_band(distances["clean"]).double().mean()),
    }
    for name, damage in VARIANTS.items():
        x = damage(z)
        for method, y in corrections(manifold, x).items():
            # A clean latent has no error to repair: what a correction adds is stated as a share of the latent's own size.
            found[f"{name}/{method}"] = rms(y - z) / (rms(x - z) if name != "clean" else rms(z))
            found[f"{name}/{method}/detail"] = high_frequency_share(y) / high_frequency_share(x)
    return found


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and half of the 95 % interval of Student's t for 8 values."""
    x = torch.tensor(values, dtype=torch.float64)
    return f"{float(x.mean()):.{digits}f} ± {2.365 * float(x.std()) / len(x) ** 0.5:.{digits}f}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=Path, required=True, metavar="FILE", help="one clip: .pth, .latent or a shard")
    args = parser.parse_args(argv)
    (ref,) = list_clips([args.latents], WAN21)
    clip = read_clip(ref)
    tiles, toy = tiles_of(clip), toy_manifold()
    spread = f"mean {float(clip.mean()):.3f}, std {float(clip.std()):.3f}"
    print(f"{args.latents.name}: {list(clip.shape)}, {spread}; {len(tiles)} tiles")
    rows: dict[str, list[dict[str, float]]] = {}
    for i, z in enumerate(tiles):
        for name, manifold in (unlike(tiles, i) | {"toy world": toy}).items():
            rows.setdefault(name, []).append(figures(manifold, z))
    print(f"\n| manifold | {' | '.join(SEPARATION)} |\n{'|---' * (1 + len(SEPARATION))}|")
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(interval([f[k] for f in found]) for k in SEPARATION) + " |")
    labels = {"": "error after / before (clean: error / size)", "/detail": "share of high frequencies after / before"}
    for what, label in labels.items():
        print(f"\n| manifold | latent, {label} | {' | '.join([*METHODS, PUSH])} |\n{'|---' * (3 + len(METHODS))}|")
        for name, found in rows.items():
            for variant in VARIANTS:
                cells = [interval([f[f"{variant}/{m}{what}"] for f in found]) for m in (*METHODS, PUSH)]
                print(f"| {name} | {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
