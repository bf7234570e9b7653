"""Peak memory of a race by a PRISM head against the number of candidates, at the width of Wan2.1-1.3B and 832x480.

    python -m benchmarks.race_memory --comfyui ~/comfy/ComfyUI [--candidates 2 4 8 16] [--output_dir outputs/race_memory]

Random weights, two blocks, a clip of five frames (3120 tokens), which a CPU can run. Each race runs in its own process. A
table shows the peak, its growth per candidate, and what a candidate's latent and one block's output would take.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from .full_shape import WIDTH, alone

FFN, LAYERS = 1536, 2
SIZE = {"width": 832, "height": 480, "length": 5}
NAME = "random_wan_two_blocks"


def write_model(folder: Path) -> None:
    """A random transformer and a random head on its first block."""
    from tests.comfy.tiny_wan import wan_dit
    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.prism import files
    from trainers.kernels.prism.backbone import of_wan
    from trainers.kernels.prism.head import HeadConfig, PrismHead

    state = wan_dit(WIDTH, FFN, LAYERS)
    for part in ("diffusion_models", "prism"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "diffusion_models" / f"{NAME}.safetensors")
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(WIDTH, dim=64, heads=4, layers=2, taps=(0,)))
    files.save(files.LoadedHead(head, of_wan(state), WAN21, (0.05, 0.99), name=NAME), folder / "prism" / f"{NAME}.safetensors")


def race(comfyui: Path, base: Path, candidates: int) -> dict:
    """One race of two steps, of which all candidates run the first."""
    from tests.comfy.comfyui_in_process import load_comfyui

    comfy = load_comfyui(comfyui, base)
    (model,) = comfy.run("UNETLoader", unet_name=f"{NAME}.safetensors", weight_dtype="default")
    (head,) = comfy.run("IntrinsicReward_LoadPrism", file=f"{NAME}.safetensors")
    words = [[0.1 * torch.randn(1, 8, 4096, generator=torch.Generator().manual_seed(0)), {}]]
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", **SIZE, batch_size=1)
    comfy.run(
        "IntrinsicReward_PrismKSampler", model=model, head=head, positive=words, negative=words, latent_image=latent, seed=0,
        steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0, candidates=candidates, keep=1,
        checkpoints="50 %", finish="continue",
    )  # fmt: skip
    return {"latent_mib": latent["samples"].numel() * 4 / 2**20}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.race_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, metavar="DIR")
    parser.add_argument("--candidates", type=int, nargs="+", default=(2, 4, 8, 16))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/race_memory"))
    args = parser.parse_args(argv)
    from tests.comfy.comfyui_install import make_base_directory

    base = args.output_dir.resolve() / "comfyui"
    if not base.exists():
        base.mkdir(parents=True)
        make_base_directory(base)
    alone(write_model, base / "models")
    tokens = (SIZE["length"] // 4 + 1) * (SIZE["height"] // 16) * (SIZE["width"] // 16)
    found = {n: alone(race, args.comfyui, base, n) for n in args.candidates}
    least = min(found)
    print("| candidates | peak, MiB | more than with the fewest, MiB per candidate |\n|---|---|---|")
    for n, seen in found.items():
        growth = 1024 * (seen["peak_gib"] - found[least]["peak_gib"]) / (n - least) if n > least else 0.0
        print(f"| {n} | {1024 * seen['peak_gib']:.0f} | {growth:.1f} |")
    print(
        f"A candidate's latent takes {found[least]['latent_mib']:.1f} MiB, one block's output "
        f"{tokens * WIDTH * 4 / 2**20:.1f} MiB (fp32)."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
