"""Command line of `python -m trainers.shell_reward`: its subcommands, help and exit codes."""

import sys

from ..running import command_line, config_file
from ..tuning import merge
from . import __doc__ as description
from . import evaluate, train

COMMANDS = {"train": train, "eval": evaluate, "merge": merge}


def main(argv=None) -> int:
    try:
        argv = config_file.expand(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as e:
        print(f"error: {command_line.sentence(e)}", file=sys.stderr)
        return 2
    return command_line.run(
        "shell_reward", description, COMMANDS, argv,
        memory="give --gradient_checkpointing, a smaller --train_batch_size, --size or --frames; --dry_run shows the plan",
        stopped="run the same command again",
    )  # fmt: skip
