"""Preference pairs out of groups of candidate clips: the best against the worst of a prompt, where that says something.

    python -m trainers.pairs build --groups candidates/ --by geometry=1 --output pairs/

Then pairs/pairs.jsonl goes into `python -m trainers.prism cache --pairs`. The exit code is 0 when there is a pair, 1 when no
group gave one, 2 when an argument or a file cannot be used, 130 after Ctrl-C.
"""

import sys

from . import command_line, pairs_build

COMMANDS = {"build": pairs_build}


def main(argv=None) -> int:
    return command_line.run(
        "pairs", __doc__, COMMANDS, argv,
        memory="try --tiling, a smaller --size or fewer --frames",
        stopped="every score so far is kept; run the same command again to go on",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
