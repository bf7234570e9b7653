"""Converts a released Shell-LCC checkpoint (.pth) to a manifold file, and calibrates it on latents of real clips.

The checkpoint is loaded with weights_only: {"model": state dict, "config": {...}}, where names may begin with "module.".
Without --calibrate the file has no quantiles: the radius is then the nominal 1 and there is no band.
"""

import argparse
from pathlib import Path

from ..kernels.latent_space import WAN21
from ..kernels.shell_lcc import evaluation, released
from ..kernels.shell_lcc.calibration import calibrate
from ..kernels.shell_lcc.manifold import ShellManifold, save
from ..kernels.shell_lcc.predictor import Predictor
from ..running.device import pick_device
from ..running.output import format_table, provenance, require_output
from .arguments import add_latents
from .data import iterate_clips, list_clips_for, resolution
from .metrics_table import metrics_rows


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
    state, config = released.read(reference)
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
