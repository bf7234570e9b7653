"""Trains the toy world's Wan 2.1 VAE on one CPU core: first on single frames, then on crops of clips, then on whole clips.

    python -m benchmarks.toy_world.train_vae --output_dir outputs/toy_world

Writes toy_wan_vae.safetensors (original Wan 2.1 layout, fp16) and, while training, vae-checkpoint.pt, from which the same
command resumes. The result depends on the seed, the number of steps and the clips, not on interruptions. --minutes stops
early and leaves the checkpoint.
"""

import argparse
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import make_parser
from benchmarks.mini_vae import calibrate, decode, read_clips
from trainers.kernels.latent_space import WAN21
from trainers.wan.vae import channels_last

from .clips import as_video, clips
from .vae_training import VaeTraining, psnr_per_frame, reconstruction_loss
from .weights import VAE, save_vae

BASE_DIM = 12
# (clips in a batch, frames, width) of the three stages; a step of the first two costs about the same.
IMAGES, CROPS, WHOLE = (4, 1, 64), (2, 9, 32), (1, 17, 64)
REAL_SHARE = 0.08


def build(seed: int, base_dim: int = BASE_DIM):
    """An untrained AutoencoderKLWan in Wan 2.1's layout with a narrow posterior."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(base_dim=base_dim, z_dim=WAN21.channels)
    with torch.no_grad():
        # With the initial posterior std of about 1, noise hides the latents, and training stalls for minutes.
        vae.quant_conv.weight[WAN21.channels :] = 0.0
        vae.quant_conv.bias[WAN21.channels :] = -5.0
    inflate(vae)
    channels_last(vae)
    return vae


@torch.no_grad()
def inflate(vae) -> None:
    """Initialises the weights as an image VAE on every frame: no past frames, groups of frames averaged and repeated.

    Training on single frames first, which are cheap, costs a fraction of learning space and time at once.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv3d):
            continue
        weight = module.weight
        if name.endswith("time_conv"):
            wide, narrow, taps = weight.shape[:3]
            one = torch.eye(narrow).repeat(wide // narrow, 1)[:, :, None, None, None]
            weight.mul_(0.1)
            # A downsampler (as many channels out as in) averages its taps; an upsampler repeats the newest frame.
            if wide == narrow:
                weight.add_(one / taps)
            else:
                weight[:, :, -1:].add_(one)
            module.bias.zero_()
        elif weight.shape[2] == 3:
            weight[:, :, -1].mul_(3**0.5)
            weight[:, :, :-1] = 0.0


@contextmanager
def single_frames(vae):
    """Context in which the VAE accepts single frames only, at half the cost: convolutions skip the empty past."""

    def planar(module, x: Tensor, cache_x=None) -> Tensor:
        return F.conv2d(x[:, :, 0], module.weight[:, :, -1], module.bias, padding=module._padding[0])[:, :, None]

    causal = [m for m in vae.modules() if type(m).__name__ == "WanCausalConv3d"]
    for module in causal:
        module.forward = partial(planar, module)
    try:
        yield
    finally:
        for module in causal:
            del module.forward


def draw_batch(toy: Tensor, real: list[Tensor], shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Random crops [B, 3, T, H, W] in [-1, 1]. toy: uint8 [N, T, 3, H, W]; real: [3, T, H, W] each; shape: (B, T, H = W)."""

    def below(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    out = []
    count, frames, size = shape
    for _ in range(count):
        if real and float(torch.rand((), generator=generator)) < REAL_SHARE:
            source = real[below(len(real))]
        else:
            source = as_video(toy[below(len(toy))])
        top, left, start = (below(have - want + 1) for have, want in zip(
            (*source.shape[-2:], source.shape[1]), (size, size, frames), strict=True))  # fmt: skip
        out.append(source[:, start : start + frames, top : top + size, left : left + size])
    return torch.stack(out)


def train(args: argparse.Namespace) -> bool:
    """Returns whether the last step was reached."""
    folder = Path(args.output_dir)
    toy = torch.stack([c.frames for c in clips("train", args.clips)])
    real = [c for c in (read_clips(args.videos, per_video=8) if args.videos else []) if c.shape[1] >= 17]
    held_out = torch.stack([c.frames for c in clips("test", 8)])
    vae = build(args.seed, args.base_dim)
    training = VaeTraining(vae, folder / "vae-checkpoint.pt", args)
    generator = training.generator
    print(f"{len(toy)} renders, {len(real)} real clips, from step {training.first} of {args.max_train_steps}", flush=True)
    whole_from = args.max_train_steps - args.whole_steps

    def loss_of(step: int) -> Tensor:
        shape = IMAGES if step < args.image_steps else CROPS if step < whole_from else WHOLE
        x = draw_batch(toy, real, shape, generator)
        with single_frames(vae) if shape is IMAGES else nullcontext():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            return reconstruction_loss(decode(vae, z), x) + args.kl * posterior.kl().mean()

    if not training.run(loss_of, held_out, watched=2):
        return False
    finish(vae, toy[:64], held_out, folder / VAE, args)
    return True


def finish(vae, calibration: Tensor, held_out: Tensor, path: Path, args: argparse.Namespace) -> None:
    """Rescales raw latents to Wan 2.1's means and stds, rounds weights to fp16 and saves."""
    vae.requires_grad_(False).train(False)
    calibrate(vae, list(as_video(calibration)))
    before = psnr_per_frame(vae, held_out)
    vae.half().float()
    after = psnr_per_frame(vae, held_out)
    print(f"psnr fp32 {before.mean():.2f}, fp16 {after.mean():.2f}; frames {[round(v, 1) for v in after.tolist()]}")
    notes = {"seed": str(args.seed), "max_train_steps": str(args.max_train_steps), "psnr": f"{after.mean():.2f}"}
    save_vae(vae, path, notes)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.train_vae", __doc__)
    parser.add_argument("--output_dir", default="outputs/toy_world")
    parser.add_argument("--videos", nargs="*", default=[], metavar="DIR_OR_GLOB", help="real clips to train on as well")
    parser.add_argument("--clips", type=int, default=400, help="renders to train on (400)")
    parser.add_argument("--base_dim", type=int, default=BASE_DIM)
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--image_steps", type=int, default=900, help="number of first steps, on single frames")
    parser.add_argument("--whole_steps", type=int, default=80, help="number of last steps, on whole clips")
    parser.add_argument("--learning_rate", type=float, default=0.02, help="of Muon; AdamW, for the other weights, has a tenth")
    parser.add_argument("--kl", type=float, default=1e-5)
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
