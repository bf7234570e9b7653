"""Measures a PRISM head on preferences: accuracy with and without ties, and calibration, by noise level."""

import json
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from ..kernels.prism import files
from ..kernels.prism.backbone import BackboneError
from ..running.device import BACKBONE_DTYPE, DTYPES, dtype_for, pick_device
from ..running.output import require_output
from ..scorers.prism_network import Scorer
from ..wan import dit as wan_dit
from . import data as prism_data
from .accuracy_by_sigma import accuracies, format_accuracies, measured_sigmas


def add_arguments(parser) -> None:
    parser.add_argument("--head", required=True, metavar="FILE.safetensors")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder written by `cache`, or by `collect` and `label`")
    parser.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    parser.add_argument(
        "--levels", dest="sigmas", type=float, nargs="+", metavar="SIGMA", help="noise levels (default: the data's, or 7)"
    )
    parser.add_argument("--other_weights", action="store_true", help="allow a backbone with other weights than in training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here")
    parser.add_argument("--batch", type=int, default=8, help="clips at a time (default 8)")
    parser.add_argument("--backbone_dtype", choices=("auto", *DTYPES), default="auto", help=BACKBONE_DTYPE)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)


def run(args) -> int:
    if args.json:
        require_output(args.json, overwrite=True, suffix=None)
    device = pick_device(args.device)
    loaded = files.load(args.head)
    data = prism_data.load(args.data)
    if not data.space.same_as(loaded.space):
        raise ValueError(f"{args.head} is for '{loaded.space.id}' latents, {args.data} holds '{data.space.id}' latents")
    unknown = [d for d in data.dimensions if d not in loaded.head.config.dimensions]
    if unknown:
        raise ValueError(f"{args.head} scores {', '.join(loaded.head.config.dimensions)}; the data compares '{unknown[0]}'")
    dtype = DTYPES[dtype_for(args.backbone_dtype, device)]
    dit = wan_dit.load(args.backbone, max(loaded.head.config.taps), dtype, device)
    loaded.backbone.require_architecture(dit.backbone, loaded.name)
    if not loaded.backbone.same_weights(dit.backbone) and not args.other_weights:
        raise BackboneError(f"{args.backbone}: other weights than {args.head} was trained on; --other_weights allows them")
    # The data may lack some of the head's dimensions: their outcomes are then MISSING.
    data.dimensions = loaded.head.config.dimensions
    sigmas = measured_sigmas(data, args.sigmas)
    scorer = Scorer(dit, loaded.head.to(device))
    found = accuracies(scorer, data, data.rows, [], sigmas, args.batch, args.seed, loaded.threshold)
    print(format_accuracies(found))
    if args.json:
        text = json.dumps({"head": loaded.name, "pairs": len(data.rows), **found}, indent=1) + "\n"
        write_atomic(args.json, lambda partial: Path(partial).write_text(text, encoding="utf-8"))
    return 0
