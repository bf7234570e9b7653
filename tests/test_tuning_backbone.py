"""The transformer to be tuned: as its file stores it, with the right velocity and gradients."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from trainers.tuning import backbone
from trainers.tuning.backbone import ImageCondition, TuningError, velocity
from trainers.wan import stored_weights
from trainers.wan.dit_keys import of_text_to_video, to_diffusers, to_original
from trainers.wan.text_padding import fold_padding
from trainers.wan.weight_files import WeightFileError

from .comfy.tiny_wan import wan_dit
from .test_wan_dit import CONFIG

IMAGE = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 128}


def make(**changes):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG | {"num_layers": 2} | changes).train(False).requires_grad_(False)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def original(model):
    return {to_original(k): v.contiguous().clone() for k, v in model.state_dict().items()}


def in_fp8(state, per_row=False, suffix=".weight_scale"):
    """The state with the blocks' linear layers in scaled fp8, as ComfyUI's files hold them."""
    state = dict(state)
    for name in [n for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2]:
        scale = state[name].abs().amax(1 if per_row else None) / 448
        state[name] = (state[name] / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
        state[name.removesuffix(".weight") + suffix] = scale
    return state | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 3, 4, 6, generator=g), torch.randn(2, 7, 24, generator=g)
    return x, torch.tensor([0.3, 0.9]), text


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


class TestStorage:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_weights_stay_in_the_files_dtype(self, model, inputs, tmp_path, dtype):
        state = {k: v.to(dtype) for k, v in original(model).items()}
        # Some files keep small tensors in fp32; the rest decides.
        state["patch_embedding.weight"] = state["patch_embedding.weight"].float()
        save_file(state, tmp_path / "wan.safetensors")
        dit = backbone.load(tmp_path / "wan.safetensors")
        assert dit.model.blocks[0].ffn.net[2].weight.dtype == dtype
        assert dit.model.patch_embedding.weight.dtype == dtype
        assert dit.model.blocks[0].scale_shift_table.dtype == torch.float32
        assert not dit.model.training
        assert not any(p.requires_grad for p in dit.model.parameters())
        assert (dit.name, dit.image_to_video, dit.expert) == ("wan", False, None)
        assert dit.backbone.depth == 2
        v = velocity(dit.model, *inputs)
        assert v.dtype == torch.float32
        assert relative(v, velocity(model, *inputs)) < (0.03 if dtype == torch.bfloat16 else 0.005)

    def test_a_dtype_is_used_for_all(self, model, tmp_path):
        save_file({k: v.half() for k, v in original(model).items()}, tmp_path / "wan.safetensors")
        dit = backbone.load(tmp_path / "wan.safetensors", torch.float32)
        assert {p.dtype for p in dit.model.parameters()} == {torch.float32}

    def test_the_velocity_is_the_models_at_a_thousand_times_sigma(self, model, inputs):
        x, sigma, text = inputs
        torch.testing.assert_close(velocity(model, x, sigma, text), model(x, 1000 * sigma, text).sample)

    def test_folded_padding_is_padding_to_512(self, model, inputs):
        x, sigma, text = inputs
        words = [text[0], text[1, :3]]
        folded, bias, _ = fold_padding(words)
        padded = torch.zeros(2, 512, 24)
        padded[0, :7], padded[1, :3] = words
        torch.testing.assert_close(velocity(model, x, sigma, folded, bias), velocity(model, x, sigma, padded))


class TestScaledFp8:
    @pytest.mark.parametrize("per_row", [False, True])
    def test_linear_layers_stay_in_fp8_and_give_the_expanded_models_velocity(self, model, inputs, tmp_path, per_row):
        save_file(in_fp8(original(model), per_row), tmp_path / "wan.safetensors")
        dit = backbone.load(tmp_path / "wan.safetensors")
        kept = [n for n, p in dit.model.named_parameters() if p.dtype in stored_weights.FP8]
        assert len(kept) == 2 * 10
        assert dit.model.proj_out.weight.dtype == torch.float32
        expanded = backbone.load(tmp_path / "wan.safetensors", torch.float32)
        assert not backbone.is_quantised(expanded.model)
        torch.testing.assert_close(velocity(dit.model, *inputs), velocity(expanded.model, *inputs))
        assert relative(velocity(dit.model, *inputs), velocity(model, *inputs)) < 0.05

    def test_weights_without_a_scale_count_as_they_are(self, model, inputs, tmp_path):
        state = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 and k[0] == "b" else v for k, v in original(model).items()}
        save_file(state, tmp_path / "wan.safetensors")
        dit = backbone.load(tmp_path / "wan.safetensors")
        assert backbone.is_quantised(dit.model)
        expanded = backbone.load(tmp_path / "wan.safetensors", torch.float32)
        torch.testing.assert_close(velocity(dit.model, *inputs), velocity(expanded.model, *inputs))

    def test_the_graph_holds_no_expanded_weight(self):
        layer = stored_weights.ScaledLinear(8, 6)
        weight, bias, scale = torch.randn(6, 8).to(torch.float8_e4m3fn), torch.randn(6), torch.tensor(0.25)
        layer.load_state_dict({"weight": weight, "bias": bias, "weight_scale": scale}, assign=True)
        layer.requires_grad_(False)
        saved = []
        x = torch.randn(5, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(x)
        assert not [t for t in saved if t.shape == weight.shape and t.dtype not in stored_weights.FP8]
        y.square().sum().backward()
        plain = x.detach().requires_grad_(True)
        torch.nn.functional.linear(plain, weight.float() * 0.25, bias).square().sum().backward()
        torch.testing.assert_close(x.grad, plain.grad)

    def test_it_cannot_be_trained_whole(self, model, tmp_path):
        save_file(in_fp8(original(model)), tmp_path / "wan.safetensors")
        with pytest.raises(TuningError, match=r"stored in fp8.*bf16, fp16 or fp32 file, or a dtype"):
            backbone.full_parameters(backbone.load(tmp_path / "wan.safetensors").model)

    def test_another_quantisation_is_refused(self, model, tmp_path):
        state = original(model)
        state["blocks.1.ffn.0.weight"] = torch.zeros(64, 128, dtype=torch.uint8)
        save_file(state, tmp_path / "wan.safetensors")
        with pytest.raises(WeightFileError, match=r"wan.safetensors: 'blocks.1.ffn.0.weight' is stored as uint8"):
            backbone.load(tmp_path / "wan.safetensors")


class TestFolders:
    def test_one_of_two_experts(self, model, inputs, tmp_path):
        model.save_pretrained(tmp_path / "a14b" / "transformer")
        other = make(ffn_dim=32)
        other.save_pretrained(tmp_path / "a14b" / "transformer_2")
        with pytest.raises(WeightFileError, match="a14b: has two experts .*--expert high_noise or low_noise"):
            backbone.load(tmp_path / "a14b")
        with pytest.raises(WeightFileError, match="--expert middle: is unknown"):
            backbone.load(tmp_path / "a14b", expert="middle")
        for name, wanted in (("high_noise", model), ("low_noise", other)):
            dit = backbone.load(tmp_path / "a14b", expert=name)
            assert (dit.name, dit.expert) == ("a14b", name)
            torch.testing.assert_close(velocity(dit.model, *inputs), velocity(wanted, *inputs))
        assert backbone.load(tmp_path / "a14b" / "transformer_2").name == "a14b"

    def test_a_pipeline_with_one_transformer(self, model, tmp_path):
        model.save_pretrained(tmp_path / "small" / "transformer")
        assert backbone.load(tmp_path / "small").name == "small"
        with pytest.raises(WeightFileError, match="has one transformer"):
            backbone.load(tmp_path / "small", expert="low_noise")

    def test_what_is_missing_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone"):
            backbone.load(tmp_path / "gone")
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet"}))
        with pytest.raises(WeightFileError, match="a UNet"):
            backbone.load(tmp_path)


@pytest.fixture(scope="module")
def i2v():
    return make(**IMAGE)


@pytest.fixture
def image():
    g = torch.Generator().manual_seed(3)
    return ImageCondition(torch.randn(2, 20, 3, 4, 6, generator=g), torch.randn(2, 9, 20, generator=g))


class TestImageToVideo:
    def test_the_file_is_recognised_and_the_condition_used(self, i2v, image, inputs, tmp_path):
        save_file(original(i2v), tmp_path / "i2v.safetensors")
        dit = backbone.load(tmp_path / "i2v.safetensors")
        assert dit.image_to_video
        x, sigma, text = inputs
        padded = torch.nn.functional.pad(text, (0, 0, 0, 505))
        v = velocity(dit.model, x, sigma, padded, image=image)
        joint = torch.cat([x, image.channels], dim=1)
        wanted = i2v(joint, 1000 * sigma, padded, encoder_hidden_states_image=image.embedding).sample
        torch.testing.assert_close(v, wanted)
        assert v.shape == x.shape

    def test_folded_padding_is_unfolded_for_image_keys(self, i2v, image, inputs):
        x, sigma, text = inputs
        folded, bias, _ = fold_padding([text[0], text[1, :3]])
        padded = torch.zeros(2, 512, 24)
        padded[0, :7], padded[1, :3] = text[0], text[1, :3]
        a, b = (velocity(i2v, x, sigma, t, bias=m, image=image) for t, m in ((folded, bias), (padded, None)))
        torch.testing.assert_close(a, b)

    def test_a_model_without_image_keys_takes_channels_only(self, inputs, image):
        plain = make(in_channels=36)
        x, sigma, text = inputs
        v = velocity(plain, x, sigma, text, image=ImageCondition(image.channels))
        torch.testing.assert_close(v, plain(torch.cat([x, image.channels], 1), 1000 * sigma, text).sample)

    def test_a_missing_or_odd_condition_is_named(self, i2v, model, image, inputs):
        x, sigma, text = inputs
        with pytest.raises(TuningError, match="20 input channels besides the latent's 16.*image condition"):
            velocity(i2v, x, sigma, text)
        with pytest.raises(TuningError, match=r"is \[2, 20, 2, 4, 6\], expected \[2, 20, 3, 4, 6\]"):
            velocity(i2v, x, sigma, text, image=ImageCondition(image.channels[:, :, :2], image.embedding))
        with pytest.raises(TuningError, match=r"is \[2, 20, 3, 4, 6\], expected \[2, 0, 3, 4, 6\]"):
            velocity(model, x, sigma, text, image=image)
        with pytest.raises(TuningError, match="CLIP's embedding"):
            velocity(i2v, x, sigma, text, image=ImageCondition(image.channels))
        with pytest.raises(TuningError, match="texts of 512 tokens.*got 7"):
            velocity(i2v, x, sigma, text, image=image)


class TestGradients:
    def test_checkpointing_changes_no_gradient_though_texts_change_between(self, inputs):
        """Two graphs with their own bias are alive at once: each block is computed again with the bias that it had."""
        x, sigma, text = inputs
        texts = [fold_padding([text[0], text[1, :3]]), fold_padding([text[1, :2], text[0, :6]])]
        found = []
        for checkpointing in (False, True):
            own = make()
            backbone.full_parameters(own)
            if checkpointing:
                backbone.enable_checkpointing(own)
            first, second = (velocity(own, x, sigma, t, bias=b) for t, b, _ in texts)
            (first - 2 * second).square().mean().backward()
            found.append({n: p.grad for n, p in own.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)

    def test_checkpointing_keeps_the_blocks_inputs_only(self, inputs):
        own, tokens = make(num_layers=4), 3 * 2 * 3
        backbone.full_parameters(own)
        backbone.enable_checkpointing(own)
        sizes = {}
        weights = {p.data_ptr() for p in own.parameters()}

        def pack(t):
            if t.data_ptr() not in weights:
                sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            velocity(own, *inputs).sum()
        blocks = [n for n in sizes.values() if n == 2 * tokens * 128]
        # The four blocks' inputs; the input of the last norm and what it multiplies.
        assert len(blocks) <= 4 + 3

    def test_all_parameters_are_sorted_and_trainable(self):
        own = make()
        found = backbone.full_parameters(own)
        assert list(found) == sorted(n for n, _ in own.named_parameters())
        assert all(p.requires_grad for p in own.parameters())


def test_every_name_has_its_way_back():
    for i2v in (False, True):
        names = wan_dit(layers=2, i2v=i2v)
        assert [to_original(to_diffusers(n)) for n in names] == list(names)
    assert {to_original(k): k for k in of_text_to_video(3)} == {v: k for k, v in of_text_to_video(3).items()}


def test_ten_blocks_are_told_apart(tmp_path):
    names = [f"blocks.{i}.self_attn.q.weight" for i in (1, 10, 39)]
    assert [to_original(to_diffusers(n)) for n in names] == names
