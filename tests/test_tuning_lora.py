"""LoRA in a frozen transformer, its files in three layouts, and merging."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from trainers.kernels.files.stream import write_streamed
from trainers.tuning import backbone, lora, lora_files
from trainers.tuning import merge as merging
from trainers.tuning.backbone import TuningError, velocity
from trainers.tuning.lora import LoraOptions
from trainers.tuning.lora_files import LoraFileError
from trainers.tuning.merge import MergeError, merge
from trainers.wan.weight_files import WeightFileError

from .test_tuning_backbone import IMAGE, in_fp8, make, original, relative

OPTIONS = LoraOptions(rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def base():
    return make()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 3, 4, 6, generator=g), torch.randn(2, 7, 24, generator=g)
    return x, torch.tensor([0.3, 0.9]), text


def train(model, seed=5, size=0.1):
    """Puts random values into B, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lora.parameters(model).items():
            if "lora_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=g))


def adapted(base, options=OPTIONS, trained=True):
    model = copy.deepcopy(base)
    lora.add(model, options, seed=0)
    if trained:
        train(model)
    return model


def changed(base, model, scale):
    """A copy of the base with scale * B A added to its weights, by hand."""
    found, tensors = copy.deepcopy(base), lora.state(model)
    with torch.no_grad():
        for name in [n for n in tensors if n.endswith("lora_A.weight")]:
            module = name.removesuffix(".lora_A.weight")
            found.get_submodule(module).weight += scale * tensors[f"{module}.lora_B.weight"] @ tensors[name]
    return found


