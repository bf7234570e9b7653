"""Prompts embedded once, for `collect` and `cache`: from lines of a file, by Wan's text encoder."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..kernels.files import header as formats
from ..kernels.latent_space import LatentSpace
from ..running import device as shell_lcc_device
from ..running.device import DTYPES
from ..running.progress import Bar
from . import text_encoder as umt5


def add_encoder(group, required: bool) -> None:
    """The arguments that say which text encoder is used and how."""
    group.add_argument(
        "--text_encoder",
        required=required,
        metavar="FILE_OR_DIR",
        help="ComfyUI's umt5_xxl .safetensors, or a transformers folder",
    )
    group.add_argument(
        "--text_dtype", choices=tuple(DTYPES), default="bfloat16", help="in which it computes (default bfloat16; 11 GB)"
    )


def text_id(prompt: str) -> str:
    """The name under which a prompt's embedding is kept: 16 hexadecimal digits of what it says."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def embed(prompts: Iterable[str], args) -> dict[str, Tensor]:
    """{id: [words, width]} by the encoder of the arguments, which is loaded for this and let go of again."""
    encoder = umt5.load(args.text_encoder, DTYPES[args.text_dtype], shell_lcc_device.pick_device(args.device))
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
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not a text file in UTF-8 ({e.reason}); expected one prompt a line") from e
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it; expected one a line")
    return prompts


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """A file's texts by the ids of what they say."""
    texts, header = formats.read(path, "texts")
    said = header.config.get("prompts", {})
    return {text_id(said[k]) if k in said else k: v for k, v in texts.items()}


def write_embeddings(
    path: Path, texts: Mapping[str, Tensor], space: LatentSpace, provenance: dict, prompts: Mapping[str, str] | None = None
) -> None:
    """Texts [words, width], fp16, into one file; prompts: id -> what it says, where that is known. Raises OSError."""
    state = {k: v.half() for k, v in texts.items()}
    formats.write(path, state, formats.Header("texts", space, {"prompts": dict(prompts or {})}, {}, provenance))
