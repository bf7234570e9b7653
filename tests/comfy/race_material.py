"""Runs of the Best-of-N nodes and of the stock sampler nodes on the same inputs, and their comparison."""

from dataclasses import dataclass, field, replace

import torch

from .prism_material import make_head, node
from .tiny_wan import TEXT_DIM, UMT5_NAME, VAE_NAME, wan_dit

STEPS = 4
# Before steps 1 and 3 of the schedule of four steps at the model's own shift of 8.
CHECKPOINTS = "0.97, 0.85"
FRAMES, SIDE = 9, 32
# Rounding of fp32 in a batch, over the steps of a run.
ROUNDING = 2e-4
# Values of widgets that have no default.
PLAIN = {"INT": 1, "FLOAT": 1.0, "STRING": "", "BOOLEAN": False}
# What a race says to somebody whose graph it cannot run.
REFUSALS = (
    "the model samples in several context windows",
    "another node runs the model several times for one evaluation",
    "the reward reads one prompt",
    "no prompt is active at sigma",
    "the prompt has an area",
    "the sampler chooses its own noise levels",
)


class NotApplicableError(Exception):
    """A node is not for this model."""


@dataclass(frozen=True)
class Parts:
    """Outputs of the stock loaders, and a head for the model."""

    model: object
    positive: list
    negative: list
    vae: object
    clip: object
    head: object


@dataclass(frozen=True)
class Scene:
    """What a sampler node is connected to. guider: a function of the model, None for KSampler."""

    model: object
    positive: list
    negative: list
    latent: dict
    cfg: float = 5.0
    sampler: object = "euler"
    scheduler: str = "simple"
    guider: object = None
    clips: int = 1
    known: dict = field(default_factory=dict, compare=False)

    def but(self, **changes) -> "Scene":
        return replace(self, known={}, **changes)

    def sampling(self, seed: int) -> dict:
        return {
            "model": self.model, "positive": self.positive, "negative": self.negative, "latent_image": self.latent,
            "seed": seed, "steps": STEPS, "cfg": self.cfg, "sampler_name": self.sampler, "scheduler": self.scheduler,
            "denoise": 1.0,
        }  # fmt: skip


