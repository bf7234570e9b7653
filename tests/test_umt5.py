"""Wan's text encoder from ComfyUI's file and from a transformers folder: the same embeddings, and clear refusals."""

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from benchmarks.toy_world import text_encoder as toy_text_encoder
from benchmarks.toy_world import weights
from trainers.wan import text_encoder
from trainers.wan.weight_files import WeightFileError

TOY = weights.FOLDER / weights.TEXT
TEXTS = ("a red ball in a wood room, fast orbit", "", "a  blue \n cube", "words it never saw")


def changed(path, **more):
    """The toy world's file with some tensors replaced, or dropped where None."""
    tensors = load_file(TOY) | {k.replace("__", "."): v for k, v in more.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    return path


def test_a_file_gives_what_the_toy_worlds_encoder_gives():
    reference, encoder = toy_text_encoder.load(TOY), text_encoder.load(TOY)
    for text, wanted in zip(TEXTS, reference.words(TEXTS), strict=True):
        torch.testing.assert_close(encoder.encode(text), wanted, atol=1e-5, rtol=1e-4)


def test_a_transformers_folder_gives_the_same(tmp_path):
    encoder, reference = text_encoder.load(TOY), toy_text_encoder.load(TOY)
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(reference.spiece)
    transformers = pytest.importorskip("transformers")
    try:
        tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path / "tokenizer", legacy=False, extra_ids=0)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    except (ImportError, ValueError, TypeError) as e:
        pytest.skip(f"this transformers makes no tokenizer of a sentencepiece model: {e}")
    for place in (tmp_path, tmp_path / "text_encoder"):
        found = text_encoder.load(place)
        for text in TEXTS[:3]:
            torch.testing.assert_close(found.encode(text), encoder.encode(text), atol=1e-6, rtol=1e-5)


def test_scaled_fp8_is_unscaled(tmp_path):
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    weight = load_file(TOY)[name].float()
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    more = {name: stored, name.replace(".weight", ".scale_weight"): scale, "scaled_fp8": torch.empty(0)}
    save_file(load_file(TOY) | more, tmp_path / "fp8.safetensors")
    save_file(load_file(TOY) | {name: stored.float() * scale}, tmp_path / "plain.safetensors")
    one, other = (text_encoder.load(tmp_path / f"{n}.safetensors") for n in ("fp8", "plain"))
    torch.testing.assert_close(one.encode(TEXTS[0]), other.encode(TEXTS[0]))
    assert not torch.equal(one.encode(TEXTS[0]), text_encoder.load(TOY).encode(TEXTS[0]))


def test_long_texts_lose_their_tail():
    encoder = text_encoder.load(TOY)
    assert encoder.encode("red " * 600).shape == (text_encoder.LENGTH, 256)
    assert encoder.encode("").shape == (1, 256)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shared__weight": None}, "has no shared.weight"),
        ({"spiece_model": None}, "no tokenizer .spiece_model. in it"),
        ({"spiece_model": torch.zeros(9, dtype=torch.uint8)}, "tokenizer .spiece_model. is damaged"),
        ({"encoder__block__1__layer__0__SelfAttention__relative_attention_bias__weight": None}, "a T5 encoder, whose layers"),
        ({"encoder__final_layer_norm__weight": None}, "missing tensor encoder.final_layer_norm.weight"),
        ({"encoder__block__0__layer__0__SelfAttention__q__weight": None}, "not a complete UMT5"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, more, message):
    path = changed(tmp_path / "other.safetensors", **more)
    with pytest.raises(WeightFileError, match=message) as error:
        text_encoder.load(path)
    assert "other.safetensors" in str(error.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        text_encoder.load(tmp_path / "nothing.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"PK junk")
    with pytest.raises(WeightFileError, match="zip archive"):
        text_encoder.load(tmp_path / "x.safetensors")
    with pytest.raises(WeightFileError, match="no tokenizer"):
        text_encoder.load(tmp_path)
    changed(tmp_path / "nan.safetensors", encoder__final_layer_norm__weight=torch.full((256,), float("nan")))
    with pytest.raises(WeightFileError, match="NaN or infinite values for 'a red ball"):
        text_encoder.load(tmp_path / "nan.safetensors").encode(TEXTS[0])
