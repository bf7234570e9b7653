"""The memory plan against the bytes that living tensors take in a real step."""

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from benchmarks.live_bytes import LiveBytes
from trainers.tuning import backbone, dit_shapes, lora, memory_plan
from trainers.tuning.backbone import TuningError, velocity
from trainers.tuning.lora import LoraOptions
from trainers.wan.weight_files import WeightFileError

from .test_tuning_backbone import IMAGE, in_fp8, make, original

LATENT = (16, 4, 16, 16)
OPTIONS = LoraOptions(4, 4.0)


def build(dtype=torch.float32, **changes):
    model = make(num_attention_heads=2, ffn_dim=1024, **changes)
    for name, p in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            p.data = p.data.to(dtype)
    return model


def step(model, options, checkpointing, tokens=40):
    """The most bytes of tensors that live in a step besides weights and gradients."""
    if options is None:
        parameters = backbone.full_parameters(model)
    else:
        lora.add(model, options, 0)
        parameters = lora.parameters(model)
    # As in the second of two backward passes of a step.
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    if checkpointing:
        backbone.enable_checkpointing(model)
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, *LATENT, generator=g), torch.randn(1, tokens, 24, generator=g)
    with LiveBytes() as live:
        velocity(model, x, torch.tensor([0.5]), text).square().mean().backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("options", "checkpointing"),
    [(OPTIONS, True), (OPTIONS, False), (LoraOptions(4, 4.0, ("all",)), True), (None, True), (None, False)],
    ids=["lora", "lora, all blocks kept", "lora of ffn", "all parameters", "all parameters, all blocks kept"],
)
def test_a_measured_step_is_as_planned(dtype, options, checkpointing):
    model = build(dtype, num_layers=3)
    shapes = dit_shapes.shapes_of(model)
    found = memory_plan.step_plan(shapes, LATENT, options, checkpointing=checkpointing, text_tokens=40)
    rows = dict(found.rows)
    others = sum(rows.get(k, 0) for k in ("frozen base", "all parameters", "LoRA", "gradients", "optimiser", "allocator"))
    measured = step(model, options, checkpointing)
    assert measured / (found.total - others) == pytest.approx(1, abs=0.25)


def test_the_base_and_the_adapter_are_counted_exactly():
    model = build(torch.bfloat16)
    shapes = dit_shapes.shapes_of(model)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = dict(memory_plan.step_plan(shapes, LATENT, LoraOptions(4, 4.0, ("all",))).rows)
    lora.add(model, LoraOptions(4, 4.0, ("all",)), 0)
    numbers = sum(p.numel() for p in lora.parameters(model).values())
    assert rows["frozen base"] == held == shapes.stored_bytes
    assert (rows["LoRA"], rows["gradients"], rows["optimiser"]) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert dit_shapes.shapes_of(model) == shapes
    image = make(**IMAGE)
    options = LoraOptions(4, 4.0, ("all",))
    wanted = memory_plan.adapter_numbers(dit_shapes.shapes_of(image), options)
    lora.add(image, options, 0)
    assert sum(p.numel() for p in lora.parameters(image).values()) == wanted


class TestFromHeaders:
    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
    def test_a_file_is_planned_as_it_would_be_loaded(self, tmp_path, dtype):
        state = original(make(**IMAGE))
        half = {k: v if k.endswith("modulation") else v.half() for k, v in state.items()}
        for name, tensors in (("whole", state), ("half", half), ("fp8", in_fp8(half))):
            path = tmp_path / f"{name}.safetensors"
            save_file({f"model.diffusion_model.{k}": v for k, v in tensors.items()}, path)
            found = dit_shapes.read_shapes(path, dtype)
            loaded = backbone.load(path, dtype).model
            assert found == dit_shapes.shapes_of(loaded), name
            assert found.quantised == (name == "fp8" and dtype is None)
            assert found.image_keys

    def test_a_folder_with_two_experts(self, tmp_path):
        make().save_pretrained(tmp_path / "a14b" / "transformer", max_shard_size="300KB")
        make(ffn_dim=32).save_pretrained(tmp_path / "a14b" / "transformer_2")
        found = dit_shapes.read_shapes(tmp_path / "a14b", expert="high_noise")
        assert found == dit_shapes.shapes_of(backbone.load(tmp_path / "a14b", expert="high_noise").model)
        assert dit_shapes.read_shapes(tmp_path / "a14b", expert="low_noise").ffn == 32
        with pytest.raises(WeightFileError, match="two experts"):
            memory_plan.plan(tmp_path / "a14b", LATENT, options=OPTIONS)

    def test_bad_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone"):
            dit_shapes.read_shapes(tmp_path / "gone")
        with pytest.raises(WeightFileError, match=r"config\.json"):
            dit_shapes.read_shapes(tmp_path)
        path = tmp_path / "x.safetensors"
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(WeightFileError, match="has no patch_embedding.weight"):
            dit_shapes.read_shapes(path)
        path.write_bytes(b"PK\x03\x04")
        with pytest.raises(WeightFileError, match="a zip archive"):
            dit_shapes.read_shapes(path)


