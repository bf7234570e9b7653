"""PRISM heads: clips collected or cached, heads trained on the preferences between them and measured by noise level.

    python -m trainers.prism cache --pairs pairs.csv --vae wan_2.1_vae.safetensors --text_encoder umt5_xxl.safetensors \\
        --output runs/

or from runs of one's own model:

    python -m trainers.prism embed --prompts prompts.txt --text_encoder umt5_xxl.safetensors --output prompts.safetensors
    python -m trainers.prism collect --backbone wan2.1_t2v_1.3B_bf16.safetensors --texts prompts.safetensors --output runs/
    python -m trainers.prism label --data runs/ --scores scores.jsonl

and then:

    python -m trainers.prism train --data runs/ --backbone wan2.1_t2v_1.3B_bf16.safetensors --output head.safetensors
    python -m trainers.prism eval --head head.safetensors --data other/ --backbone wan2.1_t2v_1.3B_bf16.safetensors

The exit code is 0 when all went well, 2 when an argument or a file cannot be used, 130 after Ctrl-C.
"""

import argparse
import sys

import torch

from . import prism_cache, prism_collect, prism_embed, prism_eval, prism_fit, prism_label
from .shell_lcc import sentence

COMMANDS = {
    "cache": prism_cache, "embed": prism_embed, "collect": prism_collect, "label": prism_label, "train": prism_fit,
    "eval": prism_eval,
}  # fmt: skip


def parse(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m trainers.prism", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
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
        print(f"error: out of memory ({sentence(e)[:200]}); give a smaller --train_batch_size", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted: {str(e) or 'nothing was written; run the same command again'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
