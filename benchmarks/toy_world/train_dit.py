"""Trains the toy world's diffusion transformer by flow matching on latents of captioned renders.

    python -m benchmarks.toy_world.train_dit --vae outputs/toy_world/toy_wan_vae.safetensors --processes 2

First encodes --clips renders with the VAE, then trains; both can be interrupted at any time and resumed with the same command.
Writes toy_wan_t2v.safetensors: the moving average of the weights in the original Wan 2.1 layout, fp16. Every
--validation_steps it samples clips and prints how many attributes the judge classifies correctly.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.command_line import make_parser
from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.latent_space import WAN21
from trainers.running.identity import file_digest
from trainers.wan.text_padding import use_bias

from . import judge, text_encoder, weights
from .captions import VALUES, caption
from .clips import as_video, clip, scene_of
from .pipeline import ToyWorld
from .text_encoder import LENGTH, TOKENS
from .weights import write_torch

PART = 50
EMA = 0.998
DROPOUT = 0.1


def encode_clips(vae, folder: Path, count: int, digest: str) -> Tensor:
    """Normalised latents [count, 16, 5, 8, 8] of the first clips of split "train", kept in parts of 50 under `folder`."""
    parts = []
    for start in range(0, count, PART):
        path = folder / f"latents-{digest}-{start:06d}.safetensors"
        if not path.exists():
            rows = []
            for i in range(start, start + PART):
                rows.append(as_video(clip("train", i).frames))
            # torch's fast convolutions over time need at least two of these small clips.
            with torch.no_grad():
                z = WAN21.normalise(torch.cat([vae.encode(x).latent_dist.mode() for x in torch.stack(rows).split(PART // 2)]))
            write_atomic(path, lambda partial, z=z: save_file({"z": z.contiguous()}, partial))
            print(f"encoded {start + PART} of {count} clips", flush=True)
        parts.append(load_file(path)["z"])
    return torch.cat(parts)[:count]


def schedule(step: int, steps: int) -> float:
    """Learning rate factor: warm-up over 50 steps, constant, linear to zero over the last 30%."""
    return min(1.0, (step + 1) / 50, max(1e-3, (steps - step) / (0.3 * steps)))


def make_optimiser(dit, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; Muon is no better here, because its own computations cost a third of a step."""
    # Weight decay on matrices only: norms, biases and modulations must not decay to zero.
    grouped = [
        {"params": [p for p in dit.parameters() if (p.ndim == 2) == matrices], "weight_decay": decay}
        for matrices, decay in ((True, 0.01), (False, 0.0))
    ]
    return torch.optim.AdamW(grouped, lr=learning_rate, betas=(0.9, 0.98))


