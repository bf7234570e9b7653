"""Embeds prompts, one per line, with Wan's text encoder, for `collect`.

Order is not kept: each embedding is keyed by a hash of its prompt, and the file's header maps keys to prompts.
"""

from pathlib import Path

from ..kernels.latent_space import WAN21
from ..running.output import provenance, require_output
from ..wan.prompts import add_encoder, embed, encoder_options, read_prompts, text_id, write_embeddings

NEGATIVE = "negative"


def add_arguments(parser) -> None:
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE.txt", help="one prompt per line")
    add_encoder(parser, required=True)
    parser.add_argument("--negative", default="", help="the negative prompt, with the key 'negative' (default: empty)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args) -> int:
    require_output(args.output, args.overwrite)
    prompts = read_prompts(args.prompts)
    texts = embed([*prompts, args.negative], encoder_options(args))
    keyed = {text_id(p): p for p in prompts}
    kept = {k: texts[k] for k in keyed} | {NEGATIVE: texts[text_id(args.negative)]}
    notes = provenance(args.argv, "trainers.prism") | {"text_encoder": Path(args.text_encoder).name}
    write_embeddings(args.output, kept, WAN21, notes, keyed | {NEGATIVE: args.negative})
    print(f"{args.output}: {len(keyed)} prompts, and the negative one as '{NEGATIVE}'")
    return 0
