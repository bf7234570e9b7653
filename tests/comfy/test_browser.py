"""The pack in ComfyUI's real frontend: templates, panels, help and languages, in Chromium.

Needs Node.js, Chromium, and playwright-core in the node_modules of the folder PLAYWRIGHT_CORE, this one or the user's; where
one is missing the test skips and says which. BROWSER_SHOTS is a folder for screenshots, and BROWSER_PARTS, such as
"race,gallery", chooses checks by the beginning of their names.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .comfyui_install import PACK_NAME, PACK_ROOT
from .template_runs import DA3_STAND_IN, STAND_INS, TEMPLATES, TemplateServer

CHECK = Path(__file__).resolve().parent / "browser" / "check.mjs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Selectors of what a panel shows after a template has run.
PANELS = {
    "01": [".ir-timeline .ir-curve circle"], "02": [".ir-card", ".ir-bars i"], "03": [".ir-timeline"],
    "04": [".ir-timeline .ir-curve"], "05": [".ir-strip i", ".ir-shell .ir-timeline canvas", ".ir-timeline .ir-legend i"],
    "06": [".ir-timeline .ir-curve polyline"], "08": [".ir-timeline"], "12": [".ir-card", ".ir-bars i"],
    "13": [".ir-card", ".ir-bars i"], "15": [".ir-timeline"], "16": [".ir-timeline"],
}  # fmt: skip
# A word of the translated help page of Geometry Consistency.
WORDS = {"zh": "一致", "ja": "一貫"}

pytestmark = pytest.mark.thorough


def find_playwright() -> str | None:
    """The folder that Node.js resolves playwright-core from, or None."""
    configured = os.environ.get("PLAYWRIGHT_CORE")
    for folder in filter(None, (configured, str(Path.cwd()), str(Path.home()))):
        if (Path(folder) / "node_modules" / "playwright-core").is_dir():
            return folder
    return None


@pytest.fixture
def tools() -> dict:
    """Paths of Chromium and playwright-core; skips where something is missing."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    playwright = find_playwright()
    missing = [
        name
        for name, found in (("node", shutil.which("node")), ("playwright-core", playwright), ("Chromium", browser))
        if not found
    ]
    if missing:
        pytest.skip(f"the browser test needs {', '.join(missing)}")
    return {"chromium": browser, "playwright": playwright}


def widgets(name: str, serial: int) -> dict:
    """Values that make a run of a template short. Clips are wide, as real ones are, since players take the shape of a clip."""
    values = TEMPLATES[name].smaller | TEMPLATES[name].vary(1, serial)
    return {k: 112 if k.endswith(".width") else v for k, v in values.items()}


def make_plan(server: TemplateServer, shots: Path, tools: dict) -> dict:
    names = list(TEMPLATES)
    info = server.get("/object_info")
    own = sorted(name for name in info if name.startswith("IntrinsicReward_"))
    translated = {
        language: json.loads((PACK_ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for language in WORDS
    }
    return {
        **tools, "url": server.url, "pack": PACK_NAME, "shots": str(shots), "stand_ins": STAND_INS | DA3_STAND_IN,
        "templates": {n: {"widgets": widgets(n, serial)} for serial, n in enumerate(names)},
        "panels": {n: PANELS.get(n[:2], []) for n in names},
        "nodes": own, "titles": {n: info[n]["display_name"] for n in own}, "help": WORDS,
        "translated": {k: {n: v["display_name"] for n, v in table.items()} for k, table in translated.items()},
        "videos": sorted(str(p) for p in (server.base / "input" / "clips_0").glob("*.mp4")),
        "parts": os.environ.get("BROWSER_PARTS", "").split(",") if os.environ.get("BROWSER_PARTS") else None,
    }  # fmt: skip


def test_the_real_frontend(comfyui_path, tmp_path, tools, capsys):
    shots = Path(os.environ.get("BROWSER_SHOTS", tmp_path / "shots"))
    shots.mkdir(parents=True, exist_ok=True)
    with TemplateServer(comfyui_path, tmp_path / "base", list(TEMPLATES)) as server:
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps(make_plan(server, shots, tools)), encoding="utf-8")
        done = subprocess.run(
            ["node", str(CHECK), str(plan)], capture_output=True, text=True, encoding="utf-8", timeout=1500
        )
        log = server.log()
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [c for c in checks if c["error"]]
    with capsys.disabled():
        print(f"\nbrowser: {len(checks) - len(failed)} of {len(checks)} checks passed")
        for c in checks:
            print(f"  {c['seconds']:6.1f} s  {c['check']}{'  FAILED' if c['error'] else ''}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not failed, "\n\n".join(f"{c['check']}: {c['error']}" for c in failed)
    assert checks
    assert "Exception during processing" not in log, log[-4000:]
