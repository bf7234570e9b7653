"""Command line of `python -m trainers.pairs`: its subcommands, help and exit codes."""

from ..running import command_line
from . import __doc__ as description
from . import build

COMMANDS = {"build": build}


def main(argv=None) -> int:
    return command_line.run(
        "pairs", description, COMMANDS, argv,
        memory="try --tiling, a smaller --size or fewer --frames",
        stopped="every score so far is kept; run the same command again to go on",
    )  # fmt: skip