class TestAdapter:
    def test_a_new_one_changes_nothing_and_is_all_that_trains(self, base, inputs):
        model = adapted(base, trained=False)
        assert torch.equal(velocity(model, *inputs), velocity(base, *inputs))
        found = lora.parameters(model)
        assert len(found) == 2 * 2 * 2 * 4
        assert list(found) == sorted(found)
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert trainable == {id(p) for p in found.values()}
        assert "blocks.1.attn2.to_out.0.lora_B.weight" in found

    def test_the_seed_decides_and_the_global_generator_is_left_alone(self, base):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        first = lora.state(adapted(base, trained=False))
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(8)
        again = lora.state(adapted(base, trained=False))
        assert all(torch.equal(again[n], t) for n, t in first.items())
        other = copy.deepcopy(base)
        lora.add(other, OPTIONS, seed=1)
        assert not any(torch.equal(lora.state(other)[n], t) for n, t in first.items() if "lora_A" in n)
        a = first["blocks.0.attn1.to_q.lora_A.weight"]
        assert float(a.abs().max()) <= 128**-0.5
        assert float(a.std()) == pytest.approx((128 * 3) ** -0.5, rel=0.1)

    def test_it_adds_alpha_over_rank_b_a(self, base, inputs):
        model = adapted(base)
        wanted = changed(base, model, 6 / 4)
        torch.testing.assert_close(velocity(model, *inputs), velocity(wanted, *inputs), rtol=1e-4, atol=1e-5)
        assert relative(velocity(model, *inputs), velocity(base, *inputs)) > 0.01

    def test_switched_off_it_is_exactly_the_base(self, base, inputs):
        model = adapted(base)
        with lora.without_adapter(model):
            assert torch.equal(velocity(model, *inputs), velocity(base, *inputs))
            assert all(p.requires_grad for p in lora.parameters(model).values())
        assert not torch.equal(velocity(model, *inputs), velocity(base, *inputs))

    def test_switched_off_within_a_step_it_still_gets_its_gradient(self, base, inputs):
        model = adapted(base)
        v = velocity(model, *inputs)
        with lora.without_adapter(model), torch.no_grad():
            reference = velocity(model, *inputs)
        (v - reference).square().mean().backward()
        assert all(float(p.grad.norm()) > 0 for p in lora.parameters(model).values())

    def test_at_a_strength(self, base, inputs):
        model = adapted(base)
        for strength in (0, 0.5, 1):
            with lora.at_strength(model, strength):
                v = velocity(model, *inputs)
            wanted = changed(base, model, strength * 6 / 4)
            torch.testing.assert_close(v, velocity(wanted, *inputs), rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError), lora.at_strength(model, 0):
            raise RuntimeError
        wanted = changed(base, model, 6 / 4)
        torch.testing.assert_close(velocity(model, *inputs), velocity(wanted, *inputs), rtol=1e-4, atol=1e-5)

    def test_dropout_acts_in_training_only(self, base, inputs):
        model = adapted(base, LoraOptions(4, 4.0, dropout=0.5))
        assert not torch.equal(velocity(model, *inputs), velocity(model, *inputs))
        with lora.at_strength(model, 1):
            assert torch.equal(velocity(model, *inputs), velocity(model, *inputs))
        torch.manual_seed(3)
        first = velocity(model, *inputs)
        torch.manual_seed(3)
        assert torch.equal(velocity(model, *inputs), first)

    def test_the_norm_of_the_change(self, base):
        model = adapted(base, LoraOptions(4, 6.0, ("all",)))
        tensors, total = lora.state(model), 0.0
        for name in [n for n in tensors if n.endswith("lora_A.weight")]:
            b = tensors[name.replace("lora_A", "lora_B")]
            total += float((1.5 * b.double() @ tensors[name].double()).square().sum())
        assert lora.change_norm(model) == pytest.approx(total**0.5, rel=1e-5)
        assert lora.change_norm(adapted(base, trained=False)) == 0.0

    @pytest.mark.parametrize("quantised", [False, True])
    def test_adapters_are_fp32_in_bf16_and_fp8(self, base, inputs, tmp_path, quantised):
        state = {k: v.bfloat16() for k, v in original(base).items()}
        save_file(in_fp8(state) if quantised else state, tmp_path / "wan.safetensors")
        model = backbone.load(tmp_path / "wan.safetensors").model
        with torch.no_grad():
            before = velocity(model, *inputs)
        lora.add(model, LoraOptions(4, 4.0, ("all",)), seed=0)
        train(model)
        assert {p.dtype for p in lora.parameters(model).values()} == {torch.float32}
        assert len(lora.parameters(model)) == 2 * 2 * 10
        backbone.enable_checkpointing(model)
        velocity(model, *inputs).square().mean().backward()
        plain = backbone.load(tmp_path / "wan.safetensors", torch.float32).model
        lora.add(plain, LoraOptions(4, 4.0, ("all",)), seed=0)
        train(plain)
        velocity(plain, *inputs).square().mean().backward()
        for name, p in lora.parameters(model).items():
            assert relative(p.grad, lora.parameters(plain)[name].grad) < 0.1, name
        with lora.without_adapter(model), torch.no_grad():
            assert torch.equal(velocity(model, *inputs), before)
        assert backbone.is_quantised(model) == quantised

    def test_the_state_goes_into_another_model(self, base, inputs):
        model, other = adapted(base), adapted(base, trained=False)
        lora.load_state(other, lora.state(model))
        assert torch.equal(velocity(other, *inputs), velocity(model, *inputs))
        wider = adapted(base, LoraOptions(4, 6.0, ("q", "k", "v", "o", "ffn")))
        with pytest.raises(TuningError, match=r"lacks blocks.0.ffn.net.0.proj.lora_A.weight.*--targets"):
            lora.load_state(wider, lora.state(model))
        with pytest.raises(TuningError, match="another --rank"):
            lora.load_state(adapted(base, LoraOptions(8, 8.0)), lora.state(model))


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "modules"), [(("q",), 2), (("q", "v"), 4), (("ffn",), 2), (("all",), 10), (("all", "q"), 10)]
    )
    def test_short_names(self, base, targets, modules):
        assert len(lora.parameters(adapted(base, LoraOptions(2, 2.0, targets)))) == 2 * 2 * modules

    def test_the_image_keys(self, base):
        image = make(**IMAGE)
        assert len(lora.parameters(adapted(image, LoraOptions(2, 2.0, ("k_img", "v_img"))))) == 2 * 2 * 2
        assert len(lora.parameters(adapted(image, LoraOptions(2, 2.0, ("all",))))) == 2 * 2 * 12
        with pytest.raises(TuningError, match="--targets k_img: this model has no image keys"):
            adapted(base, LoraOptions(2, 2.0, ("q", "k_img")))

    def test_odd_options_are_named(self, base):
        with pytest.raises(TuningError, match="--targets attn: is unknown; known are q, k, v, o, ffn, k_img, v_img and all"):
            LoraOptions(4, 4.0, ("q", "attn"))
        with pytest.raises(TuningError, match="--targets : names nothing; known are q"):
            LoraOptions(4, 4.0, ())
        with pytest.raises(TuningError, match="--rank must be 1 or more, got 0"):
            LoraOptions(0)
        with pytest.raises(TuningError, match="--lora_alpha must be above 0"):
            LoraOptions(4, 0.0)
        with pytest.raises(TuningError, match="--lora_dropout"):
            LoraOptions(4, 4.0, dropout=1.0)
        with pytest.raises(TuningError, match="has a LoRA already"):
            lora.add(adapted(base), OPTIONS, 0)


