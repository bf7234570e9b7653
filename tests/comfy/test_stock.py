"""The harness itself: ComfyUI's stock text-to-video graph runs on the tiny models, in a server and in this process."""

import pytest

from .comfyui_server import ComfyUIServer, PortTaken
from .tiny_wan import I2V_NAME, T2V_NAME, UMT5_NAME, VAE_NAME


def stock_t2v(seed=1, steps=2):
    """API prompt of the plain Wan2.1 text-to-video workflow, at 64x64 and 9 frames."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": T2V_NAME, "weight_dtype": "default"}},
        "2": {"class_type": "CLIPLoader", "inputs": {"clip_name": UMT5_NAME, "type": "wan", "device": "default"}},
        "3": {"class_type": "VAELoader", "inputs": {"vae_name": VAE_NAME}},
        "4": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 8.0}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "a slow dolly shot through the room"}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": "blurry"}},
        "7": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 9, "batch_size": 1},
        },
        "8": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["4", 0], "positive": ["5", 0], "negative": ["6", 0], "latent_image": ["7", 0], "seed": seed,
                "steps": steps, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple", "denoise": 1.0,
            },
        },
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["8", 0], "vae": ["3", 0]}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "stock"}},
    }


def test_stock_workflow_runs_in_the_server(server):
    images = server.images(server.post(stock_t2v()), "10")
    assert images.shape == (9, 64, 64, 3)
    assert images.std() > 1


def test_same_seed_same_video(server):
    first = server.images(server.post(stock_t2v(seed=3)), "10")
    other = server.images(server.post(stock_t2v(seed=4)), "10")
    server.free()
    with server.follow(stock_t2v(seed=3)) as run:
        again = server.images(run.finish(), "10")
    assert any(event == "progress" for event, _ in run.events), "the sampler did not run again"
    assert (again == first).all()
    assert (other != first).any()


def test_invalid_prompt_names_node_and_input(server):
    with pytest.raises(AssertionError, match=r"node 8 \(KSampler\).*steps"):
        server.post(stock_t2v(steps=0))


def test_prompt_with_one_invalid_branch_is_refused(server):
    prompt = stock_t2v()
    prompt["11"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "nothing"}}
    with pytest.raises(AssertionError, match=r"node 11 \(SaveImage\).*images"):
        server.post(prompt)


def test_failing_node_is_reported(server):
    prompt = stock_t2v(seed=5)
    prompt["9"]["inputs"]["samples"] = ["11", 0]
    upscale = {"samples": ["8", 0], "upscale_method": "area", "scale_by": 0.01}
    prompt["11"] = {"class_type": "LatentUpscaleBy", "inputs": upscale}
    with pytest.raises(AssertionError, match=r"node 11 \(LatentUpscaleBy\)"):
        server.post(prompt)


def test_interrupting_while_sampling(server):
    with server.follow(stock_t2v(seed=6, steps=2000)) as run:
        run.wait_for("progress", lambda data: data["value"] >= 2)
        server.interrupt()
        run.wait_for("execution_interrupted", timeout=30)
    server.post(stock_t2v(seed=7))


def test_following_to_the_end(server):
    with server.follow(stock_t2v(seed=8)) as run:
        entry = run.finish()
    assert "10" in entry["outputs"]
    assert any(event == "preview" for event, _ in run.events)


def test_the_answer_of_another_server_is_not_taken_for_its_own(server, tmp_path):
    other = ComfyUIServer(server.comfyui, tmp_path)
    other.url, other.process = server.url, server.process
    with pytest.raises(PortTaken, match="is another one"):
        other._wait_until_ready()


def test_server_memory_is_plausible(server):
    assert 2**27 < server.rss() < 2**34


def test_stock_nodes_run_in_process(comfy):
    import torch

    (model,) = comfy.run("UNETLoader", unet_name=T2V_NAME, weight_dtype="default")
    (model,) = comfy.run("ModelSamplingSD3", model=model, shift=8.0)
    (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    (positive,) = comfy.run("CLIPTextEncode", clip=clip, text="a cat walks")
    (negative,) = comfy.run("CLIPTextEncode", clip=clip, text="")
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1)
    (sampled,) = comfy.run(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=1, steps=2, cfg=6.0,
        sampler_name="euler", scheduler="simple", denoise=1.0,
    )
    assert sampled["samples"].shape == (1, 16, 3, 8, 8)
    assert torch.isfinite(sampled["samples"]).all()
    (vae,) = comfy.run("VAELoader", vae_name=VAE_NAME)
    (images,) = comfy.run("VAEDecode", samples=sampled, vae=vae)
    assert images.shape == (9, 64, 64, 3)
    assert torch.isfinite(images).all()


def test_image_to_video_runs_in_process(comfy):
    import torch

    (model,) = comfy.run("UNETLoader", unet_name=I2V_NAME, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    (vae,) = comfy.run("VAELoader", vae_name=VAE_NAME)
    (text,) = comfy.run("CLIPTextEncode", clip=clip, text="a cat walks")
    positive, negative, latent = comfy.run(
        "WanImageToVideo", positive=text, negative=text, vae=vae, width=64, height=64, length=9, batch_size=1,
        start_image=torch.rand(1, 64, 64, 3),
    )
    (sampled,) = comfy.run(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=1, steps=1, cfg=1.0,
        sampler_name="euler", scheduler="simple", denoise=1.0,
    )
    assert sampled["samples"].shape == (1, 16, 3, 8, 8)
    assert torch.isfinite(sampled["samples"]).all()


def test_in_process_run_refuses_unknown_inputs(comfy):
    with pytest.raises(TypeError, match="no input shfit"):
        comfy.run("ModelSamplingSD3", model=None, shfit=8.0)


def test_nothing_is_written_into_comfyui(comfy, base_dir):
    import folder_paths

    for path in (
        folder_paths.models_dir, folder_paths.get_output_directory(), folder_paths.get_temp_directory(),
        folder_paths.get_input_directory(), folder_paths.get_user_directory(),
    ):
        assert path.startswith(str(base_dir))
