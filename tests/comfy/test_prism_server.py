"""PRISM's workflows in a running server, and the selection that it ends with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .shell_lcc_material import write_video
from .tiny_wan import STAND_INS, T2V_NAME
from .workflow_api import override_inputs, replace_values, to_api

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
FOLDER = "clips_for_prism"
SMALLER = {
    "14 Rank clips by a PRISM head": {
        "IntrinsicReward_EncodeClips.width": 64, "IntrinsicReward_EncodeClips.height": 64,
        "IntrinsicReward_EncodeClips.frames": 9, "IntrinsicReward_EncodeClips.folder": FOLDER,
    },
    "12 Best of N with a PRISM head": {
        "EmptyHunyuanLatentVideo.width": 64, "EmptyHunyuanLatentVideo.height": 64, "EmptyHunyuanLatentVideo.length": 9,
        "IntrinsicReward_PrismKSampler.steps": 20,
    },
    "02 Best of 8 without a trained head": {
        "EmptyHunyuanLatentVideo.width": 64, "EmptyHunyuanLatentVideo.height": 64, "EmptyHunyuanLatentVideo.length": 9,
        "IntrinsicReward_PrismKSampler.steps": 12,
    },
    "07 Rank clips by several rewards": {
        "IntrinsicReward_EncodeClips.width": 64, "IntrinsicReward_EncodeClips.height": 64,
        "IntrinsicReward_EncodeClips.frames": 9, "IntrinsicReward_EncodeClips.folder": FOLDER,
    },
    "13 Best three with custom sampling": {
        "EmptyHunyuanLatentVideo.width": 64, "EmptyHunyuanLatentVideo.height": 64, "EmptyHunyuanLatentVideo.length": 9,
        "BasicScheduler.steps": 20,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def material(server, base_dir, models_dir):
    """The head and the clips that the workflow names."""
    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.prism import files
    from trainers.kernels.prism.backbone import of_wan

    clips = base_dir / "input" / FOLDER
    clips.mkdir()
    for seed in range(3):
        write_video(clips / f"{seed}.mp4", 9, seed=seed)
    backbone = of_wan(load_file(models_dir / "diffusion_models" / T2V_NAME))
    torch.manual_seed(0)
    head = files.PrismHead(files.HeadConfig(backbone.width, dim=64, heads=4, taps=(3,)))
    (models_dir / "prism").mkdir(exist_ok=True)
    path = models_dir / "prism" / "my_head.safetensors"
    files.save(files.LoadedHead(head, backbone, WAN21, (0.05, 0.99), name="my_head"), path)


@pytest.mark.parametrize("name", sorted(SMALLER))
def test_shipped_workflow_runs(server, material, base_dir, name):
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    prompt = override_inputs(replace_values(to_api(workflow, server.object_info), STAND_INS), SMALLER[name])
    # As the browser sends it: metadata that is saved with a file, in addition to the prompt.
    entry = server.post(prompt, extra_data={"extra_pnginfo": {"workflow": {"of": name}}})
    outputs = {prompt[key]["class_type"]: value for key, value in entry["outputs"].items()}
    if name == "14 Rank clips by a PRISM head":
        text = outputs["IntrinsicReward_PrismScore"]["text"][0]
        assert all(f"Clip {i}: overall" in text for i in (1, 2, 3))
        assert "Best: clip" in text
    elif name == "07 Rank clips by several rewards":
        text = outputs["IntrinsicReward_RewardScore"]["text"][0]
        assert text.startswith("Reward Score, higher is better: weighted sum of rewards, each as its z-score")
        assert "Best: clip" in text
        assert outputs["IntrinsicReward_FlowResidualScore"]["text"][0].startswith("Flow Residual Score, lower is better")
    else:
        (text,) = (v["text"][0] for k, v in outputs.items() if k.startswith("IntrinsicReward_Prism"))
        assert text.startswith("Best of 8: seed ")
        assert text.count("kept") == (3 if name == "13 Best three with custom sampling" else 1)
        (board,) = (v["images"][0] for k, v in outputs.items() if k.startswith("IntrinsicReward_Prism"))
        assert board["type"] == "temp"
    saved = outputs["SaveWEBM"]["images"][0]
    assert saved["filename"].endswith(".webm")
    found = metadata(base_dir / "output" / saved["subfolder"] / saved["filename"])
    assert found["workflow"] == {"of": name}
    noted = list(found["intrinsic_reward"].values())
    # The other score node may run before or after the file is saved.
    assert 1 <= len(noted) <= (2 if name == "07 Rank clips by several rewards" else 1)
    if name.startswith("prism"):
        assert noted[0]["head"] == "my_head"
    for entry in noted:
        assert all(isinstance(v, float) for v in entry.get("scores", entry.get("candidates", [{}])[0].get("scores")))


def metadata(path):
    """What a video's container says of itself, JSON decoded; keys in lower case."""
    import av

    with av.open(str(path)) as container:
        return {k.lower(): json.loads(v) for k, v in container.metadata.items() if v.startswith("{")}


