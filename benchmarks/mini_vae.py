"""Makes a miniature Wan 2.1 VAE (0.9 M weights) for tests and demonstrations, not for making videos.

    python -m benchmarks.mini_vae --output mini_wan_vae.safetensors [--videos clips/ --train_steps 300]

It has the layout of wan_2.1_vae.safetensors, so ComfyUI's Load VAE (0.25 and later) and `trainers.encode` load it. Its last
encoder layer is rescaled so that raw latents of the given clips have Wan 2.1's own mean and standard deviation in every
channel, and its first decoder layer undoes that: any code that expects `wan21` latents can be run on it. Without --videos,
moving noise is used as clips. The same seed, clips and number of threads give the same weights.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import make_parser
from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.latent_space import WAN21
from trainers.kernels.version import CREATED_BY
from trainers.kernels.video.clips import DecodeOptions, SourceReport, VideoError
from trainers.kernels.video.sizes import nearest_bucket
from trainers.running.inputs import InputError, expand
from trainers.video.read import VIDEO_SUFFIXES, decode_clips
from trainers.wan.vae import channels_last
from trainers.wan.vae_keys import to_original

BASE_DIM = 8
FRAMES = 17
CROP = 32
BATCH = 4


def build(seed: int):
    """An untrained AutoencoderKLWan of Wan 2.1's shape, 8 channels wide, its posterior narrow (log variance -5)."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as e:
        raise ImportError('this needs diffusers: pip install "intrinsic-reward[train]"') from e
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(base_dim=BASE_DIM, z_dim=WAN21.channels)
    with torch.no_grad():
        # Signals keep their size and mostly bypass the residual blocks. With torch's default initialisation a clip accounts
        # for 2 percent of the decoder's output, biases for the rest, and training stays at the mean colour for minutes.
        for name, module in vae.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                module.weight *= 3.0**0.5 * (0.2 if name.endswith((".conv2", ".proj")) else 1.0)
                module.bias.zero_()
        # At its initial width of about 1 the posterior's noise hides the latents, and training stalls.
        vae.quant_conv.weight[WAN21.channels :] = 0.0
        vae.quant_conv.bias[WAN21.channels :] = -5.0
    channels_last(vae)
    return vae


def train(vae, clips: list[Tensor], steps: int, generator: torch.Generator) -> Iterator[float]:
    """AdamW on random crops of `clips` ([3, T, H, W] in [-1, 1]); yields the loss of each step.

    Crops are short at first and of full length in the last third, without which colours drift in late frames.
    """
    # The spread of untrained latents may be hardly larger than the posterior's.
    _scale_means(vae, *_scale_and_shift(vae, clips, torch.zeros(WAN21.channels), torch.ones(WAN21.channels)))
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=max(steps, 1), pct_start=0.1)
    for step in range(steps):
        length = 5 if 3 * step < 2 * steps else FRAMES
        x = torch.stack([_crop(clips[_draw(len(clips), generator)], length, generator) for _ in range(BATCH)])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        y = decode(vae, posterior.mean + posterior.std * noise)
        loss = 2 * F.mse_loss(y, x) + 0.3 * F.l1_loss(y, x) + 1e-5 * posterior.kl().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        yield loss.item()


