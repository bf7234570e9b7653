"""What one training step of a Wan transformer takes in memory, from shapes alone: before anything is loaded.

For N tokens of width D, a block keeps a number of bytes for each token and channel that its code decides: unnormalised and
normalised queries and keys, values, outputs of both attentions and, for each LoRA in a 16-bit network, the input in fp32.
These numbers were counted with `benchmarks.live_bytes`, for a LoRA and for all parameters, in 16 and 32 bits; the feed-forward
part grows with its width F. Checkpointing keeps the blocks' inputs and one block; without it all blocks are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..running.output import format_table
from . import lora
from .backbone import TuningError
from .dit_shapes import DitShapes, read_shapes
from .lora import LoraOptions
from .lora_files import DTYPES

GIB = 2**30
# Bytes of an optimiser's state for each trainable number, by a part of its name in lower case, the first that is found; else
# AdamW's, two moments in fp32.
OPTIMISERS = {"8bit": 2, "4bit": 1, "fp8": 2, "adafactor": 0.1, "lion": 4, "sgd": 4}
ADAMW = 8
# Clips, noises, velocities and errors of a step that are alive together, each the size of the latent in fp32.
LATENTS = 12
# An allocator's rounding and the kernels' own buffers, as a share of the activations.
ALLOCATOR = 0.1


@dataclass(frozen=True)
class Counts:
    """Bytes for each token and channel. saved: of a block for its backward pass; attention, ffn: the most while a block is
    computed again and back-propagated, in its attention and in its feed-forward part; head: behind the blocks; text: for each
    token of the text. The *_ffn are in units of F / D.
    """

    saved: float
    saved_ffn: float
    attention: float
    attention_ffn: float
    ffn: float
    ffn_ffn: float
    head: float
    text: float


# By (all parameters, bytes of the compute dtype). A frozen linear layer keeps no input.
COUNTS = {
    (False, 4): Counts(56.4, 4, 73.3, 4, 57.3, 12, 9, 18),
    (False, 2): Counts(60.4, 2, 81.3, 2, 63.3, 6, 7, 18),
    (True, 4): Counts(88.4, 8, 104.4, 8, 97.0, 12, 22, 28),
    (True, 2): Counts(68.4, 4, 87.4, 4, 74.4, 6, 17, 20),
}
# What LoRAs of the feed-forward layers add: their inputs in fp32, and for 16 bits a gradient in fp32 (constant, per F / D).
FFN_LORA = {4: (4.0, 4.0), 2: (4.0, 6.5)}


@dataclass(frozen=True)
class MemoryPlan:
    """rows: (what, bytes), in the order of their appearance in a step."""

    rows: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes of all rows."""
        return sum(size for _, size in self.rows)


def plan(
    path: str | Path,
    latent: Sequence[int],
    *,
    options: LoraOptions | None,
    batch: int = 1,
    base_dtype: str = "stored",
    checkpointing: bool = True,
    optimizer: str = "torch.optim.AdamW",
    expert: str | None = None,
) -> MemoryPlan:
    """`step_plan` of a backbone's file or folder, of which only headers are read.

    base_dtype: "stored", or a key of lora_files.DTYPES; optimizer: its dotted name. Raises TuningError, DitError or
    FileNotFoundError.
    """
    shapes = read_shapes(path, DTYPES.get(base_dtype), expert)
    own = next((size for part, size in OPTIMISERS.items() if part in optimizer.lower()), ADAMW)
    return step_plan(shapes, latent, options, batch=batch, checkpointing=checkpointing, optimiser_bytes=own)


