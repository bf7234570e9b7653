"""Prompts and their embeddings by Wan's text encoder: reading prompt files, embedding, and files of kind "texts"."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..kernels.files import header as file_header
from ..kernels.files import lines
from ..kernels.latent_space import LatentSpace
from ..running.device import DTYPES, pick_device
from ..running.progress import Bar
from . import text_encoder


def add_encoder(group, required: bool) -> None:
    """Adds --text_encoder and --text_dtype."""
    group.add_argument(
        "--text_encoder",
        required=required,
        metavar="FILE_OR_DIR",
        help="ComfyUI's umt5_xxl .safetensors, or a transformers folder",
    )
    group.add_argument(
        "--text_dtype", choices=tuple(DTYPES), default="bfloat16", help="of the text encoder (default bfloat16; 11 GB)"
    )


def text_id(prompt: str) -> str:
    """The key of a prompt's embedding: the first 16 hexadecimal digits of the SHA-256 of its text."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EncoderOptions:
    """path: of the text encoder, file or folder; dtype: a name of DTYPES; device: as --device."""

    path: str
    dtype: str = "bfloat16"
    device: str = "auto"


def encoder_options(args) -> EncoderOptions | None:
    """The options that `add_encoder` and --device added, None without --text_encoder."""
    return None if args.text_encoder is None else EncoderOptions(args.text_encoder, args.text_dtype, args.device)


def embed(prompts: Iterable[str], options: EncoderOptions) -> dict[str, Tensor]:
    """{text id: embedding [words, width]}; the text encoder is loaded for this call and then freed."""
    encoder = text_encoder.load(options.path, DTYPES[options.dtype], pick_device(options.device))
    wanted = sorted({text_id(p): p for p in prompts}.items())
    found = {}
    with Bar("embedding", len(wanted), "prompt") as bar:
        for key, prompt in wanted:
            found[key] = encoder.encode(prompt)
            bar.add()
    return found


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, without empty ones. Raises ValueError or FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    prompts = [line.strip() for _, line in lines.numbered(lines.read_text(path))]
    if not prompts:
        raise ValueError(f"{path}: contains no prompt; expected one per line")
    return prompts


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """{text id: embedding [words, width]} of a file; embeddings without a known prompt keep the file's key.

    Raises FormatError or FileNotFoundError.
    """
    texts, header = file_header.read(path, "texts")
    prompts = header.config.get("prompts", {})
    return {text_id(prompts[k]) if k in prompts else k: v for k, v in texts.items()}


def write_embeddings(
    path: Path, texts: Mapping[str, Tensor], space: LatentSpace, provenance: dict, prompts: Mapping[str, str] | None = None
) -> None:
    """Writes embeddings [words, width] as fp16; prompts: {key: prompt}, where it is known. Raises OSError."""
    state = {k: v.half() for k, v in texts.items()}
    file_header.write(path, state, file_header.Header("texts", space, {"prompts": dict(prompts or {})}, {}, provenance))
