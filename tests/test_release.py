"""What a registry release holds: ComfyUI's publisher leaves out what .comfyignore names, by the rules of .gitignore."""

import re
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


def test_the_readme_is_for_users_and_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split("\n")) <= 150
    pages = [*ROOT.glob("*.md"), *(p for d in ("docs", "benchmarks", "web") for p in (ROOT / d).rglob("*.md"))]
    links = [(p, link) for p in pages for link in re.findall(r"\]\(([^)#]+)\)", p.read_text(encoding="utf-8"))]
    inside = [(p, link) for p, link in links if not link.startswith(("http://", "https://"))]
    assert len(inside) > 20
    # ComfyUI resolves the pictures of a translated help page, web/docs/<node>/<language>.md, from web/docs.
    help_pages = ROOT / "web" / "docs"
    at = {p: help_pages if help_pages in p.parents else p.parent for p, _ in inside}
    assert not [(p.name, link) for p, link in inside if not (at[p] / link).exists()]