def step_plan(
    shapes: DitShapes,
    latent: Sequence[int],
    options: LoraOptions | None,
    *,
    batch: int = 1,
    text_tokens: int = 512,
    checkpointing: bool = True,
    graphs: int = 1,
    optimiser_bytes: float = ADAMW,
) -> MemoryPlan:
    """The plan of a step on latents [C, T, H, W].

    options: of the LoRA, None for all parameters; batch: latents in one forward pass; text_tokens: with the padding, or
    folded; graphs: forward passes whose graphs are alive together; optimiser_bytes: of its state for each trainable number (8:
    AdamW, 2: AdamW in 8 bits). Raises TuningError for all parameters of a quantised base, or unknown targets.
    """
    if options is None and shapes.quantised:
        raise TuningError("the backbone is stored in fp8, and only a LoRA can be trained on it")
    c, width, ratio = shapes.compute_bytes, shapes.width, shapes.ffn / shapes.width
    trainable = shapes.parameters if options is None else adapter_numbers(shapes, options)
    trainable_bytes = round(shapes.stored_bytes / shapes.parameters) if options is None else 4
    frames, high, wide = (n // p for n, p in zip(latent[1:], shapes.patch, strict=True))
    tokens = batch * frames * high * wide
    counts = COUNTS[options is None, 4 if c == 4 else 2]
    has_ffn = options is not None and ({"ffn", "all"} & set(options.targets))
    more, more_ffn = FFN_LORA[4 if c == 4 else 2] if has_ffn else (0.0, 0.0)
    work = max(counts.attention + counts.attention_ffn * ratio, counts.ffn + (counts.ffn_ffn + more_ffn) * ratio + more)
    saved = counts.saved + counts.saved_ffn * ratio + more + (4 * ratio if has_ffn else 0.0)
    if checkpointing:
        kept = ("inputs of all blocks", graphs * shapes.layers * c * tokens * width)
    else:
        kept = ("activations of the other blocks", max(0, graphs * shapes.layers - 1) * saved * tokens * width)
    activations = [
        kept,
        ("one block, forward and backward", work * tokens * width),
        ("head and text", graphs * counts.head * tokens * width + counts.text * batch * text_tokens * width),
        ("latents", LATENTS * 4 * batch * latent[0] * latent[1] * latent[2] * latent[3]),
    ]
    if shapes.quantised:
        activations.append(("one fp8 layer expanded", (4 + c) * width * max(width, shapes.ffn)))
    activations.append(("allocator", ALLOCATOR * sum(size for _, size in activations)))
    rows = [("all parameters" if options is None else "frozen base", shapes.stored_bytes)]
    if options is not None:
        rows.append(("LoRA", 4 * trainable))
    rows += [("gradients", trainable * trainable_bytes), ("optimiser", trainable * optimiser_bytes), *activations]
    return MemoryPlan(tuple((label, round(size)) for label, size in rows))


def adapter_numbers(shapes: DitShapes, options: LoraOptions) -> int:
    """The number of a LoRA's trainable numbers: rank (in + out) over its layers. Raises TuningError for unknown targets."""
    found = 0
    for suffix in lora.suffixes(options, shapes.image_keys):
        if suffix.startswith("ffn"):
            found += shapes.width + shapes.ffn
        else:
            # Image keys are in the cross-attention only.
            found += 2 * shapes.width * (1 if suffix.startswith("add_") else 2)
    return shapes.layers * options.rank * found


def format_plan(plan: MemoryPlan) -> str:
    """The rows and their sum in GiB, one a line: what --dry_run prints."""
    rows = [(label, f"{size / GIB:8.2f} GiB") for label, size in (*plan.rows, ("together", plan.total))]
    return format_table(rows, "memory of one training step")


def require_fits(plan: MemoryPlan, limit_gb: float | None, device: torch.device) -> None:
    """Raises TuningError when the plan needs more than `limit_gb` (10^9 bytes), or without it than is free on a CUDA device.

    Where neither is known, nothing is checked.
    """
    if limit_gb is not None:
        available = limit_gb * 1e9
    elif device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        return
    if plan.total > available:
        label, size = max(plan.rows, key=lambda row: row[1])
        raise TuningError(
            f"a step needs about {plan.total / GIB:.1f} GiB and {available / GIB:.1f} GiB are free (most: {label}, "
            f"{size / GIB:.1f} GiB): crop the clips in time, keep --gradient_checkpointing, lower the batch, take an fp8 "
            "backbone, or a card with more memory"
        )
