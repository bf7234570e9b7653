"""Weights in every form that files hold them: read by what the file says of them, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from trainers.tuning import backbone, dit_shapes, merge
from trainers.wan import dit as wan_dit
from trainers.wan import stored_weights
from trainers.wan.stored_weights import StorageError
from trainers.wan.weight_files import OpenWeights, WeightFileError

from .test_wan_dit import CONFIG, hooked, inputs, model, original  # noqa: F401 (fixtures)

INT8, FP8 = {"format": "int8_tensorwise"}, {"format": "float8_e4m3fn"}


def description(found):
    return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)


def quantised(state, found, dtype=torch.int8, per_row=False, place="tensor"):
    """(tensors, header) with the blocks' linear layers in 8 bits, described as ComfyUI 0.33 does."""
    state, layers = dict(state), {}
    largest = 127 if dtype == torch.int8 else 448
    for name in [n for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2]:
        layer = name.removesuffix(".weight")
        scale = state[name].abs().amax(1) / largest if per_row else state[name].abs().max() / largest
        value = state[name] / (scale[:, None] if per_row else scale)
        state[name] = (value.round() if dtype == torch.int8 else value).to(dtype)
        state[f"{layer}.weight_scale"], layers[layer] = scale, found
    if place == "tensor":
        return state | {f"{layer}.comfy_quant": description(found) for layer in layers}, None
    return state, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def read(state, header, tmp_path, key="blocks.1.ffn.0.weight"):
    save_file(state, tmp_path / "wan.safetensors", header)
    with OpenWeights([tmp_path / "wan.safetensors"], "a Wan transformer") as f:
        return stored_weights.read(f, key, set(f.keys()))


