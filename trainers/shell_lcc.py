"""Shell-LCC manifolds of video latents: fitted, measured, described, or imported from a released checkpoint.

    python -m trainers.shell_lcc fit --latents latents/ --output models/shell_lcc/mine.safetensors
    python -m trainers.shell_lcc eval --manifold mine.safetensors --latents other/ --json figures.json
    python -m trainers.shell_lcc info mine.safetensors
    python -m trainers.shell_lcc import released.pth --output released.safetensors --calibrate latents/

The default coder, anchors, is fitted in closed form in minutes on a CPU; `fit --coder predictor` trains the network of
the paper and also runs under `accelerate launch -m trainers.shell_lcc fit ...`. The exit code is 0 when all went well,
2 when an argument or a file cannot be used, 130 after Ctrl-C.
"""

import argparse
import sys

import torch

from . import shell_lcc_eval, shell_lcc_fit, shell_lcc_import, shell_lcc_info

COMMANDS = {"fit": shell_lcc_fit, "eval": shell_lcc_eval, "info": shell_lcc_info, "import": shell_lcc_import}


def parse(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m trainers.shell_lcc",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        print(f"error: out of memory ({sentence(e)[:200]}); fit fewer bases, or give --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted: {str(e) or 'nothing was written; run the same command again'}", file=sys.stderr)
        return 130


def sentence(e: BaseException) -> str:
    if isinstance(e, OSError) and e.filename is not None and e.strerror:
        return f"{e.filename}: {e.strerror}"
    return " ".join(str(e).split()) or type(e).__name__


if __name__ == "__main__":
    sys.exit(main())
