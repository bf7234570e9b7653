"""Cost of a PRISM head relative to the transformer that it reads, at the size of Wan2.1-1.3B, with random weights.

    python -m benchmarks.prism [--frames 17] [--threads 2]

Times one transformer block on the tokens of an 832x480 clip, the head, and the plain formula of its attention, which projects
every token. A sampling step is 2 x 30 blocks under classifier-free guidance; a score needs the conditional pass only.
"""

import argparse
import statistics
import time

import torch

from trainers.kernels.prism import naive
from trainers.kernels.prism.head import HeadConfig, PrismHead

WIDTH, HEADS, FFN, BLOCKS, WORDS = 1536, 12, 8960, 30, 512


def seconds(function, rounds: int) -> float:
    """Median of `rounds` calls after a warm-up; with 0 rounds, the time of the warm-up."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) if rounds else times[0]


@torch.no_grad()
def measure(frames: int, rounds: int) -> dict[str, float]:
    """{"tokens": N, "block", "head", "plain": seconds}."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    latent = (frames - 1) // 4 + 1
    tokens = latent * 30 * 52
    block = WanTransformerBlock(WIDTH, FFN, HEADS, "rms_norm_across_heads", True).train(False)
    x, text = torch.randn(1, tokens, WIDTH), torch.randn(1, WORDS, WIDTH)
    rotary = WanRotaryPosEmbed(WIDTH // HEADS, (1, 2, 2), 1024)(torch.empty(1, 16, latent, 60, 104))
    time_embedding = torch.randn(1, 6, WIDTH)
    head = PrismHead(HeadConfig(WIDTH)).train(False)
    mask = torch.ones(1, tokens + WORDS, dtype=torch.bool)
    return {
        "tokens": tokens,
        "block": seconds(lambda: block(x, text, time_embedding, rotary), rounds),
        "head": seconds(lambda: head([x], text), rounds),
        "plain": seconds(lambda: naive.query_attention(head, [x, text], mask), rounds),
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=17, help="of the clip, 4n+1 (17)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = measure(args.frames, args.rounds)
    step = 2 * BLOCKS * found["block"]
    print(f"832x480, {args.frames} frames, {found['tokens']} tokens, {args.threads} threads, fp32 on a CPU\n")
    print("| | seconds | share of a step (2 x 30 blocks) |\n|---|---|---|")
    print(f"| one block | {found['block']:.3f} | {100 * found['block'] / step:.2f} % |")
    print(f"| head, as it runs | {found['head']:.3f} | {100 * found['head'] / step:.3f} % |")
    print(f"| its attention, plain formula | {found['plain']:.3f} | {100 * found['plain'] / step:.3f} % |")


if __name__ == "__main__":
    main()