class TestFormats:
    @pytest.mark.parametrize("place", ["tensor", "header"])
    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize(("found", "dtype"), [(INT8, torch.int8), (FP8, torch.float8_e4m3fn)])
    def test_described_weights_are_scaled(self, model, inputs, tmp_path, found, dtype, per_row, place):  # noqa: F811
        """By the definition of the format: a stored value times its scale, or its row's."""
        whole, key = original(model), "blocks.1.ffn.0.weight"
        state, header = quantised(whole, found, dtype, per_row, place)
        scale = state["blocks.1.ffn.0.weight_scale"]
        expected = state[key].float() * (scale[:, None] if per_row else scale)
        assert torch.equal(read(state, header, tmp_path, key), expected)
        assert (expected - whole[key]).norm() / whole[key].norm() < 0.05
        visual, _ = wan_dit.load(tmp_path / "wan.safetensors", last_block=1).features(*inputs, taps=(1,))
        wanted, _ = hooked(model, inputs, (1,))
        assert (visual[0] - wanted[0]).norm() / wanted[0].norm() < 0.05

    def test_bytes_are_read_as_the_float8_that_they_are(self, model, tmp_path):  # noqa: F811
        state, _ = quantised(original(model), FP8, torch.float8_e4m3fn)
        expected = read(state, None, tmp_path)
        stored = {k: v.view(torch.uint8) if v.dtype == torch.float8_e4m3fn else v for k, v in state.items()}
        assert torch.equal(read(stored, None, tmp_path), expected)

    @pytest.mark.parametrize(
        ("found", "named"),
        [
            ({"format": "nvfp4"}, "stored as nvfp4, which is not read here"),
            ({"format": "mxfp8"}, "stored as mxfp8"),
            ({"format": "convrot_w4a4"}, "stored as convrot_w4a4"),
            ({"format": "asym_w4a8_int8"}, "stored as asym_w4a8_int8"),
            ({"format": "svdquant"}, "stored as svdquant"),
            ({**INT8, "convrot": True}, r"stored as int8_tensorwise with rotated channels \(ConvRot\)"),
            ({**INT8, "params": {"convrot": True, "convrot_groupsize": 256}}, r"stored as int8\S+ with rotated channels"),
            ({"format": None}, "stored as None"),
            ({}, "stored as None"),
            ({"format": "float8_e5m2"}, "is int8, and the file says that it is float8_e5m2"),
        ],
    )
    @pytest.mark.parametrize("place", ["tensor", "header"])
    def test_every_other_format_is_refused_by_name(self, model, tmp_path, found, named, place):  # noqa: F811
        state, header = quantised(original(model), found, place=place)
        save_file(state, tmp_path / "wan.safetensors", header)
        for load in (wan_dit.load, backbone.load, lambda path: backbone.load(path, torch.bfloat16)):
            with pytest.raises(WeightFileError, match=rf"wan.safetensors: 'blocks\.\d\S+' (is )?{named}"):
                load(tmp_path / "wan.safetensors")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e8m0fnu])
    def test_what_nothing_describes_is_refused(self, model, tmp_path, dtype):  # noqa: F811
        state = original(model) | {"blocks.1.ffn.0.weight": torch.zeros(64, 128).to(dtype)}
        with pytest.raises(StorageError, match=r"'blocks.1.ffn.0.weight' is stored as \w+ without a description"):
            read(state, None, tmp_path)

    @pytest.mark.parametrize(
        ("edit", "named"),
        [
            ({"blocks.1.ffn.0.weight_scale": torch.ones(64, 8)}, r"weight_scale' is \[64, 8\], scales of blocks"),
            ({"blocks.1.ffn.0.comfy_quant": torch.tensor([123, 34], dtype=torch.uint8)}, "comfy_quant' is not JSON"),
            ({"blocks.1.ffn.0.comfy_quant": description([1])}, "comfy_quant' is not a JSON object"),
            ({"blocks.1.ffn.0.weight_scale": None}, "its scale is missing"),
        ],
    )
    def test_damaged_descriptions_are_named(self, model, tmp_path, edit, named):  # noqa: F811
        state = quantised(original(model), INT8)[0] | edit
        with pytest.raises(StorageError, match=named):
            read({k: v for k, v in state.items() if v is not None}, None, tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": {"blocks.1.ffn.0": 3}}'])
    def test_damaged_metadata_is_named(self, model, tmp_path, text):  # noqa: F811
        with pytest.raises(StorageError, match="_quantization_metadata"):
            read(quantised(original(model), INT8, place="header")[0], {"_quantization_metadata": text}, tmp_path)

    def test_a_lora_is_not_trained_on_int8_but_on_what_it_expands_to(self, model, tmp_path):  # noqa: F811
        state, header = quantised(original(model), INT8, place="header")
        save_file(state, tmp_path / "wan.safetensors", header)
        with pytest.raises(WeightFileError, match=r"int8, on which no LoRA is trained; expand it with --base_dtype bf16"):
            backbone.load(tmp_path / "wan.safetensors")
        with pytest.raises(WeightFileError, match=r"int8, on which no LoRA is trained"):
            dit_shapes.read_shapes(tmp_path / "wan.safetensors")
        dit = backbone.load(tmp_path / "wan.safetensors", torch.bfloat16)
        assert dit.model.blocks[1].ffn.net[0].proj.weight.dtype == torch.bfloat16
        assert dit_shapes.read_shapes(tmp_path / "wan.safetensors", torch.bfloat16) == dit_shapes.shapes_of(dit.model)


class TestFiles:
    @pytest.mark.parametrize(
        ("data", "named"),
        [
            (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file, whose quantisation is not read here"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a git-lfs pointer"),
            (b"<!DOCTYPE html><html><head>", "a web page that was saved under this name"),
            (b"\n<html>", "a web page"),
            (b"PK\x03\x04" + bytes(32), "a zip archive"),
            (b"\x80\x02}q\x00", "an old PyTorch checkpoint"),
            (b"", "an empty file"),
            (bytes(100), "not a safetensors file"),
        ],
    )
    def test_other_files_are_named(self, tmp_path, data, named):
        (tmp_path / "wan.safetensors").write_bytes(data)
        for load in (wan_dit.load, backbone.load, dit_shapes.read_shapes):
            with pytest.raises(WeightFileError, match=f"wan.safetensors: {named}.*expected a Wan transformer as .safetensors"):
                load(tmp_path / "wan.safetensors")

    @pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
    def test_a_file_that_is_cut_short_is_named(self, model, tmp_path, share):  # noqa: F811
        save_file(original(model), tmp_path / "whole.safetensors")
        data = (tmp_path / "whole.safetensors").read_bytes()
        (tmp_path / "wan.safetensors").write_bytes(data[: int(share * len(data))])
        with pytest.raises(WeightFileError, match=r"wan.safetensors: a truncated or damaged safetensors file"):
            wan_dit.load(tmp_path / "wan.safetensors")


@pytest.mark.parametrize("image", [False, True])
def test_an_image_to_video_model_is_refused_where_clips_have_no_image(tmp_path, image):
    from diffusers import WanTransformer3DModel

    more = {"image_dim": 32, "added_kv_proj_dim": 128} if image else {}
    WanTransformer3DModel(**(CONFIG | {"in_channels": 36} | more)).save_pretrained(tmp_path / "i2v")
    with pytest.raises(WeightFileError, match=r"i2v: an image-to-video transformer \(36 input channels for a latent of 16\)"):
        wan_dit.load(tmp_path / "i2v")
    assert backbone.load(tmp_path / "i2v").image_to_video


class TestFolders:
    @pytest.fixture
    def folder(self, model, tmp_path):  # noqa: F811
        """A diffusers folder of several shards with their index."""
        model.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
        return tmp_path / "transformer"

    def test_missing_shards_are_named(self, folder):
        (index,) = folder.glob("*.index.json")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        (folder / names[1]).rename(folder / f"{names[1]}.incomplete")
        for load in (wan_dit.load, backbone.load, dit_shapes.read_shapes):
            with pytest.raises(WeightFileError, match=f"1 of {len(names)} shards .* is {names[1]}, and {names[1]}.incomplete"):
                load(folder)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        index.unlink()
        with pytest.raises(WeightFileError, match=r"no \.safetensors file in this folder \(.*incomplete is an unfinished"):
            wan_dit.load(folder)

    def test_a_shard_without_its_tensors_or_cut_short_is_named(self, folder):
        shard = sorted(folder.glob("*.safetensors"))[1]
        data = shard.read_bytes()
        save_file({"other": torch.zeros(1)}, shard)
        with pytest.raises(WeightFileError, match=r"index.json: lists \d+ tensors that its shards lack, such as"):
            wan_dit.load(folder)
        shard.write_bytes(data[:-50])
        with pytest.raises(WeightFileError, match=f"{shard.name}: a truncated or damaged safetensors file"):
            wan_dit.load(folder)

    @pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": 3}', "{}"])
    def test_a_damaged_index_is_named(self, folder, text):
        (index,) = folder.glob("*.index.json")
        index.write_text(text)
        with pytest.raises(WeightFileError, match=f"{index.name}: not an index of shards"):
            wan_dit.load(folder)

    @pytest.mark.parametrize("text", ["[]", "{", '{"_class_name": "WanTransformer3DModel"}', '{"_class_name": "UNet"}'])
    def test_a_damaged_configuration_is_named(self, folder, text):
        (folder / "config.json").write_text(text)
        for load in (wan_dit.load, backbone.load, dit_shapes.read_shapes):
            with pytest.raises(WeightFileError, match=r"config.json|a UNet, expected a WanTransformer3DModel"):
                load(folder)

    @pytest.fixture
    def published(self, model, tmp_path):  # noqa: F811
        """A folder as Wan's authors publish it: their names, in shards, beside other models' files."""
        folder, state = tmp_path / "Wan2.1-T2V-1.3B", original(model)
        folder.mkdir()
        names, table = sorted(state), {}
        for part in (0, 1):
            file = f"diffusion_pytorch_model-{part + 1:05d}-of-00002.safetensors"
            save_file({n: state[n] for n in names[part::2]}, folder / file)
            table |= dict.fromkeys(names[part::2], file)
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        stated = {"_class_name": "WanModel", "dim": 128, "ffn_dim": 64, "in_dim": 16, "out_dim": 16, "num_layers": 4}
        (folder / "config.json").write_text(json.dumps(stated))
        (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"x")
        return folder

    def test_the_authors_layout_is_read(self, model, inputs, published, tmp_path):  # noqa: F811
        save_file(original(model), tmp_path / "wan.safetensors")
        file, folder = wan_dit.load(tmp_path / "wan.safetensors", last_block=1), wan_dit.load(published, last_block=1)
        assert folder.backbone == file.backbone
        torch.testing.assert_close(folder.features(*inputs, taps=(1,)), file.features(*inputs, taps=(1,)))
        tuned = backbone.load(published)
        x, sigma, text = inputs
        torch.testing.assert_close(tuned.model(x, 1000 * sigma, text).sample, model(x, 1000 * sigma, text).sample)
        assert dit_shapes.read_shapes(published) == dit_shapes.read_shapes(tmp_path / "wan.safetensors")

    def test_a_configuration_that_contradicts_the_tensors_is_refused(self, published):
        stated = json.loads((published / "config.json").read_text())
        (published / "config.json").write_text(json.dumps(stated | {"ffn_dim": 96}))
        with pytest.raises(WeightFileError, match="config.json states ffn_dim 96, and the tensors have 64"):
            wan_dit.load(published)

    def test_a_lora_is_merged_into_the_authors_layout(self, model, published, tmp_path):  # noqa: F811
        from safetensors.torch import load_file

        from trainers.tuning import lora, lora_files

        dit = backbone.load(published)
        options, path = lora.LoraOptions(rank=2, alpha=2.0), tmp_path / "lora.safetensors"
        lora.add(dit.model, options, seed=0)
        lora_files.save(path, dit.model, options, dit, format="comfy", dtype=torch.float32, metadata={})
        merge.merge(published, path, tmp_path / "merged.safetensors")
        merged, whole = load_file(tmp_path / "merged.safetensors"), original(model)
        assert merged.keys() == whole.keys()
        # A new LoRA changes nothing.
        assert all(torch.equal(merged[k], v) for k, v in whole.items())
