"""Arguments of `train` and `eval`: flags, their ranges, and the settings that they stand for."""

from pathlib import Path

from ..kernels.tuning.noise_levels import UNIFORM, NoiseLevels
from ..kernels.tuning.shell_objective import BAND, OBJECTIVES
from ..tuning import arguments
from ..tuning.validation import REWARDS
from ..wan.prompts import add_encoder
from .draws import NOISE, NOISED, STARTS
from .held_out import CRITERIA, SAMPLES
from .objective import ALARMS, STOP

FILE, PER_SIGMA = "file", "per_sigma"
RADII = (FILE, PER_SIGMA)
# The paper's range of noise levels, and those of the experts of Wan 2.2 A14B.
RANGE = (0.7, 1.0)
EXPERT_RANGES = {None: RANGE, "high_noise": (0.875, 1.0), "low_noise": (0.7, 0.875)}


def add_train(parser) -> None:
    """Adds all flags of `train`."""
    what = parser.add_argument_group("files")
    arguments.add_files(what)
    add_material(what)
    arguments.add_trained(parser.add_argument_group("what is trained"), 16)
    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--objective", choices=OBJECTIVES, default=BAND,
        help="of a prediction's distances: band, distance (published) or |mean - tau| (published), see above (default band)",
    )  # fmt: skip
    objective.add_argument(
        "--radius", choices=RADII, default=FILE,
        help="where the band comes from: real latents, in the manifold's file, or the base's own predictions at each noise "
        "level, measured before the training (default file)",
    )  # fmt: skip
    objective.add_argument("--radius_bins", type=int, default=8, help="noise levels of --radius per_sigma (default 8)")
    objective.add_argument(
        "--radius_predictions", type=int, default=32, help="predictions at each of them (default 32)"
    )
    objective.add_argument(
        "--anchor_weight", type=float, default=0.0,
        help="of max(0, mean squared distance of the prediction to the base's - --anchor_margin) (default 0)",
    )  # fmt: skip
    objective.add_argument("--anchor_margin", type=float, default=0.05, help="(default 0.05, published)")
    arguments.add_training(
        parser.add_argument_group("training"), steps=100, rate=1e-5, warmup=0, schedule="constant", items="predictions"
    )
    stop = parser.add_argument_group("held-out clips and early stopping")
    add_held_out(stop)
    stop.add_argument(
        "--criterion", choices=CRITERIA, default=SAMPLES,
        help="what is measured: clips of a short sampling run, or one-step predictions, cheaper (default samples)",
    )  # fmt: skip
    stop.add_argument("--held_out", type=float, default=0.1, help="share of prompts kept apart (default 0.1; 0: none)")
    stop.add_argument(
        "--validation_steps", type=int, default=10, help="steps between two measurements; 0: none, no early stopping"
    )
    stop.add_argument(
        "--patience", type=int, default=5, help="measurements without a better one that end the run; 0: go on (default 5)"
    )
    stop.add_argument(
        "--alarm", choices=ALARMS, default=STOP,
        help="where detail shows over-optimisation: stop, warn (log it and go on) or off (default stop)",
    )  # fmt: skip
    stop.add_argument("--validation_rewards", nargs="+", choices=REWARDS, default=[], help="further scores of the clips")
    stop.add_argument("--vae", metavar="FILE_OR_DIR", help="writes the clips as videos, too; for the geometry score")
    stop.add_argument("--vae_dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    stop.add_argument("--tiling", action="store_true", help="decode in tiles: less memory")
    arguments.add_computing(parser.add_argument_group("computing"))
    arguments.add_saving(parser.add_argument_group("checkpoints and loggers"), 20)


def add_material(group) -> None:
    """Adds the flags of manifold, prompts, starts and sizes, which `train` and `eval` share."""
    group.add_argument("--manifold", required=True, metavar="FILE", help="written by `python -m trainers.shell_lcc fit`")
    group.add_argument("--prompts", type=Path, metavar="FILE.txt", help="one per line (default: all of --embeddings)")
    group.add_argument("--embeddings", metavar="FILE", help="prompts embedded by `trainers.prism embed`")
    add_encoder(group, required=False)
    group.add_argument(
        "--start", choices=STARTS, default=NOISE,
        help="noise: pure noise whatever the noise level, published; noised: --latents with noise, as in sampling "
        "(default noise)",
    )  # fmt: skip
    group.add_argument("--latents", nargs="+", metavar="PATH", help="clips with captions, for --start noised")
    group.add_argument(
        "--sigma_range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels, uniform (default .7 1; with --expert .875 1 for high_noise, .7 .875 for low_noise)",
    )  # fmt: skip
    group.add_argument(
        "--size", type=int, nargs=2, default=(832, 480), metavar=("WIDTH", "HEIGHT"), help="of clips (default 832 480)"
    )
    group.add_argument("--frames", type=int, default=81, help="of clips, 4n+1 (default 81)")


def add_held_out(group) -> None:
    """Adds the flags of the clips that are measured."""
    group.add_argument("--validation_prompts", type=Path, metavar="FILE.txt", help="(default: up to 8 held-out ones)")
    group.add_argument("--validation_seeds", type=int, nargs="+", default=[0], metavar="SEED")
    group.add_argument("--validation_sampling_steps", type=int, default=8, help="(default 8)")
    group.add_argument(
        "--validation_cfg", type=float, default=1.0, help="above 1 needs the embedded --negative_prompt (default 1)"
    )
    group.add_argument("--negative_prompt", default="", metavar="TEXT", help="of these clips (default: empty)")
    group.add_argument("--shift", type=float, default=5.0, help="of the sampling schedule (default 5)")


def check_train(args) -> None:
    """Raises ValueError for any argument out of its range, naming the flag."""
    arguments.check(
        args, ("radius_bins", "radius_predictions", "validation_sampling_steps"),
        ("validation_steps", "patience", "anchor_weight", "anchor_margin"),
    )  # fmt: skip
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held_out must be 0 or more and below 1, got {args.held_out}")
    if args.full and args.anchor_weight:
        raise ValueError("--anchor_weight needs the base and the model in training, which --full has not; leave one out")
    check_material(args)


def check_material(args) -> None:
    """Raises ValueError for what `add_material` and `add_held_out` added."""
    levels_of(args)
    if args.start == NOISED and not args.latents:
        raise ValueError("--start noised needs --latents: clips with captions, as trainers of latents write them")
    if args.latents and args.start == NOISE and getattr(args, "radius", None) != PER_SIGMA:
        raise ValueError("--latents are used with --start noised or --radius per_sigma; add one, or leave --latents out")
    if args.validation_cfg < 1:
        raise ValueError(f"--validation_cfg must be 1 or more, got {args.validation_cfg:g}")
    if not args.shift > 0:
        raise ValueError(f"--shift must be above 0, got {args.shift:g}")
    if min(args.size) < 16 or args.size[0] % 16 or args.size[1] % 16:
        raise ValueError(f"--size {args.size[0]} {args.size[1]}: expected multiples of 16")
    if args.frames < 1 or args.frames % 4 != 1:
        raise ValueError(f"--frames {args.frames} is not 4n+1, as a Wan VAE needs")


def levels_of(args) -> NoiseLevels:
    """Raises ValueError naming the flag."""
    low, high = args.sigma_range or EXPERT_RANGES[args.expert]
    try:
        if low <= 0:
            raise ValueError("expected a lowest level above 0")
        return NoiseLevels(UNIFORM, low=low, high=high)
    except ValueError as e:
        raise ValueError(f"--sigma_range: {e}") from e
