"""Command line of `python -m trainers.geometry`: its subcommands, help and exit codes."""

from ..running import command_line
from . import __doc__ as description
from . import score

COMMANDS = {"score": score}


def main(argv=None) -> int:
    return command_line.run(
        "geometry", description, COMMANDS, argv,
        memory="give fewer --jobs or --frames", stopped="run the same command again to go on",
    )  # fmt: skip
