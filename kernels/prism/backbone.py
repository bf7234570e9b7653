"""Identity of the diffusion transformer that a head reads: its architecture, and a fingerprint of its weights.

A head is a reading of one backbone's features. Another architecture cannot be read at all; other weights of the same
architecture can, and give nonsense, so they are told apart by a few tensors that every storage format keeps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

# In the original Wan layout. fp8 files keep these in 16 or 32 bits, and LoRAs do not touch them.
FINGERPRINT_TENSORS = ("patch_embedding.weight", "blocks.0.modulation", "blocks.0.norm3.weight", "head.modulation")
VALUES = 6
# bf16 rounds by up to 0.4 %, and a file may have been rounded twice.
TOLERANCE = 0.02


class BackboneError(ValueError):
    """A head does not fit the model; the message names both."""


@dataclass(frozen=True)
class Backbone:
    """A diffusion transformer as a head's file names it.

    model: family, such as "wan"; width, depth, text_width, channels: hidden size, blocks, width of the text encoder's
    output, input channels; fingerprint: tensor name -> [root mean square, first values].
    """

    model: str
    width: int
    depth: int
    text_width: int
    channels: int
    fingerprint: Mapping[str, list[float]]

    @property
    def architecture(self) -> str:
        return f"{self.model}, {self.depth} blocks of width {self.width}, {self.channels} channels, text {self.text_width}"

    def require_architecture(self, other: "Backbone", head: str) -> None:
        """Raises BackboneError unless the model `other` has this architecture."""
        if other.architecture != self.architecture:
            raise BackboneError(
                f"PRISM head '{head}' was trained on {self.architecture}; the model is {other.architecture}: "
                "load a head of that model, or train one with `python -m trainers.prism train`"
            )

    def comparable(self, other: "Backbone") -> bool:
        """Whether the fingerprints have a tensor in common."""
        return bool(self.fingerprint.keys() & other.fingerprint.keys())

    def same_weights(self, other: "Backbone") -> bool:
        """Whether fingerprints agree up to rounding, over the tensors that both have."""
        common = self.fingerprint.keys() & other.fingerprint.keys()
        return bool(common) and all(_close(self.fingerprint[k], other.fingerprint[k]) for k in common)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Backbone":
        """The inverse of `to_json`. Raises TypeError for other entries, ValueError for entries of other types."""
        found = cls(**values)
        sizes = found.width, found.depth, found.text_width, found.channels
        prints = found.fingerprint.values() if isinstance(found.fingerprint, dict) else [None]
        if not all(type(n) is int for n in sizes) or not all(map(_is_print, prints)):
            raise ValueError("expected the sizes of a backbone, and lists of numbers by name as its fingerprint")
        return found


def of_wan(tensors: Mapping[str, Tensor]) -> Backbone:
    """The Backbone of a Wan model's tensors, or of its shapes where tensors are on the meta device, original names.

    Raises BackboneError when they are not those of a Wan transformer.
    """
    try:
        patch, text = tensors["patch_embedding.weight"], tensors["text_embedding.0.weight"]
    except KeyError as e:
        raise BackboneError(f"no tensor {e} among the weights: PRISM reads Wan transformers") from None
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    known = {k: tensors[k] for k in FINGERPRINT_TENSORS if k in tensors}
    prints = {k: fingerprint(t) for k, t in known.items() if t.device.type != "meta" and t.is_floating_point()}
    return Backbone("wan", patch.shape[0], depth, text.shape[1], patch.shape[1], prints)


def of_wan_module(network: torch.nn.Module) -> Backbone:
    """The Backbone of a loaded Wan transformer with the original names of its modules.

    Sizes are those of the layers: a tensor stored in another format (GGUF) has the shape of its bytes. Such tensors have no
    fingerprint. Raises BackboneError when the network is not a Wan transformer.
    """
    found = of_wan({k: v for k, v in network.state_dict().items() if isinstance(v, Tensor)})
    patch, text = network.patch_embedding, network.text_embedding[0]
    width, channels = getattr(patch, "out_channels", found.width), getattr(patch, "in_channels", found.channels)
    return replace(found, width=width, channels=channels, text_width=getattr(text, "in_features", found.text_width))


def fingerprint(tensor: Tensor) -> list[float]:
    """Root mean square and the first values of a tensor of any float dtype."""
    flat = tensor.detach().flatten().to("cpu", torch.float32)
    return [float(flat.square().mean().sqrt()), *flat[:VALUES].tolist()]


def _is_print(values: object) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(type(n) in (int, float) and abs(n) < 1e38 for n in values)


def _close(a: list[float], b: list[float]) -> bool:
    scale = max(abs(a[0]), abs(b[0]), 1e-12)
    return len(a) == len(b) and all(abs(x - y) <= TOLERANCE * max(scale, abs(x), abs(y)) for x, y in zip(a, b, strict=True))
