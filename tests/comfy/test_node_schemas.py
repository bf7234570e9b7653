"""What users and their saved workflows see of every node: ids, inputs, help, and how the pack loads."""

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("schema_snapshot.json")
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
HELP, TRANSLATED = ROOT / "web" / "docs", ("ja", "zh")
# The options of these are files and folders of the user.
OPEN_COMBOS = {
    "IntrinsicReward_LoadShellLCC": {"file"},
    "IntrinsicReward_LoadPrism": {"file"},
    "IntrinsicReward_EncodeClips": {"folder"},
    "IntrinsicReward_LoadGeometry": {"file"},
    "IntrinsicReward_GeometryDA3": {"perceptual", "vgg"},
}

# Capital words, and what tells nodes of one name apart in brackets.
TITLE = r"([A-Z0-9][\w-]*|from)( ([A-Z0-9][\w-]*|from))*( \([\w ]+\))?"


def own_nodes(comfy):
    return {name: cls for name, cls in comfy.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("IntrinsicReward_")}


def contract(name, info):
    """What a saved workflow or an API client depends on, the same in every version of ComfyUI."""
    inputs = []
    for section in ("required", "optional"):
        for key in info["input_order"].get(section, []):
            kind, options = info["input"][section][key]
            kept = {k: options[k] for k in ("default", "min", "max", "step", "options", "forceInput") if k in options}
            if key in OPEN_COMBOS.get(name, ()):
                kept.pop("options", None)
            inputs.append([key, section, kind, kept])
    outputs = [list(row) for row in zip(info["output"], info["output_name"], info["output_is_list"], strict=True)]
    kept = {key: info[key] for key in ("display_name", "category", "output_node")}
    return {**kept, "inputs": inputs, "outputs": outputs}


@pytest.fixture(scope="module")
def contracts(comfy):
    return json.loads(json.dumps({n: contract(n, c.GET_NODE_INFO_V1()) for n, c in sorted(own_nodes(comfy).items())}))


@pytest.fixture(scope="module")
def snapshot(contracts):
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(json.dumps(contracts, indent=1) + "\n")
        pytest.fail(f"{SNAPSHOT.name} was missing and has been written; look it over and run again")
    return json.loads(SNAPSHOT.read_text())


def test_saved_workflows_keep_working(contracts, snapshot):
    """Values are saved by position: inputs and outputs may be appended, never moved, renamed, retyped or removed."""
    for name, old in snapshot.items():
        assert name in contracts, f"{name} is gone"
        for part in ("inputs", "outputs"):
            kept = contracts[name][part][: len(old[part])]
            assert len(kept) == len(old[part]), f"{part} of {name}"
            for row, then in zip(kept, old[part], strict=True):
                # An input may take more types than before.
                more = part == "inputs" and set(then[2].split(",")) <= set(row[2].split(","))
                assert row[:2] == then[:2], f"{part} of {name}"
                assert more or row[2] == then[2], f"{part} of {name}"
        for row, then in zip(contracts[name]["inputs"], old["inputs"], strict=False):
            assert set(then[3].get("options", [])) <= set(row[3].get("options", [])), f"an option of {name}.{row[0]} is gone"


def test_snapshot_is_current(contracts, snapshot):
    assert contracts == snapshot, f"after an intended change delete {SNAPSHOT.name} and run this test to write it again"


def test_there_are_twenty_eight_nodes(comfy):
    assert len(own_nodes(comfy)) == 28


def test_execute_takes_the_inputs_in_order(comfy, contracts):
    for name, cls in own_nodes(comfy).items():
        assert list(inspect.signature(cls.execute).parameters) == [row[0] for row in contracts[name]["inputs"]], name


def test_every_node_explains_itself(comfy):
    for name, cls in own_nodes(comfy).items():
        schema = cls.define_schema()
        assert len(schema.description) > 40, name
        assert schema.search_aliases, name
        assert not schema.is_experimental
        assert re.fullmatch(TITLE, schema.display_name), schema.display_name
        for socket in [*schema.inputs, *schema.outputs]:
            assert len(socket.tooltip or "") > 8, f"{name}.{getattr(socket, 'id', socket)}"
        pages = [HELP / f"{name}.md", *(HELP / name / f"{language}.md" for language in TRANSLATED)]
        texts = [page.read_text(encoding="utf-8") for page in pages]
        for page, text in zip(pages, texts, strict=True):
            for socket in schema.inputs:
                assert f"`{socket.id}`" in text, f"{page} does not mention {socket.id}"
        # A translation that is out of date shows by its structure.
        outlines = [[line[:2] for line in text.split("\n") if line.startswith(("#", "|", "- ", "!"))] for text in texts]
        assert all(outline == outlines[0] for outline in outlines), name


