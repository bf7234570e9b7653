"""Command line of `python -m trainers.prism`: its subcommands, help and exit codes."""

from ..running import command_line
from . import __doc__ as description
from . import cache, collect, embed, evaluate, label, train

COMMANDS = {"cache": cache, "embed": embed, "collect": collect, "label": label, "train": train, "eval": evaluate}


def main(argv=None) -> int:
    return command_line.run(
        "prism", description, COMMANDS, argv,
        memory="give a smaller --train_batch_size", stopped="nothing was written; run the same command again",
    )  # fmt: skip
