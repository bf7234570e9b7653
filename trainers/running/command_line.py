"""Command line of a package of subcommands: help from the docstrings, errors as one line on stderr, exit codes."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from safetensors import SafetensorError

from . import config_file

RAW = argparse.RawDescriptionHelpFormatter


def run(name: str, doc: str, commands: Mapping[str, ModuleType], argv: Sequence[str] | None, memory: str, stopped: str) -> int:
    """Runs `python -m trainers.<name> COMMAND ...` and returns its exit code: the command's own, 2 when an argument or a
    file cannot be used, 130 after Ctrl-C.

    doc: the package's docstring, whose first paragraph is the summary; commands: {name: module with add_arguments(parser)
    and run(args) -> int}; argv: None for sys.argv; memory: advice printed when memory runs out; stopped: message for a
    KeyboardInterrupt that has none. args.argv keeps the arguments for provenance, those of a --config file among them.
    """
    try:
        argv = config_file.expand(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as e:
        print(f"error: {sentence(e)}", file=sys.stderr)
        return 2
    args = _parser(name, doc, commands).parse_args(argv)
    args.argv = argv
    try:
        return commands[args.command].run(args)
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {sentence(e)}", file=sys.stderr)
        return 2
    except SafetensorError as e:
        print(f"error: a .safetensors file cannot be read or written ({sentence(e)}); copy or make it again", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"error: out of memory ({sentence(e)[:200]}); {memory}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted: {str(e) or stopped}", file=sys.stderr)
        return 130


def sentence(e: BaseException) -> str:
    """An exception's message on one line, with the file name that str() of an OSError may lack."""
    if isinstance(e, OSError) and e.filename is not None and e.strerror:
        return f"{e.filename}: {e.strerror}"
    return " ".join(str(e).split()) or type(e).__name__


def _parser(name: str, doc: str, commands: Mapping[str, ModuleType]) -> argparse.ArgumentParser:
    summary, _, rest = doc.partition("\n\n")
    parser = argparse.ArgumentParser(f"python -m trainers.{name}", description=summary, epilog=rest, formatter_class=RAW)
    added = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(commands) + "}")
    for command, module in commands.items():
        first = module.__doc__.partition("\n")[0]
        module.add_arguments(added.add_parser(command, help=first, description=module.__doc__, formatter_class=RAW))
    return parser
