"""LoRA (arXiv 2106.09685) in a frozen Wan transformer inside ComfyUI: W x + B A x, by core's bypass hooks.

Bypass hooks add the product to a layer's output and leave its weight alone, so any storage format of the base will do, no
second copy of a weight is made in the forward, and with the hooks off the model is exactly the base.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from comfy.weight_adapter.base import WeightAdapterTrainBase
from comfy.weight_adapter.bypass import BypassInjectionManager
from torch.nn import functional as F

# q, k, v and o of self- and cross-attention; VACE's own blocks are left alone.
LAYERS = re.compile(r"blocks\.\d+\.(?:self_attn|cross_attn)\.[qkvo]")
PREFIX = "diffusion_model."


class Adapter(WeightAdapterTrainBase):
    """The product B A of one layer. A [rank, in] is uniform in +-1 / sqrt(in), B [out, rank] zero, both fp32; on: whether it
    counts."""

    def __init__(self, inputs: int, outputs: int, rank: int, generator: torch.Generator):
        super().__init__()
        bound = inputs**-0.5
        self.a = torch.nn.Parameter(torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator))
        self.b = torch.nn.Parameter(torch.zeros(outputs, rank))
        self.on = True

    def bypass_forward(self, org_forward, x, *args, **kwargs):
        y = org_forward(x, *args, **kwargs)
        if not self.on:
            return y
        return y + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class Adapters:
    """Adapters of layers, as `attention_layers` returns them; seed: of the initial values."""

    def __init__(self, layers: Mapping[str, torch.nn.Module], rank: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        # Sizes are the layers' own: a quantised weight may have the shape of its bytes.
        self.by_layer = {
            name: Adapter(layer.in_features, layer.out_features, rank, generator) for name, layer in sorted(layers.items())
        }
        self.rank = rank

    def injections(self, model: torch.nn.Module) -> list:
        """Core's injections, which put the adapters into the model's layers and take them out."""
        manager = BypassInjectionManager()
        for name, adapter in self.by_layer.items():
            manager.add_adapter(f"{PREFIX}{name}.weight", adapter)
        return manager.create_injections(model)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """{layer + ".lora_A.weight" or ".lora_B.weight": parameter}, in one order."""
        found = {}
        for name, adapter in self.by_layer.items():
            found |= {f"{name}.lora_A.weight": adapter.a, f"{name}.lora_B.weight": adapter.b}
        return found

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the model is exactly the base: the reference of a preference loss."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for adapter in self.by_layer.values():
            adapter.on = on


def attention_layers(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The attention layers of a transformer by name; empty where it is not Wan's."""
    return {name: layer for name, layer in network.named_modules() if LAYERS.fullmatch(name)}


def lora_model(parameters: Mapping[str, torch.Tensor], rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The value of a LORA_MODEL wire, and the content of a LoRA file, with keys that ComfyUI's loaders read.

    parameters: with the names of Adapters.parameters. alpha is the rank, so that the product counts once.
    """
    found = {}
    for name, tensor in parameters.items():
        found[f"{PREFIX}{name}"] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if name.endswith(".lora_B.weight"):
            found[f"{PREFIX}{name.removesuffix('lora_B.weight')}alpha"] = torch.tensor(float(rank))
    return found
