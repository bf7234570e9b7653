"""Converts a released Shell-LCC checkpoint (.pth) to a manifold file, and calibrates it on latents of real clips.

The checkpoint is loaded with weights_only: {"model": state dict, "config": {...}}, where names may begin with "module.".
Without --calibrate the file has no quantiles: the radius is then the nominal 1 and there is no band.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.files.header import describe_foreign
from ..kernels.latent_space import WAN21
from ..kernels.shell_lcc import evaluation
from ..kernels.shell_lcc.calibration import calibrate
from ..kernels.shell_lcc.manifold import ShellManifold, save
from ..kernels.shell_lcc.predictor import Predictor
from ..running.device import pick_device
from ..running.output import format_table, provenance, require_output
from .arguments import add_latents
from .data import iterate_clips, list_clips_for, resolution
from .metrics_table import metrics_rows

PREFIXES = ("module.", "_orig_mod.")
# Written by BatchNorm and not used.
OPTIONAL = {"predictor.1.num_batches_tracked"}
SIZES = ("embedding_dim", "num_bases", "hidden_dim")


class ImportRefused(ValueError):
    """The file is not a checkpoint that this command can import; the message names it and the reason."""


def add_arguments(parser) -> None:
    parser.add_argument("reference", metavar="REFERENCE.pth", help="the released checkpoint, for Wan2.1 latents")
    parser.add_argument("--output", required=True, metavar="FILE.safetensors")
    parser.add_argument("--overwrite", action="store_true")
    add_latents(parser, "--calibrate", False, "latents of real clips, to measure radius and band on")
    parser.add_argument("--max_held_out_tokens", type=int, default=1_000_000, help="to measure on (default 1000000)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args) -> int:
    output, reference = Path(args.output), Path(args.reference)
    require_output(output, args.overwrite)
    state, config = read_reference(reference)
    coder = Predictor.from_state(state).to(pick_device(args.device))
    manifold = ShellManifold(coder, WAN21, name=output.stem)
    facts = {"source": reference.name, "source_config": config, "latent_space": WAN21.id}
    if args.latents:
        facts |= _calibrate(manifold, output, args)
    manifold.provenance = provenance(args.argv, "trainers.shell_lcc") | facts
    save(manifold, output)
    rows = [*((k.replace("_", " "), v) for k, v in coder.config().items()), *metrics_rows(manifold.metrics)]
    if manifold.calibration is None:
        rows.append(("note", "not calibrated: no radius, no band; import again with --calibrate LATENTS"))
    print(format_table(rows, f"wrote {output}"))
    return 0


def read_reference(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(state dict with Predictor's names and shapes, fp32; the plain values of the checkpoint's config).

    Raises FileNotFoundError, or ImportRefused naming the entry that is missing, unexpected or of a wrong shape.
    """
    loaded = _load(path)
    if not isinstance(loaded, Mapping):
        raise ImportRefused(f"{path}: holds a {type(loaded).__name__}, expected {{'model': state dict, 'config': sizes}}")
    model = loaded.get("model", loaded)
    config = loaded.get("config") or {}
    if not isinstance(model, Mapping) or not isinstance(config, Mapping):
        raise ImportRefused(f"{path}: its 'model' or 'config' is not a dictionary; expected a released Shell-LCC checkpoint")
    state = {_plain_name(k): v for k, v in model.items()}
    _require_keys(path, state)
    state = _require_shapes(path, state)
    _require_config(path, state, config)
    return state, {str(k): v for k, v in config.items() if v is None or isinstance(v, (bool, int, float, str))}


def _load(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" + (" (it is a folder)" if path.is_dir() else ""))
    if path.suffix == ".safetensors":
        raise ImportRefused(f"{path}: is already a safetensors file; `info` prints what it holds")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many unrelated types
        if "weights_only" in str(e) or "Weights only" in str(e):
            raise ImportRefused(
                f"{path}: holds objects other than tensors and plain values, which could run code; it was not executed. "
                "Ask its author for a checkpoint of tensors only"
            ) from e
        raise ImportRefused(f"{path}: {describe_foreign(path)}, damaged or not a checkpoint ({type(e).__name__})") from e


def _plain_name(name: object) -> str:
    name, before = str(name), None
    while name != before:
        before = name
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _expected(channels: int, bases: int, hidden: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in Predictor(channels, bases, hidden).state_dict().items()}


def _require_keys(path: Path, state: dict) -> None:
    names = set(_expected(1, 1, 1))
    missing, unknown = sorted(names - OPTIONAL - set(state)), sorted(set(state) - names)
    if missing or unknown:
        parts = [f"{what} {', '.join(found)}" for what, found in (("missing", missing), ("unexpected", unknown)) if found]
        raise ImportRefused(f"{path}: not a Shell-LCC checkpoint: {'; '.join(parts)}")


def _require_shapes(path: Path, state: dict) -> dict[str, Tensor]:
    bad = sorted(k for k, v in state.items() if not isinstance(v, Tensor))
    if bad:
        raise ImportRefused(f"{path}: '{bad[0]}' is a {type(state[bad[0]]).__name__}, expected a tensor")
    basis, first = state["basis"], state["predictor.0.weight"]
    if basis.ndim != 2 or basis.shape[1] != WAN21.channels or first.ndim != 2:
        raise ImportRefused(
            f"{path}: basis {list(basis.shape)} and predictor.0.weight {list(first.shape)}, expected [K, {WAN21.channels}] "
            f"and [h, {WAN21.channels}]: released checkpoints are for '{WAN21.id}' latents"
        )
    expected = _expected(basis.shape[1], basis.shape[0], first.shape[0])
    result = {"predictor.1.num_batches_tracked": torch.zeros((), dtype=torch.long)}
    wrong = []
    for name, value in state.items():
        if name in ("global_scale", "global_bias") and value.numel() == math.prod(expected[name]):
            value = value.reshape(expected[name])
        if value.shape != expected[name]:
            wrong.append(f"{name} {list(value.shape)} instead of {list(expected[name])}")
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            wrong.append(f"{name} has NaN or infinite values")
        result[name] = value.long() if name in OPTIONAL else value.float()
    if wrong:
        raise ImportRefused(f"{path}: {'; '.join(wrong)}")
    return result


def _require_config(path: Path, state: dict[str, Tensor], config: Mapping) -> None:
    sizes = dict(zip(SIZES, (*reversed(state["basis"].shape), state["predictor.0.weight"].shape[0]), strict=True))
    wrong = [f"{k} {config[k]} against {v} of its tensors" for k, v in sizes.items() if k in config and config[k] != v]
    if wrong:
        raise ImportRefused(f"{path}: its config contradicts its tensors: {', '.join(wrong)}")


def _calibrate(manifold: ShellManifold, output: Path, args: argparse.Namespace) -> dict:
    """Calibrates on args.latents and measures the figures, reading each clip twice; returns facts for the file."""
    refs = list_clips_for(manifold, output, args)
    cap = max(1, args.max_held_out_tokens // len(refs))
    resolutions: set[str] = set()

    def clips():
        for clip_id, z in iterate_clips(refs, args):
            resolutions.add(resolution(z, manifold.space))
            yield clip_id, evaluation.draw_frames(z, cap)

    manifold.calibration = calibrate([evaluation.score(manifold, z) for _, z in clips()])
    manifold.metrics = evaluation.evaluate(manifold, clips())
    return {"clips": len(refs), "held_out_clips": [r.clip_id for r in refs], "resolutions": sorted(resolutions)}
