"""The pictures of docs/panels.md and docs/templates.md: panels and templates in ComfyUI's real frontend.

Panels show the toy world's model and manifold; small files stand in for those that the templates name.

    PLAYWRIGHT_CORE=/path/to/folder python -m benchmarks.panel_pictures --comfyui ComfyUI --output docs/images/panels

Runs in ComfyUI's own Python with this pack's test dependencies; needs Node.js, playwright-core and Chromium.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from PIL import Image

from benchmarks.command_line import make_parser
from tests.comfy.comfyui_install import make_base_directory
from tests.comfy.comfyui_server import ComfyUIServer
from tests.comfy.template_runs import DA3_STAND_IN, STAND_INS, TEMPLATES, write_depth_model, write_material
from tests.comfy.test_browser import BROWSERS, find_playwright
from trainers.kernels.latent_space import WAN21
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.evaluation import score, tokens
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold, save
from trainers.latents.read import list_clips, read_clip

from .toy_world import export, weights

SCRIPT = Path(__file__).with_name("panel_pictures.mjs")
QUALITY, WIDTH = 80, 1200


def write_manifold(path: Path) -> None:
    """A manifold of the toy world's clips."""
    clips = [read_clip(r) for r in list_clips([weights.FOLDER / weights.LATENTS], WAN21)]
    manifold = ShellManifold(fit_anchors(torch.cat([tokens(c) for c in clips[:200]]), 1024), WAN21, name="toy")
    manifold.calibration = calibrate([score(manifold, c) for c in clips[200:240]])
    save(manifold, path)


def main(argv=None) -> None:
    parser = make_parser("benchmarks.panel_pictures", __doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args(argv)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base, shots = make_base_directory(Path(folder) / "base"), Path(folder) / "shots"
        shots.mkdir()
        export.to_comfyui(base / "models")
        write_material(base, list(TEMPLATES))
        write_depth_model(args.comfyui.resolve(), base)
        for real, small in (STAND_INS | DA3_STAND_IN).items():
            for path in (base / "models").rglob(small):
                shutil.copy(path, path.with_name(real))
        write_manifold(base / "models" / "shell_lcc" / "toy_manifold.safetensors")
        head = sorted((weights.FOLDER / "prism").glob("*.safetensors"))[0].name
        with ComfyUIServer(args.comfyui.resolve(), base) as server:
            subprocess.run(
                ["node", str(SCRIPT), server.url, browser, find_playwright(), str(shots)],
                check=True, env={**os.environ, "TOY_HEAD": head},
            )  # fmt: skip
        for path in sorted(shots.glob("*.png")):
            picture = Image.open(path).convert("RGB")
            picture.thumbnail((WIDTH, WIDTH))
            picture.save(args.output / f"{path.stem}.jpg".replace(" ", "_"), quality=QUALITY)
            print(path.stem)


if __name__ == "__main__":
    main()