def flow_loss(dit, z: Tensor, text: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity. z, noise: [B, 16, 5, 8, 8]; text: [B, L, 256]; sigma: [B]."""
    s = sigma.view(-1, 1, 1, 1, 1)
    v = dit(s * noise + (1 - s) * z, 1000 * sigma, text, return_dict=False)[0]
    return (v - (noise - z)).square().mean()


def average_gradients(parameters: list[Tensor], processes: int) -> None:
    """Averages gradients over processes as one flat tensor: hundreds of small all_reduce calls would cost more than a step."""
    if processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, g in zip(parameters, (flat / processes).split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(g.view_as(p))


def train(rank: int, args: argparse.Namespace) -> None:
    """Trains in one of args.processes: all draw the same batch, each uses its share; the first saves and validates."""
    torch.set_num_threads(1)
    folder = Path(args.output_dir)
    if args.processes > 1:
        where = f"file://{(folder / '.processes').resolve()}"
        torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    text_path = folder / weights.TEXT
    world = ToyWorld(weights.new_dit(weights.dit_config()), weights.load_vae(args.vae), text_encoder.load(text_path))
    latents = encode_clips(world.vae, folder / "latents", args.clips, file_digest(Path(args.vae)))
    attributes = [scene_of("train", i)[0].attributes for i in range(args.clips)]
    dit, ema = world.dit, copy.deepcopy(world.dit).requires_grad_(False)
    optimiser = make_optimiser(dit, args.learning_rate)
    first, checkpoint = 0, folder / "dit-checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        dit.load_state_dict(state["dit"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        first = state["step"]
    if rank == 0:
        print(f"{len(latents)} latents, std {latents.std():.3f}; step {first} of {args.max_train_steps}", flush=True)
    share = slice(rank, None, args.processes)
    started, running = time.monotonic(), 0.0
    # Every text has TOKENS positions here; one more position represents the rest of the padding.
    bias = torch.zeros(1, 1, 1, TOKENS + 1)
    bias[..., -1] = math.log(LENGTH - TOKENS)
    use_bias(dit, bias)
    for step in range(first, args.max_train_steps):
        i = torch.randint(0, len(latents), (args.train_batch_size,), generator=generator)
        drop = torch.rand(len(i), generator=generator) < DROPOUT
        texts = ["" if d else caption(attributes[j], generator) for j, d in zip(i.tolist(), drop.tolist(), strict=True)]
        sigma = torch.randn(len(i), generator=generator).sigmoid()
        noise = torch.randn((len(i), *latents.shape[1:]), generator=generator)
        text = world.text.encode(texts[share], TOKENS + 1)
        loss = flow_loss(dit, latents[i[share]], text, sigma[share], noise[share])
        dit.zero_grad()
        loss.backward()
        average_gradients(list(dit.parameters()), args.processes)
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.max_train_steps)
        optimiser.step()
        done = step + 1
        with torch.no_grad():
            # At first the average follows closely, so that the initial weights are forgotten quickly.
            keep = min(EMA, (1 + done) / (10 + done))
            torch._foreach_lerp_(list(ema.parameters()), list(dit.parameters()), 1 - keep)
        running = loss.item() if step == first else 0.99 * running + 0.01 * loss.item()
        spent = (time.monotonic() - started) / 60
        stop = args.processes == 1 and args.minutes is not None and spent >= args.minutes
        if rank > 0:
            continue
        if done % 50 == 0:
            print(f"step {done} {spent:.1f} min loss {running:.4f}", flush=True)
        if done in args.keep:
            weights.save_dit(ema, folder / f"step-{done}-{weights.DIT}", {"seed": str(args.seed), "steps": str(done)})
        if done % args.validation_steps == 0 or done == args.max_train_steps or stop:
            state = {"dit": dit.state_dict(), "ema": ema.state_dict(), "optimiser": optimiser.state_dict()}
            write_torch(checkpoint, state | {"generator": generator.get_state(), "step": done})
            notes = {"seed": str(args.seed), "steps": str(done), "clips": str(args.clips)}
            weights.save_dit(ema, folder / weights.DIT, notes)
            if Path(args.judge).exists():
                print(f"step {done} read right:", validate(ToyWorld(ema, world.vae, world.text), args.judge), flush=True)
        if stop:
            return


def validate(world: ToyWorld, path: str | Path, count: int = 24, split: str = "test") -> dict[str, float]:
    """Share of each attribute that the judge classifies as in the caption, over `count` samples."""
    scenes = [scene_of(split, i) for i in range(count)]
    frames = world.decode(world.sample([text for _, text in scenes], range(count)))
    reading, truth = judge.load(path).read(frames), [scene.attributes for scene, _ in scenes]
    return {k: round(float(reading.correct(truth, k).float().mean()), 3) for k in VALUES}


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.train_dit", __doc__)
    parser.add_argument("--output_dir", default="outputs/toy_world")
    parser.add_argument("--vae", required=True, metavar="FILE", help="the trained VAE")
    parser.add_argument("--judge", default=judge.WEIGHTS, metavar="FILE", help="the trained judge, for validation")
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--keep", type=int, nargs="+", default=[], metavar="STEP", help="also keep the weights of these steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="number, of one thread each; same results to rounding")
    parser.add_argument("--minutes", type=float, help="stop after this time (one process only); the same command resumes")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.train_batch_size % args.processes:
        parser.error(f"--train_batch_size {args.train_batch_size} is not divisible by --processes {args.processes}")
    torch.set_num_threads(1)
    encode_clips(weights.load_vae(args.vae), folder / "latents", args.clips, file_digest(Path(args.vae)))
    if not (folder / weights.TEXT).exists():
        text_encoder.save(folder / weights.TEXT)
    if args.processes == 1:
        train(0, args)
    else:
        (folder / ".processes").unlink(missing_ok=True)
        torch.multiprocessing.spawn(train, (args,), args.processes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
