"""Geometry consistency of clips: how well one rigid scene under a moving camera explains them.

    python -m trainers.geometry score --videos clips/ --output scores/

The exit code is 0 when all went well, 1 when none of the clips could be scored, 2 when an argument or a file cannot be
used, 130 after Ctrl-C.
"""

import argparse
import sys

import torch

from . import geometry_score
from .shell_lcc import sentence

COMMANDS = {"score": geometry_score}


def parse(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m trainers.geometry", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
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
        print(f"error: out of memory ({sentence(e)[:200]}); give fewer --jobs or --frames", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted: {str(e) or 'run the same command again to go on'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
