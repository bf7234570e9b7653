"""The geometry workflows in a running server: what they save, show and record."""

import json
from pathlib import Path

import pytest

from trainers.kernels.files import preference_records
from trainers.kernels.geometry import view_files

from .geometry_material import clip, views
from .random_da3 import NAME, STAND_IN, write_model
from .shell_lcc_material import write_video
from .test_prism_server import metadata
from .tiny_wan import STAND_INS
from .workflow_api import override_inputs, replace_values, to_api

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SAMPLED = {
    "EmptyHunyuanLatentVideo.width": 64, "EmptyHunyuanLatentVideo.height": 64, "EmptyHunyuanLatentVideo.length": 9,
    "KSampler.steps": 2,
}  # fmt: skip
SMALLER = {
    "01 Check a video for consistency": {},
    "03 Most consistent of several clips": SAMPLED,
    "08 Record preferences": SAMPLED,
    "15 Consistency with Depth Anything 3": {
        "IntrinsicReward_GeometryDA3.views": 3, "IntrinsicReward_GeometryDA3.resolution": 140,
    },
    "16 Consistency from saved geometry": {},
}


@pytest.fixture(scope="module")
def material(comfy, server, base_dir, models_dir):
    """The video, the depth model and the geometry that the workflows name."""
    write_video(base_dir / "input" / "clip.mp4", 9)
    write_model(models_dir / "geometry_estimation" / NAME)
    path = base_dir / "output" / "geometry" / "clip_00001_.safetensors"
    view_files.save_views(path, views(clip()))


def run(server, name, changes=None):
    """(the prompt, its history entry, what each class of node showed)."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    prompt = replace_values(to_api(workflow, server.object_info), STAND_INS | STAND_IN)
    prompt = override_inputs(prompt, SMALLER[name] | (changes or {}))
    entry = server.post(prompt, extra_data={"extra_pnginfo": {"workflow": {"of": name}}})
    shown = {}
    for key, value in entry["outputs"].items():
        shown.setdefault(prompt[key]["class_type"], []).append(value)
    return prompt, entry, shown


@pytest.mark.parametrize(("clip", "verdict"), [("rigid room", "consistent"), ("warped room", "inconsistent")])
def test_the_first_template_needs_nothing_and_gives_a_verdict(server, clip, verdict):
    _, _, shown = run(server, "01 Check a video for consistency", {"IntrinsicReward_ExampleClip.clip": clip})
    ((text,),) = (v["text"] for v in shown["IntrinsicReward_GeometryTracks"])
    assert text.startswith(f"3D consistency: {verdict}, score 0.")
    assert sorted(len(v["images"]) for v in shown["PreviewImage"]) == [17, 33]


def test_the_most_consistent_clip_and_its_heat_map_are_saved(server, material, base_dir):
    import av

    _, _, shown = run(server, "03 Most consistent of several clips")
    ((text,),) = (v["text"] for v in shown["IntrinsicReward_GeometryBestOfN"])
    assert "of 4" in text.splitlines()[0]
    assert sorted(line.split(":")[0] for line in text.splitlines()[1:]) == [f"  clip {i}" for i in (1, 2, 3, 4)]
    assert len(shown["IntrinsicReward_GeometryBestOfN"][0]["images"]) == 5
    names = []
    for saved in shown["SaveWEBM"]:
        path = base_dir / "output" / saved["images"][0]["subfolder"] / saved["images"][0]["filename"]
        names.append(path.name)
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9
        (noted,) = metadata(path)["intrinsic_reward"].values()
        assert noted["node"] == "Geometry Best-of-N"
        assert len(noted["scores"]) == 4
    assert [n.rsplit("_", 2)[0] for n in sorted(names)] == ["geometry_best", "geometry_best_heat_map"]


def test_candidates_are_recorded_once_for_each_run(server, material, base_dir):
    folder = base_dir / "output" / "intrinsic_reward_preferences" / "my_preferences"
    prompt, _, shown = run(server, "08 Record preferences")
    ((text,),) = (v["text"] for v in shown["IntrinsicReward_RecordPreference"])
    assert text.startswith("Recorded 4 candidates as ")
    (record,) = preference_records.read(folder)
    assert record.id in text
    wanted = {node["inputs"]["value"] for node in prompt.values() if node["class_type"] == "PrimitiveStringMultiline"}
    assert {record.prompt, record.negative} == wanted
    assert record.model == "wan2.1_t2v_1.3B"
    assert len(record.candidates) == 4
    for candidate in record.candidates:
        assert candidate.scores["flow_residual"] < 0
        assert candidate.geometry.frames == 9
    # The same again is not run again, another seed is.
    run(server, "08 Record preferences")
    assert len(preference_records.read(folder)) == 1
    run(server, "08 Record preferences", {"KSampler.seed": 7})
    assert len(preference_records.read(folder)) == 2


def test_a_video_is_scored_with_depth_anything(server, material, base_dir):
    prompt, entry, shown = run(server, "15 Consistency with Depth Anything 3")
    (saved,) = shown["IntrinsicReward_SaveGeometry"]
    path = base_dir / saved["text"][0].removeprefix("Saved ").partition(":")[0]
    assert path.parent == base_dir / "output" / "geometry"
    assert "3 views of a clip of 9 frames" in saved["text"][0]
    assert view_files.load_views(path).frame_indices == [0, 4, 8]
    (preview,) = (key for key, node in prompt.items() if node["class_type"] == "PreviewImage")
    assert server.images(entry, preview).shape[0] == 3
    assert shown["SaveWEBM"][0]["images"][0]["filename"].startswith("geometry_heat_map")


def test_saved_geometry_is_scored(server, material):
    _, _, shown = run(server, "16 Consistency from saved geometry")
    text = shown["IntrinsicReward_GeometryDA3"][0]["text"][0]
    assert ", score 0." in text.splitlines()[0]
    assert len(shown["PreviewImage"]) == 2


def test_a_name_that_leads_elsewhere_is_refused_before_anything_runs(server, material):
    with pytest.raises(AssertionError, match=r"IntrinsicReward_RecordPreference.*expected the name of one folder"):
        run(server, "08 Record preferences", {"IntrinsicReward_RecordPreference.name": "../elsewhere"})


def test_the_list_of_files_follows_the_disk(server, material, base_dir):
    view_files.save_views(base_dir / "input" / "geometry" / "deeper" / "new.safetensors", views(clip()))
    options = server.object_info("IntrinsicReward_LoadGeometry")["input"]["required"]["file"][1]["options"]
    assert {"geometry/clip_00001_.safetensors [output]", "geometry/deeper/new.safetensors [input]"} <= set(options)
