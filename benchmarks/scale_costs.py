"""What candidates and preference training cost on 1, 8 and 64 GPUs, computed from shapes: FLOPs, bytes, hours.

    python -m benchmarks.scale_costs [--prompts 10000] [--seeds 8] [--sampling_steps 50] [--train_steps 1000] [--pairs 8]

Prints the tables of docs/scale.md. A multiplication with an addition counts as two FLOPs; only matrix products, convolutions
and attention are counted. Hours follow from an assumed share of the GPU's peak, given as a range, and are no measurement. The
transformer's FLOPs are formulas, which a test holds to PyTorch's counter; the VAE's are counted by it on the meta device,
which allocates and computes nothing (needs diffusers).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from trainers.kernels.rewards import flow_residual, prompt_gap
from trainers.tuning.dit_shapes import DitShapes
from trainers.tuning.lora import LoraOptions
from trainers.tuning.memory_plan import MemoryPlan, adapter_numbers, step_plan

from .command_line import make_parser

# Dense bf16, FLOP/s, of the data sheets.
PEAK = {"H100 SXM": 989e12, "A100": 312e12}
# Assumed shares of that peak which a long run reaches: transformer; VAE, whose convolutions are limited by memory.
DIT_SHARE, VAE_SHARE = (0.3, 0.5), (0.1, 0.25)
GPUS = (1, 8, 64)
# Published, not measured here: Wan2.1's README gives "about 4 minutes" for a 5-second 480p clip by the 1.3B on an RTX 4090,
# whose data sheet gives 165.2 TFLOP/s in bf16.
PUBLISHED_S, PUBLISHED_PEAK = 240, 165.2e12
# Of an 80 GB card, what a process can allocate.
USABLE = 78 * 2**30
# Seconds of one CPU core for the geometry score of 81 frames of 832x480 with OpenCV and with torch, measured:
# benchmarks/geometry/results/tracks_speed.md.
GEOMETRY_S = (1.2, 2.9)
TEXT_TOKENS, TEXT_WIDTH, FREQUENCIES = 512, 4096, 256
# UMT5-XXL's encoder: width, feed-forward width, layers.
TEXT_ENCODER = (4096, 10240, 24)
CHANNELS, PATCH = 16, (1, 2, 2)
# Rows of a memory plan that do not depend on the clip.
STATE = ("all parameters", "frozen base", "LoRA", "gradients", "optimiser")
# Noisy latents that `prism collect` stores by default besides the finished one.
LEVELS = 5
# Latent frames of a row in the memory table.
CROP = 9


@dataclass(frozen=True)
class Flops:
    """FLOPs of a pass. linear: of layers with weights; attention: of the products of queries, keys and values."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def backward(self, full: bool) -> float:
        """Of the backward pass: for the inputs, and with `full` for the weights, as many as forward; for attention five
        products in place of two, since it computes its scores again."""
        return self.linear * (2 if full else 1) + 2.5 * self.attention


@dataclass(frozen=True)
class DitSize:
    """A Wan 2.1 text-to-video transformer: width and feed-forward width of its blocks, their number."""

    width: int
    ffn: int
    layers: int
    channels: int = CHANNELS
    text_width: int = TEXT_WIDTH

    @property
    def block_parameters(self) -> int:
        """Numbers of one block: both attentions with the norms of queries and keys, feed-forward, norm, modulation."""
        d = self.width
        return 8 * (d * d + d) + 4 * d + 2 * d + 2 * d * self.ffn + self.ffn + d + 6 * d

    @property
    def parameters(self) -> int:
        """Numbers of all blocks, the embeddings of patches, text and time, and the head."""
        d, patch = self.width, self.channels * math.prod(PATCH)
        text = self.text_width * d + d + d * d + d
        time = FREQUENCIES * d + d + d * d + d + 6 * d * d + 6 * d
        return self.layers * self.block_parameters + (patch * d + d) + text + time + (d * patch + patch) + 2 * d

    def forward(self, tokens: int, text_tokens: int = TEXT_TOKENS) -> Flops:
        """FLOPs of one forward pass of one clip of so many tokens, under one text."""
        d, patch = self.width, self.channels * math.prod(PATCH)
        # Queries, keys, values and output of the self-attention; queries and output of the cross-attention.
        block = 2 * tokens * (6 * d * d + 2 * d * self.ffn) + 2 * text_tokens * 2 * d * d
        around = 2 * tokens * 2 * patch * d + 2 * text_tokens * (self.text_width * d + d * d)
        time = 2 * (FREQUENCIES * d + 7 * d * d)
        return Flops(self.layers * block + around + time, self.layers * 4 * tokens * (tokens + text_tokens) * d)

    def shapes(self, stored: int, compute: int) -> DitShapes:
        """As the trainers' memory plan reads it; stored, compute: bytes of a weight and of an activation."""
        return DitShapes(
            self.width, self.ffn, self.layers, self.channels, PATCH, False, self.parameters, stored * self.parameters, compute,
            stored == 1,
        )  # fmt: skip


