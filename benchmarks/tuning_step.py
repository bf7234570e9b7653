"""Peak memory and time of a preference step against an ordinary training step of the same model, one and two graphs.

    python -m benchmarks.tuning_step [--layers 6] [--latent 16 3 20 32] [--dtype bf16] [--device cuda] [--repeats 3]

A random transformer of Wan2.1-1.3B's width with a LoRA of rank 32. An ordinary step is one forward and one backward pass of
one clip. The split step is kernels.tuning.split_step with the reference computed; the two-graph step keeps the winner's graph
until the loser's error is known, as trainers do that call backward() once on the whole loss. Peaks are the bytes of living
tensors besides weights and LoRA (benchmarks.live_bytes), on a GPU the allocator's as well.
"""

import argparse
import time
from collections.abc import Callable

import torch

from trainers.kernels.tuning import preference_loss as losses
from trainers.kernels.tuning import split_step
from trainers.kernels.tuning.preference_loss import Errors, PreferenceLoss
from trainers.kernels.tuning.split_step import NoisyPair, Velocity
from trainers.tuning import backbone, lora
from trainers.tuning.lora import LoraOptions

from .live_bytes import LiveBytes

WIDTH, FFN, TEXT = 1536, 8960, 4096
MIB = 1 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETA, LOSS = 500.0, PreferenceLoss()


def make_model(layers: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A random transformer with a LoRA, made on the device in its dtype."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = WanTransformer3DModel(
                num_attention_heads=WIDTH // 128, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=TEXT,
                freq_dim=256, ffn_dim=FFN, num_layers=layers, cross_attn_norm=True,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).train(False)
    lora.add(model, LoraOptions(), 0)
    return model


def ordinary(velocity: Velocity, pair: NoisyPair) -> None:
    """Forward and backward pass of one clip's error."""
    losses.velocity_error(velocity(pair.noisy("winner"), pair.sigma), pair.target("winner")).sum().backward()


def split(velocity: Velocity, pair: NoisyPair, model: torch.nn.Module) -> None:
    with lora.without_adapter(model):
        reference = split_step.measure_reference(velocity, pair)
    split_step.backward(velocity, pair, reference, BETA, LOSS, 1.0)


def two_graphs(velocity: Velocity, pair: NoisyPair, model: torch.nn.Module) -> None:
    with lora.without_adapter(model):
        reference = split_step.measure_reference(velocity, pair)
    errors, further = {}, 0.0
    for side in ("winner", "loser"):
        v = velocity(pair.noisy(side), pair.sigma)
        errors[side] = losses.velocity_error(v, pair.target(side))
        moved = getattr(reference, f"{side}_motion")
        further = further + losses.of_prediction(v, pair.noisy(side), pair.sigma, moved, None, BETA, LOSS)
    whole = Errors(errors["winner"], errors["loser"], reference.winner, reference.loser)
    (losses.of_errors(whole, BETA, LOSS) + further).sum().backward()


def measured(call: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, float, float]:
    """(MiB of living tensors at the peak, MiB that the allocator held more, best seconds), the last two of a GPU, else NaN."""
    with LiveBytes() as live:
        call()
    if device.type != "cuda":
        return live.peak / MIB, float("nan"), float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return live.peak / MIB, (torch.cuda.max_memory_allocated() - before) / MIB, min(seconds)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.tuning_step", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="of the transformer (default 6; Wan2.1-1.3B has 30)")
    parser.add_argument("--latent", type=int, nargs=4, default=(16, 3, 20, 32), metavar=("C", "T", "H", "W"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the frozen weights (default bf16)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls, on a GPU (default 3)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model = make_model(args.layers, DTYPES[args.dtype], device)
    g = torch.Generator().manual_seed(0)
    w, l, n = (torch.randn(1, *args.latent, generator=g).to(device) for _ in range(3))
    text = torch.randn(1, 32, TEXT, generator=g).to(device)
    pair = NoisyPair(w, l, n, torch.tensor([0.6], device=device))

    def velocity(x, sigma):
        return backbone.velocity(model, x, sigma, text)

    tokens = args.latent[1] * (args.latent[2] // 2) * (args.latent[3] // 2)
    print(f"{args.layers} blocks of width {WIDTH}, {args.dtype}, {tokens} tokens, LoRA rank 32")
    print(f"{device}, torch {torch.__version__}\n")
    print("| checkpointing | step | peak, MiB | against ordinary | allocator, MiB | seconds |\n|---|---|---|---|---|---|")
    for checkpointing in (False, True):
        if checkpointing:
            backbone.enable_checkpointing(model)
        base = None
        for name, call in (
            ("ordinary, one clip", lambda: ordinary(velocity, pair)),
            ("preference, split", lambda: split(velocity, pair, model)),
            ("preference, two graphs", lambda: two_graphs(velocity, pair, model)),
        ):
            peak, allocator, seconds = measured(call, device, args.repeats)
            base = base or peak
            shown = "yes" if checkpointing else "no"
            gpu = "- | -" if device.type != "cuda" else f"{allocator:.0f} | {seconds:.2f}"
            print(f"| {shown} | {name} | {peak:.0f} | {peak / base:.2f} | {gpu} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
