"""Embeds prompts, one a line, with Wan's text encoder, for `collect` to sample from.

The prompts keep their order in no way: each is known by an id made of its words, and the file says which id says what.
"""

from pathlib import Path

from ..kernels.latent_space import WAN21
from ..running.output import provenance, require_output
from ..wan import prompts as prism_texts
from ..wan.prompts import write_embeddings

NEGATIVE = "negative"


def add_arguments(parser) -> None:
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE.txt", help="one prompt a line")
    prism_texts.add_encoder(parser, required=True)
    parser.add_argument("--negative", default="", help="the negative prompt, known as 'negative' (default: no words)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args) -> int:
    require_output(args.output, args.overwrite)
    prompts = prism_texts.read_prompts(args.prompts)
    texts = prism_texts.embed([*prompts, args.negative], args)
    said = {prism_texts.text_id(p): p for p in prompts}
    kept = {k: texts[k] for k in said} | {NEGATIVE: texts[prism_texts.text_id(args.negative)]}
    notes = provenance(args.argv, "trainers.prism") | {"text_encoder": Path(args.text_encoder).name}
    write_embeddings(args.output, kept, WAN21, notes, said | {NEGATIVE: args.negative})
    print(f"{args.output}: {len(said)} prompts, and the negative one as '{NEGATIVE}'")
    return 0
