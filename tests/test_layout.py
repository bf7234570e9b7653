"""The layout's rules, each with the reason why breaking it is expensive."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [
    p
    for p in ROOT.rglob("*.py")
    if p.relative_to(ROOT).parts[0] in ("__init__.py", "nodes", "kernels", "trainers")
]
# What the registry's scanner flags, even once and even in a comment: a flagged version cannot be installed.
TRIPWIRES = re.compile(
    r"os\.environ|os\.getenv|subprocess|urllib|requests\.|import socket|importlib\.import_module|pickle"
    r"|(?<![\w.])(?:eval|exec)\(|\.eval\(\)|nn\.Linear\(|\.cuda\(|torch\.autocast|empty_cache"
)


NAMESPACES = [
    "nodes", "kernels", "kernels/files", "kernels/geometry", "kernels/prism", "kernels/rewards", "kernels/shell_lcc",
    "kernels/tuning", "kernels/video",
]  # fmt: skip


@pytest.mark.parametrize("folder", NAMESPACES)
def test_namespace_folders_have_no_init(folder):
    """nodes/__init__.py would shadow ComfyUI's nodes.py, kernels/__init__.py Hugging Face's kernels package."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_there_is_something_to_check():
    assert len(SHIPPED) > 15


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_code_is_clean(path):
    text = path.read_text(encoding="ascii")
    found = [f"{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if TRIPWIRES.search(line)]
    assert not found, found


def imported_modules(path: Path) -> set[str]:
    """Every module name that a file imports, relative ones with their dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", [p for p in SHIPPED if "kernels" in p.parts], ids=lambda p: p.name)
def test_kernels_know_neither_comfyui_nor_trainers(path):
    foreign = r"\.*(comfy|folder_paths|nodes|trainers|diffusers|accelerate)\b"
    assert not {n for n in imported_modules(path) if re.match(foreign, n)}


@pytest.mark.parametrize("path", [p for p in SHIPPED if "nodes" in p.parts], ids=lambda p: p.name)
def test_nodes_do_not_import_trainers(path):
    assert not {n for n in imported_modules(path) if "trainers" in n}


COMMANDS = {
    "pairs", "prism", "shell_lcc", "geometry", "encode", "demo", "demo_clips", "dpo", "shell_reward", "compare",
}  # fmt: skip
ROOMS = {"running", "wan", "latents", "video", "preferences", "scorers", "tuning", "reporting"}


def imports_at_start(path: Path) -> set[Path]:
    """The repository's modules that a shipped file imports when it is imported, as files; packages as their folders."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        base = folder.joinpath(*(node.module or "").split("."))
        if not base.exists() and not base.with_suffix(".py").exists():
            # trainers reach kernels/ as trainers.kernels.
            base = ROOT.joinpath(*(node.module or "").split("."))
        targets = [base / a.name for a in node.names] if base.is_dir() else []
        found |= {t.with_suffix(".py") for t in targets if t.with_suffix(".py").is_file()}
        if base.with_suffix(".py").is_file():
            found.add(base.with_suffix(".py"))
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "trainers").parts[0].removesuffix(".py")


TRAINERS = [p for p in SHIPPED if p.is_relative_to(ROOT / "trainers") and p.name != "__init__.py"]


def test_every_room_of_the_trainers_is_known():
    names = {p.name.removesuffix(".py") for p in (ROOT / "trainers").iterdir() if p.name != "__pycache__"}
    assert names == COMMANDS | ROOMS | {"__init__"}
    # Ten commands and what they share: more would need another level of folders.
    assert len(names) <= 20


@pytest.mark.parametrize("path", TRAINERS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_is_general_lies_in_a_shared_room(path):
    """A command that imports another one's package would carry it along, and what they share could not be found."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == len(path.relative_to(ROOT).parts) - 1:
            # Relative to trainers/ itself, at the top or inside a function: `from ..prism import x`, `from .. import prism`.
            named |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    assert named <= ROOMS | {"kernels"} | {room_of(path)}


def test_there_is_no_import_circle():
    edges = {p: imports_at_start(p) for p in SHIPPED}
    assert edges[ROOT / "trainers" / "scorers" / "prism.py"] >= {ROOT / "kernels" / "prism" / "files.py"}
    done, open_ = set(), []

    def visit(path):
        if path in open_:
            raise AssertionError(" -> ".join(str(p.relative_to(ROOT)) for p in [*open_[open_.index(path) :], path]))
        if path in done:
            return
        open_.append(path)
        for other in sorted(edges.get(path, ())):
            visit(other)
        open_.pop()
        done.add(path)

    for path in SHIPPED:
        visit(path)


def test_root_imports_nothing(pack):
    """The pack's import is on the path of every ComfyUI start, and pytest imports the root as well."""
    code = (
        "import sys, importlib.util as u; before = set(sys.modules);"
        f"s = u.spec_from_file_location('p', r'{ROOT / '__init__.py'}', submodule_search_locations=[r'{ROOT}']);"
        "m = u.module_from_spec(s); sys.modules['p'] = m; s.loader.exec_module(m);"
        "print(sorted(set(sys.modules) - before - {'p'})); assert m.WEB_DIRECTORY"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_trainers_reach_the_kernels_beside_hugging_faces():
    """`from kernels...` would find Hugging Face's package of that name where it is installed."""
    out = subprocess.run(
        [sys.executable, "-c", "import trainers.kernels.files.header as f; print(f.__file__)"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    assert Path(out.strip()) == ROOT / "kernels" / "files" / "header.py"


def test_requirements_equal_the_projects_dependencies():
    """ComfyUI-Manager installs requirements.txt, the registry reads pyproject.toml."""
    declared = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)
    assert sorted(re.findall(r'"([^"]+)"', declared)) == sorted((ROOT / "requirements.txt").read_text().split())


def test_extras_have_ranges_and_constraints_cover_them():
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"^\[project.optional-dependencies\](.*?)^\[", text, re.M | re.S).group(1)
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    for requirement in re.findall(r'"([^"]+)"', extras):
        assert "==" not in requirement, f"{requirement}: a pin breaks other packs' installations"
        assert re.match(r"[\w-]+", requirement).group(0) in pinned


def test_version_is_said_once_alike():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'VERSION = "{version}"' in (ROOT / "kernels" / "version.py").read_text()


def test_what_the_contributors_guide_names_exists():
    """A reader who looks for a thing takes its path from there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:nodes|kernels|trainers|tests|benchmarks)/[\w/]+\.(?:py|json))`", text)
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).is_file()]
    for name, function in (("kernels/geometry/track_verdict.py", "judge"), ("kernels/geometry/dense.py", "_judge"),
                           ("kernels/prism/accuracy.py", "tie_threshold")):  # fmt: skip
        assert f"def {function}(" in (ROOT / name).read_text()
