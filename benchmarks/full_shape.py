"""Smoke test and peak memory at the shape of Wan2.1-1.3B, with random weights.

    python -m benchmarks.full_shape --comfyui ~/comfy/ComfyUI [--output_dir outputs/full_shape] [--storage bf16 fp8]

Writes transformer files of that shape as ComfyUI users have them (bf16; fp8 with scales). Runs each through PRISM Score,
PRISM Best-of-N and Shell-LCC Guidance in ComfyUI on a small latent, and through the trainer: videos cached, one training step
of a head of the default size. Each part runs in its own process, whose peak memory is printed. Clips are small, so that a CPU
is enough.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, FFN, LAYERS, TAP = 1536, 8960, 30, 11
STORAGE = ("bf16", "fp8")
# Pixels and frames of the clip in ComfyUI: 96 tokens.
SIZE = {"width": 128, "height": 64, "length": 9}


def write_transformer(path: Path, storage: str) -> None:
    """A random transformer. storage: bf16 for all weights, or fp8 for the blocks' matrices (e4m3, one scale each)."""
    from tests.comfy.tiny_wan import wan_dit

    state = {}
    for name, weight in wan_dit(WIDTH, FFN, LAYERS).items():
        if storage == "fp8" and name.startswith("blocks.") and weight.ndim == 2:
            scale = weight.abs().max() / 448
            state[name] = (weight / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale
        else:
            state[name] = weight.bfloat16()
    if storage == "fp8":
        state["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file({k: v.contiguous() for k, v in state.items()}, path)


def write_head(path: Path, transformer: Path) -> None:
    """A random head of the default size for that transformer file."""
    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.prism import files
    from trainers.kernels.prism.head import HeadConfig, PrismHead
    from trainers.wan import dit as wan_dit

    backbone = wan_dit.load(transformer, 0, torch.bfloat16).backbone
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(backbone.width, taps=(TAP,)))
    files.save(files.LoadedHead(head, backbone, WAN21, (0.05, 0.99), name=path.stem), path)


def in_comfyui(comfyui: Path, base: Path, name: str) -> dict:
    """Score, race and guidance with one transformer file. Returns scores, reports and seconds by name."""
    from tests.comfy.comfyui_in_process import load_comfyui
    from tests.comfy.shell_lcc_material import FIT, GUIDANCE, sheet

    comfy = load_comfyui(comfyui, base)
    own, seen = "IntrinsicReward_{}".format, {"version": comfy.version}
    (model,) = comfy.run("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")
    (head,) = comfy.run(own("LoadPrism"), file=f"{name}.safetensors")
    g = torch.Generator().manual_seed(0)
    words = torch.zeros(1, 512, 4096)
    words[:, :8] = 0.1 * torch.randn(1, 8, 4096, generator=g)
    positive, negative = [[words, {}]], [[words.roll(1, dims=1) * (words.roll(1, dims=1) != 0), {}]]
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", **SIZE, batch_size=1)
    raw = {"samples": torch.randn(latent["samples"].shape, generator=g)}
    began = time.perf_counter()
    score, *_ = comfy.run(
        own("PrismScore"), model=model, head=head, positive=positive, latent=raw, sigmas="0.2", draws=1, seed=0
    )
    seen |= {"score": score, "score_s": time.perf_counter() - began}
    began = time.perf_counter()
    out, scores, seeds, report, _ = comfy.run(
        own("PrismKSampler"), model=model, head=head, positive=positive, negative=negative, latent_image=latent, seed=0,
        steps=4, cfg=5.0, sampler_name="euler", scheduler="simple", denoise=1.0, candidates=3, keep=1,
        checkpoints="0.97, 0.93", finish="continue",
    )  # fmt: skip
    seen |= {"report": report, "race_s": time.perf_counter() - began, "finite": bool(torch.isfinite(out["samples"]).all())}
    (manifold, *_) = comfy.run(own("FitShellLCC"), latents={"samples": 2 * sheet(6)}, **FIT)
    (guided,) = comfy.run(own("ShellLCCGuidance"), model=model, manifold=manifold, **GUIDANCE)
    began = time.perf_counter()
    (sampled,) = comfy.run(
        "KSampler", model=guided, positive=positive, negative=negative, latent_image=latent, seed=0, steps=2, cfg=1.0,
        sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    return seen | {"guided_s": time.perf_counter() - began, "guided_finite": bool(torch.isfinite(sampled["samples"]).all())}


def in_trainer(folder: Path, transformer: Path) -> dict:
    """Caches three pairs of videos and trains a head of the default size for one step. Returns seconds by name."""
    from benchmarks.toy_world import weights
    from tests.video_clips import moving, write_clip
    from trainers.kernels.latent_space import WAN21
    from trainers.prism import cli as prism
    from trainers.wan.prompts import text_id, write_embeddings

    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"prompt {i}" for i in range(3)]
    lines = ["path_A,path_B,prompt,overall"]
    for i, prompt in enumerate(prompts):
        for side in "ab":
            write_clip(folder / f"{i}{side}.mkv", moving(12, seed=2 * i + (side == "b")))
        lines.append(f"{i}a.mkv,{i}b.mkv,{prompt},A")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    g = torch.Generator().manual_seed(0)
    texts = {text_id(p): 0.1 * torch.randn(8, 4096, generator=g) for p in prompts}
    write_embeddings(folder / "embedded.safetensors", texts, WAN21, {})
    cache = [
        "cache", "--pairs", folder / "pairs.csv", "--vae", weights.FOLDER / weights.VAE, "--texts",
        folder / "embedded.safetensors", "--output", folder / "data", "--width", 128, "--height", 64, "--frames", 9,
        "--overwrite", "--device", "cpu",
    ]  # fmt: skip
    train = [
        "train", "--data", folder / "data", "--backbone", transformer, "--output", folder / "head.safetensors", "--overwrite",
        "--max_train_steps", 1, "--train_batch_size", 1, "--held_out", 0.4, "--levels", 0.9, "--validation_steps", 0,
        "--backbone_dtype", "bfloat16", "--device", "cpu",
    ]  # fmt: skip
    seen = {}
    for argv in (cache, train):
        began = time.perf_counter()
        code = prism.main([str(a) for a in argv])
        if code:
            raise SystemExit(code)
        seen[f"{argv[0]}_s"] = time.perf_counter() - began
    return seen


def alone(function, *arguments) -> dict:
    """What a function returns when run in its own process, with that process's peak memory in GiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, arguments))


def _measured(function, arguments) -> dict:
    torch.set_num_threads(1)
    found = function(*arguments) or {}
    return found | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.full_shape", description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/full_shape"))
    parser.add_argument("--storage", nargs="+", choices=STORAGE, default=STORAGE)
    args = parser.parse_args(argv)
    from tests.comfy.comfyui_install import make_base_directory

    out = args.output_dir.resolve()
    base = out / "comfyui"
    if not base.exists():
        base.mkdir(parents=True)
        make_base_directory(base)
    found = {}
    for storage in args.storage:
        name = f"random_wan_1.3B_{storage}"
        transformer = base / "models" / "diffusion_models" / f"{name}.safetensors"
        head = base / "models" / "prism" / f"{name}.safetensors"
        for path in (transformer, head):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not transformer.exists():
            alone(write_transformer, transformer, storage)
        if not head.exists():
            alone(write_head, head, transformer)
        gib = transformer.stat().st_size / 2**30
        print(f"{name}: {gib:.2f} GiB", flush=True)
        found[storage] = {"file_gib": gib}
        for part, arguments in (("comfyui", (in_comfyui, args.comfyui, base, name)),
                                ("trainer", (in_trainer, out / f"trainer_{storage}", transformer))):  # fmt: skip
            found[storage][part] = seen = alone(*arguments)
            print(f"  {part}: peak {seen['peak_gib']:.2f} GiB", flush=True)
            for key, value in seen.items():
                if key != "peak_gib":
                    print(f"    {key}: {value:.2f}" if isinstance(value, float) else f"    {key}: {value}", flush=True)
    (out / "full_shape.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
