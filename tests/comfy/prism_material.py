"""A PRISM head with random weights, written where ComfyUI looks for heads, for the tests of the PRISM nodes."""

import torch

# What the tests on the toy world's model share: a caption, and how PRISM Score reads a latent.
PROMPT = "a red ball in a wood room, fast orbit"
SCORE = {"sigmas": "0.2, 0.6", "draws": 2, "seed": 3}


def node(name):
    """The node id of one of this pack's nodes."""
    return f"IntrinsicReward_{name}"


def make_head(comfy, path, backbone, seed=0, space="wan21", **options):
    """Write a random head for a backbone to `path`; `options` replace fields of its HeadConfig."""
    files, heads = comfy.module("kernels.prism.files"), comfy.module("kernels.prism.head")
    space = comfy.module("kernels.latent_space").by_id(space)
    torch.manual_seed(seed)
    config = heads.HeadConfig(backbone.width, **({"dim": 64, "heads": 4, "layers": 3} | options))
    head = heads.PrismHead(config)
    for p in head.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    path.parent.mkdir(exist_ok=True)
    files.save(files.LoadedHead(head, backbone, space, (0.05, 0.99), name=path.stem), path)


def two_latents():
    """LATENT of two random clips of the toy world's shape, not normalised."""
    from trainers.kernels.latent_space import WAN21

    z = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"samples": WAN21.denormalise(z)}


def score(comfy, toy, positive, head, latent, model=None, **changes):
    """The outputs (mean, scores, text) of PRISM Score on the toy world's model, or on `model`."""
    inputs = {"model": model or toy.model, "head": head, "positive": positive, "latent": latent, **SCORE, **changes}
    return comfy.run(node("PrismScore"), **inputs)
