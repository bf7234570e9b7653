"""Arguments of commands that score clips: the scorers' files and settings, how clips are read, and on what it is computed."""

from ..kernels.video.sizes import BUCKETS
from ..latents.arguments import add_pt_axes
from ..preferences.clips import ClipOptions
from ..running.device import BACKBONE_DTYPE, DTYPES, dtype_for, pick_device
from ..wan.prompts import add_encoder, encoder_options
from .geometry import GeometryOptions
from .geometry_files import BACKENDS
from .model_reward import ModelRewardOptions
from .prism import PrismOptions
from .scores import ScoringOptions


def add_scorers(by) -> None:
    """Adds the scorers' files and settings to a group of arguments."""
    by.add_argument("--head", metavar="FILE", help="prism: the head")
    by.add_argument(
        "--backbone", metavar="FILE_OR_DIR",
        help="prism, flow_residual, prompt_gap: the model, a Wan .safetensors or diffusers folder",
    )  # fmt: skip
    by.add_argument("--negative_prompt", default="", metavar="TEXT", help="prompt_gap: compare with it (default: empty)")
    by.add_argument("--draws", type=int, default=4, help="flow_residual, prompt_gap: noise samples per level (default 4)")
    by.add_argument("--prism_dimensions", nargs="+", metavar="NAME", help="prism: of these dimensions (default: all)")
    by.add_argument(
        "--levels", dest="sigmas", type=float, nargs="+", metavar="SIGMA",
        help="prism: noise levels (default: the 3 lowest of the head's)",
    )  # fmt: skip
    by.add_argument("--other_weights", action="store_true", help="prism: score on other weights than it was trained on")
    by.add_argument("--texts", metavar="FILE", help="prompts made by `trainers.prism embed`, where the model is needed")
    add_encoder(by, required=False)
    by.add_argument("--manifold", metavar="FILE", help="shell_lcc: the manifold")


def add_clips(clips) -> None:
    """Adds how clips are encoded and decoded."""
    clips.add_argument(
        "--vae", metavar="FILE_OR_DIR", help="encodes videos for all but geometry, decodes latents for geometry"
    )
    clips.add_argument("--vae_dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on a CPU, else bfloat16")
    clips.add_argument("--tiling", action="store_true", help="encode in tiles: less memory, not quite the same latents")
    clips.add_argument("--size", choices=list(BUCKETS), default="480p", help="that videos are encoded at (default 480p)")
    clips.add_argument("--fps", type=float, default=16.0, help="that videos are encoded at (default 16)")
    clips.add_argument("--frames", type=int, default=81, help="at most, 4n+1 (default 81)")
    add_pt_axes(clips)


def add_computing(compute) -> None:
    """Adds backends, processes, dtypes, device and seed."""
    compute.add_argument("--backend", choices=BACKENDS, default="auto", help="of geometry")
    compute.add_argument("--jobs", type=int, default=0, help="processes for the geometry of videos (default: up to 4)")
    compute.add_argument("--backbone_dtype", choices=("auto", *DTYPES), default="auto", help=BACKBONE_DTYPE)
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compute.add_argument("--seed", type=int, default=0, help="prism, flow_residual, prompt_gap: of the noise")


def check(args) -> None:
    """Raises ValueError for an argument of these groups that is out of its range."""
    if args.jobs < 0:
        raise ValueError(f"--jobs must be 0 (up to 4) or more, got {args.jobs}")
    if args.draws < 1:
        raise ValueError(f"--draws must be 1 or more, got {args.draws}")
    if args.frames < 5 or args.frames % 4 != 1:
        raise ValueError(f"--frames {args.frames} is not 4n+1, at least 5, as a Wan VAE needs")
    if not 0 < args.fps <= 1000:
        raise ValueError(f"--fps {args.fps} must be above 0 and at most 1000")


def clip_options(args) -> ClipOptions:
    """How clips are encoded and decoded."""
    return ClipOptions(args.vae, args.vae_dtype, args.tiling, args.size, args.fps, args.frames, args.device, args.pt_axes)


def scoring_options(args) -> ScoringOptions:
    """The options of all scorers, whether or not they are used."""
    # Stored scores name the dtype that they were computed in.
    backbone_dtype = dtype_for(args.backbone_dtype, pick_device(args.device))
    prism = PrismOptions(
        args.head, args.backbone, backbone_dtype, args.sigmas and tuple(args.sigmas),
        args.prism_dimensions and tuple(args.prism_dimensions), args.texts, encoder_options(args), args.other_weights,
        args.seed, args.device,
    )  # fmt: skip
    model = ModelRewardOptions(
        args.backbone, backbone_dtype, args.texts, encoder_options(args), args.negative_prompt, args.draws, args.seed,
        args.device,
    )  # fmt: skip
    return ScoringOptions(GeometryOptions(args.frames, args.backend, args.jobs), prism, model, args.manifold, args.device)