def test_no_help_page_without_a_node(comfy):
    assert {p.stem for p in HELP.glob("*.md")} == set(own_nodes(comfy))
    assert {p.name for p in HELP.iterdir() if p.is_dir()} == {*own_nodes(comfy), "images"}


@pytest.mark.parametrize("path", sorted((ROOT / "locales").glob("*/nodeDefs.json")), ids=lambda p: p.parent.name)
def test_translations_name_every_socket(comfy, path):
    translated = json.loads(path.read_text(encoding="utf-8"))
    assert set(translated) == set(own_nodes(comfy))
    for name, cls in own_nodes(comfy).items():
        schema, entry = cls.define_schema(), translated[name]
        assert entry["display_name"]
        assert entry["description"]
        assert set(entry["inputs"]) == {i.id for i in schema.inputs}
        assert all(i["name"] and i["tooltip"] for i in entry["inputs"].values())
        assert set(entry["outputs"]) == {str(n) for n in range(len(schema.outputs))}


def test_every_node_is_in_a_workflow(comfy):
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    assert set(own_nodes(comfy)) <= used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_files(comfy, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".jpg").stat().st_size < 300_000
    assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"])
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        ours = node["type"].startswith("IntrinsicReward_")
        assert node["properties"]["cnr_id"] == ("intrinsic-reward" if ours else "comfy-core")
        if node["type"] in ("UNETLoader", "CLIPLoader", "VAELoader"):
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert f"/{model['directory']}/{model['name']}" in model["url"]
    assert not re.search(r"(/tmp|/root|/home|[A-Z]:\\\\)", path.read_text(encoding="utf-8"))


def test_model_folder(comfy):
    import folder_paths

    paths, suffixes = folder_paths.folder_names_and_paths["shell_lcc"]
    assert paths[-1] == str(comfy.base / "models" / "shell_lcc")
    assert suffixes == {".safetensors", ".pth"}


def test_model_folder_beside_one_of_extra_model_paths(comfy, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "shell_lcc", ([str(tmp_path)], set()))
    for name in ("a.safetensors", "a.txt"):
        (tmp_path / name).touch()
    comfy.module("nodes.shell_lcc_files").FOLDER.register()
    assert folder_paths.get_folder_paths("shell_lcc") == [str(tmp_path), str(comfy.base / "models" / "shell_lcc")]
    assert "a.safetensors" in folder_paths.get_filename_list("shell_lcc")
    assert "a.txt" not in folder_paths.get_filename_list("shell_lcc")


def test_pack_loads_at_once_and_in_silence(server):
    log, *_ = server.log().partition("To see the GUI")
    (seconds,) = re.findall(r"\b(\d+\.\d) seconds: \S*ComfyUI-IntrinsicReward", log)
    # 0.0 or 0.1, but Python's garbage collection of everything loaded before may fall into it.
    assert float(seconds) <= 1.0
    assert not re.search(r"(?i)(warning|error|deprecat).*(intrinsic|shell_lcc)", log)


def test_importing_the_nodes_needs_nothing_that_comfyui_has_not_loaded():
    """What costs seconds, such as diffusers or FAISS, is imported by the function that needs it."""
    core = {"comfy", "comfy_api", "folder_paths", "latent_preview", "nodes", "server"}
    loaded = {"torch", "safetensors", "numpy", "av", "PIL"} | core | sys.stdlib_module_names
    # This one is itself imported by the function that needs it.
    lazy = ROOT / "kernels" / "geometry" / "opencv_tracker.py"
    for path in sorted({*(ROOT / "nodes").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")} - {lazy}):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Import):
                assert {alias.name.split(".")[0] for alias in statement.names} <= loaded, path
            elif isinstance(statement, ast.ImportFrom) and not statement.level:
                assert statement.module.split(".")[0] in loaded, path
