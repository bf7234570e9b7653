"""What a registry release holds: ComfyUI's publisher leaves out what .comfyignore names, by the rules of .gitignore."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IGNORED = [line for line in (ROOT / ".comfyignore").read_text().split("\n") if line]
FOLDERS = [line.rstrip("/") for line in IGNORED if line.endswith("/")]
SHIPPED = {"docs", "kernels", "locales", "nodes", "trainers", "web", "workflows"}


def test_tests_and_benchmarks_are_left_out():
    assert {".ci", "benchmarks", "tests"} <= set(FOLDERS)


def test_every_folder_is_shipped_or_left_out():
    found = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0].isalpha()}
    made = {"build", "outputs"} | {name for name in found if name.endswith(".egg-info")}
    assert found - made - set(FOLDERS) == SHIPPED


def test_nothing_that_is_shipped_is_left_out_by_its_name():
    """A pattern such as `tests/` matches a folder of that name anywhere."""
    patterns = {line.rstrip("/") for line in IGNORED}
    parts = {part for name in SHIPPED for path in (ROOT / name).rglob("*") for part in path.relative_to(ROOT).parts}
    assert not patterns & parts
