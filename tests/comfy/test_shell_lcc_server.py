"""The Shell-LCC nodes in a running server: the shipped workflows, interruption, and memory."""

import json
from pathlib import Path

import pytest

from . import test_geometry_server as geometry
from . import test_prism_server as prism
from . import test_training_server as training
from .shell_lcc_material import FIT, GUIDANCE, sheet, write_video
from .test_stock import stock_t2v
from .tiny_wan import STAND_INS
from .workflow_api import override_inputs, replace_values, to_api

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
MANIFOLD = "my_manifold_00001.safetensors"
CLIPS = {
    "IntrinsicReward_EncodeClips.width": 64, "IntrinsicReward_EncodeClips.height": 64, "IntrinsicReward_EncodeClips.frames": 9,
}
SMALLER = {
    "05 Guide sampling with Shell-LCC": {
        "EmptyHunyuanLatentVideo.width": 64, "EmptyHunyuanLatentVideo.height": 64, "EmptyHunyuanLatentVideo.length": 9,
        "KSampler.steps": 2,
    },
    "04 Fit a Shell-LCC manifold on your clips": {**CLIPS, "IntrinsicReward_FitShellLCC.anchors": 64},
    "06 Refine a clip with Shell-LCC": CLIPS,
}
IMAGES = {"05 Guide sampling with Shell-LCC": (3, 64, 64), "04 Fit a Shell-LCC manifold on your clips": (3, 64, 64)}


@pytest.fixture(scope="module")
def material(server, base_dir, models_dir):
    """The manifold and the clips that the workflows name."""
    clips = base_dir / "input" / "clips"
    clips.mkdir()
    for seed in range(4):
        write_video(clips / f"{seed}.mp4", 9, seed=seed)
    (models_dir / "shell_lcc").mkdir(exist_ok=True)
    latent = {"class_type": "LoadLatent", "inputs": {"latent": "sheet.latent"}}
    fit = {"class_type": "IntrinsicReward_FitShellLCC", "inputs": {"latents": ["1", 0], **FIT}}
    save = {"class_type": "IntrinsicReward_SaveShellLCC", "inputs": {"manifold": ["2", 0], "name": "workflow"}}
    write_latent(base_dir / "input" / "sheet.latent")
    entry = server.post({"1": latent, "2": fit, "3": save})
    (made,) = (models_dir / "shell_lcc").glob("workflow_*.safetensors")
    assert str(made) in entry["outputs"]["3"]["text"][0]
    (models_dir / "shell_lcc" / MANIFOLD).write_bytes(made.read_bytes())


def write_latent(path):
    import torch
    from safetensors.torch import save_file

    save_file({"latent_tensor": (2 * sheet(6)).contiguous(), "latent_format_version_0": torch.tensor([])}, path)


def guided(seed=1, steps=2, strength=1.0):
    """The stock text-to-video prompt with guidance between the model's loader and its shift."""
    prompt = stock_t2v(seed, steps)
    prompt["20"] = {"class_type": "IntrinsicReward_LoadShellLCC", "inputs": {"file": MANIFOLD}}
    inputs = {"model": ["1", 0], "manifold": ["20", 0], **GUIDANCE, "strength": strength}
    prompt["21"] = {"class_type": "IntrinsicReward_ShellLCCGuidance", "inputs": inputs}
    prompt["4"]["inputs"]["model"] = ["21", 0]
    return prompt


@pytest.mark.parametrize("name", sorted(SMALLER))
def test_shipped_workflow_runs(server, material, name):
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    prompt = override_inputs(replace_values(to_api(workflow, server.object_info), STAND_INS), SMALLER[name])
    entry = server.post(prompt)
    outputs = {prompt[key]["class_type"]: value for key, value in entry["outputs"].items()}
    assert "Clip 1: score" in outputs["IntrinsicReward_ShellLCCScore"]["text"][0]
    if name in IMAGES:
        (preview,) = (key for key, node in prompt.items() if node["class_type"] == "PreviewImage")
        heat_map = server.images(entry, preview)
        assert heat_map.shape[:3] == IMAGES[name]
        assert heat_map.std() > 1
    if name != "04 Fit a Shell-LCC manifold on your clips":
        assert outputs["SaveWEBM"]["images"][0]["filename"].endswith(".webm")


def test_every_shipped_workflow_is_run():
    run = set().union(*(module.SMALLER for module in (prism, geometry, training)), SMALLER)
    assert {path.stem for path in WORKFLOWS.glob("*.json")} == run


def test_strength_zero_gives_the_stock_video(server, material):
    stock = server.images(server.post(stock_t2v(seed=11)), "10")
    assert (server.images(server.post(guided(seed=11, strength=0.0)), "10") == stock).all()
    assert (server.images(server.post(guided(seed=11)), "10") != stock).mean() > 0.1


def test_interruption_leaves_the_next_prompt_clean(server, material):
    before = server.images(server.post(guided(seed=12)), "10")
    with server.follow(guided(seed=13, steps=2000)) as run:
        run.wait_for("progress", lambda data: data["value"] >= 2)
        server.interrupt()
        run.wait_for("execution_interrupted", timeout=30)
    server.free()
    again = server.post(override_inputs(guided(seed=12), {"SaveImage.filename_prefix": "after_interruption"}))
    assert (server.images(again, "10") == before).all()


def test_memory_stays(server, material):
    for seed in range(20, 22):
        server.post(guided(seed))
    after_two = server.rss()
    for seed in range(22, 30):
        server.post(guided(seed))
    grown = server.rss() - after_two
    assert grown < 64 << 20, f"{grown / 2**20:.0f} MiB more after ten prompts than after two"


def test_missing_manifold_is_named_before_anything_runs(server, material):
    with pytest.raises(AssertionError, match=r"node 20 \(IntrinsicReward_LoadShellLCC\).*there is no 'gone.safetensors'"):
        server.post(override_inputs(guided(), {"IntrinsicReward_LoadShellLCC.file": "gone.safetensors"}))


def test_help_and_translations_are_served(server):
    page = server.get("/extensions/ComfyUI-IntrinsicReward/docs/IntrinsicReward_ShellLCCGuidance.md")
    assert b"Shell-LCC Guidance" in page
    templates = server.get("/workflow_templates")["ComfyUI-IntrinsicReward"]
    assert set(SMALLER) <= set(templates)
    for language in (path.name for path in (WORKFLOWS.parent / "locales").iterdir()):
        assert "IntrinsicReward_FitShellLCC" in server.get("/i18n")[language]["nodeDefs"]