def load_parts(comfy, models_dir, name: str, head: dict | None = None, **options) -> Parts:
    """The tiny model with `options` of `wan_dit`, and a head with the options `head`."""
    from safetensors.torch import save_file

    path = models_dir / "diffusion_models" / f"{name}.safetensors"
    if not path.exists():
        save_file(wan_dit(**options), path)
    (model,) = comfy.run("UNETLoader", unet_name=path.name, weight_dtype="default")
    (clip,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    (vae,) = comfy.run("VAELoader", vae_name=VAE_NAME)
    # Embeddings of a few words: padded to Wan's 512, most of the time goes into the text.
    prompts = [prompt(seed) for seed in (0, 1)]
    backbone = comfy.module("kernels.prism.backbone").of_wan(model.model.diffusion_model.state_dict())
    make_head(comfy, models_dir / "prism" / f"{name}_head.safetensors", backbone, **({"taps": (1, 2)} | (head or {})))
    (loaded,) = comfy.run(node("LoadPrism"), file=f"{name}_head.safetensors")
    return Parts(model, *prompts, vae, clip, loaded)


def prompt(seed: int, words: int = 8) -> list:
    """A CONDITIONING of a random prompt."""
    text = 0.1 * torch.randn(1, words, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    return [[text, {"pooled_output": None}]]


def scene_of(comfy, parts: Parts, batch_size: int = 1, side: int = SIDE) -> Scene:
    """KSampler on an empty latent."""
    (latent,) = comfy.run("EmptyHunyuanLatentVideo", width=side, height=side, length=FRAMES, batch_size=batch_size)
    return Scene(parts.model, parts.positive, parts.negative, latent, clips=batch_size)


def stock(comfy, scene: Scene, seed: int) -> torch.Tensor:
    """The stock sampler's latent, computed once."""
    if seed not in scene.known:
        if scene.guider is None:
            (out,) = comfy.run("KSampler", **scene.sampling(seed))
        else:
            (noise,) = comfy.run("RandomNoise", noise_seed=seed)
            out, _ = comfy.run("SamplerCustomAdvanced", noise=noise, **advanced(comfy, scene))
        scene.known[seed] = out["samples"]
    return scene.known[seed]


def advanced(comfy, scene: Scene) -> dict:
    """Inputs of SamplerCustomAdvanced, without the noise."""
    sampler = scene.sampler
    if isinstance(sampler, str):
        (sampler,) = comfy.run("KSamplerSelect", sampler_name=sampler)
    (sigmas,) = comfy.run("BasicScheduler", model=scene.model, scheduler=scene.scheduler, steps=STEPS, denoise=1.0)
    return {"guider": scene.guider(scene.model), "sampler": sampler, "sigmas": sigmas, "latent_image": scene.latent}


def output_of(comfy, class_id: str, values: dict, index: int = 0, **settings):
    """An output of a core node with its defaults. values: by the name or the type of an input; settings: by name.

    Raises NotApplicableError where there is no value for an input, or where the node refuses them.
    """
    inputs = {}
    for name, (kind, *options) in comfy.node(class_id).INPUT_TYPES().get("required", {}).items():
        options = options[0] if options else {}
        if name in settings:
            inputs[name] = settings[name]
        elif name in values:
            inputs[name] = values[name]
        elif isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else options.get("options", [])
            if not choices:
                raise NotApplicableError(f"has no file to choose for {name}")
            inputs[name] = options.get("default", choices[0])
        elif kind in values:
            inputs[name] = values[kind]
        elif "default" in options or kind in PLAIN:
            inputs[name] = options.get("default", PLAIN.get(kind))
        else:
            raise NotApplicableError(f"needs {kind}")
    try:
        return comfy.run(class_id, **inputs)[index]
    except Exception as e:
        raise NotApplicableError(f"raises {type(e).__name__}: {e}") from e


def race(comfy, scene: Scene, head, seed: int = 5, **changes):
    """(samples, scores, seeds, report) of PRISM Best-of-N."""
    plan = {"candidates": 3, "keep": 1, "checkpoints": CHECKPOINTS, "finish": "restart", "chunk": 1} | changes
    if scene.guider is None:
        out, scores, seeds, text, _ = comfy.run(node("PrismKSampler"), head=head, **scene.sampling(seed), **plan)
    else:
        (noise,) = comfy.run("RandomNoise", noise_seed=seed)
        inputs = advanced(comfy, scene)
        out, scores, seeds, text, _ = comfy.run(node("PrismBestOfN"), noise=noise, head=head, **inputs, **plan)
    return out["samples"], scores, seeds, text


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative norm of the difference; infinite for another shape."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))


def refusal(error: Exception) -> str | None:
    """The sentence by which the race refuses, or None for another error."""
    return next((text for text in REFUSALS if text in str(error)), None)


def problems(
    comfy, scene: Scene, head, name: str = "", finishes=("restart", "continue"), chunks=(1, 3), alone=True
) -> list[str]:
    """What is wrong with the race on this scene; empty where it keeps its promise or refuses.

    Raises NotApplicableError where the stock sampler fails or gives NaN.
    """
    try:
        expected = stock(comfy, scene, 5)
    except Exception as e:
        raise NotApplicableError(f"the stock sampler raises {type(e).__name__}: {e}") from e
    if not bool(torch.isfinite(expected).all()):
        raise NotApplicableError("the stock sampler gives NaN")
    found = []

    def check(kind: str, limit: float, **changes) -> None:
        try:
            samples, _, seeds, _ = race(comfy, scene, head, **changes)
        except Exception as e:
            if refusal(e) is None:
                found.append(f"{name}: {kind} raises {type(e).__name__}: {e}")
            return
        gap = difference(samples, stock(comfy, scene, seeds[0]))
        if not gap <= limit:
            found.append(f"{name}: {kind} differs by {gap:.2g} (allowed {limit:g})")

    if alone:
        check("one candidate", 0.0, candidates=1)
    if "restart" in finishes and not uses_step_cache(scene):
        check("restart", 0.0, finish="restart", chunk=max(chunks))
    if "continue" in finishes:
        for chunk in chunks:
            check(f"continue, chunk {chunk}", ROUNDING if chunk > 1 else 0.0, finish="continue", chunk=chunk)
    return found


def uses_step_cache(scene: Scene) -> bool:
    """Whether restarted winners are sampled without a cache that the stock run has."""
    return "easycache" in scene.model.model_options["transformer_options"]
