"""UMT5 (arXiv 2304.09151), Wan's text encoder, from a transformers folder or from ComfyUI's single file with its tokenizer.

Sizes are read from the tensors' shapes; nothing is downloaded. A text's embedding is the encoder's output for its tokens
and the end token, without padding.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import stored_weights
from .weight_files import OpenWeights, WeightFileError

PREFIXES = ("", "text_encoder.", "umt5xxl.", "transformer.")
TABLE = "shared.weight"
# Entries that are not weights: how a file is stored, and the tokenizer.
OTHERS = (*stored_weights.STORAGE, "spiece_model")
PAD, END = 0, 1
# Wan's limit in tokens; longer texts are truncated, as in its pipeline.
LENGTH = 512


class TextEncoderError(WeightFileError):
    """A file is not a text encoder that prompts can be embedded with; the message names it and the reason."""


@dataclass(frozen=True)
class Umt5:
    """tokens: text -> ids, without the end token; model: transformers' UMT5EncoderModel, frozen."""

    tokens: Callable[[str], list[int]]
    model: torch.nn.Module
    name: str

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """float32 [tokens, width] on the CPU; the empty text is the end token only. Raises TextEncoderError for NaN or Inf."""
        ids = [*self.tokens(re.sub(r"\s+", " ", text).strip())[: LENGTH - 1], END]
        weight = next(self.model.parameters())
        rows = torch.tensor([ids], device=weight.device)
        out = self.model(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state[0].float().cpu()
        if not bool(torch.isfinite(out).all()):
            raise TextEncoderError(f"{self.name}: NaN or infinite values for '{text[:60]}'; try --text_dtype float32")
        return out


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Umt5:
    """The encoder with its tokenizer. Raises WeightFileError or FileNotFoundError naming the file."""
    path = Path(path)
    if path.is_dir():
        tokens, model = _from_folder(path, dtype)
    elif path.is_file():
        tokens, model = _from_file(path, dtype)
    else:
        raise FileNotFoundError(
            f"{path}: no such file or folder; give ComfyUI's umt5_xxl .safetensors or a transformers folder"
        )
    return Umt5(tokens, model.train(False).requires_grad_(False).to(device), path.name)


def read_config(shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> dict:
    """UMT5Config's entries from the shapes of a state dict. Raises TextEncoderError."""
    try:
        bias = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        config = {
            "vocab_size": shapes[TABLE][0], "d_model": shapes[TABLE][1],
            "num_layers": 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("encoder.block.")),
            "relative_attention_num_buckets": bias[0], "num_heads": bias[1],
            "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // bias[1],
            "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        }  # fmt: skip
    except (KeyError, ValueError) as e:
        raise TextEncoderError(f"{source}: not a complete UMT5 encoder ({type(e).__name__}: {e})") from e
    last = config["num_layers"] - 1
    if f"encoder.block.{last}.layer.0.SelfAttention.relative_attention_bias.weight" not in shapes:
        raise TextEncoderError(f"{source}: a T5 encoder, whose layers share one relative position bias; expected Wan's UMT5")
    return config | {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "pad_token_id": PAD, "eos_token_id": END}


def _from_file(path: Path, dtype: torch.dtype):
    try:
        with OpenWeights([path], "a text encoder") as f:
            keys = set(f.keys())
            prefix = next((p for p in PREFIXES if p + TABLE in keys), None)
            if prefix is None:
                raise TextEncoderError(f"{path}: has no {TABLE}, so it is not a UMT5 text encoder")
            if "spiece_model" not in keys:
                raise TextEncoderError(f"{path}: no tokenizer (spiece_model) in it; give ComfyUI's umt5 file or a folder")
            spiece = bytes(f.get_tensor("spiece_model").tolist())
            names = [k.removeprefix(prefix) for k in f.keys() if k.startswith(prefix) and not k.endswith(OTHERS)]  # noqa: SIM118
            names = [n for n in names if n == TABLE or n.startswith("encoder.") and n != "encoder.embed_tokens.weight"]
            config = read_config({n: tuple(f.get_slice(prefix + n).get_shape()) for n in names}, path)
            state = {n: stored_weights.read(f, prefix + n, keys).to(dtype) for n in names}
    except stored_weights.StorageError as e:
        raise TextEncoderError(f"{path}: {e}") from e
    return _tokenizer_of(spiece, path), _build(config, state, path)


def _from_folder(path: Path, dtype: torch.dtype):
    transformers = _transformers()
    inner = path / "text_encoder"
    folder = inner if inner.is_dir() else path
    words = next((p for p in (path / "tokenizer", folder.parent / "tokenizer", folder) if _has_tokenizer(p)), None)
    if words is None:
        raise TextEncoderError(f"{path}: no tokenizer; expected spiece.model or tokenizer.json there or in tokenizer/")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "umt5":
            raise TextEncoderError(f"{folder}: model_type is '{kind}', expected 'umt5'")
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
        model = transformers.UMT5EncoderModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(dtype)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        if isinstance(e, TextEncoderError):
            raise
        raise TextEncoderError(f"{folder}: could not be loaded ({' '.join(str(e).split())[:300]})") from e
    return (lambda text: tokenizer(text, add_special_tokens=False).input_ids), model


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json"))


def _tokenizer_of(spiece: bytes, path: Path):
    try:
        import sentencepiece
    except ImportError as e:
        raise ImportError('embedding prompts needs sentencepiece: pip install "intrinsic-reward[train]"') from e
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    except RuntimeError as e:
        raise TextEncoderError(f"{path}: its tokenizer (spiece_model) is damaged ({' '.join(str(e).split())[:120]})") from e
    return processor.encode


def _build(config: dict, state: dict[str, Tensor], source: Path):
    transformers = _transformers()
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
    state["encoder.embed_tokens.weight"] = state[TABLE]
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        problem = f"missing tensor {missing[0]}" if missing else f"unexpected tensor {unexpected[0]}"
        raise TextEncoderError(f"{source}: {problem}; this variant of UMT5 is not supported")
    return model


def _transformers():
    try:
        import transformers
    except ImportError as e:
        raise ImportError('embedding prompts needs transformers: pip install "intrinsic-reward[train]"') from e
    return transformers
