"""Best-of-N without a trained head through the node, in a real ComfyUI, on the captions of the rewards' report.

    python -m benchmarks.toy_world.rewards_in_comfyui --comfyui ~/comfy/ComfyUI --jobs outputs/toy_world/rewards/jobs
        [--captions 48] [--output_dir outputs/toy_world/rewards_in_comfyui]

Runs PRISM Best-of-N KSampler with Model Reward (prompt gap) and the plan "drafts" on the toy world's files, with the seeds of
the report's tables (--jobs). The tables hold the oracle's score of every seed's clip, so a winner's gain follows from its
seed; also printed: how often the node's winner is that of the tables, and the blocks that the node counted.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import export, pipeline, statistics, training_free, weights
from .clips import scene_of

SPLIT = "unseen"


def run(comfy, index: int, model, clip) -> tuple[int, float]:
    """(place of the winner among the caption's seeds, share of the blocks of all candidates in full)."""
    own = "IntrinsicReward_{}".format
    (positive,) = comfy.run("CLIPTextEncode", clip=clip, text=scene_of(SPLIT, index)[1])
    (negative,) = comfy.run("CLIPTextEncode", clip=clip, text="")
    _, _, frames, height, width = (1, *pipeline.LATENT_SHAPE)
    size = {"width": 8 * width, "height": 8 * height, "length": 4 * (frames - 1) + 1}
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", **size, batch_size=1)
    (reward,) = comfy.run(own("ModelReward"), kind="prompt gap", draws=4, draw_seed=index, sigmas="", motion=0.0)
    first = 1_000_000 + 100 * index
    *_, seeds, text, _ = comfy.run(
        own("PrismKSampler"), model=model, head=reward, positive=positive, negative=negative, latent_image=latent, seed=first,
        steps=pipeline.STEPS, cfg=pipeline.CFG, sampler_name="euler", scheduler="simple", denoise=1.0,
        candidates=training_free.COUNT, keep=1, checkpoints="50 %", finish="restart", plan="drafts",
        draft_steps=training_free.DRAFT_STEPS,
    )  # fmt: skip
    return seeds[0] - first, float(re.search(r"blocks: ([\d.]+) %", text)[1]) / 100


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.toy_world.rewards_in_comfyui", description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=Path, required=True, metavar="DIR", help="the folder jobs of the rewards' report")
    parser.add_argument("--captions", type=int, default=48)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_world/rewards_in_comfyui"))
    args = parser.parse_args(argv)
    from tests.comfy.comfyui_in_process import load_comfyui
    from tests.comfy.comfyui_install import make_base_directory

    torch.set_num_threads(1)
    base = args.output_dir.resolve() / "comfyui"
    if not base.exists():
        base.mkdir(parents=True)
        make_base_directory(base)
    export.to_comfyui(base / "models")
    comfy = load_comfyui(args.comfyui, base)
    (model,) = comfy.run("UNETLoader", unet_name=weights.DIT, weight_dtype="default")
    (model,) = comfy.run("ModelSamplingSD3", model=model, shift=pipeline.SHIFT)
    (clip,) = comfy.run("CLIPLoader", clip_name=weights.TEXT, type="wan")
    gains, same, shares = [], [], []
    for index in range(training_free.FIRST, training_free.FIRST + args.captions):
        (path,) = args.jobs.glob(f"training_free-{SPLIT}-{index}-{training_free.COUNT}-*.safetensors")
        table = load_file(path)
        winner, share = run(comfy, index, model, clip)
        oracle = table["oracle.overall"]
        gains.append(oracle[winner] - oracle.mean())
        same.append(winner == int(table["prompt gap/draft"].argmax()))
        shares.append(share)
    gain = statistics.mean(torch.stack(gains))
    print(
        f"ComfyUI {comfy.version}, {args.captions} captions: gain over a random seed {gain.mean:+.3f} ± {gain.half:.3f}; "
        f"the tables' winner in {sum(same)} of {len(same)}; {100 * sum(shares) / len(shares):.1f} % of the blocks"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
