"""Goes on training the toy world's VAE, its decoder alone, on whole clips; one CPU core.

    python -m benchmarks.toy_world.train_decoder --vae outputs/toy_world/toy_wan_vae.safetensors

Latents stay what they are, so that a DiT may be trained on them at the same time. Writes --output_dir's
toy_wan_vae.safetensors and, while training, decoder-checkpoint.pt, from which the same command goes on.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.mini_vae import decode
from trainers.kernels.latent_space import WAN21
from trainers.wan.vae import channels_last

from .clips import as_video, clips
from .train_vae import make_optimisers, psnr_per_frame, reconstruction_loss, schedule
from .weights import VAE, header, load_vae, save_vae, write_torch


def trainable(path: str | Path):
    """A saved VAE, its decoder and post_quant_conv to be trained."""
    vae = load_vae(path)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    channels_last(vae)
    return vae


@torch.no_grad()
def posteriors(vae, frames: Tensor) -> Tensor:
    """Means and stds, raw: [N, 32, 5, 8, 8] of clips uint8 [N, 17, 3, 64, 64]."""
    rows = []
    for x in as_video(frames).split(1):
        posterior = vae.encode(x).latent_dist
        rows.append(torch.cat([posterior.mean, posterior.std], dim=1))
    return torch.cat(rows)


def train(args: argparse.Namespace) -> bool:
    """Returns whether the last step was reached."""
    folder = Path(args.output_dir)
    checkpoint = folder / "decoder-checkpoint.pt"
    generator = torch.Generator().manual_seed(args.seed)
    vae = trainable(args.vae)
    optimisers = make_optimisers(vae, args.learning_rate)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        generator.set_state(state["generator"])
        first = state["step"]
    held_out = torch.stack([c.frames for c in clips("test", 8)])
    frames = torch.stack([c.frames for c in clips("train", args.clips)])
    latents = posteriors(vae, frames)
    print(f"{len(frames)} renders, from step {first} of {args.max_train_steps}", flush=True)
    started = time.monotonic()
    running = 0.0
    for step in range(first, args.max_train_steps):
        i = torch.randint(0, len(frames), (args.train_batch_size,), generator=generator)
        mean, std = latents[i].split(WAN21.channels, dim=1)
        z = mean + std * torch.randn(mean.shape, generator=generator)
        loss = reconstruction_loss(decode(vae, z), as_video(frames[i]))
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = schedule(step, args.max_train_steps) * group["peak"]
            optimiser.step()
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        spent = (time.monotonic() - started) / 60
        done = step + 1
        stop = args.minutes is not None and spent >= args.minutes
        if done % args.log_steps == 0 or done == args.max_train_steps or stop:
            psnr = psnr_per_frame(vae, held_out)
            text = " ".join(f"{v:.1f}" for v in psnr[[0, 1, 4, 8, 12, 16]].tolist())
            print(f"step {done} {spent:.1f} min loss {running:.4f} psnr {psnr.mean():.2f} frames {text}", flush=True)
            state = {"vae": vae.state_dict(), "optimisers": [o.state_dict() for o in optimisers]}
            write_torch(checkpoint, state | {"generator": generator.get_state(), "step": done})
        if stop and done < args.max_train_steps:
            return False
    vae.half().float()
    psnr = f"{psnr_per_frame(vae, held_out).mean():.2f}"
    save_vae(vae, folder / VAE, header(args.vae) | {"decoder_steps": str(args.max_train_steps), "psnr": psnr})
    return True


def main(argv=None) -> int:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.toy_world.train_decoder",
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--vae", required=True, metavar="FILE", help="what train_vae wrote")
    parser.add_argument("--output_dir", default="outputs/toy_world/sharper")
    parser.add_argument("--clips", type=int, default=600, help="renders to train on (600)")
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=0.01, help="of Muon; AdamW, for the rest, has a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log_steps", type=int, default=100)
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")
    args = parser.parse_args(argv)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