class TestPlan:
    @pytest.fixture
    def file(self, tmp_path):
        save_file(in_fp8({k: v.half() for k, v in original(build()).items()}), tmp_path / "fp8.safetensors")
        return tmp_path / "fp8.safetensors"

    def test_what_makes_it_larger(self, file):
        def total(latent=LATENT, **changes):
            return memory_plan.plan(file, latent, **{"options": OPTIONS, **changes}).total

        assert total() < total(batch=2) < total(batch=4)
        assert total((16, 2, 16, 16)) < total()
        assert total(base_dtype="bf16") < total(base_dtype="fp32")
        assert total() < total(checkpointing=False)
        assert total(optimizer="bitsandbytes.optim.AdamW8bit") < total(optimizer="torch.optim.SGD") < total()
        assert total() < total(options=LoraOptions(64, 64.0))
        assert total(base_dtype="fp16") < total(options=None, base_dtype="fp16")
        rows = [dict(memory_plan.plan(file, LATENT, options=OPTIONS, base_dtype=d).rows) for d in ("stored", "fp16")]
        assert rows[0]["frozen base"] < 0.7 * rows[1]["frozen base"]

    def test_two_graphs_keep_twice_the_inputs(self, file):
        shapes = dit_shapes.read_shapes(file)
        one, two = (dict(memory_plan.step_plan(shapes, LATENT, OPTIONS, graphs=g).rows) for g in (1, 2))
        assert two["inputs of all blocks"] == 2 * one["inputs of all blocks"]
        assert two["one block, forward and backward"] == one["one block, forward and backward"]

    def test_the_table(self, file):
        text = memory_plan.format_plan(memory_plan.plan(file, LATENT, options=OPTIONS))
        lines = text.splitlines()
        assert lines[0] == "memory of one training step"
        assert lines[1].split() == ["frozen", "base", "0.00", "GiB"]
        assert lines[-1].split()[0] == "together"
        assert any("one fp8 layer expanded" in line for line in lines)

    def test_too_little_memory_is_said_in_a_sentence(self, file):
        found, cpu = memory_plan.plan(file, LATENT, options=OPTIONS), torch.device("cpu")
        memory_plan.require_fits(found, None, cpu)
        memory_plan.require_fits(found, found.total / 1e9 * 1.01, cpu)
        with pytest.raises(TuningError, match=r"needs about 0\.\d GiB and 0\.0 GiB are free \(most: .*crop the clips in time"):
            memory_plan.require_fits(found, found.total / 1e9 * 0.99, cpu)

    def test_all_parameters_of_a_quantised_base_are_refused(self, file):
        with pytest.raises(TuningError, match="stored in fp8"):
            memory_plan.plan(file, LATENT, options=None)

    def test_wan_at_full_size(self):
        """1.3B and 14B on 13 latent frames of 832 x 480: known sizes of the bases, and what fits a card."""
        small = dit_shapes.DitShapes(1536, 8960, 30, 16, (1, 2, 2), False, 1_418_996_800, 2 * 1_418_996_800, 2)
        latent = (16, 13, 60, 104)
        rows = dict(memory_plan.step_plan(small, latent, LoraOptions()).rows)
        assert rows["frozen base"] / memory_plan.GIB == pytest.approx(2.64, abs=0.01)
        assert rows["inputs of all blocks"] == 30 * 2 * 13 * 30 * 52 * 1536
        assert 6 < memory_plan.step_plan(small, latent, LoraOptions()).total / memory_plan.GIB < 12


class TestLiveBytes:
    def test_it_counts_what_lives_once(self):
        before = torch.zeros(1000)
        with LiveBytes() as live:
            a = before + 1
            b = a.view(10, 100)[3]
            assert live.now == 4000
            c = torch.ones(500, dtype=torch.float64)
            del a
            assert live.now == 8000
            del b
            assert live.now == 4000
            before.add_(c.sum())
        assert live.peak == 8000
        assert live.now <= 4008

    def test_saved_tensors_count_until_the_backward_pass(self):
        x = torch.ones(1000, requires_grad=True)
        with LiveBytes() as live:
            y = (x * 2).exp().sum()
            held = live.now
            y.backward()
            after = live.now
        assert held >= 4000
        assert after < held + 4000 + 100
        assert live.peak >= 8000
