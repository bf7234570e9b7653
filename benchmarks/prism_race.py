"""Time of early Best-of-N in a real ComfyUI against the number of transformer blocks it runs, with random weights.

    python -m benchmarks.prism_race --comfyui ~/comfy/ComfyUI [--output_dir outputs/prism_race] [--rounds 3]

The predicted time of a race is the time of a plain KSampler run, times the race's blocks over the plain run's. Plain runs and
races alternate, so that other load on the machine slows both.
"""

import argparse
import re
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, FFN, LAYERS, TAP = 256, 1024, 30, 11
SIZE = {"width": 256, "height": 160, "length": 9}
NAME = "random_wan_race.safetensors"
RACES = {
    "halving, continue": {"candidates": 8, "checkpoints": "0.987, 0.97, 0.924", "finish": "continue", "chunk": 1},
    "one prune, continue": {"candidates": 8, "checkpoints": "0.97", "finish": "continue", "chunk": 1},
    "halving, restart": {"candidates": 8, "checkpoints": "0.987, 0.97, 0.924", "finish": "restart", "chunk": 1},
    "halving, two at a time": {"candidates": 8, "checkpoints": "0.987, 0.97, 0.924", "finish": "continue", "chunk": 2},
}


def write_models(models: Path) -> None:
    """Writes a random transformer and a head for it."""
    from tests.comfy.tiny_wan import wan_dit as random_wan
    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.prism import files
    from trainers.kernels.prism.head import HeadConfig, PrismHead
    from trainers.wan import dit as wan_dit

    path = models / "diffusion_models" / NAME
    for folder in (path.parent, models / "prism"):
        folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in random_wan(WIDTH, FFN, LAYERS).items()}, path)
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(WIDTH, dim=256, heads=4, taps=(TAP,)))
    loaded = files.LoadedHead(head, wan_dit.load(path, 0).backbone, WAN21, (0.05, 0.99), name="race")
    files.save(loaded, models / "prism" / NAME)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.prism_race", description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/prism_race"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    from tests.comfy.comfyui_in_process import load_comfyui
    from tests.comfy.comfyui_install import make_base_directory

    base = args.output_dir.resolve()
    base.mkdir(parents=True, exist_ok=True)
    make_base_directory(base)
    write_models(base / "models")
    comfy = load_comfyui(args.comfyui, base)
    (model,) = comfy.run("UNETLoader", unet_name=NAME, weight_dtype="default")
    (head,) = comfy.run("IntrinsicReward_LoadPrism", file=NAME)
    g = torch.Generator().manual_seed(0)
    texts = [torch.zeros(1, 512, 4096) for _ in range(2)]
    for t in texts:
        t[:, :8] = 0.1 * torch.randn(1, 8, 4096, generator=g)
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", **SIZE, batch_size=1)
    common = {
        "model": model, "positive": [[texts[0], {}]], "negative": [[texts[1], {}]], "latent_image": latent, "seed": 0,
        "steps": args.steps, "cfg": 5.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }  # fmt: skip
    blocks = 2 * args.steps * LAYERS

    def plain() -> float:
        began = time.perf_counter()
        comfy.run("KSampler", **common)
        return time.perf_counter() - began

    def race(options: dict) -> tuple[float, int]:
        began = time.perf_counter()
        *_, report, _ = comfy.run("IntrinsicReward_PrismKSampler", head=head, keep=1, **common, **options)
        return time.perf_counter() - began, int(re.search(r"(\d+) blocks", report)[1])

    plain()
    print(f"{'race':<24} {'blocks':>7} {'of 8 runs':>10} {'seconds':>8} {'predicted':>10} {'ratio':>6}")
    for name, options in RACES.items():
        rows = []
        for _ in range(args.rounds):
            before = plain()
            taken, ran = race(options)
            rows.append((taken, (before + plain()) / 2 * ran / blocks))
        ratio = statistics.median(t / p for t, p in rows)
        taken, predicted = (statistics.median(column) for column in zip(*rows, strict=True))
        share = 100 * ran / (8 * blocks)
        print(f"{name:<24} {ran:>7} {share:>9.1f}% {taken:>8.1f} {predicted:>10.1f} {ratio:>6.3f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
