"""LPIPS with VGG16 (Zhang et al. 2018, weights v0.1), loaded from local files; nothing is downloaded.

Supported layouts: the state dict of the lpips package (`net.slice1.0.weight` ... and `lin0.model.1.weight` ...), or
torchvision's VGG16 (`features.0.weight` ...) and the linear heads. Convolutions and heads may be in one file or two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ..files.header import describe_foreign, is_plain, not_finite
from .record import GeometryError

# Indices of VGG16's convolutions in torchvision's `features`; each stage ends at a layer whose output LPIPS compares:
# relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10


@dataclass(frozen=True)
class Lpips:
    """LPIPS-VGG as a callable. convolutions: (weight, bias) of the layers of each stage; heads: channel weights [C] of each
    stage."""

    convolutions: list[list[tuple[Tensor, Tensor]]]
    heads: list[Tensor]

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS distances [N], lower is more similar, of image pairs a, b: [N, H, W, 3] in [0, 1].

        Pairs are processed one at a time to save memory. Raises GeometryError for images smaller than 16x16.
        """
        if min(a.shape[1:3]) < 16:
            raise GeometryError(f"LPIPS: images of {a.shape[2]}x{a.shape[1]} pixels; expected at least 16x16")
        return torch.stack([self._distance(torch.stack(pair)) for pair in zip(a, b, strict=True)])

    def to(self, device: torch.device | str) -> "Lpips":
        """A copy on `device`."""
        stages = [[(w.to(device), c.to(device)) for w, c in stage] for stage in self.convolutions]
        return Lpips(stages, [h.to(device) for h in self.heads])

    def _distance(self, pair: Tensor) -> Tensor:
        x = pair.to(self.heads[0]).permute(0, 3, 1, 2) * 2 - 1
        x = (x - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)
        total = x.new_zeros(())
        for head, features in zip(self.heads, self._stages(x), strict=True):
            unit = features / (features.square().sum(dim=1, keepdim=True).sqrt() + EPSILON)
            total = total + (head @ (unit[0] - unit[1]).square_().flatten(1)).mean()
        return total

    def _stages(self, x: Tensor) -> Iterator[Tensor]:
        for i, stage in enumerate(self.convolutions):
            x = F.max_pool2d(x, 2) if i else x
            for weight, bias in stage:
                x = F.conv2d(x, weight, bias, padding=1).relu_()
            yield x


def load_lpips(*paths: str | Path) -> Lpips:
    """Load LPIPS-VGG from one or two local files (.safetensors, .pth, .pt) in a layout of the module's docstring.

    Raises FileNotFoundError for a missing file, and GeometryError, naming file and tensors, for a file that cannot be read
    safely, for missing tensors and for wrong shapes.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        state |= _read(Path(path))
    return from_state(state, " and ".join(str(p) for p in paths))


def from_state(state: dict[str, Tensor], source: str) -> Lpips:
    """LPIPS-VGG from a state dict in a layout of the module's docstring. source: its name in error messages.

    Raises GeometryError, naming the tensors, if tensors are missing or have a wrong shape.
    """
    lists = any(name.startswith("net.slice") for name in state)
    missing: list[str] = []

    def get(name: str, shape: tuple[int, ...]) -> Tensor:
        value = state.get(name)
        if value is None:
            missing.append(name)
            return torch.zeros(())
        if tuple(value.shape) != shape:
            raise GeometryError(f"{source}: {name} has shape {tuple(value.shape)}; expected {shape} of VGG16")
        return value.detach().float()

    convolutions, fan_in = [], 3
    for i, (stage, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
        layers = []
        for position in stage:
            name = f"net.slice{i + 1}.{position}" if lists else f"features.{position}"
            layers.append((get(f"{name}.weight", (width, fan_in, 3, 3)), get(f"{name}.bias", (width,))))
            fan_in = width
        convolutions.append(layers)
    heads = [get(f"lin{i}.model.1.weight", (1, width, 1, 1)) for i, width in enumerate(WIDTHS)]
    if missing:
        few = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        trunk = any(not name.startswith("lin") for name in missing)
        part = "VGG16's convolutions" if trunk else "LPIPS's linear heads"
        raise GeometryError(
            f"{source}: lacks {part} ({few}); expected an lpips state dict (net.slice1.0.weight ..., lin0.model.1.weight ...) "
            "or torchvision's VGG16 (features.0.weight ...) and the heads, in one file or two"
        )
    return Lpips(convolutions, [h.flatten() for h in heads])


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" + (" (it is a folder)" if path.is_dir() else ""))
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as e:
        raise GeometryError(f"{path}: {describe_foreign(path)} ({e}); expected LPIPS weights") from e
    # torch.load raises many exception types for a bad file.
    except Exception as e:
        first = str(e).splitlines()[0] if str(e) else ""
        raise GeometryError(
            f"{path}: could not be read as plain weights ({type(e).__name__}: {first}); expected a state dict of tensors"
        ) from e
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise GeometryError(f"{path}: contains {type(state).__name__}, not a state dict of tensors; expected LPIPS weights")
    bad = [k for k, v in state.items() if not is_plain(v) or not_finite({k: v}) is not None]
    if bad:
        raise GeometryError(
            f"{path}: tensor '{bad[0]}' has NaN, infinite or no plain values; expected LPIPS weights: download the file again"
        )
    return state
