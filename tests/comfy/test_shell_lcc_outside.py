"""What the Shell-LCC nodes tell about tokens outside the band of real ones."""

import logging
import re

import pytest
import torch

from .prism_material import node
from .race_material import load_parts, scene_of, stock
from .shell_lcc_material import FIT, GUIDANCE, REFINE, sheet

UNKNOWN = "does not know such content"


@pytest.fixture(scope="module")
def manifold(comfy):
    return comfy.run(node("FitShellLCC"), latents={"samples": raw(comfy, sheet(12))}, **FIT)[0]


def raw(comfy, z):
    return comfy.module("kernels.latent_space").WAN21.denormalise(z)


def messages(caplog, name):
    return [r for r in caplog.records if r.getMessage().startswith(f"{name}: ")]


def test_known_content_is_not_warned_of(comfy, manifold, caplog):
    latent = {"samples": raw(comfy, sheet(2, seed=4))}
    with caplog.at_level(logging.INFO):
        text = comfy.run(node("ShellLCCScore"), latent=latent, manifold=manifold, frames="latent frames")[5]
        comfy.run(node("ShellLCCRefine"), latent=latent, manifold=manifold, **REFINE)
    assert text.startswith("Distance from the latents of real video; near ")
    assert UNKNOWN not in text
    (told,) = messages(caplog, "Shell-LCC Refine")
    assert told.levelno == logging.INFO
    share = int(re.search(r"(\d+) % of the tokens of the latent", told.getMessage())[1])
    assert share <= 30


def test_unknown_content_is(comfy, manifold, caplog):
    latent = {"samples": raw(comfy, 3 * torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))}
    text = comfy.run(node("ShellLCCScore"), latent=latent, manifold=manifold, frames="latent frames")[5]
    comfy.run(node("ShellLCCRefine"), latent=latent, manifold=manifold, **REFINE)
    assert UNKNOWN in text
    for name in ("Shell-LCC Score", "Shell-LCC Refine"):
        (told,) = messages(caplog, name)
        assert told.levelno == logging.WARNING
        assert UNKNOWN in told.getMessage()


def test_guidance_tells_once_for_a_run(comfy, models_dir, manifold, caplog):
    parts = load_parts(comfy, models_dir, "parity", layers=4)
    (guided,) = comfy.run(node("ShellLCCGuidance"), model=parts.model, manifold=manifold, **GUIDANCE)
    with caplog.at_level(logging.INFO):
        stock(comfy, scene_of(comfy, parts).but(model=guided), 5)
    (told,) = messages(caplog, "Shell-LCC Guidance")
    # The tiny model's clips are noise.
    assert UNKNOWN in told.getMessage()
    # An uncalibrated manifold has no band.
    caplog.clear()
    kernel = manifold.manifold
    calibration, kernel.calibration = kernel.calibration, None
    try:
        stock(comfy, scene_of(comfy, parts).but(model=guided), 6)
    finally:
        kernel.calibration = calibration
    assert not messages(caplog, "Shell-LCC Guidance")
