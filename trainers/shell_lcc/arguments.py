"""The arguments by which Shell-LCC commands take latents."""

from ..kernels.latent_space import NORMALISED, RAW
from ..latents.arguments import add_pt_axes


def add_latents(group, flag: str, required: bool, text: str) -> None:
    """Adds `flag`, which takes the paths (args.latents), --pt_state, --pt_axes and --trust_state."""
    group.add_argument(flag, dest="latents", nargs="+", required=required, metavar="PATH", help=text)
    group.add_argument(
        "--pt_state", choices=(NORMALISED, RAW), default=NORMALISED,
        help="what .pt and .pth files hold (default normalised)",
    )  # fmt: skip
    add_pt_axes(group)
    group.add_argument("--trust_state", action="store_true", help="do not check this state against the latents' statistics")
