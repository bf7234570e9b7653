"""LoRA files and merged checkpoints of the trainers through ComfyUI's stock loaders. Needs diffusers and peft."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from .comfyui_in_process import LogLines
from .race_material import difference
from .tiny_wan import CLIP_VISION_DIM, TEXT_DIM, wan_dit

pytest.importorskip("diffusers")
pytest.importorskip("peft")

SHIFT, STEPS, CFG = 8.0, 4, 5.0
# Rounding of fp32 in another order.
ROUNDING = 1e-4


class Tuned:
    """A tiny Wan file, and the trainers' model of it with an adapter that changes its output by several per cent."""

    def __init__(self, models_dir, name, i2v=False):
        from trainers.tuning import backbone, lora

        self.file = models_dir / "diffusion_models" / f"{name}.safetensors"
        save_file(wan_dit(layers=2, i2v=i2v, seed=3), self.file)
        self.dit = backbone.load(self.file)
        self.options = lora.LoraOptions(rank=4, alpha=6.0, targets=("all",))
        lora.add(self.dit.model, self.options, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, p in lora.parameters(self.dit.model).items():
                if "lora_B" in key:
                    p.copy_(0.15 * torch.randn(p.shape, generator=generator))

    def save(self, path, format, dtype=torch.float32):
        from trainers.tuning import lora_files

        path.parent.mkdir(exist_ok=True)
        lora_files.save(path, self.dit.model, self.options, self.dit, format=format, dtype=dtype, metadata={"steps": 1})

    @torch.no_grad()
    def velocity(self, x, sigma, text, image=None):
        from trainers.tuning.backbone import velocity

        return velocity(self.dit.model, x, sigma, text, image=image)


@pytest.fixture(scope="module")
def tuned(models_dir):
    return Tuned(models_dir, "tuned_t2v")


@pytest.fixture(scope="module")
def tuned_i2v(models_dir):
    return Tuned(models_dir, "tuned_i2v", i2v=True)


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(2)
    text = torch.zeros(2, 512, TEXT_DIM)
    text[:, :6] = 0.1 * torch.randn(2, 6, TEXT_DIM, generator=g)
    return torch.randn(2, 16, 3, 8, 8, generator=g), torch.tensor([0.35, 0.9]), text


def load_model(comfy, file):
    (model,) = comfy.run("UNETLoader", unet_name=file.name, weight_dtype="default")
    return model


def load_lora(comfy, model, name, strength=1.0):
    """(the patched model, what ComfyUI warned of) of the stock loader."""
    log = LogLines()
    logging.getLogger().addHandler(log)
    try:
        (patched,) = comfy.run("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)
    finally:
        logging.getLogger().removeHandler(log)
    return patched, log.lines


def velocity(comfy, model, x, sigma, text, **known):
    """The velocity of a ComfyUI MODEL with its patches: it predicts x0 = x - sigma * velocity."""
    import comfy.model_management as memory

    memory.load_models_gpu([model], force_full_load=True)
    with torch.inference_mode():
        x0 = model.model.apply_model(x, sigma, c_crossattn=text, transformer_options={}, **known)
    return (x - x0.float()) / sigma.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("format", ["comfy", "kohya"])
def test_the_stock_loader_takes_every_key_and_the_model_is_the_trainers(comfy, models_dir, tuned, inputs, format):
    name = f"tuned_{format}.safetensors"
    tuned.save(models_dir / "loras" / name, format)
    model = load_model(comfy, tuned.file)
    before = velocity(comfy, model, *inputs)
    patched, warnings = load_lora(comfy, model, name)
    assert warnings == []
    # Two blocks of two attentions with four projections, and two layers of the feed-forward network.
    assert len(patched.patches) == 2 * (2 * 4 + 2)
    ours = tuned.velocity(*inputs)
    assert difference(velocity(comfy, patched, *inputs), ours) < ROUNDING
    assert difference(before, ours) > 0.02


def test_half_the_strength_is_half_the_strength(comfy, models_dir, tuned, inputs):
    from trainers.tuning import lora

    tuned.save(models_dir / "loras" / "tuned_half.safetensors", "comfy")
    patched, _ = load_lora(comfy, load_model(comfy, tuned.file), "tuned_half.safetensors", 0.5)
    with lora.at_strength(tuned.dit.model, 0.5):
        ours = tuned.velocity(*inputs)
    assert difference(velocity(comfy, patched, *inputs), ours) < ROUNDING


def test_a_bf16_file_gives_the_trainers_model_up_to_its_rounding(comfy, models_dir, tuned, inputs):
    tuned.save(models_dir / "loras" / "tuned_bf16.safetensors", "comfy", torch.bfloat16)
    patched, warnings = load_lora(comfy, load_model(comfy, tuned.file), "tuned_bf16.safetensors")
    assert warnings == []
    assert difference(velocity(comfy, patched, *inputs), tuned.velocity(*inputs)) < 1e-2


def test_the_image_keys_of_an_image_to_video_model_load(comfy, models_dir, tuned_i2v, inputs):
    from trainers.tuning.backbone import ImageCondition

    x, sigma, text = inputs
    g = torch.Generator().manual_seed(4)
    image = ImageCondition(torch.randn(2, 20, *x.shape[2:], generator=g), torch.randn(2, 257, CLIP_VISION_DIM, generator=g))
    tuned_i2v.save(models_dir / "loras" / "tuned_i2v.safetensors", "comfy")
    patched, warnings = load_lora(comfy, load_model(comfy, tuned_i2v.file), "tuned_i2v.safetensors")
    assert warnings == []
    assert len(patched.patches) == 2 * (2 * 4 + 2 + 2)
    theirs = velocity(comfy, patched, x, sigma, text, c_concat=image.channels, clip_fea=image.embedding)
    ours = tuned_i2v.velocity(x, sigma, text, image)
    assert difference(theirs, ours) < ROUNDING
    assert difference(theirs, tuned_i2v.velocity(x, sigma, text, ImageCondition(image.channels, 0 * image.embedding))) > 1e-3


def test_a_key_that_no_module_has_would_be_seen(comfy, models_dir, tuned):
    """The counting itself: diffusers' layout is the one that ComfyUI drops with a warning."""
    tuned.save(models_dir / "loras" / "tuned_peft.safetensors", "peft")
    patched, warnings = load_lora(comfy, load_model(comfy, tuned.file), "tuned_peft.safetensors")
    assert len(warnings) == 40
    assert not patched.patches


def test_a_sampled_clip_is_the_trainers_own(comfy, models_dir, tuned):
    from trainers.kernels.latent_space import WAN21
    from trainers.wan import sampling

    tuned.save(models_dir / "loras" / "tuned_clip.safetensors", "comfy")
    patched, _ = load_lora(comfy, load_model(comfy, tuned.file), "tuned_clip.safetensors")
    (shifted,) = comfy.run("ModelSamplingSD3", model=patched, shift=SHIFT)
    words = [0.1 * torch.randn(n, TEXT_DIM, generator=torch.Generator().manual_seed(n)) for n in (7, 3)]
    positive, negative = (
        [[torch.nn.functional.pad(w, (0, 0, 0, 512 - len(w)))[None], {"pooled_output": None}]] for w in words
    )
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)
    (out,) = comfy.run(
        "KSampler", model=shifted, seed=5, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative, latent_image=latent, denoise=1.0,
    )  # fmt: skip
    denoiser = sampling.Denoiser(tuned.dit.model, words[:1], words[1], CFG)
    start = sampling.noise((16, 3, 8, 8), [5])
    ours = sampling.euler(denoiser, start, sampling.sigmas(STEPS, SHIFT).tolist())
    assert difference(WAN21.normalise(out["samples"]), ours) < 1e-3


def test_a_merged_checkpoint_is_base_and_lora(comfy, models_dir, tuned, inputs):
    from trainers.tuning.merge import merge

    tuned.save(models_dir / "loras" / "tuned_merge.safetensors", "comfy")
    merged = models_dir / "diffusion_models" / "tuned_merged.safetensors"
    assert merge(tuned.file, models_dir / "loras" / "tuned_merge.safetensors", merged) == 20
    assert difference(velocity(comfy, load_model(comfy, merged), *inputs), tuned.velocity(*inputs)) < ROUNDING


@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
def test_a_scaled_fp8_file_is_the_same_model_to_both(comfy, models_dir, inputs, suffix):
    """So that a LoRA trained on one in fp8 corrects the model that ComfyUI runs."""
    import json

    from trainers.tuning import backbone

    state = wan_dit(layers=2, seed=3)
    plain = {k: v.half() for k, v in state.items()}
    for name in [n for n, t in state.items() if n.startswith("blocks.") and t.ndim == 2]:
        # Half of the range, so that a scale that is left out shows.
        scale = state[name].abs().max() / 224
        plain[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        plain[name.removesuffix(".weight") + suffix] = scale
        if suffix == ".weight_scale":
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            plain[name.removesuffix(".weight") + ".comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if suffix == ".scale_weight":
        plain["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = models_dir / "diffusion_models" / f"tuned_fp8{suffix}.safetensors"
    save_file(plain, file)
    dit = backbone.load(file)
    assert backbone.is_quantised(dit.model)
    theirs = velocity(comfy, load_model(comfy, file), *inputs)
    with torch.no_grad():
        assert difference(backbone.velocity(dit.model, *inputs), theirs) < 1e-2


def test_the_header_is_what_a_loader_keeps(comfy, models_dir, tuned):
    import json

    from comfy.utils import load_torch_file

    path = models_dir / "loras" / "tuned_header.safetensors"
    tuned.save(path, "comfy")
    _, header = load_torch_file(str(path), safe_load=True, return_metadata=True)
    assert header["modelspec.architecture"] == "wan2.1/lora"
    assert header["ss_network_dim"] == "4"
    assert json.loads(header["intrinsic_reward.training"])["steps"] == 1
