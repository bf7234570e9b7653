"""The Shell-LCC nodes inside ComfyUI: guidance while sampling, scores, refinement, fitting and files."""

import asyncio
import gc
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ..test_shell_lcc_import import reference_mean_distance, synthetic_reference
from .shell_lcc_material import FIT, GUIDANCE, REFINE, sheet, write_video
from .tiny_wan import HEAD_DIM, I2V_NAME, T2V_NAME, UMT5_NAME, VAE_NAME

pytestmark = pytest.mark.thorough

KEY = "intrinsic_reward_shell_lcc"


def node(name):
    return f"IntrinsicReward_{name}"


class Wan:
    """The tiny Wan2.1 model with its prompts, and the stock samplers on 17 frames of 64x64."""

    def __init__(self, comfy):
        self.comfy = comfy
        (self.model,) = comfy.run("UNETLoader", unet_name=T2V_NAME, weight_dtype="default")
        (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
        self.conditioning = {
            name: comfy.run("CLIPTextEncode", clip=clip, text=text)[0]
            for name, text in (("positive", "a cat walks on grass"), ("negative", "blurry"))
        }

    def guided(self, manifold, model=None, **changes):
        """The model, or another one, with Shell-LCC guidance."""
        inputs = {**GUIDANCE, **changes}
        return self.comfy.run(node("ShellLCCGuidance"), model=model or self.model, manifold=manifold, **inputs)[0]

    def empty(self, batch=1):
        return self.comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=17, batch_size=batch)[0]

    def sample(self, model, seed=1, cfg=6.0, latent=None, sampler="euler"):
        """Samples [B, 16, 5, 8, 8] of KSampler in four steps, raw."""
        (out,) = self.comfy.run(
            "KSampler", model=model, latent_image=latent or self.empty(), seed=seed, steps=4, cfg=cfg, sampler_name=sampler,
            scheduler="simple", denoise=1.0, **self.conditioning,
        )
        return out["samples"]


def fit(comfy, latents, **changes):
    return comfy.run(node("FitShellLCC"), latents=latents, **{**FIT, **changes})


def outside(shell, samples):
    """Share of raw samples' tokens outside the manifold's band."""
    manifold = shell.manifold
    return float(manifold.outside_band(manifold.distance(manifold.space.normalise(samples))).float().mean())


@pytest.fixture(scope="module")
def wan(comfy):
    return Wan(comfy)


@pytest.fixture(scope="module")
def own(comfy, wan):
    """A manifold of the tiny model's own latents: other seeds of it lie within the band but for about a tenth."""
    return fit(comfy, {"samples": wan.sample(wan.model, seed=10, latent=wan.empty(8))})[0]


@pytest.fixture(scope="module")
def plain(wan):
    return wan.sample(wan.model)


@pytest.fixture(scope="module")
def wan21(comfy):
    return comfy.module("kernels.latent_space").WAN21


@pytest.fixture(scope="module")
def sheet_manifold(comfy, wan21):
    """A manifold of synthetic latents that have real structure."""
    return fit(comfy, {"samples": wan21.denormalise(sheet(8))}, anchors=256)[0]


@pytest.fixture(scope="module")
def wan22_manifold(comfy):
    wan22 = comfy.module("kernels.latent_space").WAN22
    return fit(comfy, {"samples": wan22.denormalise(sheet(4, channels=48))})[0]


@pytest.fixture
def uncalibrated(comfy, sheet_manifold):
    manifold = sheet_manifold.manifold
    return comfy.module("nodes.shell_lcc_type").for_wire(type(manifold)(manifold.coder, manifold.space))


