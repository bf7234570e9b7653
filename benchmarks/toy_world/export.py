"""Exports the committed stack to the folder layouts that ComfyUI and diffusers read.

    python -m benchmarks.toy_world.export --comfyui /path/to/ComfyUI/models --diffusers outputs/toy_wan_diffusers

ComfyUI: Load Diffusion Model and Load VAE read the files unchanged; CLIPLoader supports the sizes of umt5-xxl only and needs
the node pack tests/comfy/tiny_umt5_shim for this text encoder. Sample with ModelSamplingSD3 at shift 3, euler, simple.
"""

import json
import shutil
from pathlib import Path

from benchmarks.command_line import make_parser
from trainers.kernels.latent_space import WAN21

from . import text_encoder, weights
from .pipeline import SHIFT

COMFYUI = {weights.DIT: "diffusion_models", weights.VAE: "vae", weights.TEXT: "text_encoders"}


def to_comfyui(models: str | Path, source: str | Path = weights.FOLDER) -> list[Path]:
    """Copies the three files, and the PRISM heads, below a ComfyUI models folder. Returns their paths."""
    out = []
    heads = {f"prism/{path.name}": "." for path in sorted((Path(source) / "prism").glob("*.safetensors"))}
    for name, kind in (COMFYUI | heads).items():
        target = Path(models) / kind / name
        target.parent.mkdir(parents=True, exist_ok=True)
        out.append(Path(shutil.copyfile(Path(source) / name, target)))
    return out


def to_diffusers(folder: str | Path, source: str | Path = weights.FOLDER) -> None:
    """Writes a WanPipeline folder in fp32: transformer, vae, text_encoder, tokenizer and scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder, source = Path(folder), Path(source)
    weights.load_dit(source / weights.DIT).save_pretrained(folder / "transformer")
    vae = weights.load_vae(source / weights.VAE)
    vae.register_to_config(latents_mean=list(WAN21.mean), latents_std=list(WAN21.std))
    vae.save_pretrained(folder / "vae")
    text = text_encoder.load(source / weights.TEXT)
    text.model.save_pretrained(folder / "text_encoder")
    tokenizer(text).save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def tokenizer(text: text_encoder.TextEncoder):
    """The vocabulary as a transformers tokenizer; ids as sentencepiece gives them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    spiece = text.tokenizer
    # Scores prefer whole words over letters, as sentencepiece does with words that are "user defined".
    pieces = [spiece.id_to_piece(i) for i in range(spiece.get_piece_size())]
    known = Tokenizer(models.Unigram([(p, 0.0 if len(p) > 2 else -10.0) for p in pieces], unk_id=text_encoder.UNKNOWN))
    known.normalizer = normalizers.NFKC()
    known.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(",", "isolated")]
    )
    end = pieces[text_encoder.END]
    known.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, text_encoder.END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=known, eos_token=end, pad_token=pieces[text_encoder.PAD], unk_token=pieces[text_encoder.UNKNOWN],
        model_max_length=text_encoder.LENGTH,
    )  # fmt: skip


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.export", __doc__)
    parser.add_argument("--weights", type=Path, default=weights.FOLDER, metavar="DIR", help="the stack (the committed one)")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="a ComfyUI models folder")
    parser.add_argument("--diffusers", type=Path, metavar="DIR", help="a folder to write a WanPipeline into")
    args = parser.parse_args(argv)
    if not (args.comfyui or args.diffusers):
        parser.error("give --comfyui DIR, --diffusers DIR or both")
    if args.comfyui:
        print(*to_comfyui(args.comfyui, args.weights), sep="\n")
    if args.diffusers:
        to_diffusers(args.diffusers, args.weights)
        print(args.diffusers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