@pytest.fixture
def tuned(base, tmp_path):
    """(the backbone's file, its model with a trained LoRA on all layers, the options)."""
    file = tmp_path / "wan.safetensors"
    save_file(original(base), file)
    dit = backbone.load(file)
    options = LoraOptions(4, 6.0, ("all",))
    lora.add(dit.model, options, seed=0)
    train(dit.model)
    return file, dit, options


class TestFiles:
    @pytest.mark.parametrize("format", lora_files.FORMATS)
    def test_each_layout_is_read_back(self, tuned, tmp_path, format):
        _, dit, options = tuned
        path = tmp_path / "lora.safetensors"
        lora_files.save(path, dit.model, options, dit, format=format, dtype=torch.float32)
        tensors, rank, alpha = lora_files.load(path)
        assert (rank, alpha) == (4, 6.0)
        assert all(torch.equal(tensors[n], p) for n, p in lora.parameters(dit.model).items())
        assert list(tensors) == list(lora.parameters(dit.model))

    @pytest.mark.parametrize(
        ("format", "key"),
        [
            ("comfy", "diffusion_model.blocks.1.cross_attn.o.lora_B.weight"),
            ("kohya", "lora_unet_blocks_1_cross_attn_o.lora_up.weight"),
            ("peft", "transformer.blocks.1.attn2.to_out.0.lora_B.weight"),
        ],
    )
    def test_names_dtype_and_alpha(self, tuned, tmp_path, format, key):
        _, dit, options = tuned
        lora_files.save(tmp_path / "lora.safetensors", dit.model, options, dit, format=format)
        stored = load_file(tmp_path / "lora.safetensors")
        assert stored[key].dtype == torch.bfloat16
        assert torch.equal(stored[key], lora.parameters(dit.model)["blocks.1.attn2.to_out.0.lora_B.weight"].bfloat16())
        assert len(stored) == 20 * (2 if format == "peft" else 3)
        alphas = [t for k, t in stored.items() if k.endswith(".alpha")]
        assert all(t.ndim == 0 and float(t) == 6.0 for t in alphas)

    def test_the_header_says_what_it_is(self, tuned, tmp_path):
        _, dit, options = tuned
        record = {"steps": 12, "learning_rate": 1e-4, "seed": 3, "title": "Rigid", "method": "dpo", "beta": {"auto": True}}
        lora_files.save(tmp_path / "lora.safetensors", dit.model, options, dit, metadata=record)
        with safe_open(tmp_path / "lora.safetensors", "pt") as f:
            header = f.metadata()
        assert header["format"] == "pt"
        assert header["modelspec.sai_model_spec"] == "1.0.0"
        assert header["modelspec.architecture"] == "wan2.1/lora"
        assert header["modelspec.title"] == "Rigid"
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "6")
        assert (header["ss_steps"], header["ss_learning_rate"], header["ss_seed"]) == ("12", "0.0001", "3")
        found = json.loads(header["intrinsic_reward.training"])
        assert found["beta"] == {"auto": True}
        assert (found["backbone"], found["targets"], found["rank"]) == ("wan", ["all"], 4)
        assert str(tmp_path) not in json.dumps(header)

    @pytest.mark.parametrize("format", ["peft", "comfy"])
    def test_diffusers_loads_it(self, tuned, inputs, tmp_path, format):
        from diffusers import WanPipeline

        file, dit, options = tuned
        path = tmp_path / "lora.safetensors"
        lora_files.save(path, dit.model, options, dit, format=format, dtype=torch.float32)
        tensors, header = WanPipeline.lora_state_dict(str(path), return_lora_metadata=True)
        plain = backbone.load(file).model
        WanPipeline.load_lora_into_transformer(tensors, plain, metadata=header)
        torch.testing.assert_close(velocity(plain, *inputs), velocity(dit.model, *inputs), rtol=1e-4, atol=1e-5)
        if format == "peft":
            assert plain.peft_config["default_0" if "default_0" in plain.peft_config else "default"].lora_alpha == 6.0

    def test_diffusers_loads_the_folder_of_the_file(self, tuned, inputs, tmp_path):
        file, dit, options = tuned
        path = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
        lora_files.save(path, dit.model, options, dit, format="peft", dtype=torch.float32)
        plain = backbone.load(file).model
        plain.load_lora_adapter(str(path.parent), prefix="transformer", use_safetensors=True)
        torch.testing.assert_close(velocity(plain, *inputs), velocity(dit.model, *inputs), rtol=1e-4, atol=1e-5)

    def test_files_of_other_tools(self, tmp_path):
        a, b = torch.randn(2, 128), torch.randn(128, 2)
        named = {
            "base_model.model.blocks.0.self_attn.q.lora_A.default.weight": a,
            "base_model.model.blocks.0.self_attn.q.lora_B.default.weight": b,
        }
        save_file(named, tmp_path / "other.safetensors")
        tensors, rank, alpha = lora_files.load(tmp_path / "other.safetensors")
        assert set(tensors) == {"blocks.0.attn1.to_q.lora_A.weight", "blocks.0.attn1.to_q.lora_B.weight"}
        assert (rank, alpha) == (2, 2.0)
        save_file(
            {"lora_unet__blocks_3_ffn_0.lora_down.weight": a, "lora_unet__blocks_3_ffn_0.lora_up.weight": b},
            tmp_path / "fun.safetensors",
        )
        assert "blocks.3.ffn.net.0.proj.lora_A.weight" in lora_files.load(tmp_path / "fun.safetensors").tensors

    def test_scales_that_differ_go_into_b(self, tmp_path):
        a, b = torch.randn(2, 128), torch.randn(128, 2)
        state = {}
        for i, alpha in enumerate((2.0, 8.0)):
            key = f"diffusion_model.blocks.{i}.ffn.0"
            state |= {f"{key}.lora_A.weight": a.clone(), f"{key}.lora_B.weight": b.clone()}
            state[f"{key}.alpha"] = torch.tensor(alpha)
        save_file(state, tmp_path / "lora.safetensors")
        tensors, rank, alpha = lora_files.load(tmp_path / "lora.safetensors")
        for i, own in enumerate((2.0, 8.0)):
            torch.testing.assert_close(alpha / rank * tensors[f"blocks.{i}.ffn.net.0.proj.lora_B.weight"], own / 2 * b)

    def test_bad_files_are_named(self, tuned, tmp_path):
        _, dit, options = tuned
        path = tmp_path / "lora.safetensors"
        with pytest.raises(LoraFileError, match="--format onnx: is unknown; expected comfy, peft, kohya"):
            lora_files.save(path, dit.model, options, dit, format="onnx")
        with pytest.raises(FileNotFoundError, match="lora.safetensors: no such file"):
            lora_files.load(path)
        path.write_bytes(b"PK\x03\x04")
        with pytest.raises(LoraFileError, match="a zip archive"):
            lora_files.load(path)
        a, b = torch.randn(2, 8), torch.randn(8, 2)
        name = "diffusion_model.blocks.0.self_attn.q"
        cases = [
            ({}, "holds no tensor"),
            ({f"{name}.diff": a}, "self_attn.q.diff is not part of a LoRA"),
            ({f"{name}.lora_A.weight": a}, r"blocks.0.attn1.to_q has A only"),
            ({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": a}, "do not fit together"),
            (
                {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, "lora_unet_blocks_0_ffn_0.lora_down.weight": a[:1],
                 "lora_unet_blocks_0_ffn_0.lora_up.weight": b[:, :1]}, "rank 1 to 2",
            ),
            ({"lora_te_text_model.lora_down.weight": a}, "not part of a LoRA of Wan"),
        ]  # fmt: skip
        for state, message in cases:
            save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
            with pytest.raises(LoraFileError, match=message):
                lora_files.load(path)

    def test_a_full_disk_leaves_the_file_that_was_there(self, tuned, tmp_path, monkeypatch):
        _, dit, options = tuned
        path = tmp_path / "lora.safetensors"
        lora_files.save(path, dit.model, options, dit)
        before = path.read_bytes()

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(lora_files, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            lora_files.save(path, dit.model, options, dit, dtype=torch.float32)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


class TestMerge:
    def save(self, tuned, tmp_path, format="comfy"):
        _, dit, options = tuned
        lora_files.save(tmp_path / "lora.safetensors", dit.model, options, dit, format=format, dtype=torch.float32)
        return tmp_path / "lora.safetensors"

    @pytest.mark.parametrize("format", lora_files.FORMATS)
    def test_base_and_lora_in_one_file(self, tuned, inputs, tmp_path, format):
        file, dit, _ = tuned
        output = tmp_path / "merged.safetensors"
        assert merge(file, self.save(tuned, tmp_path, format), output) == 20
        model = backbone.load(output).model
        torch.testing.assert_close(velocity(model, *inputs), velocity(dit.model, *inputs), rtol=1e-4, atol=1e-5)
        stored, before = load_file(output), load_file(file)
        assert stored.keys() == before.keys()
        assert sum(torch.equal(stored[k], before[k]) for k in stored) == len(stored) - 20
        with safe_open(output, "pt") as f:
            note = json.loads(f.metadata()["intrinsic_reward.merged"])
        assert (note["lora"], note["strength"], note["training"]["rank"]) == ("lora.safetensors", 1.0, 4)

    def test_strength_and_the_other_models_of_the_file(self, base, tuned, inputs, tmp_path):
        file, dit, _ = tuned
        whole = tmp_path / "checkpoint.safetensors"
        state = {f"model.diffusion_model.{k}": v for k, v in original(base).items()} | {"vae.conv.weight": torch.ones(3)}
        save_file(state, whole, metadata={"modelspec.author": "somebody"})
        output = tmp_path / "merged.safetensors"
        merge(whole, self.save(tuned, tmp_path), output, strength=0.5)
        stored = load_file(output)
        assert stored.keys() == state.keys()
        assert torch.equal(stored["vae.conv.weight"], torch.ones(3))
        with lora.at_strength(dit.model, 0.5):
            wanted = velocity(dit.model, *inputs)
        torch.testing.assert_close(velocity(backbone.load(output).model, *inputs), wanted, rtol=1e-4, atol=1e-5)
        with safe_open(output, "pt") as f:
            assert f.metadata()["modelspec.author"] == "somebody"

    def test_a_folder_becomes_one_file_in_the_original_layout(self, base, tuned, inputs, tmp_path):
        file, dit, _ = tuned
        base.save_pretrained(tmp_path / "folder" / "transformer", max_shard_size="300KB")
        assert len(list((tmp_path / "folder" / "transformer").glob("*.safetensors"))) > 1
        output = tmp_path / "merged.safetensors"
        merge(tmp_path / "folder", self.save(tuned, tmp_path), output)
        assert load_file(output).keys() == load_file(file).keys()
        torch.testing.assert_close(
            velocity(backbone.load(output).model, *inputs), velocity(dit.model, *inputs), rtol=1e-4, atol=1e-5
        )

    def test_dtypes_are_kept_and_fp8_is_expanded_on_demand(self, base, tuned, inputs, tmp_path):
        _, dit, _ = tuned
        path, output = self.save(tuned, tmp_path), tmp_path / "merged.safetensors"
        half = {k: v if k.endswith("modulation") else v.half() for k, v in original(base).items()}
        save_file(half, tmp_path / "half.safetensors")
        merge(tmp_path / "half.safetensors", path, output)
        assert {k: v.dtype for k, v in load_file(output).items()} == {k: v.dtype for k, v in half.items()}
        save_file(in_fp8(original(base)), tmp_path / "fp8.safetensors")
        with pytest.raises(MergeError, match="fp8.safetensors: is stored in fp8.*--dtype bf16"):
            merge(tmp_path / "fp8.safetensors", path, output)
        merge(tmp_path / "fp8.safetensors", path, output, dtype=torch.bfloat16)
        stored = load_file(output)
        assert {v.dtype for v in stored.values()} == {torch.bfloat16}
        assert stored.keys() == half.keys()
        assert relative(velocity(backbone.load(output).model, *inputs), velocity(dit.model, *inputs)) < 0.06

    def test_it_is_a_command_that_asks_before_it_overwrites(self, tuned, tmp_path, capsys):
        import argparse

        file, output = tuned[0], tmp_path / "merged.safetensors"
        parser = argparse.ArgumentParser()
        merging.add_arguments(parser)
        line = ["--backbone", str(file), "--lora", str(self.save(tuned, tmp_path)), "--output", str(output)]
        assert merging.run(parser.parse_args(line)) == 0
        assert "20 weights changed" in capsys.readouterr().out
        with pytest.raises(FileExistsError, match="--overwrite"):
            merging.run(parser.parse_args(line))
        assert merging.run(parser.parse_args([*line, "--overwrite", "--dtype", "fp16"])) == 0
        assert {v.dtype for v in load_file(output).values()} == {torch.float16}

    def test_what_does_not_fit_is_named(self, tuned, tmp_path):
        file, output = tuned[0], tmp_path / "merged.safetensors"
        cases = (("blocks.7.ffn.0", 64, "changes blocks.7.ffn.net.0.proj"), ("blocks.0.ffn.0", 99, "99 x 128"))
        for name, rows, message in cases:
            state = {f"diffusion_model.{name}.lora_A.weight": torch.ones(2, 128),
                     f"diffusion_model.{name}.lora_B.weight": torch.ones(rows, 2)}  # fmt: skip
            save_file(state, tmp_path / "foreign.safetensors")
            with pytest.raises(MergeError, match=f"{message}.*a LoRA of another model"):
                merge(file, tmp_path / "foreign.safetensors", output)
        path = self.save(tuned, tmp_path)
        with pytest.raises(WeightFileError, match="has no patch_embedding.weight"):
            merge(path, path, output)
        with pytest.raises(FileNotFoundError, match="gone"):
            merge(tmp_path / "gone", path, output)
        (tmp_path / "empty").mkdir()
        with pytest.raises(WeightFileError, match=r"no \.safetensors file"):
            merge(tmp_path / "empty", path, output)
        assert not output.exists()


class TestStream:
    def test_safetensors_reads_it(self, tmp_path):
        tensors = {
            "b": torch.randn(3, 5).bfloat16(), "a": torch.randn(2, 2), "scalar": torch.tensor(4.0), "none": torch.zeros(0, 3),
            "f8": torch.randn(7).to(torch.float8_e4m3fn), "i": torch.arange(5), "t": torch.randn(4, 3).T,
        }  # fmt: skip
        entries = {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}
        write_streamed(tmp_path / "x.safetensors", entries, tensors.__getitem__, {"note": "x"})
        found = load_file(tmp_path / "x.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].float(), tensor.float())
        with safe_open(tmp_path / "x.safetensors", "pt") as f:
            assert f.metadata() == {"note": "x"}

    def test_one_tensor_is_held_at_a_time(self, tmp_path):
        import weakref

        alive, most = weakref.WeakSet(), 0

        class Held(torch.Tensor):
            pass

        def read(name):
            nonlocal most
            t = torch.zeros(1000).as_subclass(Held)
            alive.add(t)
            most = max(most, len(alive))
            return t

        entries = {f"t{i}": (torch.float32, (1000,)) for i in range(6)}
        write_streamed(tmp_path / "x.safetensors", entries, read)
        assert most <= 2

    def test_another_shape_than_announced_is_refused_and_nothing_written(self, tmp_path):
        with pytest.raises(ValueError, match=r"a: is torch.float32 \[3\], announced as torch.float32 \[2\]"):
            write_streamed(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}, lambda n: torch.zeros(3))
        assert list(tmp_path.iterdir()) == []
