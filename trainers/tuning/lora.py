"""LoRA (arXiv 2106.09685) in a frozen Wan transformer: W x + (alpha / rank) B A x, by peft.

A [rank, in] and B [out, rank] are fp32 whatever the base is stored in; B starts at zero, so a new adapter changes nothing.
The reference model of a preference loss is the same network with the adapter switched off: no second copy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import TuningError

ADAPTER = "default"
# Wan's short names -> suffixes of diffusers' module names.
TARGETS = {
    "q": ("to_q",), "k": ("to_k",), "v": ("to_v",), "o": ("to_out.0",), "ffn": ("ffn.net.0.proj", "ffn.net.2"),
    "k_img": ("add_k_proj",), "v_img": ("add_v_proj",),
}  # fmt: skip
DEFAULT_TARGETS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class LoraOptions:
    """rank: of the products; alpha: they are scaled by alpha / rank; targets: keys of TARGETS, of self- and cross-attention
    alike, or "all"; dropout: share of a product's inputs withheld in training, in [0, 1).

    Raises TuningError for values outside those.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    dropout: float = 0.0

    def __post_init__(self):
        if self.rank < 1:
            raise TuningError(f"--rank must be 1 or more, got {self.rank}")
        if self.alpha <= 0:
            raise TuningError(f"--lora_alpha must be above 0, got {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise TuningError(f"--lora_dropout must be 0 or more and below 1, got {self.dropout:g}")
        unknown = [t for t in self.targets if t not in TARGETS and t != "all"]
        if unknown or not self.targets:
            problem = f"{unknown[0]}: is unknown" if unknown else ": names nothing"
            raise TuningError(f"--targets {problem}; known are {', '.join(TARGETS)} and all")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def suffixes(options: LoraOptions, image_keys: bool) -> list[str]:
    """The suffixes of diffusers' module names that the options name. image_keys: whether the model has keys of an image.

    Raises TuningError where they are asked for and there are none.
    """
    every = "all" in options.targets
    named = [t for t in TARGETS if t in options.targets or (every and (image_keys or not t.endswith("_img")))]
    missing = [t for t in named if t.endswith("_img") and not image_keys]
    if missing:
        raise TuningError(f"--targets {missing[0]}: this model has no image keys (only image-to-video models of Wan 2.1 do)")
    return [suffix for target in named for suffix in TARGETS[target]]


def add(model: torch.nn.Module, options: LoraOptions, seed: int) -> None:
    """Injects an adapter into a frozen WanTransformer3DModel; its parameters are the only trainable ones.

    A is uniform in +-1 / sqrt(in) from a generator with `seed`, module after module in the order of their names; torch's
    global generator is left alone. Dropout, if any, draws from the global generator and is on outside `at_strength`. Raises
    TuningError when the model has an adapter, or lacks what the options name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as e:
        raise ImportError("a LoRA needs peft: pip install peft") from e

    if _layers(model):
        raise TuningError("the model has a LoRA already; load it again for another one")
    wanted = suffixes(options, model.config.added_kv_proj_dim is not None)
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=wanted, lora_dropout=options.dropout, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in sorted(_layers(model).items()):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        device = layer.get_base_layer().weight.device
        bound = a.in_features**-0.5
        values = torch.empty(options.rank, a.in_features).uniform_(-bound, bound, generator=generator)
        a.weight = torch.nn.Parameter(values.to(device))
        b.weight = torch.nn.Parameter(torch.zeros(b.out_features, options.rank, device=device))
        layer.lora_dropout[ADAPTER].train(True)


def parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters, {module name + ".lora_A.weight" or ".lora_B.weight": fp32}, sorted by name."""
    found = {}
    for name, layer in _layers(model).items():
        found[f"{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
        found[f"{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight
    return dict(sorted(found.items()))


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the adapter's tensors on the CPU, with the names of `parameters`."""
    return {n: p.detach().to("cpu", copy=True) for n, p in parameters(model).items()}


@torch.no_grad()
def load_state(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors with the names of `parameters` into the adapter. Raises TuningError where names or shapes differ."""
    own = parameters(model)
    other = sorted(own.keys() ^ tensors.keys())
    if other:
        kind = "lacks" if other[0] in own else "has, in addition to this adapter's targets,"
        raise TuningError(f"the LoRA {kind} {other[0]}; give the --targets that it was trained with")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            found = list(tensors[name].shape)
            raise TuningError(f"{name} of the LoRA is {found}, expected {list(parameter.shape)}: another --rank or model")
        parameter.copy_(tensors[name])


@contextmanager
def without_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model is exactly the base: the reference of a preference loss, and of the norm of the change."""
    layers = list(_layers(model).values())
    before = [layer._disable_adapters for layer in layers]
    # Not enable_adapters(False), which also makes the parameters untrainable, in the middle of a step.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def at_strength(model: torch.nn.Module, strength: float) -> Iterator[None]:
    """Within it the adapter counts `strength` times as much, without dropout; 0 is exactly the base."""
    layers = list(_layers(model).values())
    before = [(layer.scaling[ADAPTER], layer.lora_dropout[ADAPTER].training) for layer in layers]
    for layer, (scale, _) in zip(layers, before, strict=True):
        layer.scaling[ADAPTER] = scale * strength
        layer.lora_dropout[ADAPTER].train(False)
    try:
        if strength == 0:
            with without_adapter(model):
                yield
        else:
            yield
    finally:
        for layer, (scale, training) in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scale
            layer.lora_dropout[ADAPTER].train(training)


@torch.no_grad()
def change_norm(model: torch.nn.Module) -> float:
    """The Frobenius norm of all changes (alpha / rank) B A together.

    |B A|^2 = trace((B^T B) (A A^T)): products of rank x rank, never the matrix itself.
    """
    total = 0.0
    for layer in _layers(model).values():
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        total += layer.scaling[ADAPTER] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
    return max(0.0, total) ** 0.5


def _layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """{module name: peft's layer}, in the model's order."""
    inner = getattr(model, "module", model)
    return {n: m for n, m in inner.named_modules() if ADAPTER in getattr(m, "lora_A", ())}
