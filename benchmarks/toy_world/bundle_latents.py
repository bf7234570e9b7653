"""Writes a shard of latents of the toy world's training clips with their captions, on which the demo and the report fit.

    python -m benchmarks.toy_world.bundle_latents --vae outputs/toy_world/toy_wan_vae.safetensors

The file is the same as `python -m trainers.encode` would write, so every trainer reads it.
"""

from pathlib import Path

import torch

from benchmarks.command_line import make_parser
from trainers.kernels.files.latents import write_latents
from trainers.kernels.latent_space import WAN21
from trainers.running.identity import file_digest

from . import weights
from .clips import scene_of
from .train_dit import encode_clips

COUNT = 256


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.bundle_latents", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_world"))
    parser.add_argument("--vae", required=True, metavar="FILE", help="the VAE that the DiT was trained with")
    parser.add_argument("--count", type=int, default=COUNT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    digest = file_digest(Path(args.vae))
    latents = encode_clips(weights.load_vae(args.vae), args.output_dir / "latents", args.count, digest)
    tensors, clips = {}, {}
    for i, z in enumerate(latents):
        name = f"toy-{i:04d}"
        tensors[name] = z.half()
        clips[name] = {"source": name, "video": name, "window": 0, "frames": 17, "caption": scene_of("train", i)[1]}
    provenance = {"created_by": "benchmarks.toy_world.bundle_latents", "clips": len(clips)}
    path = args.output_dir / weights.LATENTS
    write_latents(path, tensors, WAN21, clips, settings={"vae": digest}, provenance=provenance)
    print(f"{path}: {len(clips)} clips, {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
