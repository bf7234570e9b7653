"""What ComfyUI's registry looks for: nothing that is shipped runs other programs, reaches the network, reads the environment,
or runs text as code."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted([ROOT / "__init__.py", *(p for d in ("nodes", "kernels", "trainers") for p in (ROOT / d).rglob("*.py"))])
# Modules that start processes, reach the network, or make objects of bytes by running what the bytes say.
MODULES = {
    "subprocess", "socket", "ssl", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib",
    "webbrowser", "pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "ctypes", "cffi", "pip", "pkg_resources",
    "runpy", "code", "codeop", "huggingface_hub", "urllib3",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
# (module, attribute): environment, shells, other programs, dynamic imports.
ATTRIBUTES = {
    ("os", "environ"), ("os", "environb"), ("os", "getenv"), ("os", "putenv"), ("os", "unsetenv"), ("os", "system"),
    ("os", "popen"), ("os", "startfile"), ("os", "fork"), ("importlib", "import_module"), ("importlib", "reload"),
    ("torch", "load"), ("torch", "hub"), ("sys", "settrace"),
}  # fmt: skip
# What may be used where an argument makes it safe, and arguments that make a function unsafe: the keyword and its value.
SAFE = {("torch", "load"): ("weights_only", True)}
UNSAFE = ("allow_pickle", True)


def findings(source: str) -> list[str]:
    """What a file does that it must not, as "line: what"."""
    tree, found = ast.parse(source), []
    safe = {
        id(call.func) for call in ast.walk(tree)
        if isinstance(call, ast.Call) and (wanted := SAFE.get(_dotted(call.func)))
        and any(k.arg == wanted[0] and isinstance(k.value, ast.Constant) and k.value.value is wanted[1] for k in call.keywords)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name.split(".")[0] for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "").split(".")[0]]
            found += [f"{node.lineno}: {node.module}.{a.name}" for a in node.names if (node.module, a.name) in ATTRIBUTES]
        else:
            names = []
        found += [f"{node.lineno}: import {n}" for n in names if n in MODULES]
        if isinstance(node, ast.keyword) and node.arg == UNSAFE[0] and getattr(node.value, "value", None) is not False:
            found.append(f"{node.value.lineno}: {node.arg}")
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append(f"{node.lineno}: {node.id}")
        dotted = _dotted(node)
        spawns = dotted is not None and dotted[0] == "os" and dotted[1].startswith(("exec", "spawn", "posix_spawn"))
        if (dotted in ATTRIBUTES and id(node) not in safe) or spawns:
            found.append(f"{node.lineno}: {'.'.join(dotted)}")
    return found


def _dotted(node) -> tuple[str, str] | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id, node.attr
    return None


def test_no_shipped_file_does_what_the_registry_forbids():
    assert len(SHIPPED) > 200
    found = {p.relative_to(ROOT).as_posix(): findings(p.read_text(encoding="utf-8")) for p in SHIPPED}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    ["import subprocess", "from urllib.request import urlopen", "import os\nos.environ['A']", "from os import environ",
     "import torch\ntorch.load('a')", "import torch\ntorch.load('a', weights_only=False)", "eval('1')",
     "import numpy as np\nnp.load('a', allow_pickle=True)", "import importlib\nimportlib.import_module('a')",
     "import os\nos.execv('a', [])", "e = __import__"],
)  # fmt: skip
def test_what_is_forbidden_is_found(source):
    assert len(findings(source)) == 1


def test_what_is_safe_is_not_found():
    assert not findings("import torch\ntorch.load('a', weights_only=True)")
    assert not findings("import numpy as np\nnp.load('a', allow_pickle=False)")
    assert not findings("import os\nos.replace('a', 'b')")


def test_requirements_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert stated == project["dependencies"]
    every = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert not [r for r in every if "==" in r or "git+" in r or "@" in r]


# What `comfy node validate` of comfy-cli 1.23 runs, and `comfy node publish` before it uploads; there it only warns.
VALIDATE = [sys.executable, "-m", "ruff", "check", "-q", "--select", "S102,S307,E702"]
needs_ruff = pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")


@needs_ruff
def test_comfy_node_validate_finds_nothing():
    run = subprocess.run([*VALIDATE, "."], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert not run.stdout


@needs_ruff
@pytest.mark.parametrize(("source", "rule"), [("exec(a)", "S102"), ("eval(a)", "S307"), ("a = 1; b = 2", "E702")])
def test_comfy_node_validate_finds_what_it_is_for(source, rule):
    run = subprocess.run([*VALIDATE, "-"], input=source + "\n", cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert rule in run.stdout


@pytest.mark.parametrize(("key", "ratio"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_pictures_for_the_registry(key, ratio):
    """The registry shows what lies at these addresses once the repository's main branch is public."""
    tomllib = pytest.importorskip("tomllib")
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    repository = stated["project"]["urls"]["Repository"]
    base = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    address = stated["tool"]["comfy"][key]
    assert address.startswith(base)
    path = ROOT / address.removeprefix(base)
    assert path.stat().st_size < 200_000
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width * ratio[1] == picture.height * ratio[0]
        # The registry's limit for icons; it has none for banners.
        assert key == "Banner" or picture.width <= 400
