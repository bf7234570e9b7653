"""Fine-tunes the decoder of the toy world's VAE on whole clips, on one CPU core.

    python -m benchmarks.toy_world.train_decoder --vae outputs/toy_world/toy_wan_vae.safetensors

The encoder does not change, so a DiT can be trained on its latents at the same time. Writes toy_wan_vae.safetensors into
--output_dir and, while training, decoder-checkpoint.pt, from which the same command resumes.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.command_line import make_parser
from benchmarks.mini_vae import decode
from trainers.kernels.latent_space import WAN21
from trainers.wan.vae import channels_last

from .clips import as_video, clips
from .vae_training import VaeTraining, psnr_per_frame, reconstruction_loss
from .weights import VAE, header, load_vae, save_vae


def trainable(path: str | Path):
    """A saved VAE whose decoder and post_quant_conv are trainable."""
    vae = load_vae(path)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    channels_last(vae)
    return vae


@torch.no_grad()
def posteriors(vae, frames: Tensor) -> Tensor:
    """Means and stds of raw latents, [N, 32, 5, 8, 8], of clips uint8 [N, 17, 3, 64, 64]."""
    rows = []
    for x in as_video(frames).split(1):
        posterior = vae.encode(x).latent_dist
        rows.append(torch.cat([posterior.mean, posterior.std], dim=1))
    return torch.cat(rows)


def train(args: argparse.Namespace) -> bool:
    """Returns whether the last step was reached."""
    folder = Path(args.output_dir)
    vae = trainable(args.vae)
    training = VaeTraining(vae, folder / "decoder-checkpoint.pt", args)
    generator = training.generator
    held_out = torch.stack([c.frames for c in clips("test", 8)])
    frames = torch.stack([c.frames for c in clips("train", args.clips)])
    latents = posteriors(vae, frames)
    print(f"{len(frames)} renders, from step {training.first} of {args.max_train_steps}", flush=True)

    def loss_of(step: int) -> Tensor:
        i = torch.randint(0, len(frames), (args.train_batch_size,), generator=generator)
        mean, std = latents[i].split(WAN21.channels, dim=1)
        z = mean + std * torch.randn(mean.shape, generator=generator)
        return reconstruction_loss(decode(vae, z), as_video(frames[i]))

    if not training.run(loss_of, held_out, watched=8):
        return False
    vae.half().float()
    psnr = f"{psnr_per_frame(vae, held_out).mean():.2f}"
    save_vae(vae, folder / VAE, header(args.vae) | {"decoder_steps": str(args.max_train_steps), "psnr": psnr})
    return True


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.train_decoder", __doc__)
    parser.add_argument("--vae", required=True, metavar="FILE", help="written by train_vae")
    parser.add_argument("--output_dir", default="outputs/toy_world/sharper")
    parser.add_argument("--clips", type=int, default=600, help="renders to train on (600)")
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=0.01, help="of Muon; AdamW, for the other weights, has a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log_steps", type=int, default=100)
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command resumes")
    args = parser.parse_args(argv)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
