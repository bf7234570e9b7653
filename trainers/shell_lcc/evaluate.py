"""Prints the distances of clips' tokens to a manifold, per clip and over all tokens, and writes them as JSON.

The JSON object has mean, median, p05, p95 (of the token distances), tokens, outside_band (share of tokens outside the
calibrated band, null without calibration), and clips: a list of the same figures per clip with its id.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.files.atomic import write_atomic
from ..kernels.shell_lcc.evaluation import score, summary
from ..kernels.shell_lcc.manifold import ShellManifold, load
from ..running.device import pick_device
from ..running.output import require_output
from .arguments import add_latents
from .data import iterate_clips, list_clips_for

KEYS = ("mean", "median", "p05", "p95")


def add_arguments(parser) -> None:
    parser.add_argument("--manifold", required=True, metavar="FILE", help="made by `fit` or `import`")
    add_latents(parser, "--latents", True, "files, folders or patterns: .safetensors shards, .latent, .pt, .pth")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here; replaces an existing file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args) -> int:
    if args.json:
        require_output(Path(args.json), True, ".json")
    path = Path(args.manifold)
    manifold = load(path, pick_device(args.device))
    report = evaluate(manifold, iterate_clips(list_clips_for(manifold, path, args), args))
    print(text(report))
    if args.json:
        body = json.dumps(report, indent=1) + "\n"
        write_atomic(args.json, lambda partial: Path(partial).write_text(body, encoding="utf-8"))
    return 0


def evaluate(manifold: ShellManifold, clips) -> dict:
    """The JSON object of the module's docstring; clips: an iterable of (id, z [C, T, h, w]), read once."""
    every: list[Tensor] = []
    rows = []
    for clip_id, z in clips:
        d = score(manifold, z).flatten()
        every.append(d)
        rows.append({"id": clip_id, "frames": z.shape[1], **_figures(manifold, d)})
    return {**_figures(manifold, torch.cat(every)), "clips": rows}


def text(report: dict) -> str:
    """A table with a line per clip, then one for all of them."""
    lines = [("clip", "tokens", *KEYS, "outside")]
    for row in [*report["clips"], {**report, "id": "all"}]:
        outside = "-" if row["outside_band"] is None else f"{row['outside_band']:.4f}"
        lines.append((row["id"], str(row["tokens"]), *(f"{row[k]:.4f}" for k in KEYS), outside))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _figures(manifold: ShellManifold, d: Tensor) -> dict:
    figures = summary(d)
    outside = None if manifold.calibration is None else float(manifold.outside_band(d).double().mean())
    return {k: figures[k] for k in KEYS} | {"tokens": d.numel(), "outside_band": outside}