def test_the_scores_are_shared_by_the_nodes_selection(comfy):
    latent = {"samples": torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 16, 2, 4, 4), "batch_index": [5, 6, 7], "note": "x"}
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 4, 4, 3)
    select = comfy.node("IntrinsicReward_SelectTopK").execute
    picked, frames, scores, indices = select([0.1, 0.9, 0.5], [2], [latent], [images]).args
    assert picked["samples"][:, 0, 0, 0, 0].tolist() == [1.0, 2.0]
    assert picked["batch_index"] == [6, 7]
    assert picked["note"] == "x"
    assert frames[:, 0, 0, 0].tolist() == [2, 3, 4, 5]
    assert (scores, indices) == ([0.9, 0.5], [1, 2])
    assert select([0.1, 0.9, 0.5], [1], None, [images]).args[0] is None


def test_lists_of_clips_are_selected_from_as_a_whole(comfy):
    """A list comes from a node that ran once per seed; the best clip is not always in its first item."""
    select = comfy.node("IntrinsicReward_SelectTopK").execute
    masks = [torch.full((1, 4, 4), 0.1 * i) for i in range(3)]
    latents = [{"samples": torch.full((1, 16, 2, 4, 4), float(i)), "noise_mask": masks[i]} for i in range(3)]
    images = [torch.full((3, 4, 4, 3), float(i)) for i in range(3)]
    picked, frames, scores, indices = select([0.1, 0.5, 0.9], [2], latents, images).args
    assert picked["samples"][:, 0, 0, 0, 0].tolist() == [2.0, 1.0]
    assert picked["noise_mask"][:, 0, 0].tolist() == pytest.approx([0.2, 0.1])
    assert frames[:, 0, 0, 0].tolist() == [2.0] * 3 + [1.0] * 3
    assert (scores, indices) == ([0.9, 0.5], [2, 1])
    # Batches of two clips each, and clips that differ in length.
    pairs = [{"samples": torch.cat([a["samples"], a["samples"] + 0.5])} for a in latents]
    assert select([0, 1, 2, 9, 4, 5], [1], pairs).args[0]["samples"][:, 0, 0, 0, 0].tolist() == [1.5]
    longer = [torch.zeros(3, 4, 4, 3), torch.ones(5, 4, 4, 3)]
    assert select([0.1, 0.9], [1], None, longer).args[1].shape == (5, 4, 4, 3)
    assert select([0.1, 0.9], [2], None, longer).args[1].shape == (8, 4, 4, 3)
    other_size = [latents[0], {"samples": torch.zeros(1, 16, 2, 8, 8)}]
    assert select([0.1, 0.9], [1], other_size).args[0]["samples"].shape[-1] == 8
    with pytest.raises(ValueError, match="input 'latent': the best clips have shapes .* set k to 1"):
        select([0.1, 0.9], [2], other_size)
    with pytest.raises(ValueError, match="input 'latent': 3 clips for 2 scores"):
        select([0.1, 0.9], [1], latents)
    with pytest.raises(ValueError, match=r"9 frames are not 2 clips of equal length \(in 3 batches\)"):
        select([0.1, 0.9], [1], None, images)


def test_bad_selections_are_named(comfy):
    select = comfy.node("IntrinsicReward_SelectTopK").execute
    latent = [{"samples": torch.zeros(2, 16, 2, 4, 4)}]
    for arguments, message in (
        (([1.0, 2.0], [1]), "connect a batch"),
        (([1.0, 2.0], [3], latent), "3 of 2 scored clips"),
        (([1.0, 2.0, 3.0], [1], latent), "2 clips for 3 scores"),
        (([1.0, 2.0], [1], None, [torch.zeros(5, 4, 4, 3)]), "5 frames are not 2 clips"),
        (([1.0, float("nan")], [1], latent), "candidate 1 scored NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            select(*arguments)
