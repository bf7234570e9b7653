"""Turns a workflow file as the ComfyUI frontend saves it into the API format that /prompt takes.

This repeats what the frontend's graphToPrompt does, for the plain graphs of this pack's own workflows: no subgraphs, no muted
or bypassed nodes. Anything it does not know raises WorkflowError, so that a workflow that drifted from the node schemas fails.
"""

import copy

NOTES = {"Note", "MarkdownNote"}
REROUTE = "Reroute"
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", DYNAMIC_COMBO}
VALUE_TYPES = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,)}
NUMBERS = {"INT", "FLOAT"}
SEED_NAMES = {"seed", "noise_seed"}
CONTROL_VALUES = {"fixed", "increment", "decrement", "randomize", "increment-wrap"}
MUTED, BYPASSED = 2, 4


class WorkflowError(ValueError):
    """The workflow cannot be converted, or does not fit the node schemas."""


def to_api(workflow, object_info):
    """API-format prompt of a UI-format workflow; `object_info(class_id)` returns a node's schema as /object_info gives it."""
    if workflow.get("definitions", {}).get("subgraphs"):
        raise WorkflowError("subgraphs are not supported")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = dict(_link(link) for link in workflow["links"])
    prompt = {}
    for node in nodes.values():
        if node["type"] in NOTES or node["type"] == REROUTE:
            continue
        if node.get("mode", 0) in (MUTED, BYPASSED):
            raise WorkflowError(f"{_label(node)} is muted or bypassed")
        inputs = _widget_inputs(node, object_info(node["type"]))
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = _origin(slot["link"], nodes, links)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def replace_values(prompt, replacements):
    """Copy of a prompt in which every input equal to a key of `replacements`, such as a model's file name, has its value."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, str) and value in replacements:
                node["inputs"][name] = replacements[value]
    return prompt


def override_inputs(prompt, overrides):
    """Copy of a prompt with widget inputs set by "ClassId.input", such as {"KSampler.steps": 2}.

    Each one must exist as a widget in the prompt, so that a test notices when a workflow no longer has the node it shrinks.
    """
    prompt = copy.deepcopy(prompt)
    for target, value in overrides.items():
        class_id, _, name = target.partition(".")
        nodes = [node for node in prompt.values() if node["class_type"] == class_id and name in node["inputs"]]
        nodes = [node for node in nodes if not isinstance(node["inputs"][name], list)]
        if not nodes:
            raise WorkflowError(f"no node has the widget {target}")
        for node in nodes:
            node["inputs"][name] = value
    return prompt


def _label(node):
    return f"node {node['id']} ({node['type']})"


def _link(link):
    # The older array form and the newer object form are both in use.
    if isinstance(link, dict):
        return link["id"], (link["origin_id"], link["origin_slot"])
    return link[0], (link[1], link[2])


def _origin(link_id, nodes, links):
    origin_id, slot = links[link_id]
    node = nodes[origin_id]
    if node["type"] == REROUTE:
        upstream = node["inputs"][0].get("link")
        if upstream is None:
            raise WorkflowError(f"{_label(node)} has no input")
        return _origin(upstream, nodes, links)
    return [str(origin_id), slot]


def _widget_inputs(node, info):
    values = node.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(values)
    remaining = list(values)
    inputs = {}
    _take_widgets(node, info["input"], "", remaining, inputs)
    if _has_upload_button(info["input"]) and remaining:
        remaining.pop(0)
    if remaining:
        raise WorkflowError(f"{_label(node)} has {len(remaining)} widget values more than its schema: {remaining}")
    return inputs


def _take_widgets(node, schema, prefix, remaining, inputs):
    for name, spec in _widgets(schema):
        kind, options = _kind(spec)
        name = prefix + name
        if not remaining:
            raise WorkflowError(f"{_label(node)} has no value for the widget {name}")
        value = remaining.pop(0)
        if not isinstance(value, VALUE_TYPES.get(kind, object)) or (kind in NUMBERS and isinstance(value, bool)):
            raise WorkflowError(f"{_label(node)} has {value!r} for the {kind} widget {name}")
        # An empty combo is saved as null and left out of the prompt.
        if value is not None:
            inputs[name] = value
        if _has_control(name, kind, options):
            control = remaining.pop(0) if remaining else None
            if control not in CONTROL_VALUES:
                raise WorkflowError(f"{_label(node)} has {control!r} for the seed control of {name}")
            if kind == "COMBO" and remaining:
                # The control of a combo brings its filter text along.
                remaining.pop(0)
        if kind == DYNAMIC_COMBO:
            _take_widgets(node, _chosen_option(node, options, value), f"{name}.", remaining, inputs)


def _widgets(schema):
    for section in ("required", "optional"):
        for name, spec in schema.get(section, {}).items():
            kind, options = _kind(spec)
            if kind in WIDGET_TYPES and not options.get("forceInput"):
                yield name, spec


def _kind(spec):
    options = spec[1] if len(spec) > 1 else {}
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    return options.get("widgetType", kind), options


def _has_control(name, kind, options):
    return bool(options.get("control_after_generate", kind == "INT" and name in SEED_NAMES))


def _chosen_option(node, options, value):
    for option in options["options"]:
        if option["key"] == value:
            return option["inputs"]
    raise WorkflowError(f"{_label(node)} has no option {value!r}")


def _has_upload_button(schema):
    specs = [spec for section in ("required", "optional") for spec in schema.get(section, {}).values()]
    return any(key.endswith("_upload") and on for spec in specs for key, on in _kind(spec)[1].items())
