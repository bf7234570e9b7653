"""What the Shell-LCC commands share: their latents' arguments, checks of the output, provenance and tables."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ..kernels import latent_space
from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..kernels.shell_lcc.manifold import ShellManifold
from ..latents import read as latent_data
from ..running.output import show


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


def metrics_rows(metrics: dict) -> list[tuple[str, object]]:
    """The rows of a table of kernels.shell_lcc.evaluation.evaluate's figures; absent ones are left out."""
    rows: list[tuple[str, object]] = []
    if "tokens" in metrics:
        rows.append(("held-out", f"{metrics['tokens']} tokens of {metrics['clips']} clips"))
    d = metrics.get("distance", {})
    if d:
        rows.append(("distance mean", d["mean"]))
        rows.append(("distance p01 p05 p25", "  ".join(show(d[k]) for k in ("p01", "p05", "p25"))))
        rows.append(("distance median", d["median"]))
        rows.append(("distance p75 p95 p99", "  ".join(show(d[k]) for k in ("p75", "p95", "p99"))))
    if "reconstruction" in metrics:
        r = metrics["reconstruction"]
        rows.append(("reconstruction error", f"{show(r['mse'])}, {show(r['relative'])} of the variance"))
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
