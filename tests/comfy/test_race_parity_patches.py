"""A race against the stock samplers, for every node of ComfyUI that patches a model.

With one candidate, and for the winner of three with the finish "restart", the clip must be the stock node's bit for bit. With
"continue" it must be so for one candidate at a time, and up to rounding in batches. Where a race cannot keep this it must
refuse in one sentence. The tests walk ComfyUI's registry, so that a new core node joins them by itself.
"""

import pytest
import torch

from .prism_material import node
from .race_material import SIDE, NotApplicableError, load_parts, output_of, problems, scene_of
from .shell_lcc_material import FIT, GUIDANCE, sheet

# Values where the node's default does nothing on a small network or a short clip.
SETTINGS = {
    "SkipLayerGuidanceDiT": {"double_layers": "2", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "2", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0},
    "APG": {"momentum": 0.5},
    "EasyCache": {"reuse_threshold": 9.0},
    "LazyCache": {"reuse_threshold": 9.0},
    "ContextWindowsManual": {"context_length": 2, "context_overlap": 1, "dim": 2},
    "WanContextWindowsManual": {"context_length": 5, "context_overlap": 1},
    "CFGOverride": {"cfg": 2.0, "start_percent": 0.0, "end_percent": 1.0},
    "TemporalScoreRescaling": {"tsr_k": 0.9, "tsr_sigma": 1.0},
    "NAGuidance": {"nag_scale": 3.0},
}
# Not sampled here: it needs a C++ compiler, which a test machine may lack.
NOT_RUN = {"TorchCompileModel"}
# Nodes that were found to change a race, each in its own way.
KNOWN = {
    "APG", "EasyCache", "LazyCache", "Mahiro", "SkipLayerGuidanceDiT", "TemporalScoreRescaling", "WanContextWindowsManual",
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(comfy, models_dir):
    return load_parts(comfy, models_dir, "parity", layers=4)


@pytest.fixture(scope="module")
def scene(comfy, parts):
    return scene_of(comfy, parts)


def apply(comfy, class_id: str, model, parts):
    """A core node applied to a model, with its defaults and SETTINGS. Raises NotApplicableError."""
    values = {
        "MODEL": model, "CONDITIONING": parts.positive, "VAE": parts.vae, "CLIP": parts.clip,
        "IMAGE": torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0)),
        "LATENT_OPERATION": lambda latent, **_: 0.9 * latent,
    }  # fmt: skip
    index = [str(t) for t in comfy.node(class_id).RETURN_TYPES].index("MODEL")
    return output_of(comfy, class_id, values, index, **SETTINGS.get(class_id, {}))


def model_nodes(comfy) -> list[str]:
    """Ids of ComfyUI's own nodes that take one model and give it back."""
    out = []
    for class_id, cls in sorted(comfy.nodes.NODE_CLASS_MAPPINGS.items()):
        if class_id.startswith(("IntrinsicReward_", "Test")) or class_id in NOT_RUN:
            continue
        kinds = [kind for kind, *_ in cls.INPUT_TYPES().get("required", {}).values()]
        if "MODEL" in [str(t) for t in getattr(cls, "RETURN_TYPES", None) or ()] and kinds.count("MODEL") == 1:
            out.append(class_id)
    return out


def walk(comfy, scene, head, patched, class_ids, **options) -> tuple[list[str], set[str]]:
    """(problems, ids of the nodes that were tried). patched(class_id) -> the model."""
    wrong, tried = [], set()
    for class_id in class_ids:
        try:
            wrong += problems(comfy, scene.but(model=patched(class_id)), head, name=class_id, **options)
            tried.add(class_id)
        except NotApplicableError:
            continue
    return wrong, tried


@pytest.mark.thorough
def test_every_patch(comfy, parts, scene):
    wrong, tried = walk(comfy, scene, parts.head, lambda i: apply(comfy, i, parts.model, parts), model_nodes(comfy))
    assert not wrong, "\n".join(wrong)
    assert tried >= KNOWN
    assert len(tried) >= 35, sorted(tried)


@pytest.mark.parametrize("order", ["guidance first", "guidance last"])
def test_every_patch_with_shell_lcc_guidance(comfy, parts, scene, order):
    (manifold, *_) = comfy.run(node("FitShellLCC"), latents={"samples": 2 * sheet(6)}, **FIT)

    def guided(model):
        return comfy.run(node("ShellLCCGuidance"), model=model, manifold=manifold, **GUIDANCE)[0]

    def patched(class_id):
        if order == "guidance first":
            return apply(comfy, class_id, guided(parts.model), parts)
        return guided(apply(comfy, class_id, parts.model, parts))

    # Every node before the guidance; after it those that are known for what they change.
    class_ids = sorted(KNOWN) if order == "guidance first" else model_nodes(comfy)
    options = {"finishes": ("continue",), "chunks": (1,), "alone": False}
    wrong, tried = walk(comfy, scene, parts.head, patched, class_ids, **options)
    assert not wrong, "\n".join(wrong)
    assert tried >= KNOWN