class Recorder:
    """A post-CFG function that keeps the predictions it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, args):
        self.seen.append(args["denoised"].clone())
        return args["denoised"]

    def on(self, model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(self)
        return model


class TestGuidance:
    def test_strength_zero_is_the_model_itself(self, wan, own):
        assert wan.guided(own, strength=0.0) is wan.model

    def test_input_model_is_left_alone(self, wan, own, plain):
        before = dict(wan.model.model_options)
        wan.guided(own)
        assert wan.model.model_options == before
        assert KEY not in wan.model.additional_models
        assert torch.equal(wan.sample(wan.model), plain)

    @pytest.mark.parametrize("method", ["project", "band", "gradient"])
    def test_fewer_tokens_end_outside_the_band(self, wan, own, plain, method):
        before = outside(own, plain)
        assert before > 0.05
        assert outside(own, wan.sample(wan.guided(own, method=method))) < before / 3

    def test_minimising_collapses_through_the_shell(self, wan, own, plain):
        guided = wan.sample(wan.guided(own, method="minimise"))
        assert outside(own, guided) > 2 * outside(own, plain)

    def test_prediction_becomes_its_pull(self, wan, own):
        before, after = Recorder(), Recorder()
        model = wan.guided(own, before.on(wan.model), strength=0.7, target="custom", radius=0.8, trust=0.1)
        wan.sample(after.on(model))
        assert len(before.seen) == len(after.seen) == 4
        for x0, corrected in zip(before.seen, after.seen, strict=True):
            assert corrected.dtype == x0.dtype
            assert torch.equal(corrected, own.manifold.pull(x0, "project", 0.7, 0.8, 0.1))
            assert not torch.equal(corrected, x0)

    @pytest.mark.parametrize(("start", "end", "steps"), [(0.0, 0.0, [0]), (0.5, 1.0, [2, 3]), (0.9, 1.0, [])])
    def test_window(self, wan, own, start, end, steps):
        before, after = Recorder(), Recorder()
        wan.sample(after.on(wan.guided(own, before.on(wan.model), start_percent=start, end_percent=end)))
        changed = [i for i, (a, b) in enumerate(zip(before.seen, after.seen, strict=True)) if not torch.equal(a, b)]
        assert changed == steps

    def test_missed_window_changes_nothing(self, wan, own, plain):
        assert torch.equal(wan.sample(wan.guided(own, start_percent=0.9)), plain)

    @pytest.mark.parametrize("shift", [1.0, 12.0])
    def test_shift_before_or_after(self, comfy, wan, own, shift):
        """percent means the same schedule on either side, so the window must be found while sampling."""

        def shifted(model):
            return comfy.run("ModelSamplingSD3", model=model, shift=shift)[0]

        after = wan.sample(shifted(wan.guided(own, start_percent=0.6)))
        assert torch.equal(after, wan.sample(wan.guided(own, shifted(wan.model), start_percent=0.6)))
        assert not torch.equal(after, wan.sample(shifted(wan.model)))
        assert not torch.equal(after, wan.sample(shifted(wan.guided(own))))

    def test_start_after_end_is_refused(self, wan, own):
        with pytest.raises(ValueError, match="start_percent 0.6 is after end_percent 0.4"):
            wan.guided(own, start_percent=0.6, end_percent=0.4)

    def test_cfg_one(self, wan, own):
        fewer = outside(own, wan.sample(wan.guided(own), cfg=1.0))
        assert fewer < outside(own, wan.sample(wan.model, cfg=1.0))

    def test_batch_equals_singles(self, wan, own):
        guided = wan.guided(own)
        both = wan.sample(guided, latent={**wan.empty(2), "batch_index": [0, 1]})
        for index in range(2):
            single = wan.sample(guided, latent={**wan.empty(), "batch_index": [index]})
            torch.testing.assert_close(both[index : index + 1], single, atol=2e-3, rtol=1e-3)

    def test_ksampler_advanced_in_two_parts(self, comfy, wan, own):
        guided = wan.guided(own, start_percent=0.3)
        common = {
            "model": guided, "noise_seed": 1, "steps": 4, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple",
            **wan.conditioning,
        }
        (first,) = comfy.run(
            "KSamplerAdvanced", add_noise="enable", latent_image=wan.empty(), start_at_step=0, end_at_step=2,
            return_with_leftover_noise="enable", **common,
        )
        (second,) = comfy.run(
            "KSamplerAdvanced", add_noise="disable", latent_image=first, start_at_step=2, end_at_step=4,
            return_with_leftover_noise="disable", **common,
        )
        torch.testing.assert_close(second["samples"], wan.sample(guided), atol=2e-3, rtol=1e-3)

    def test_sampler_custom_advanced(self, comfy, wan, own):
        guided = wan.guided(own)
        (noise,) = comfy.run("RandomNoise", noise_seed=1)
        (guider,) = comfy.run("CFGGuider", model=guided, cfg=6.0, **wan.conditioning)
        (sampler,) = comfy.run("KSamplerSelect", sampler_name="euler")
        (sigmas,) = comfy.run("BasicScheduler", model=guided, scheduler="simple", steps=4, denoise=1.0)
        out, _ = comfy.run(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=wan.empty()
        )
        assert torch.equal(out["samples"], wan.sample(guided))

    @pytest.mark.parametrize("sampler", ["uni_pc", "heun", "dpmpp_2m_sde"])
    def test_other_samplers(self, wan, own, sampler):
        guided = wan.sample(wan.guided(own), sampler=sampler)
        assert torch.isfinite(guided).all()
        assert outside(own, guided) < outside(own, wan.sample(wan.model, sampler=sampler))

    def test_image_to_video_model(self, comfy, wan, own):
        """Its concatenated mask and first frame stay out of the prediction that is corrected."""
        (model,) = comfy.run("UNETLoader", unet_name=I2V_NAME, weight_dtype="default")
        (vae,) = comfy.run("VAELoader", vae_name=VAE_NAME)
        positive, negative, latent = comfy.run(
            "WanImageToVideo", vae=vae, width=64, height=64, length=17, batch_size=1, start_image=torch.rand(1, 64, 64, 3),
            **wan.conditioning,
        )
        after = Recorder()
        guided = after.on(wan.guided(own, model))
        comfy.run(
            "KSampler", model=guided, positive=positive, negative=negative, latent_image=latent, seed=1, steps=2, cfg=6.0,
            sampler_name="euler", scheduler="simple", denoise=1.0,
        )
        assert [tuple(x0.shape) for x0 in after.seen] == 2 * [(1, 16, 5, 8, 8)]
        assert all(torch.isfinite(x0).all() for x0 in after.seen)

    def test_noise_mask_keeps_what_it_protects(self, wan, own, plain):
        mask = torch.zeros(1, 1, 1, 8, 8)
        mask[..., 4:] = 1
        out = wan.sample(wan.guided(own), latent={"samples": plain, "noise_mask": mask})
        torch.testing.assert_close(out[..., :4], plain[..., :4], atol=1e-4, rtol=1e-4)
        assert (out[..., 4:] - plain[..., 4:]).abs().max() > 0.1

    def test_lora_before_or_after(self, comfy, wan, own, models_dir):
        generator = torch.Generator().manual_seed(3)
        prefix = "diffusion_model.blocks.0.self_attn.q"
        tensors = {
            f"{prefix}.lora_A.weight": torch.randn(4, HEAD_DIM, generator=generator),
            f"{prefix}.lora_B.weight": torch.randn(HEAD_DIM, 4, generator=generator),
        }
        (models_dir / "loras").mkdir(exist_ok=True)
        save_file(tensors, models_dir / "loras" / "tiny_lora.safetensors")

        def with_lora(model):
            return comfy.run("LoraLoaderModelOnly", model=model, lora_name="tiny_lora.safetensors", strength_model=1.0)[0]

        after = wan.sample(with_lora(wan.guided(own)))
        assert torch.equal(after, wan.sample(wan.guided(own, with_lora(wan.model))))
        assert not torch.equal(after, wan.sample(wan.guided(own)))
        assert outside(own, after) < outside(own, wan.sample(with_lora(wan.model)))

    def test_two_guidance_nodes_keep_both_manifolds(self, wan, own, sheet_manifold):
        model = wan.model.clone()
        model.set_additional_models("another pack", [])
        twice = wan.guided(sheet_manifold, wan.guided(own, model))
        kept = [patcher.model for patcher in twice.additional_models[KEY]]
        assert kept == [own.patcher.model, sheet_manifold.patcher.model]
        assert twice.get_additional_models_with_key("another pack") == []
        assert len(twice.model_options["sampler_post_cfg_function"]) == 2
        assert torch.isfinite(wan.sample(twice)).all()

    def test_the_same_manifold_twice_is_loaded_once(self, wan, own):
        twice = wan.guided(own, wan.guided(own, end_percent=0.4), start_percent=0.6)
        assert len(twice.additional_models[KEY]) == 1
        assert len(twice.model_options["sampler_post_cfg_function"]) == 2

    def test_manifold_is_loaded_with_the_model(self, wan, own):
        from comfy import model_management

        model_management.unload_all_models()
        wan.sample(wan.guided(own))
        assert any(own.patcher.is_clone(loaded.model) for loaded in model_management.current_loaded_models)

    def test_nothing_of_a_run_stays_in_memory(self, wan, own):
        def alive():
            gc.collect()
            return sum(o.numel() * o.element_size() for o in gc.get_objects() if type(o) is torch.Tensor)

        guided = wan.guided(own)
        for seed in range(2):
            wan.sample(guided, seed=seed)
        before = alive()
        for seed in range(2, 10):
            wan.sample(guided, seed=seed)
        assert alive() == before

    def test_another_latent_space_is_refused_by_name(self, wan, wan22_manifold):
        expected = "'fitted here' belongs to latent space 'wan22', model WAN21 works in 'wan21'; load one for 'wan21'"
        with pytest.raises(ValueError, match=expected):
            wan.guided(wan22_manifold)

    @pytest.mark.parametrize("method", ["band", "gradient"])
    def test_a_band_needs_calibration(self, wan, uncalibrated, method):
        with pytest.raises(ValueError, match=f"no calibration, so the band of method '{method}' is not known"):
            wan.guided(uncalibrated, method=method)

    def test_uncalibrated_projects_to_the_nominal_radius(self, wan, uncalibrated):
        assert torch.isfinite(wan.sample(wan.guided(uncalibrated))).all()

    def test_packed_latents_are_refused(self, wan, own):
        from types import SimpleNamespace

        (correct,) = wan.guided(own).model_options["sampler_post_cfg_function"]
        sampling = wan.model.get_model_object("model_sampling")
        args = {"denoised": torch.zeros(1, 1, 4096), "sigma": torch.ones(1), "model": SimpleNamespace(model_sampling=sampling)}
        with pytest.raises(ValueError, match=r"Shell-LCC Guidance: expected a video latent .* found shape \[1, 1, 4096\]"):
            correct(args)


class TestScore:
    def score(self, comfy, samples, manifold, frames="latent frames"):
        return comfy.run(node("ShellLCCScore"), latent={"samples": samples}, manifold=manifold, frames=frames)

    def test_outputs(self, comfy, wan21, sheet_manifold):
        z = sheet(2, seed=5)
        score, percentile, clips, frames, image, report = self.score(comfy, wan21.denormalise(z), sheet_manifold)
        distance = sheet_manifold.manifold.distance(z)
        assert score == pytest.approx(float(distance.mean()), rel=1e-4)
        assert 0 < percentile < 100
        assert clips == pytest.approx(distance.mean(dim=(1, 2, 3)).tolist(), rel=1e-4)
        assert frames == pytest.approx(distance.mean(dim=(2, 3)).flatten().tolist(), rel=1e-4)
        assert image.shape == (6, 64, 64, 3)
        assert image.dtype == torch.float32
        assert 0 <= float(image.min()) < float(image.max()) <= 1
        assert report.count("Clip ") == 2
        assert report.count("frames:") == 2
        assert comfy.ui["text"][0] == report

    def test_heat_map_has_the_frames_of_the_decoded_clip(self, comfy, wan21, sheet_manifold):
        samples = wan21.denormalise(sheet(2, seed=5))
        latent_frames, video_frames = (
            self.score(comfy, samples, sheet_manifold, frames)[4] for frames in ("latent frames", "video frames")
        )
        (vae,) = comfy.run("VAELoader", vae_name=VAE_NAME)
        (decoded,) = comfy.run("VAEDecode", samples={"samples": samples}, vae=vae)
        assert video_frames.shape == decoded.shape == (18, 64, 64, 3)
        for clip in range(2):
            for frame, source in enumerate([0] + 4 * [1] + 4 * [2]):
                assert torch.equal(video_frames[9 * clip + frame], latent_frames[3 * clip + source])

    def test_damage_is_told_apart_and_coloured(self, comfy, wan21, sheet_manifold):
        diagnostics = comfy.module("kernels.shell_lcc.diagnostics")
        real = sheet(2, seed=5)
        scores, blue, red = [], [], []
        for z in (diagnostics.blur(real), real, diagnostics.add_noise(real)):
            score, percentile, _, _, image, _ = self.score(comfy, wan21.denormalise(z), sheet_manifold)
            scores.append((score, percentile))
            blue.append(float(image[..., 2].mean()))
            red.append(float(image[..., 0].mean()))
        assert scores[0][0] < scores[1][0] < scores[2][0]
        assert scores[0][1] <= scores[1][1] < scores[2][1] == 100
        assert blue[0] > 1.2 * blue[1]
        assert red[2] > 1.5 * red[1]

    def test_without_calibration(self, comfy, wan21, uncalibrated):
        score, percentile, _, _, image, report = self.score(comfy, wan21.denormalise(sheet(1, seed=5)), uncalibrated)
        assert score > 0
        assert percentile == -1
        assert "not calibrated" in report
        assert torch.isfinite(image).all()

    def test_normalised_latents_raise_a_warning(self, comfy, wan21, sheet_manifold, caplog):
        z = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with caplog.at_level(logging.WARNING):
            report = self.score(comfy, z, sheet_manifold)[-1]
        assert "looks normalised already" in report
        assert "looks normalised already" in caplog.text
        assert "normalised" not in self.score(comfy, wan21.denormalise(z), sheet_manifold)[-1]


class TestRefine:
    def refine(self, comfy, latent, manifold, **changes):
        return comfy.run(node("ShellLCCRefine"), latent=latent, manifold=manifold, **{**REFINE, **changes})[0]

    def test_strength_zero_is_the_latent_itself(self, comfy, plain, own):
        latent = {"samples": plain}
        assert self.refine(comfy, latent, own, strength=0.0) is latent

    def test_other_entries_stay_and_the_input_is_left_alone(self, comfy, plain, own):
        mask = torch.ones(1, 1, 1, 8, 8)
        latent = {"samples": plain.clone(), "noise_mask": mask, "batch_index": [3]}
        out = self.refine(comfy, latent, own)
        assert torch.equal(latent["samples"], plain)
        assert set(latent) == set(out)
        assert out["noise_mask"] is mask
        assert out["batch_index"] == [3]
        assert not torch.equal(out["samples"], plain)

    def test_tokens_move_to_the_radius(self, comfy, wan21, sheet_manifold):
        raw = wan21.denormalise(comfy.module("kernels.shell_lcc.diagnostics").add_noise(sheet(1, seed=5)))
        out = self.refine(comfy, {"samples": raw}, sheet_manifold)["samples"]
        manifold = sheet_manifold.manifold
        before, after = (manifold.distance(wan21.normalise(x)) - manifold.radius for x in (raw, out))
        assert after.abs().mean() < 0.5 * before.abs().mean()

    def test_half_precision_comes_back(self, comfy, plain, own):
        out = self.refine(comfy, {"samples": plain.half()}, own)["samples"]
        assert out.dtype == torch.float16
        torch.testing.assert_close(out.float(), self.refine(comfy, {"samples": plain}, own)["samples"], atol=0.05, rtol=0.05)


class TestBadLatents:
    """Each of them is one sentence that names the node and the socket."""

    @pytest.fixture
    def read(self, comfy, sheet_manifold):
        def run(name, samples):
            latent = {"samples": samples}
            if name == "FitShellLCC":
                return fit(comfy, latent)
            inputs = {"frames": "latent frames"} if name == "ShellLCCScore" else REFINE
            return comfy.run(node(name), latent=latent, manifold=sheet_manifold, **inputs)

        return run

    @pytest.mark.parametrize("name", ["ShellLCCScore", "ShellLCCRefine", "FitShellLCC"])
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: torch.full((1, 16, 3, 8, 8), float("nan")), "NaN or infinite"),
            (lambda: torch.zeros(1, 16, 8, 8), r"found shape \[1, 16, 8, 8\]"),
            (lambda: torch.zeros(1, 4, 3, 8, 8), r"(found shape \[1, 4, 3, 8, 8\]|found 4 channels)"),
        ],
        ids=["nan", "image", "channels"],
    )
    def test_refused(self, read, name, make, message):
        with pytest.raises(ValueError, match=message) as error:
            read(name, make())
        assert re.match(r"(Shell-LCC (Score|Refine)|Fit Shell-LCC), input 'latents?'", str(error.value))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["ShellLCCScore", "ShellLCCRefine", "FitShellLCC"])
    def test_audio_video_latents_are_refused(self, read, name):
        from comfy.nested_tensor import NestedTensor

        with pytest.raises(ValueError, match="audio-video"):
            read(name, NestedTensor((torch.zeros(1, 16, 3, 8, 8), torch.zeros(1, 8, 10))))

    def test_manifold_of_another_vae(self, comfy, wan22_manifold, plain):
        with pytest.raises(ValueError, match=r"expected 48 channels \(latent space 'wan22'\)"):
            comfy.run(node("ShellLCCScore"), latent={"samples": plain}, manifold=wan22_manifold, frames="latent frames")


class TestFit:
    def test_batches_of_different_sizes(self, comfy, wan21):
        latents = [{"samples": wan21.denormalise(sheet(2, seed=i, size=size))} for i, size in enumerate((8, 12))]
        # A list on a wire, as the executor passes it to a node that takes lists.
        values, _, v3_data = comfy.execution.get_input_data({"latents": None, **FIT}, comfy.node(node("FitShellLCC")), "1")
        values["latents"] = latents
        with torch.inference_mode():
            run = comfy.execution.get_output_data("test", "1", comfy.node(node("FitShellLCC"))(), values, v3_data=v3_data)
            ((shell,), (report,)), *_ = asyncio.run(run)
        assert "1 of 4 clips" in report
        assert shell.manifold.calibration is not None

    def test_same_seed_same_manifold(self, comfy, wan21):
        latent = {"samples": wan21.denormalise(sheet(4))}
        a, b, c = (fit(comfy, latent, seed=seed)[0].manifold.coder.anchors for seed in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    def test_single_clip_holds_out_its_end(self, comfy, wan21):
        shell, report = fit(comfy, {"samples": wan21.denormalise(sheet(1, frames=6))})
        assert "the last 2 of 6 latent frames of the only clip" in report
        assert shell.manifold.provenance["tokens"] == 4 * 64

    def test_max_tokens(self, comfy, wan21):
        shell, _ = fit(comfy, {"samples": wan21.denormalise(sheet(8))}, max_tokens=1024)
        assert shell.manifold.provenance["tokens"] == 1024

    def test_figures_and_provenance(self, sheet_manifold):
        manifold = sheet_manifold.manifold
        assert manifold.metrics["clips"] == 2
        assert manifold.metrics["auroc_noisy_over_clean"] > 0.6
        assert manifold.provenance["created_by"].startswith("intrinsic-reward ")
        assert manifold.provenance["clips"] == 8
        assert manifold.provenance["held_out"] == "2 of 8 clips"
        assert not any(t.is_inference() for t in manifold.coder.state_dict().values())

    def test_wan22_latents(self, wan22_manifold):
        assert wan22_manifold.manifold.space.id == "wan22"

    def test_stated_space_must_fit(self, comfy, wan21):
        with pytest.raises(ValueError, match="expected 48 channels"):
            fit(comfy, {"samples": wan21.denormalise(sheet(2))}, latent_space="wan22")

    def test_too_few_tokens(self, comfy, wan21):
        with pytest.raises(ValueError, match="1024 .* need .*tokens, found 576: give more clips or fewer anchors"):
            fit(comfy, {"samples": wan21.denormalise(sheet(4))}, anchors=1024)

    def test_interruption(self, comfy, wan21):
        from comfy import model_management

        latent = {"samples": wan21.denormalise(sheet(4))}
        model_management.interrupt_current_processing()
        with pytest.raises(model_management.InterruptProcessingException):
            fit(comfy, latent)
        assert len(fit(comfy, latent)) == 2


class TestFiles:
    @pytest.fixture
    def folder(self, models_dir):
        path = models_dir / "shell_lcc"
        path.mkdir(exist_ok=True)
        return path

    def load(self, comfy, file):
        """The loader's answer as a queued prompt gets it: a refusal before it runs, or an error while it runs."""
        refusal = comfy.node(node("LoadShellLCC")).validate_inputs(file)
        if refusal is not True:
            raise ValueError(refusal)
        return comfy.run(node("LoadShellLCC"), file=file)[0]

    def test_round_trip(self, comfy, sheet_manifold, wan21, folder):
        (file,) = comfy.run(node("SaveShellLCC"), manifold=sheet_manifold, name="round trip")
        assert file == "round_trip_00001.safetensors"
        assert str(folder / file) in comfy.ui["text"][0]
        loaded = self.load(comfy, file).manifold
        z = sheet(1, seed=5)
        assert torch.equal(loaded.distance(z), sheet_manifold.manifold.distance(z))
        assert loaded.space.id == "wan21"
        assert loaded.radius == sheet_manifold.manifold.radius
        assert loaded.metrics == sheet_manifold.manifold.metrics
        assert loaded.provenance == sheet_manifold.manifold.provenance
        assert not any(t.is_inference() for t in loaded.coder.state_dict().values())

    def test_the_released_checkpoint_is_loaded_and_calibrated_by_a_latent(self, comfy, folder):
        state = synthetic_reference(24, 8)
        torch.save({"model": state, "config": {"num_bases": 24}}, folder / "released.pth")
        assert "released.pth" in comfy.node(node("LoadShellLCC")).define_schema().inputs[0].options
        z = torch.randn(2, 16, 3, 4, 5, generator=torch.Generator().manual_seed(1))
        plain = comfy.run(node("LoadShellLCC"), file="released.pth")[0].manifold
        assert plain.calibration is None
        expected = [reference_mean_distance(state, item.movedim(0, 1)) for item in z]
        assert [float(d.mean()) for d in plain.distance(z)] == pytest.approx(expected, rel=1e-4)
        raw = {"samples": plain.space.denormalise(z)}
        found = comfy.run(node("LoadShellLCC"), file="released.pth", calibrate=raw)[0].manifold
        assert found.radius == pytest.approx(float(plain.distance(z).square().mean().sqrt()), rel=1e-4)
        low, high = found.band
        assert 0.05 < float(found.outside_band(found.distance(z)).float().mean()) < 0.15
        assert low < found.radius < high
        with pytest.raises(Exception, match="Load Shell-LCC Manifold, input 'calibrate'"):
            comfy.run(node("LoadShellLCC"), file="released.pth", calibrate={"samples": torch.zeros(1, 48, 3, 4, 5)})

    def test_a_checkpoint_with_objects_in_it_is_not_run(self, comfy, folder):
        torch.save({"model": Path("x")}, folder / "objects.pth")
        with pytest.raises(Exception, match="objects other than tensors"):
            comfy.run(node("LoadShellLCC"), file="objects.pth")

    def test_nothing_is_overwritten(self, comfy, sheet_manifold, folder):
        files = [comfy.run(node("SaveShellLCC"), manifold=sheet_manifold, name="again")[0] for _ in range(3)]
        assert files == [f"again_0000{n}.safetensors" for n in (1, 2, 3)]
        (folder / files[0]).unlink()
        assert comfy.run(node("SaveShellLCC"), manifold=sheet_manifold, name="again") == ("again_00004.safetensors",)

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("../../escape", "escape_00001.safetensors"),
            ("/etc/passwd", "etc_passwd_00001.safetensors"),
            ("C:\\a b", "C_a_b_00001.safetensors"),
            ("nul\0byte", "nul_byte_00001.safetensors"),
            (".hidden", "hidden_00001.safetensors"),
        ],
    )
    def test_names_cannot_leave_the_folder(self, comfy, sheet_manifold, folder, name, file):
        before = set(folder.parent.rglob("*"))
        assert comfy.run(node("SaveShellLCC"), manifold=sheet_manifold, name=name) == (file,)
        (new,) = set(folder.parent.rglob("*")) - before
        assert new == folder / file
        new.unlink()

    @pytest.mark.parametrize("name", ["", "  ", "../.."])
    def test_names_without_a_letter_are_refused(self, comfy, sheet_manifold, name):
        with pytest.raises(ValueError, match="input 'name'.*at least one letter or digit"):
            comfy.run(node("SaveShellLCC"), manifold=sheet_manifold, name=name)

    def test_empty_folder(self, comfy, monkeypatch, tmp_path):
        import folder_paths

        monkeypatch.setitem(folder_paths.folder_names_and_paths, "shell_lcc", ([str(tmp_path)], {".safetensors"}))
        options = comfy.node(node("LoadShellLCC")).define_schema().inputs[0].options
        assert options == ["(no file in models/shell_lcc yet)"]
        with pytest.raises(ValueError, match=f"there is no manifold in {re.escape(str(tmp_path))}: fit one"):
            self.load(comfy, options[0])
        # Templates name a file that is not there yet.
        with pytest.raises(ValueError, match=r"there is no 'my_manifold.safetensors' in .*, nor any other manifold: fit one"):
            self.load(comfy, "my_manifold.safetensors")

    def test_missing_file(self, comfy, folder):
        with pytest.raises(ValueError, match=r"there is no 'gone.safetensors' in .*shell_lcc: put it there"):
            self.load(comfy, "gone.safetensors")

    @pytest.mark.parametrize("file", ["../vae/tiny_wan_vae.safetensors", "/etc/passwd"])
    def test_paths_cannot_leave_the_folder(self, comfy, folder, file):
        with pytest.raises(ValueError, match="there is no"):
            self.load(comfy, file)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda path, good: save_file({"x": torch.zeros(1)}, path), "not a Shell-LCC manifold"),
            (lambda path, good: path.write_bytes(good[: len(good) // 2]), "truncated"),
            (lambda path, good: path.write_bytes(pickle.dumps({"basis": [1, 2]})), "PyTorch checkpoint"),
            (lambda path, good: path.write_bytes(b""), "an empty file"),
        ],
        ids=["other_kind", "truncated", "pickle", "empty"],
    )
    def test_bad_files(self, comfy, sheet_manifold, folder, make, message):
        (good,) = comfy.run(node("SaveShellLCC"), manifold=sheet_manifold, name="good")
        path = folder / "bad.safetensors"
        make(path, (folder / good).read_bytes())
        with pytest.raises(ValueError, match=message) as error:
            self.load(comfy, path.name)
        assert str(path) in str(error.value)
        path.unlink()

    def test_a_changed_file_is_read_again(self, comfy, sheet_manifold, folder):
        (file,) = comfy.run(node("SaveShellLCC"), manifold=sheet_manifold, name="changing")
        fingerprint = comfy.node(node("LoadShellLCC")).fingerprint_inputs
        before = fingerprint(file)
        assert fingerprint(file) == before
        (folder / file).write_bytes((folder / file).read_bytes() + b" ")
        assert fingerprint(file) != before
        (folder / file).unlink()
        assert fingerprint(file) == file


class TestEncodeClips:
    SIZE = {"width": 64, "height": 64, "frames": 9, "fps": 16.0, "max_clips": 2}

    @pytest.fixture
    def vae(self, comfy):
        return comfy.run("VAELoader", vae_name=VAE_NAME)[0]

    @pytest.fixture
    def folder(self, base_dir, tmp_path):
        path = base_dir / "input" / tmp_path.name
        path.mkdir()
        return path

    def encode(self, comfy, vae, folder, **changes):
        return comfy.run(node("EncodeClips"), vae=vae, folder=folder.name, **{**self.SIZE, **changes})

    def test_good_short_and_broken_files(self, comfy, vae, folder):
        write_video(folder / "a.mp4", 30)
        write_video(folder / "b_short.mp4", 7, seed=1)
        (folder / "c_broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:500])
        (folder / "notes.txt").write_text("not a video")
        latent, report = self.encode(comfy, vae, folder)
        assert latent["samples"].shape == (2, 16, 3, 8, 8)
        lines = report.splitlines()
        assert lines[1] == "a.mp4: 2 clips"
        assert lines[2] == "b_short.mp4: skipped, 7 frames at 16 frames per second, at least 9 needed"
        assert lines[3].startswith("c_broken.mp4: skipped, damaged or not a video")
        assert len(lines) == 4

    def test_equals_the_stock_nodes(self, comfy, vae, folder):
        """A clip of the wanted size and rate goes through Load Video's own decoder to the same latent."""
        from comfy_api.latest import InputImpl

        write_video(folder / "a.mp4", 9, width=64, height=64)
        images = InputImpl.VideoFromFile(str(folder / "a.mp4")).get_components().images
        (stock,) = comfy.run("VAEEncode", pixels=images, vae=vae)
        latent, _ = self.encode(comfy, vae, folder)
        torch.testing.assert_close(latent["samples"], stock["samples"], atol=0.05, rtol=0.05)

    @pytest.mark.parametrize(("fps", "clips"), [(8.0, 2), (24.0, 4)])
    def test_frame_rate(self, comfy, vae, folder, fps, clips):
        """36 frames at 16 a second are 18 at 8; asked for 24 they stay 36."""
        write_video(folder / "a.mp4", 36)
        assert len(self.encode(comfy, vae, folder, fps=fps, max_clips=9)[0]["samples"]) == clips

    def test_clips_are_those_of_the_trainer(self, comfy, folder):
        """trainers.encode reads the same pictures: one reader for both."""
        from trainers.kernels.video.clips import DecodeOptions, SourceReport
        from trainers.video.read import decode_clips

        module = comfy.module("nodes.encode_clips")
        write_video(folder / "a.mp4", 11, width=128, height=64)
        (clip,) = module.decode_clips(str(folder / "a.mp4"), 64, 64, 5, 8.0, 9, module.SourceReport("a.mp4"))
        options = DecodeOptions(lambda w, h: (64, 64), fps=8.0, frames=5, min_frames=5, max_clips=9)
        (expected,) = decode_clips(folder / "a.mp4", options, SourceReport("a.mp4"))
        assert torch.equal((clip * 255).round(), expected.frames.movedim(1, -1).float())

    def test_crop_covers_the_size(self, comfy, folder):
        module = comfy.module("nodes.encode_clips")
        write_video(folder / "a.mp4", 5, width=128, height=64)
        (clip,), (wide,) = (
            module.decode_clips(str(folder / "a.mp4"), width, 64, 5, 16.0, 1, module.SourceReport("a")) for width in (64, 128)
        )
        torch.testing.assert_close(clip, wide[:, :, 32:96], atol=0.02, rtol=0)

    def test_no_clip_long_enough(self, comfy, vae, folder):
        write_video(folder / "a.mp4", 7)
        with pytest.raises(ValueError, match=r"no clip of 9 frames .* give longer videos(.|\n)*a.mp4: skipped"):
            self.encode(comfy, vae, folder)

    def test_empty_folder(self, comfy, vae, folder):
        with pytest.raises(ValueError, match="no video file in .*put some there"):
            self.encode(comfy, vae, folder)

    def test_frames_must_be_4n_plus_1(self, comfy, vae, folder):
        with pytest.raises(ValueError, match="found 10, expected 4n.1, such as 9"):
            self.encode(comfy, vae, folder, frames=10)

    def test_frames_are_refused_before_the_run(self, comfy, folder):
        check = comfy.node(node("EncodeClips")).validate_inputs
        assert check(folder.name, 9) is True
        for frames, near in ((10, 9), (4, 5), (2001, 1001)):
            assert f"found {frames}, expected 4n+1 of 5 to 1001, such as {near}" in check(folder.name, frames)

    @pytest.mark.parametrize("name", ["../models", "/etc", "."])
    def test_folders_outside_input_are_refused(self, comfy, vae, name):
        assert "there is no folder" in comfy.node(node("EncodeClips")).validate_inputs(name)
        with pytest.raises(ValueError, match="is not a folder in the input directory"):
            comfy.run(node("EncodeClips"), vae=vae, folder=name, **self.SIZE)

    def test_a_new_file_makes_it_run_again(self, comfy, folder):
        fingerprint = comfy.node(node("EncodeClips")).fingerprint_inputs
        write_video(folder / "a.mp4", 5)
        before = fingerprint(folder.name, width=64)
        assert fingerprint(folder.name, width=64) == before
        write_video(folder / "b.mp4", 5)
        assert fingerprint(folder.name, width=64) != before


def test_a_fit_holds_out_files_and_equal_clips_whole(comfy):
    """Windows of one file are on one side, and so is a clip that is given twice."""
    module = comfy.module("nodes.shell_lcc_fit")
    z = torch.randn(8, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    clips = [(str(i), z[i]) for i in range(7)] + [("copy of 0", z[0].clone())]
    files = ["a.mp4", "a.mp4", "b.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "copy of 0"]
    for seed in range(12):
        fit_on, held, _ = module.split(clips, files, 0.4, seed)
        sides = [{name for name, _ in side} for side in (fit_on, held)]
        assert all({"0", "1", "copy of 0"} <= side or not {"0", "1", "copy of 0"} & side for side in sides)
        assert all({"2", "3"} <= side or not {"2", "3"} & side for side in sides)
    _, held, how = module.split([clips[0], clips[7]], ["x", "y"], 0.4, 0)
    assert how == "the last 1 of 3 latent frames of the only clip"
    assert held[0][1].shape == (16, 1, 4, 4)