SIZES = {"1.3B": DitSize(1536, 8960, 30), "14B": DitSize(5120, 13824, 40)}


def latent_shape(width: int, height: int, frames: int) -> tuple[int, int, int, int]:
    """[C, T, h, w] of a clip's latents: a quarter of the frames behind the first, an eighth of the sides."""
    return CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8


def tokens_of(latent: Sequence[int]) -> int:
    """Tokens of latents [C, T, h, w]."""
    return math.prod(n // p for n, p in zip(latent[1:], PATCH, strict=True))


def sampling_flops(size: DitSize, tokens: int, steps: int) -> float:
    """FLOPs of one clip: each step runs the prompt and the negative prompt."""
    return 2 * steps * size.forward(tokens).total


def pair_flops(size: DitSize, tokens: int, *, cached: bool = False, full: bool = False) -> float:
    """FLOPs of one pair in a step of trainers.dpo with checkpointing (kernels.tuning.split_step).

    Without a graph: the reference's winner and loser unless they are cached, and the loser. With one, for each side: forward,
    the same again in the backward pass, and that pass itself. full: all parameters instead of a LoRA, whose own FLOPs, below
    1 % of the network's, are left out.
    """
    forward = size.forward(tokens)
    return (1 if cached else 3) * forward.total + 2 * (2 * forward.total + forward.backward(full))


def text_flops(words: int = TEXT_TOKENS) -> float:
    """FLOPs of the text encoder for one prompt of so many tokens."""
    d, ffn, layers = TEXT_ENCODER
    return layers * (2 * words * (4 * d * d + 3 * d * ffn) + 4 * words * words * d)


@lru_cache(maxsize=4)
def vae_flops(width: int, height: int, frames: int, config: tuple[tuple[str, object], ...] = ()) -> tuple[float, float]:
    """(encoding, decoding) FLOPs of a clip, counted by PyTorch while diffusers' VAE runs on the meta device.

    config: of AutoencoderKLWan where it is not Wan 2.1's, lists as tuples. Raises ImportError without diffusers.
    """
    import torch
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLWan(**{k: list(v) if isinstance(v, tuple) else v for k, v in config})
        channels, latent_frames, h, w = latent_shape(width, height, frames)
        found = []
        for run, shape in ((vae.encode, (1, 3, frames, height, width)), (vae.decode, (1, channels, latent_frames, h, w))):
            with FlopCounterMode(display=False) as counter:
                run(torch.zeros(shape))
            found.append(float(counter.get_total_flops()))
    return found[0], found[1]


def hours(flops: float, peak: float, share: tuple[float, float], gpus: int = 1) -> tuple[float, float]:
    """(fewest, most) hours on so many GPUs."""
    return flops / (max(share) * peak * gpus) / 3600, flops / (min(share) * peak * gpus) / 3600


def sharded_bytes(plan: MemoryPlan, size: DitSize, gpus: int) -> int:
    """Bytes a GPU when FSDP shards weights, gradients and optimiser over so many: activations stay, and two whole blocks are
    gathered at a time."""
    state = {label: n for label, n in plan.rows if label in STATE}
    weights = state.get("all parameters", state.get("frozen base", 0))
    gathered = 0 if gpus == 1 else 2 * weights * size.block_parameters / size.parameters
    return round(sum(state.values()) / gpus + gathered + plan.total - sum(state.values()))


def gpus_needed(plan: MemoryPlan, size: DitSize, usable: int = USABLE) -> int | None:
    """The smallest power of two of GPUs that hold a step sharded by FSDP; None where the activations alone do not fit."""
    return next((n for n in (2**k for k in range(11)) if sharded_bytes(plan, size, n) <= usable), None)


def flops_table(width: int, height: int, frames: int, steps: int) -> str:
    latent = latent_shape(width, height, frames)
    n = tokens_of(latent)
    encode, decode = vae_flops(width, height, frames)
    rows = [
        ("parameters", *(f"{s.parameters / 1e9:.2f} G" for s in SIZES.values())),
        ("tokens of a clip", *(f"{n:,}" for _ in SIZES)),
        ("forward pass: layers", *(tera(s.forward(n).linear) for s in SIZES.values())),
        ("forward pass: attention", *(tera(s.forward(n).attention) for s in SIZES.values())),
        ("forward pass", *(tera(s.forward(n).total) for s in SIZES.values())),
        (f"one clip, {steps} steps, cfg (2 passes)", *(tera(sampling_flops(s, n, steps)) for s in SIZES.values())),
        ("flow residual of a clip", *(tera(flow_residual_passes() * s.forward(n).total) for s in SIZES.values())),
        ("prompt gap of a clip", *(tera(prompt_gap_passes() * s.forward(n).total) for s in SIZES.values())),
        ("DPO, one pair, LoRA", *(tera(pair_flops(s, n)) for s in SIZES.values())),
        ("the same, --cached_reference", *(tera(pair_flops(s, n, cached=True)) for s in SIZES.values())),
        ("DPO, one pair, all parameters", *(tera(pair_flops(s, n, cached=True, full=True)) for s in SIZES.values())),
        ("VAE, encoding a clip", *(tera(encode) for _ in SIZES)),
        ("VAE, decoding a clip", *(tera(decode) for _ in SIZES)),
        (f"text encoder, {TEXT_TOKENS} tokens", *(tera(text_flops()) for _ in SIZES)),
    ]
    shape = "x".join(map(str, latent))
    return markdown((f"TFLOP, {width}x{height}, {frames} frames (latent {shape})", *SIZES), rows)


def candidates_table(width: int, height: int, frames: int, steps: int, prompts: int, seeds: int) -> str:
    n, clips = tokens_of(latent_shape(width, height, frames)), prompts * seeds
    rows = []

    def add(label: str, flops: float, gpu: str, share: tuple[float, float]) -> None:
        rows.append((label, gpu, *(span(hours(flops, PEAK[gpu], share, g)) for g in GPUS)))

    for name, size in SIZES.items():
        for gpu in PEAK:
            add(f"{name}: sampling", clips * sampling_flops(size, n, steps), gpu, DIT_SHARE)
        add(f"{name}: flow residual", clips * flow_residual_passes() * size.forward(n).total, "H100 SXM", DIT_SHARE)
    add("VAE decoding", clips * vae_flops(width, height, frames)[1], "H100 SXM", VAE_SHARE)
    add("text encoding", prompts * text_flops(), "H100 SXM", DIT_SHARE)
    core = tuple(clips * s / 3600 for s in GEOMETRY_S)
    rows.append(("geometry score", "16 CPU cores a GPU", *(span(tuple(h / (16 * g) for h in core)) for g in GPUS)))
    return markdown((f"hours for {prompts:,} prompts x {seeds} seeds", "on", *on_gpus()), rows)


def training_table(width: int, height: int, frames: int, train_steps: int, pairs: int) -> str:
    n, rows = tokens_of(latent_shape(width, height, frames)), []
    for name, size in SIZES.items():
        for gpu, peak in PEAK.items():
            cells = []
            for g in GPUS:
                # A pair is not divided: with more GPUs than pairs, a step has a pair for each GPU.
                each = max(1, pairs // g)
                cells.append(f"{span(hours(train_steps * each * pair_flops(size, n), peak, DIT_SHARE))} ({each * g} pairs)")
            rows.append((f"{name}, LoRA", gpu, *cells))
    return markdown((f"hours for {train_steps:,} steps (pairs a step)", "on", *on_gpus()), rows)


def memory_table(width: int, height: int, frames: int) -> str:
    latent, rows = latent_shape(width, height, frames), []
    cases = (
        ("LoRA 32, base in bf16", 2, 2, LoraOptions(), 0), ("LoRA 32, base in fp8", 1, 2, LoraOptions(), 0),
        (f"LoRA 32, base in fp8, --crop_frames {CROP}", 1, 2, LoraOptions(), CROP),
        ("all parameters in fp32, AdamW", 4, 4, None, 0),
    )  # fmt: skip
    for name, size in SIZES.items():
        for label, stored, compute, options, crop in cases:
            shape = (latent[0], crop or latent[1], *latent[2:])
            plan = step_plan(size.shapes(stored, compute), shape, options)
            found = dict(plan.rows)
            weights = found.get("frozen base", found.get("all parameters"))
            state = sum(found.get(label, 0) for label in STATE)
            needed = gpus_needed(plan, size)
            cards = "too large for any number" if needed is None else "1" if needed == 1 else f"{needed} with FSDP"
            sizes = (weights, state - weights, plan.total - state, plan.total)
            rows.append((f"{name}, {label}", *(f"{n / 2**30:.1f}" for n in sizes), cards))
    heads = ("GiB, one clip of a pair at a time", "weights", "LoRA, gradients, optimiser", "activations", "together",
             "80 GB cards")  # fmt: skip
    return markdown(heads, rows)


def storage_table(width: int, height: int, frames: int, prompts: int, seeds: int) -> str:
    latent = 2 * math.prod(latent_shape(width, height, frames))
    clips, words = prompts * seeds, 2 * TEXT_WIDTH
    pixels = 3 * frames * height * width
    rows = [
        ("finished latent, fp16", size_of(latent), size_of(clips * latent)),
        (f"with {LEVELS} noisy latents (`collect` without --levels)", size_of((1 + LEVELS) * latent),
         size_of((1 + LEVELS) * clips * latent)),
        ("decoded frames, uint8, where they are kept raw", size_of(pixels), size_of(clips * pixels)),
        ("a pair in the folder of `dpo cache`, one for each prompt", size_of(2 * latent), size_of(2 * prompts * latent)),
        (f"embedded prompt, fp16, at most {TEXT_TOKENS} tokens", size_of(TEXT_TOKENS * words),
         size_of(prompts * TEXT_TOKENS * words)),
    ]  # fmt: skip
    for name, size in SIZES.items():
        numbers = adapter_numbers(size.shapes(2, 2), LoraOptions())
        rows.append((f"{name}: LoRA 32 as bf16 file", size_of(2 * numbers), "-"))
        rows.append((f"{name}: checkpoint of it (fp32, AdamW)", size_of(12 * numbers), "-"))
    return markdown((f"bytes, {prompts:,} prompts x {seeds} seeds", "each", "together"), rows)


def flow_residual_passes() -> int:
    """Forward passes of a clip's flow residual with the default levels and draws."""
    return len(flow_residual.SIGMAS) * flow_residual.NOISES


def prompt_gap_passes() -> int:
    """Forward passes of a clip's prompt gap: with the prompt and with the negative prompt."""
    return 2 * len(prompt_gap.SIGMAS) * prompt_gap.NOISES


def tera(flops: float) -> str:
    return f"{flops / 1e12:,.0f}" if flops >= 1e13 else f"{flops / 1e12:.1f}"


def size_of(count: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def span(found: tuple[float, float]) -> str:
    """A range of hours; two significant digits are more than the assumption is worth."""
    return " to ".join(f"{h:,.0f}" if h >= 10 else f"{h:.2g}" for h in found)


def on_gpus() -> list[str]:
    return [f"{g} GPU{'s' * (g > 1)}" for g in GPUS]


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def published_text() -> str:
    """What a published time says of the shares that are assumed here."""
    flops = sampling_flops(SIZES["1.3B"], tokens_of(latent_shape(832, 480, 81)), 50)
    return (
        f"For comparison, published and not measured here: Wan2.1's README gives about {PUBLISHED_S // 60} minutes for a\n"
        f"5-second 480p clip by the 1.3B on an RTX 4090. With 50 steps that is {flops / PUBLISHED_S / 1e12:.0f} TFLOP/s by\n"
        f"this count, {flops / PUBLISHED_S / PUBLISHED_PEAK:.0%} of the card's {PUBLISHED_PEAK / 1e12:.0f}."
    )


def tables(args) -> list[str]:
    """All tables and the comparison, in the order of docs/scale.md."""
    clip = (args.width, args.height, args.frames)
    return [
        flops_table(*clip, args.sampling_steps),
        candidates_table(*clip, args.sampling_steps, args.prompts, args.seeds),
        published_text(),
        training_table(*clip, args.train_steps, args.pairs),
        memory_table(*clip),
        storage_table(*clip, args.prompts, args.seeds),
    ]


def parse(argv=None):
    parser = make_parser("benchmarks.scale_costs", __doc__)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--sampling_steps", type=int, default=50)
    parser.add_argument("--train_steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a training step, all GPUs together (default 8)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    print("\n\n".join(tables(parse(argv))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
