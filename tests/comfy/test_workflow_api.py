"""Conversion of UI-format workflows to API format."""

import copy

import pytest

from .workflow_api import WorkflowError, override_inputs, replace_values, to_api

SCHEMAS = {
    "Loader": {"input": {"required": {"file": [["a.safetensors", "b.safetensors"], {}]}}},
    "Encode": {"input": {"required": {"text": ["STRING", {"multiline": True}], "source": ["MODEL"]}}},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "cfg": ["FLOAT", {"default": 8.0}],
                "sampler": ["COMBO", {"options": ["euler", "heun"]}],
            },
            "optional": {"tiled": ["BOOLEAN", {"default": False}], "sigma": ["FLOAT", {"forceInput": True}]},
        }
    },
    "Resize": {
        "input": {
            "required": {
                "mode": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "scale", "inputs": {"required": {"factor": ["FLOAT", {}]}}},
                            {"key": "size", "inputs": {"required": {"width": ["INT", {}], "seed": ["INT", {}]}}},
                        ]
                    },
                ],
                "method": [["area", "nearest"]],
            }
        }
    },
    "LoadImage": {"input": {"required": {"image": [["example.png"], {"image_upload": True}]}}},
}

WORKFLOW = {
    "nodes": [
        {"id": 1, "type": "Loader", "widgets_values": ["a.safetensors"]},
        {"id": 2, "type": "Reroute", "inputs": [{"name": "", "link": 10}]},
        {
            "id": 3,
            "type": "Sample",
            "inputs": [{"name": "model", "link": 11}, {"name": "steps", "widget": {"name": "steps"}, "link": 12}],
            "widgets_values": [5, "randomize", 20, 7.5, "euler", True],
        },
        {"id": 4, "type": "Steps", "widgets_values": []},
        {"id": 5, "type": "MarkdownNote", "widgets_values": ["read me"]},
    ],
    "links": [
        [10, 1, 0, 2, 0, "MODEL"],
        {"id": 11, "origin_id": 2, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "MODEL"},
        [12, 4, 1, 3, 1, "INT"],
    ],
}


def object_info(class_id):
    return SCHEMAS.get(class_id, {"input": {}})


def test_widgets_links_notes_and_seed_control():
    assert to_api(WORKFLOW, object_info) == {
        "1": {"class_type": "Loader", "inputs": {"file": "a.safetensors"}},
        "3": {
            "class_type": "Sample",
            "inputs": {"model": ["1", 0], "seed": 5, "steps": ["4", 1], "cfg": 7.5, "sampler": "euler", "tiled": True},
        },
        "4": {"class_type": "Steps", "inputs": {}},
    }


@pytest.mark.parametrize("mode", [2, 4])
def test_muted_and_bypassed_nodes_raise(mode):
    workflow = copy.deepcopy(WORKFLOW)
    workflow["nodes"][0]["mode"] = mode
    with pytest.raises(WorkflowError, match="muted or bypassed"):
        to_api(workflow, object_info)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([5, "randomize", 20, 7.5, "euler"], "no value for the widget tiled"),
        ([5, "randomize", 20, 7.5, "euler", True, 1], "1 widget values more"),
        ([5, 20, 7.5, "euler", True], "seed control of seed"),
        ([5, "fixed", 7.5, "euler", 20, True], "'euler' for the FLOAT widget cfg|7.5 for the INT widget steps"),
    ],
)
def test_drifted_widget_values_raise(values, message):
    workflow = copy.deepcopy(WORKFLOW)
    workflow["nodes"][2]["widgets_values"] = values
    with pytest.raises(WorkflowError, match=message):
        to_api(workflow, object_info)


def test_dynamic_combo_takes_the_chosen_option():
    # The frontend gives a seed its control widget by name, and inside a dynamic combo the name has a prefix.
    node = {"id": 1, "type": "Resize", "widgets_values": ["size", 64, 32, "area"]}
    prompt = to_api({"nodes": [node], "links": []}, object_info)
    assert prompt["1"]["inputs"] == {"mode": "size", "mode.width": 64, "mode.seed": 32, "method": "area"}


def test_upload_button_has_a_value_of_its_own():
    node = {"id": 1, "type": "LoadImage", "widgets_values": ["example.png", "image"]}
    assert to_api({"nodes": [node], "links": []}, object_info)["1"]["inputs"] == {"image": "example.png"}


def test_empty_combo_is_left_out():
    node = {"id": 1, "type": "Loader", "widgets_values": [None]}
    assert to_api({"nodes": [node], "links": []}, object_info)["1"]["inputs"] == {}


def test_replacing_model_files_leaves_the_original_alone():
    prompt = to_api(WORKFLOW, object_info)
    replaced = replace_values(prompt, {"a.safetensors": "tiny.safetensors"})
    assert replaced["1"]["inputs"]["file"] == "tiny.safetensors"
    assert prompt["1"]["inputs"]["file"] == "a.safetensors"


def test_overriding_widgets():
    prompt = to_api(WORKFLOW, object_info)
    assert override_inputs(prompt, {"Sample.cfg": 1.0})["3"]["inputs"]["cfg"] == 1.0
    with pytest.raises(WorkflowError, match="Sample.steps"):
        override_inputs(prompt, {"Sample.steps": 2})
