"""Wan transformers from ComfyUI's single file and from a diffusers folder, cut after a block, and their features."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from trainers.kernels.prism.backbone import FINGERPRINT_TENSORS
from trainers.wan import dit as wan_dit
from trainers.wan import stored_weights
from trainers.wan.dit_keys import of_text_to_video
from trainers.wan.weight_files import WeightFileError

CONFIG = {
    "patch_size": (1, 2, 2), "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16,
    "text_dim": 24, "freq_dim": 32, "ffn_dim": 64, "num_layers": 4, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG).train(False).requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


def original(model):
    names = of_text_to_video(model.config.num_layers)
    return {names[k]: v.contiguous().clone() for k, v in model.state_dict().items()}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 3, 4, 6, generator=g), torch.randn(2, 7, 24, generator=g)
    return x, torch.tensor([0.3, 0.9]), text


def hooked(model, inputs, taps):
    """Outputs of blocks and of the text embedding during the model's own forward."""
    x, sigma, text = inputs
    seen = {}
    hooks = [model.blocks[i].register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out)) for i in taps]
    embedder = model.condition_embedder.text_embedder
    hooks.append(embedder.register_forward_hook(lambda m, a, out: seen.__setitem__("text", out)))
    model(x, 1000 * sigma, text)
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in taps], seen["text"]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_gives_the_whole_models_features(model, inputs, tmp_path, prefix):
    path = tmp_path / "wan.safetensors"
    save_file({prefix + k: v for k, v in original(model).items()}, path)
    dit = wan_dit.load(path, last_block=2)
    assert len(dit.model.blocks) == 3
    assert dit.backbone.depth == 4
    assert dit.backbone.width == 128
    assert set(dit.backbone.fingerprint) == set(FINGERPRINT_TENSORS)
    visual, text = dit.features(*inputs, taps=(0, 2))
    wanted, words = hooked(model, inputs, (0, 2))
    torch.testing.assert_close(visual, wanted)
    torch.testing.assert_close(text, words)
    whole = wan_dit.load(path)
    torch.testing.assert_close(
        whole.model(inputs[0], 1000 * inputs[1], inputs[2]).sample, model(inputs[0], 1000 * inputs[1], inputs[2]).sample
    )


def test_a_folder_and_a_file_of_the_same_weights_agree(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="300KB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    save_file(original(model), tmp_path / "wan.safetensors")
    folder, file = (wan_dit.load(tmp_path / p, last_block=1) for p in ("pipeline", "wan.safetensors"))
    assert folder.backbone == file.backbone
    torch.testing.assert_close(folder.features(*inputs, taps=(1,)), file.features(*inputs, taps=(1,)))


def test_a_folder_of_two_experts_asks_for_one(model, tmp_path):
    for name in ("transformer", "transformer_2"):
        model.save_pretrained(tmp_path / "a14b" / name)
    with pytest.raises(WeightFileError, match="two experts .*a14b/transformer for high noise"):
        wan_dit.load(tmp_path / "a14b")
    assert wan_dit.load(tmp_path / "a14b" / "transformer_2", last_block=0).backbone.architecture


def test_half_precision_keeps_what_must_stay_exact(model, inputs, tmp_path):
    path = tmp_path / "wan.safetensors"
    save_file({k: v.bfloat16() for k, v in original(model).items()}, path)
    dit = wan_dit.load(path, last_block=1, dtype=torch.bfloat16)
    assert dit.model.blocks[0].scale_shift_table.dtype == torch.float32
    assert dit.model.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert wan_dit.load(path).backbone.same_weights(dit.backbone)
    x, sigma, text = inputs
    visual, _ = dit.features(x.bfloat16(), sigma, text.bfloat16(), taps=(1,))
    wanted, _ = hooked(model, inputs, (1,))
    assert (visual[0].float() - wanted[0]).norm() / wanted[0].norm() < 0.03


@pytest.mark.parametrize("suffix", stored_weights.SCALES)
def test_scaled_fp8_weights_are_scaled_back(model, inputs, tmp_path, suffix):
    state, path = original(model), tmp_path / "wan.safetensors"
    for name in [n for n in state if n.endswith((".q.weight", ".ffn.0.weight"))]:
        scale = state[name].abs().max() / 448
        state[name.removesuffix(".weight") + suffix] = scale
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
    state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(state, path)
    visual, _ = wan_dit.load(path, last_block=1).features(*inputs, taps=(1,))
    wanted, _ = hooked(model, inputs, (1,))
    assert (visual[0] - wanted[0]).norm() / wanted[0].norm() < 0.05


def test_the_toy_worlds_file_is_read(tmp_path):
    from benchmarks.toy_world import weights

    dit = wan_dit.load(weights.FOLDER / weights.DIT, last_block=5)
    assert dit.backbone.architecture == "wan, 12 blocks of width 128, 16 channels, text 256"
    assert len(dit.model.blocks) == 6


class TestBadFiles:
    def test_what_is_no_wan_transformer_is_named(self, model, tmp_path):
        path = tmp_path / "other.safetensors"
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(WeightFileError, match=r"other.safetensors: has no patch_embedding.weight"):
            wan_dit.load(path)
        path.write_bytes(b"PK\x03\x04 something")
        with pytest.raises(WeightFileError, match="a zip archive"):
            wan_dit.load(path)
        with pytest.raises(FileNotFoundError, match="gone"):
            wan_dit.load(tmp_path / "gone")
        with pytest.raises(WeightFileError, match="no readable config.json"):
            wan_dit.load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet"}))
        with pytest.raises(WeightFileError, match="a UNet"):
            wan_dit.load(tmp_path)

    def test_missing_foreign_and_oddly_sized_weights_are_named(self, model, tmp_path):
        path, state = tmp_path / "wan.safetensors", original(model)
        save_file({k: v for k, v in state.items() if k != "blocks.0.ffn.2.bias"}, path)
        with pytest.raises(WeightFileError, match=r"missing tensor blocks.0.ffn.net.2.bias"):
            wan_dit.load(path)
        save_file(state | {"vace_blocks.0.x": torch.zeros(1)}, path)
        with pytest.raises(WeightFileError, match=r"unexpected tensor vace_blocks.0.x"):
            wan_dit.load(path)
        save_file({k: v for k, v in state.items() if k != "head.head.weight"}, path)
        with pytest.raises(WeightFileError, match="not a complete Wan transformer"):
            wan_dit.load(path)

    def test_a_tap_beyond_the_depth_is_refused(self, model, tmp_path):
        save_file(original(model), tmp_path / "wan.safetensors")
        with pytest.raises(WeightFileError, match="blocks 0 to 3, so block 11 cannot be tapped"):
            wan_dit.load(tmp_path / "wan.safetensors", last_block=11)


def test_no_original_name_is_lost(model):
    assert len(set(of_text_to_video(4).values())) == len(model.state_dict())
