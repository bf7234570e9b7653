"""Arguments of `train`: flags, their ranges, and the settings that they stand for."""

import argparse
from pathlib import Path

from ..kernels.tuning.auto_beta import FACTOR, HIGH, LOW, AutoBeta, FixedBeta
from ..kernels.tuning.preference_loss import IPO, LOSSES, SIGMOID, PreferenceLoss
from ..tuning import arguments as shared
from ..tuning.validation import REWARDS
from . import evaluate


def add(parser) -> None:
    """Adds all flags of `train`."""
    what = parser.add_argument_group("files")
    what.add_argument("--data", required=True, metavar="DIR", help="folder written by `cache`")
    shared.add_files(what)
    shared.add_trained(parser.add_argument_group("what is trained"), 32)
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss", choices=LOSSES, default=SIGMOID, help="sft: the winners' error alone, to compare with (default sigmoid)"
    )
    loss.add_argument(
        "--beta", default="auto", metavar="auto|NUMBER",
        help=f"auto keeps the gradient factor near {FACTOR:g}; fixed values of mean errors are 500 to 2500 (default auto)",
    )  # fmt: skip
    loss.add_argument("--beta_factor", type=float, default=FACTOR, help=f"that auto holds (default {FACTOR:g})")
    loss.add_argument("--beta_min", type=float, default=LOW, help=f"of auto: holds the model back (default {LOW:g})")
    loss.add_argument("--beta_max", type=float, default=HIGH, help=f"of auto (default {HIGH:g})")
    loss.add_argument("--label_smoothing", type=float, default=0.0, help="share of preferences taken for wrong (default 0)")
    unit = "in units of the preference's slope at d = 0"
    loss.add_argument("--winner_anchor", type=float, default=1.0, help=f"of a rise of winners' error, {unit} (default 1)")
    loss.add_argument("--sft_weight", type=float, default=0.0, help=f"of the winners' error, {unit} (default 0)")
    loss.add_argument(
        "--reference_anchor", type=float, default=0.0, help=f"of the distance to the reference's velocity, {unit} (default 0)"
    )
    loss.add_argument(
        "--static_penalty", type=float, default=0.1, help=f"of motion lost against the reference, {unit} (default 0.1)"
    )
    noise = parser.add_argument_group("noise and clips")
    evaluate.add_levels(noise)
    noise.add_argument(
        "--mask_first_frame", action=argparse.BooleanOptionalAction,
        help="leave the first latent frame out of the errors (default: for image-to-video models)",
    )  # fmt: skip
    noise.add_argument(
        "--crop_frames", type=int, default=0, help="train on so many latent frames of a clip, from a random one on; 0: all"
    )
    noise.add_argument(
        "--cached_reference", action="store_true",
        help="compute the reference's errors once, for --cache_size noises a pair, instead of in every step",
    )  # fmt: skip
    noise.add_argument(
        "--cache_size", type=int, default=0, help="noises a pair is seen with (default: new ones each time; 8 if cached)"
    )
    how = parser.add_argument_group("training")
    shared.add_training(how, steps=1000, rate=5e-6, warmup=100, schedule="cosine", items="pairs")
    how.add_argument(
        "--max_winner_rise", type=float, default=0.05,
        help="stop where the running mean of the winners' error is this share above the reference's (default 0.05; 0: never)",
    )  # fmt: skip
    shared.add_computing(parser.add_argument_group("computing"))
    save = parser.add_argument_group("checkpoints and figures")
    shared.add_saving(save, 100)
    save.add_argument("--held_out", type=float, default=0.1, help="share of prompts to measure on (default 0.1; 0: none)")
    save.add_argument("--eval_levels", type=int, default=evaluate.LEVELS, help="noise levels a held-out pair is measured at")
    save.add_argument("--eval_steps", type=int, default=0, help="steps between held-out figures; 0: at the end only")
    clips = parser.add_argument_group("validation clips")
    clips.add_argument("--validation_steps", type=int, default=0, help="steps between validation clips; 0: none (default)")
    clips.add_argument("--validation_prompts", type=Path, metavar="FILE.txt", help="one per line (default: 4 held-out ones)")
    clips.add_argument("--validation_seeds", type=int, nargs="+", default=[0], metavar="SEED")
    clips.add_argument(
        "--validation_size", type=int, nargs=3, metavar=("WIDTH", "HEIGHT", "FRAMES"), help="(default: that of the first pair)"
    )
    clips.add_argument("--validation_sampling_steps", type=int, default=30)
    clips.add_argument("--validation_cfg", type=float, default=5.0)
    clips.add_argument("--validation_rewards", nargs="+", choices=REWARDS, default=[], help="scores of the clips")
    clips.add_argument("--negative_prompt", default="", metavar="TEXT", help="of the validation (default: empty)")
    clips.add_argument("--vae", metavar="FILE_OR_DIR", help="writes the clips as videos, too; for the geometry score")
    clips.add_argument("--vae_dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    clips.add_argument("--tiling", action="store_true", help="decode in tiles: less memory")
    clips.add_argument("--manifold", metavar="FILE", help="for the shell_lcc score")


def check(args) -> None:
    """Raises ValueError for any argument out of its range, naming the flag."""
    shared.check(
        args, ("eval_levels", "validation_sampling_steps"),
        ("validation_steps", "eval_steps", "crop_frames", "cache_size", "max_winner_rise"),
    )  # fmt: skip
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held_out must be 0 or more and below 1, got {args.held_out}")
    if args.validation_size:
        width, height, frames = args.validation_size
        if min(width, height) < 16 or width % 16 or height % 16 or frames < 1 or frames % 4 != 1:
            raise ValueError("--validation_size: expected a width and height that are multiples of 16, and 4n+1 frames")
    loss, cached = loss_of(args), args.cached_reference or args.full
    if loss.needs_reference_velocity and cached:
        which = "--full" if args.full else "--cached_reference"
        raise ValueError(f"--reference_anchor needs the reference's velocities, but {which} stores errors only; leave one out")
    beta_of(args)


def loss_of(args) -> PreferenceLoss:
    """Raises LossError."""
    return PreferenceLoss(
        args.loss, args.label_smoothing, args.sft_weight, args.winner_anchor, args.reference_anchor, args.static_penalty
    )


def beta_of(args) -> AutoBeta | FixedBeta:
    """Raises ValueError naming the flag."""
    if args.beta == "auto":
        if args.loss == IPO:
            raise ValueError(
                "--loss ipo needs a number as --beta: its target is d = 1 / (2 beta), which would shrink as auto follows d; "
                "100 aims at .005"
            )
        try:
            return AutoBeta(args.beta_factor, low=args.beta_min, high=args.beta_max)
        except ValueError as e:
            raise ValueError(f"--beta_factor, --beta_min, --beta_max: {e}") from e
    try:
        return FixedBeta(float(args.beta))
    except ValueError as e:
        raise ValueError(f"--beta {args.beta}: expected auto, or a number above 0") from e
