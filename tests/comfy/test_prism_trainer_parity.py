"""A latent's PRISM score inside ComfyUI is the trainers' score of the same latent and noise. Needs diffusers."""

import pytest
import torch

from . import prism_material
from .prism_material import PROMPT, make_head, node

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def dit():
    """The toy world's transformer as trainers read it."""
    from benchmarks.toy_world import weights
    from trainers.wan import dit as wan_dit

    return wan_dit.load(weights.FOLDER / weights.DIT, last_block=7)


def test_both_sides_describe_the_backbone_alike(dit, toy_backbone):
    assert dit.backbone == toy_backbone


def test_the_score_is_the_trainers(comfy, toy, toy_world, toy_backbone, dit, models_dir):
    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.prism import files
    from trainers.prism.train_loop import Scorer

    path, latent = models_dir / "prism" / "parity.safetensors", prism_material.two_latents()
    make_head(comfy, path, toy_backbone, taps=(3, 7), dimensions=("look", "motion"))
    (head,) = comfy.run(node("LoadPrism"), file=path.name)
    (positive,) = comfy.run("CLIPTextEncode", clip=toy.clip, text=PROMPT)
    mean, clips, text = prism_material.score(comfy, toy, positive, head, latent)
    scorer = Scorer(dit, files.load(path).head)
    words = toy_world.text.words([PROMPT, PROMPT])
    z = WAN21.normalise(latent["samples"])
    theirs = []
    with torch.no_grad():
        for draw in range(2):
            noise = torch.randn((1, 16, 5, 8, 8), generator=torch.Generator().manual_seed(3 + draw))
            for sigma in (0.2, 0.6):
                theirs.append(scorer(sigma * noise + (1 - sigma) * z, torch.full((2,), sigma), words))
    theirs = torch.stack(theirs).mean(dim=0)
    spread = float(theirs.std())
    torch.testing.assert_close(torch.tensor(clips), theirs.mean(dim=1), rtol=1e-3, atol=1e-3 * spread)
    assert mean == pytest.approx(sum(clips) / 2)
    assert f"look {float(theirs[0, 0]):.3f}" in text
    assert "Best: clip" in text


