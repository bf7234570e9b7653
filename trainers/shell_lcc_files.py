"""What the Shell-LCC commands share: their latents' arguments, checks of the output, provenance and tables."""

import argparse
import shlex
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from . import latent_data
from .kernels import latent_space
from .kernels.latent_space import LatentSpace, LatentSpaceError
from .kernels.shell_lcc.manifold import ShellManifold
from .kernels.version import CREATED_BY


def add_latents(group, flag: str, required: bool, text: str) -> None:
    """The arguments that say which latents are read and how; `flag` takes the paths."""
    group.add_argument(flag, dest="latents", nargs="+", required=required, metavar="PATH", help=text)
    group.add_argument(
        "--pt_state", choices=(latent_space.NORMALISED, latent_space.RAW), default=latent_space.NORMALISED,
        help="what .pt files hold (default normalised)",
    )  # fmt: skip
    group.add_argument("--trust_state", action="store_true", help="believe that state whatever the statistics say")


def read_clips(refs: list[latent_data.ClipRef], args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """(clip id, normalised z [C, T, h, w] fp32) of every clip, read one at a time."""
    for ref in refs:
        yield ref.clip_id, latent_data.read_clip(ref, args.pt_state, args.trust_state)


def clips_for(manifold: ShellManifold, path: Path, args: argparse.Namespace) -> list[latent_data.ClipRef]:
    """The clips of args.latents. Raises LatentSpaceError naming both spaces when they are not the manifold's."""
    try:
        return latent_data.list_clips(args.latents, manifold.space)
    except LatentSpaceError as e:
        raise LatentSpaceError(f"{path} is a manifold of '{manifold.space.id}' latents, but {e}") from e


def resolution(z: Tensor, space: LatentSpace) -> str:
    """Pixels of a clip z [C, T, h, w], as "832x480"."""
    return f"{z.shape[3] * space.spatial_stride}x{z.shape[2] * space.spatial_stride}"


def require_output(path: Path, overwrite: bool, suffix: str = ".safetensors") -> None:
    """Raises FileExistsError, ValueError or OSError unless `path` can be written, before any long work begins."""
    if path.suffix != suffix:
        raise ValueError(f"{path}: the output's name must end in {suffix}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already; give another name, or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise OSError(f"{path}: cannot be written ({e.strerror or e})") from e


def provenance(argv: list[str], module: str = "trainers.shell_lcc") -> dict:
    """The entries that every file gets. The command keeps file names, but no folders outside the working one."""
    return {
        "created_by": CREATED_BY,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([f"python -m {module}", *map(shlex.quote, map(_without_folders, argv))]),
        "torch": torch.__version__,
    }


def table(rows: list[tuple[str, object]], title: str = "") -> str:
    """Aligned text, a row a line."""
    width = max((len(label) for label, _ in rows), default=0)
    lines = [f"  {label:<{width}}  {_show(value)}" for label, value in rows]
    return "\n".join(([title] if title else []) + lines)


def metrics_rows(metrics: dict) -> list[tuple[str, object]]:
    """The rows of a table of kernels.shell_lcc.evaluation.evaluate's figures; absent ones are left out."""
    rows: list[tuple[str, object]] = []
    if "tokens" in metrics:
        rows.append(("held-out", f"{metrics['tokens']} tokens of {metrics['clips']} clips"))
    d = metrics.get("distance", {})
    if d:
        rows.append(("distance mean", d["mean"]))
        rows.append(("distance p01 p05 p25", "  ".join(_show(d[k]) for k in ("p01", "p05", "p25"))))
        rows.append(("distance median", d["median"]))
        rows.append(("distance p75 p95 p99", "  ".join(_show(d[k]) for k in ("p75", "p95", "p99"))))
    if "reconstruction" in metrics:
        r = metrics["reconstruction"]
        rows.append(("reconstruction error", f"{_show(r['mse'])}, {_show(r['relative'])} of the variance"))
    if "codebook" in metrics:
        c = metrics["codebook"]
        rows.append(("codebook perplexity", f"{c['perplexity']:.1f} of {c['bases']} bases, {c['dead']} dead"))
    for key, label in (
        ("auroc_clean_over_blurred", "AUROC clean over blurred"),
        ("auroc_noisy_over_clean", "AUROC noisy over clean"),
        ("ordered", "clips blurred < clean < noisy"),
        ("outside_band", "outside the 5-95 % band"),
    ):
        if metrics.get(key) is not None:
            rows.append((label, metrics[key]))
    return rows


def _without_folders(argument: str) -> str:
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    hidden = path.is_absolute() or ".." in path.parts
    return flag + equals + (path.name if hidden else value)


def _show(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