def decode(vae, z: Tensor) -> Tensor:
    """Raw latents [B, C, T, h, w] -> video [B, 3, 4T-3, 8h, 8w], unclamped: AutoencoderKLWan.decode clamps gradients away."""
    cache = [None] * sum(type(m).__name__ == "WanCausalConv3d" for m in vae.decoder.modules())
    z = vae.post_quant_conv(z)
    return torch.cat(
        [vae.decoder(z[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0) for i in range(z.shape[2])], dim=2
    )


@torch.no_grad()
def calibrate(vae, clips: list[Tensor]) -> None:
    """Rescales quant_conv, and post_quant_conv inversely, until raw latents of `clips` have WAN21's means and stds.

    What the VAE reconstructs stays the same. clips: [3, T, H, W] in [-1, 1].
    """
    c = WAN21.channels
    scale, shift = _scale_and_shift(vae, clips, torch.tensor(WAN21.mean), torch.tensor(WAN21.std))
    _scale_means(vae, scale, shift)
    vae.quant_conv.bias[c:] += 2 * scale.log()
    vae.post_quant_conv.weight /= scale.view(1, c, 1, 1, 1)
    vae.post_quant_conv.bias -= vae.post_quant_conv.weight.flatten(1) @ shift


def save(vae, path: str | Path, notes: dict[str, str]) -> None:
    """Writes the VAE in the original Wan 2.1 layout. `notes` go into the header. Raises OSError."""
    state = {k: v.detach().contiguous().clone() for k, v in vae.state_dict().items()}
    names = to_original(state)
    header = {"format": "pt", "created_by": CREATED_BY, "title": "Miniature Wan 2.1 VAE for tests and demonstrations"} | notes
    write_atomic(path, lambda partial: save_file({names[k]: v for k, v in state.items()}, partial, metadata=header))


def moving_noise(count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` clips [3, 17, 96, 128] in [-1, 1]: smooth noise of two scales that drifts."""
    clips = []
    for _ in range(count):
        fine, coarse = (torch.randn(1, 3, *size, generator=generator) for size in ((30, 40), (6, 8)))
        picture = sum(F.interpolate(n, (160, 192), mode="bicubic") for n in (0.5 * fine, coarse))[0].mul(0.5).tanh()
        dy, dx = (int(v) for v in torch.randint(0, 4, (2,), generator=generator))
        clips.append(torch.stack([picture[:, t * dy : t * dy + 96, t * dx : t * dx + 128] for t in range(FRAMES)], dim=1))
    return clips


def read_clips(videos: list[str], per_video: int = 4) -> list[Tensor]:
    """Up to `per_video` clips [3, T, H, W] in [-1, 1] of each video, 144p, T at most 17. Raises InputError."""
    clips, reasons = [], []
    reading = DecodeOptions(lambda w, h: nearest_bucket("144p", w, h), frames=FRAMES, max_clips=per_video)
    for name, path in expand(videos, VIDEO_SUFFIXES, "videos").items():
        try:
            clips += [w.frames.movedim(0, 1) / 127.5 - 1.0 for w in decode_clips(path, reading, SourceReport(name))]
        except VideoError as e:
            reasons.append(str(e))
    if not clips:
        raise InputError(f"none of the videos could be read: {'; '.join(reasons)}")
    return clips


def main(argv=None) -> int:
    parser = make_parser("benchmarks.mini_vae", __doc__)
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, .safetensors")
    parser.add_argument("--videos", nargs="+", metavar="DIR_OR_GLOB", help="clips to train on and to calibrate with")
    parser.add_argument("--train_steps", type=int, default=0, help="0 (default): random weights, calibrated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    if not args.output.endswith(".safetensors"):
        parser.error(f"--output {args.output}: the name must end in .safetensors")
    if Path(args.output).exists() and not args.overwrite:
        parser.error(f"--output {args.output} exists; use --overwrite to replace it")
    if args.train_steps < 0:
        parser.error("--train_steps must be 0 or more")
    try:
        return run(args)
    except (InputError, OSError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Builds, trains, calibrates and saves the VAE. Returns the exit code."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(args.seed)
    clips = read_clips(args.videos) if args.videos else moving_noise(8, generator)
    vae = build(args.seed)
    losses = list(
        tqdm(train(vae, clips, args.train_steps, generator), total=args.train_steps, disable=not sys.stderr.isatty())
    )
    vae.requires_grad_(False).train(False)
    calibrate(vae, clips)
    psnr = _psnr(vae, clips)
    notes = {"seed": str(args.seed), "train_steps": str(args.train_steps), "psnr": f"{psnr:.2f}"}
    save(vae, args.output, notes)
    size = sum(p.numel() for p in vae.parameters())
    print(f"{args.output}: {size} weights, {len(clips)} clips, {args.train_steps} steps, reconstruction {psnr:.2f} dB PSNR")
    if losses:
        print(f"loss {sum(losses[:10]) / len(losses[:10]):.4f} -> {sum(losses[-10:]) / len(losses[-10:]):.4f}")
    return 0


@torch.no_grad()
def _psnr(vae, clips: list[Tensor]) -> float:
    errors = [F.mse_loss(decode(vae, vae.encode(x[None]).latent_dist.mode())[0].clamp(-1, 1), x) for x in clips[:4]]
    return float(-10 * torch.log10(torch.stack(errors).mean() / 4))


@torch.no_grad()
def _scale_and_shift(vae, clips: list[Tensor], mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    raw = torch.cat([vae.encode(x[None]).latent_dist.mode()[0].flatten(1) for x in clips], dim=1).double()
    found_std, found_mean = torch.std_mean(raw, dim=1)
    scale = (std / found_std.clamp(min=1e-8)).float()
    return scale, mean - found_mean.float() * scale


@torch.no_grad()
def _scale_means(vae, scale: Tensor, shift: Tensor) -> None:
    c = WAN21.channels
    vae.quant_conv.weight[:c] *= scale.view(c, 1, 1, 1, 1)
    vae.quant_conv.bias[:c] = vae.quant_conv.bias[:c] * scale + shift


def _crop(clip: Tensor, length: int, generator: torch.Generator) -> Tensor:
    start, top, left = (_draw(max(1, n - m + 1), generator) for n, m in zip(clip.shape[1:], (length, CROP, CROP), strict=True))
    clip = clip[:, start : start + length, top : top + CROP, left : left + CROP]
    # Short clips repeat their last frame, so that the crops of a batch can be stacked.
    return torch.cat([clip, clip[:, -1:].expand(-1, length - clip.shape[1], -1, -1)], dim=1)


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(0, n, (), generator=generator))


if __name__ == "__main__":
    raise SystemExit(main())
