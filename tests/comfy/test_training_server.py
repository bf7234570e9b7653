"""The training workflows in a running server, and a training that the user interrupts there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainers.kernels.files import preference_records
from trainers.kernels.latent_space import WAN21

from .tiny_wan import STAND_INS
from .workflow_api import override_inputs, replace_values, to_api

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
FOLDER = "records_for_training"
LORA, HEAD = "IntrinsicReward_TrainPreferenceLora", "IntrinsicReward_TrainPrismHead"
SMALLER = {
    "09 Train a preference LoRA": {
        f"{LORA}.folder": FOLDER, f"{LORA}.decided_by": "", f"{LORA}.rank": 4, f"{LORA}.pairs_per_step": 1,
    },
    "11 Train a PRISM head": {
        f"{HEAD}.folder": FOLDER, f"{HEAD}.decided_by": "", f"{HEAD}.taps": "3", f"{HEAD}.dim": 24,
        f"{HEAD}.pairs_per_step": 1,
    },
    "10 Compare a tuned LoRA with its base": {
        "EmptyHunyuanLatentVideo.width": 64, "EmptyHunyuanLatentVideo.height": 64, "EmptyHunyuanLatentVideo.length": 17,
        "KSampler.steps": 6,
    },
}  # fmt: skip
CAPTIONS = ("a red ball in a wood room, fast orbit", "a blue cube in a brick room")


@pytest.fixture(scope="module")
def records(base_dir):
    """Two records of one preference each."""
    folder = base_dir / "output" / "intrinsic_reward_preferences" / FOLDER
    (folder / "latents").mkdir(parents=True)
    lines = b""
    for seed in (0, 1):
        z = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        record = preference_records.new_record(folder, CAPTIONS[seed], z, WAN21, preference=(1, 0))
        for i in (0, 1):
            preference_records.write_candidate(record, i, z[i], WAN21)
        lines += preference_records.to_line(record, folder)
    (folder / "records.jsonl").write_bytes(lines)
    return folder


@pytest.fixture
def toy_lora(records, toy_files, models_dir, tmp_path):
    """A LoRA of the toy world's transformer that `trainers.dpo` wrote, where ComfyUI looks for LoRAs."""
    for package in ("diffusers", "peft", "accelerate"):
        pytest.importorskip(package)
    from benchmarks.toy_world import text_encoder, weights
    from trainers.dpo import cli as dpo
    from trainers.wan.prompts import write_embeddings

    encoder = text_encoder.load(weights.FOLDER / weights.TEXT)
    prompts = {f"p{i}": text for i, text in enumerate(("", *CAPTIONS))}
    texts = tmp_path / "texts.safetensors"
    write_embeddings(texts, dict(zip(prompts, encoder.words(list(prompts.values())), strict=True)), WAN21, {}, prompts)
    data, lora = tmp_path / "data", models_dir / "loras" / "my_preference_lora.safetensors"
    lora.parent.mkdir(exist_ok=True)
    dpo.main(["cache", "--pairs", str(records), "--embeddings", str(texts), "--output", str(data)])
    dpo.main(
        ["train", "--data", str(data), "--backbone", str(weights.FOLDER / weights.DIT), "--output", str(lora), "--rank", "4",
         "--max_train_steps", "4", "--learning_rate", "0.01", "--lr_warmup_steps", "0", "--held_out", "0", "--shift", "3",
         "--device", "cpu"]
    )  # fmt: skip
    yield lora
    lora.unlink()


def prompt_of(server, name, changes, files=STAND_INS):
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    prompt = replace_values(to_api(workflow, server.object_info), files)
    return override_inputs(prompt, SMALLER[name] | changes)


def text_of(entry, prompt, kind):
    (key,) = (k for k, n in prompt.items() if n["class_type"] == kind)
    return "\n".join(entry["outputs"][key]["text"])


def step_of(data):
    """The step that the node's text reports: ComfyUI sends its bar in steps of half a per cent only."""
    return int(data["text"].split()[1]) if data["text"].startswith("Step ") else 0


