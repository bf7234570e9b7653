"""Speed and peak memory of Shell-LCC compared with its plain formula and autograd.

    python -m benchmarks.shell_lcc [--tokens 5x60x104 21x60x104] [--bases 4096] [--hidden 512] [--threads N] [--repeats 3]

Times are medians over rounds; in a round every implementation runs once, so that other load on the machine slows all of them.
Memory is the growth of the process's peak resident set during one call (Linux), or of the CUDA allocator's peak.
On CUDA the share of one transformer step at Wan2.1-1.3B's shape (random weights, bf16) is printed as well.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.speed_and_memory import MIB, extra_peak, median_speedup, timed, timed_in_turn
from trainers.kernels.shell_lcc import coder as streamed
from trainers.kernels.shell_lcc import naive
from trainers.kernels.shell_lcc.anchors import Anchors
from trainers.kernels.shell_lcc.predictor import Predictor
from trainers.kernels.shell_lcc.pull import project


def implementations(z: torch.Tensor, bases: int, hidden: int) -> dict[str, Callable[[], object]]:
    """Name -> call on tokens z [N, 16], the reference first."""
    torch.manual_seed(0)
    device = z.device
    predictor = Predictor(16, bases, hidden).train(False).requires_grad_(False).to(device)
    state = dict(predictor.state_dict())
    anchors = Anchors(torch.randn(bases, 16), torch.rand(bases, 16) + 0.5, 16, 0.2).to(device)
    return {
        "naive value+gradient (autograd)": lambda: naive.distance_and_gradient(z, lambda t: naive.predictor_code(t, state)),
        "predictor value+gradient": lambda: streamed.distance_and_gradient(predictor, z),
        "predictor project": lambda: project(predictor, z, 1.0, 1.0, 1.0, 0.2),
        "anchors value+gradient": lambda: streamed.distance_and_gradient(anchors, z),
        "anchors project": lambda: project(anchors, z, 1.0, 1.0, 1.0, 0.2),
    }


def wan_step_seconds(tokens: tuple[int, int, int], repeats: int) -> float:
    """Median seconds of one forward of a Wan2.1-1.3B with random weights on CUDA in bf16. tokens: (T, H, W) of the latent."""
    from diffusers import WanTransformer3DModel

    with torch.device("cuda"):
        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30).to(torch.bfloat16)
        x = torch.randn(1, 16, *tokens, dtype=torch.bfloat16)
        text = torch.randn(1, 512, 4096, dtype=torch.bfloat16)
        t = torch.tensor([500.0])
    with torch.no_grad():
        model(x, t, text)
        return statistics.median(timed(lambda: model(x, t, text), x.device) for _ in range(repeats))


def measure(shape: tuple[int, int, int], device: torch.device, args: argparse.Namespace) -> list[dict]:
    """One row per implementation: seconds, times as fast as the reference, extra bytes, share of the reference's.

    Prints the largest relative difference between the predictor's values and gradients and the reference's.
    """
    n = shape[0] * shape[1] * shape[2]
    z = torch.randn(n, 16, generator=torch.Generator().manual_seed(1)).to(device)
    calls = implementations(z, args.bases, args.hidden)
    memory = {name: extra_peak(call, device) for name, call in calls.items()}
    seconds = timed_in_turn(calls, device, args.repeats)
    reference, fast = (calls[n]() for n in list(calls)[:2])
    gap = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(reference, fast, strict=True))
    print(f"largest relative difference of predictor value and gradient from the reference: {gap:.1e}")
    base = next(iter(calls))
    return [
        {
            "name": name,
            "seconds": statistics.median(seconds[name]),
            "faster": median_speedup(seconds[base], seconds[name]),
            "memory": memory[name],
            "memory_share": memory[name] / memory[base],
        }
        for name in calls
    ]


def print_table(rows: list[dict], step: float | None) -> None:
    heads = ["", "seconds", "x faster", "extra peak MiB", "share of naive's"] + (["share of a Wan 1.3B step"] if step else [])
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for r in rows:
        share = f"1/{1 / max(r['memory_share'], 1e-9):.1f}"
        cells = [r["name"], f"{r['seconds']:.3f}", f"{r['faster']:.2f}", f"{r['memory'] / MIB:.0f}", share]
        print("| " + " | ".join(cells + ([f"{r['seconds'] / step:.2%}"] if step else [])) + " |")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", default=["5x60x104", "21x60x104"], help="latent sizes TxHxW")
    parser.add_argument("--bases", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    for size in args.tokens:
        shape = tuple(int(v) for v in size.split("x"))
        print(f"\n{size}: {shape[0] * shape[1] * shape[2]} tokens, K={args.bases}, h={args.hidden}, k=16, "
              f"{device.type}, {torch.get_num_threads()} threads")  # fmt: skip
        rows = measure(shape, device, args)
        print_table(rows, wan_step_seconds(shape, args.repeats) if device.type == "cuda" else None)


if __name__ == "__main__":
    main()
