"""Command line of `python -m trainers.shell_reward`: its subcommands, help and exit codes."""

from ..running import command_line
from ..tuning import merge
from . import __doc__ as description
from . import evaluate, train

COMMANDS = {"train": train, "eval": evaluate, "merge": merge}


def main(argv=None) -> int:
    return command_line.run(
        "shell_reward", description, COMMANDS, argv,
        memory="give --gradient_checkpointing, a smaller --train_batch_size, --size or --frames; --dry_run shows the plan",
        stopped="run the same command again",
    )  # fmt: skip
