"""Preference pairs out of groups of candidate clips: the best against the worst of a prompt, where that says something.

    python -m trainers.pairs build --groups candidates/ --by geometry=1 --output pairs/

Then pairs/pairs.jsonl goes into `python -m trainers.prism cache --pairs`. The exit code is 0 when there is a pair, 1 when no
group gave one, 2 when an argument or a file cannot be used, 130 after Ctrl-C.
"""

import argparse
import sys

import torch

from . import pairs_build
from .shell_lcc import sentence

COMMANDS = {"build": pairs_build}


def parse(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m trainers.pairs", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        first = module.__doc__.partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=first, description=module.__doc__,
                                                 formatter_class=argparse.RawDescriptionHelpFormatter))  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    args.argv = argv
    try:
        return COMMANDS[args.command].run(args)
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {sentence(e)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"error: out of memory ({sentence(e)[:200]}); try --tiling, a smaller --size or fewer --frames", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: every score so far is kept; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