def test_the_lora_of_the_workflow_is_listed_for_loading(server, records, base_dir):
    prompt = prompt_of(server, "09 Train a preference LoRA", {f"{LORA}.steps": 3})
    entry = server.post(prompt)
    assert "trained for 3 steps on 2 pairs of 2 prompts" in text_of(entry, prompt, LORA)
    assert (base_dir / "output" / "loras" / "my_preference_lora.safetensors").is_file()
    options = server.object_info("LoraLoaderModelOnly")["input"]["required"]["lora_name"]
    assert "my_preference_lora.safetensors" in json.dumps(options)


def test_the_head_of_the_workflow_is_listed_for_loading(server, records, base_dir):
    prompt = prompt_of(server, "11 Train a PRISM head", {f"{HEAD}.steps": 3})
    entry = server.post(prompt)
    assert "trained for 3 steps on 1 pairs of 1 prompts: models/prism/my_prism_head" in text_of(entry, prompt, HEAD)
    options = server.object_info("IntrinsicReward_LoadPrism")["input"]["required"]["file"]
    assert "my_prism_head.safetensors" in json.dumps(options)
    (base_dir / "models" / "prism" / "my_prism_head.safetensors").unlink()


def test_a_training_that_the_user_interrupts_goes_on_where_it_stopped(server, records, base_dir):
    """More steps than anyone would wait for: the interruption ends them; then the steps that were done are the whole."""
    prompt = prompt_of(server, "09 Train a preference LoRA", {f"{LORA}.steps": 100000, f"{LORA}.name": "stopped"})
    with server.follow(prompt) as run:
        run.wait_for("text", lambda data: step_of(data) >= 3)
        server.interrupt()
        run.wait_for("execution_interrupted", timeout=30)
    state = base_dir / "output" / "intrinsic_reward_training" / "stopped" / "state.safetensors"
    with safe_open(state, framework="pt") as f:
        first = json.loads(f.metadata()["state"])["step"]
    assert first >= 3
    assert load_file(base_dir / "output" / "loras" / "stopped.safetensors")
    with server.follow(prompt) as run:
        run.wait_for("text", lambda data: step_of(data) > first)
        server.interrupt()
        run.wait_for("execution_interrupted", timeout=30)
    with safe_open(state, framework="pt") as f:
        assert json.loads(f.metadata()["state"])["step"] > first
        assert len(f.get_tensor("history")) > first


def test_a_folder_without_records_is_named(server):
    prompt = prompt_of(server, "09 Train a preference LoRA", {f"{LORA}.folder": "nowhere"})
    with pytest.raises(AssertionError, match=r"TrainPreferenceLora\): .*there are no records in .*nowhere"):
        server.post(prompt)
    prompt = prompt_of(server, "09 Train a preference LoRA", {f"{LORA}.name": "../elsewhere"})
    with pytest.raises(AssertionError, match="expected the name of one file"):
        server.post(prompt)


def test_the_workflow_shows_a_tuned_lora_beside_its_base(server, toy_lora):
    """The LoRA changes the right half of the video, and nothing does at strength 0. The scores name both clips."""
    from benchmarks.toy_world import weights

    files = {
        "wan2.1_t2v_1.3B_fp16.safetensors": weights.DIT, "wan_2.1_vae.safetensors": weights.VAE,
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors": weights.TEXT,
    }  # fmt: skip
    halves = {}
    for strength in (1.0, 0.0):
        changes = {"LoraLoaderModelOnly.strength_model": strength}
        prompt = prompt_of(server, "10 Compare a tuned LoRA with its base", changes, files)
        (stitch,) = (k for k, n in prompt.items() if n["class_type"] == "ImageStitch")
        prompt["shown"] = {"class_type": "PreviewImage", "inputs": {"images": [stitch, 0]}}
        entry = server.post(prompt)
        frames = server.images(entry, "shown").astype(float)
        assert frames.shape[:3] == (17, 64, 64 + 8 + 64)
        halves[strength] = frames[:, :, :64], frames[:, :, -64:]
        scored = {"IntrinsicReward_RewardScore", "IntrinsicReward_FlowResidualScore"}
        texts = ["\n".join(entry["outputs"][k]["text"]) for k, n in prompt.items() if n["class_type"] in scored]
        assert len(texts) == 3
        assert all("Clip 1: " in text and "Clip 2: " in text for text in texts)
    assert (halves[1.0][0] == halves[0.0][0]).all()
    assert (halves[0.0][0] == halves[0.0][1]).all()
    assert abs(halves[1.0][1] - halves[1.0][0]).mean() > 1
