"""Command line of `python -m trainers.shell_lcc`: its subcommands, help and exit codes."""

from ..running import command_line
from . import __doc__ as description
from . import evaluate, fit, import_released, info

COMMANDS = {"fit": fit, "eval": evaluate, "info": info, "import": import_released}


def main(argv=None) -> int:
    return command_line.run(
        "shell_lcc", description, COMMANDS, argv,
        memory="fit fewer bases, or give --device cpu", stopped="nothing was written; run the same command again",
    )  # fmt: skip
