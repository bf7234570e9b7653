"""The argument by which commands that read .pt and .pth latents are told the order of their axes."""

from .read import AUTO, PT_AXES


def add_pt_axes(group) -> None:
    """Adds --pt_axes (args.pt_axes), one of read.PT_AXES."""
    group.add_argument(
        "--pt_axes", choices=PT_AXES, default=AUTO,
        help="order of axes in .pt and .pth latents: t frames, c channels (default auto: by shape, else by statistics)",
    )  # fmt: skip


def pt_axes_setting(args) -> dict:
    """What --pt_axes adds to the settings of stored latents: nothing by default, so that earlier folders stay valid."""
    return {} if args.pt_axes == AUTO else {"pt_axes": args.pt_axes}
