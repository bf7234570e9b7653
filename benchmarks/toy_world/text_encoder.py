"""A tiny text encoder in UMT5's layout: its own vocabulary, two layers, random weights that are not trained.

Random projections of word embeddings with relative positions are enough to distinguish captions, and the diffusion model
learns their meaning. The file holds what ComfyUI reads from a umt5 file (`spiece_model` is the tokenizer) and its sizes as
JSON bytes in `tiny_umt5_config`, because ComfyUI supports the sizes of umt5-xxl only.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers.kernels.files.atomic import write_atomic

from .captions import every_caption, vocabulary

WIDTH, HEADS, KEY_WIDTH, HIDDEN, LAYERS = 256, 4, 32, 256, 2
PAD, END, UNKNOWN = 0, 1, 2
LENGTH = 512
# More than the longest caption has, its end token included.
TOKENS = 16


@dataclass(frozen=True)
class TextEncoder:
    """tokenizer: sentencepiece's processor; model: transformers' UMT5EncoderModel, frozen; spiece: the tokenizer's file."""

    tokenizer: object
    model: torch.nn.Module
    spiece: bytes

    def tokens(self, text: str) -> list[int]:
        """Ids of the pieces, then the end."""
        return [*self.tokenizer.encode(clean(text)), END]

    @torch.no_grad()
    def encode(self, texts: list[str], length: int = LENGTH) -> Tensor:
        """float32 [N, length, 256], zero after each text's end, as Wan's cross-attention expects it.

        Texts of more than `length` tokens are cut.
        """
        ids = [self.tokens(t) for t in texts]
        ids = [i if len(i) <= length else [*i[: length - 1], END] for i in ids]
        longest = max(len(i) for i in ids)
        padded = torch.tensor([i + [PAD] * (longest - len(i)) for i in ids])
        mask = (torch.arange(longest) < torch.tensor([[len(i)] for i in ids])).long()
        hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state * mask[..., None]
        return torch.nn.functional.pad(hidden, (0, 0, 0, length - longest))

    def words(self, texts: Sequence[str]) -> list[Tensor]:
        """One float32 [tokens, 256] per text, without padding."""
        encoded = self.encode(list(texts))
        return [e[: min(LENGTH, len(self.tokens(t)))] for e, t in zip(encoded, texts, strict=True)]


def clean(text: str) -> str:
    """Collapses white space, as diffusers' WanPipeline and ComfyUI's tokenizer do."""
    return re.sub(r"\s+", " ", text).strip()


def make(seed: int = 7) -> dict[str, Tensor]:
    """The file's tensors: fp16 weights, vocabulary and sizes, determined by the seed."""
    spiece = _vocabulary()
    pieces = _processor(spiece).get_piece_size()
    config = {
        "d_ff": HIDDEN, "d_kv": KEY_WIDTH, "d_model": WIDTH, "num_heads": HEADS, "num_layers": LAYERS, "vocab_size": pieces,
    }  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=g) * std

    inner, w = HEADS * KEY_WIDTH, {}
    w["shared.weight"] = normal(pieces, WIDTH, std=1.0)
    for i in range(LAYERS):
        attention, dense = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        # UMT5 does not scale attention logits by the square root of the key width: small weights do it here.
        w[f"{attention}.SelfAttention.q.weight"] = normal(inner, WIDTH, std=(WIDTH * KEY_WIDTH) ** -0.5)
        w[f"{attention}.SelfAttention.k.weight"] = normal(inner, WIDTH, std=WIDTH**-0.5)
        w[f"{attention}.SelfAttention.v.weight"] = normal(inner, WIDTH, std=WIDTH**-0.5)
        w[f"{attention}.SelfAttention.o.weight"] = normal(WIDTH, inner, std=0.7 * inner**-0.5)
        w[f"{attention}.SelfAttention.relative_attention_bias.weight"] = normal(32, HEADS, std=1.5)
        w[f"{attention}.layer_norm.weight"] = torch.ones(WIDTH)
        w[f"{dense}.DenseReluDense.wi_0.weight"] = normal(HIDDEN, WIDTH, std=WIDTH**-0.5)
        w[f"{dense}.DenseReluDense.wi_1.weight"] = normal(HIDDEN, WIDTH, std=WIDTH**-0.5)
        w[f"{dense}.DenseReluDense.wo.weight"] = normal(WIDTH, HIDDEN, std=0.5 * HIDDEN**-0.5)
        w[f"{dense}.layer_norm.weight"] = torch.ones(WIDTH)
    w["encoder.final_layer_norm.weight"] = torch.ones(WIDTH)
    return {k: v.half() for k, v in w.items()} | {
        "spiece_model": _bytes(spiece),
        "tiny_umt5_config": _bytes(json.dumps(config).encode()),
    }


def save(path: str | Path, seed: int = 7) -> None:
    """Makes the text encoder and saves it to a file."""
    header = {"format": "pt", "title": "Toy world text encoder (UMT5 layout)", "seed": str(seed)}
    write_atomic(path, lambda partial: save_file(make(seed), partial, metadata=header))


def load(path: str | Path) -> TextEncoder:
    """Reads a file that `save` wrote, in fp32."""
    return from_tensors(load_file(path))


def from_tensors(tensors: dict[str, Tensor]) -> TextEncoder:
    """What `make` returns -> TextEncoder."""
    from transformers import UMT5Config, UMT5EncoderModel

    tensors = dict(tensors)
    spiece = bytes(tensors.pop("spiece_model").tolist())
    sizes = json.loads(bytes(tensors.pop("tiny_umt5_config").tolist()))
    config = UMT5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=PAD, eos_token_id=END)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    state = {k: v.float() for k, v in tensors.items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    return TextEncoder(_processor(spiece), model.train(False).requires_grad_(False), spiece)


def _vocabulary() -> bytes:
    import sentencepiece

    words, out = vocabulary(), io.BytesIO()
    # Every word is declared as one piece, because sentencepiece would split words when trained on so little text. Single
    # letters are added so that words outside the captions do not all become "unknown".
    letters = [" ".join("abcdefghijklmnopqrstuvwxyz.")] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(every_caption() + letters), model_writer=out, model_type="unigram", vocab_size=160,
        user_defined_symbols=[w if w == "," else "\u2581" + w for w in words], hard_vocab_limit=False,
        pad_id=PAD, eos_id=END, unk_id=UNKNOWN, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue()


def _processor(spiece: bytes):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=spiece)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
