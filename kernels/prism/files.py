"""Files of PRISM heads: weights, and in the header the configuration, backbone, noise levels and accuracy."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files import header as formats
from ..files.header import FormatError, Header
from ..latent_space import LatentSpace
from .backbone import Backbone
from .head import HeadConfig, PrismHead

KIND = "prism_head"


@dataclass
class LoadedHead:
    """A head and the entries of its file's header.

    sigmas: (lowest, highest) noise level it was trained on; threshold: |score difference| below which two are called
    equal, per dimension; metrics: the accuracy table and what else was measured; provenance: how it was made.
    """

    head: PrismHead
    backbone: Backbone
    space: LatentSpace
    sigmas: tuple[float, float]
    threshold: dict[str, float] = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    name: str = "head"


def save(loaded: LoadedHead, path: str | Path) -> None:
    """Writes the head atomically. Raises OSError."""
    config = {
        "head": loaded.head.config.to_json(),
        "backbone": loaded.backbone.to_json(),
        "sigmas": list(loaded.sigmas),
        "threshold": loaded.threshold,
    }
    header = Header(KIND, loaded.space, config, loaded.metrics, loaded.provenance)
    formats.write(path, loaded.head.state_dict(), header)


def load(path: str | Path) -> LoadedHead:
    """Reads a head to the CPU. Raises FormatError or FileNotFoundError naming the file and the reason."""
    path = Path(path)
    tensors, header = formats.read(path, KIND)
    bad = formats.not_finite(tensors)
    if bad is not None:
        raise FormatError(f"{path}: tensor '{bad}' has NaN or infinite values: the training diverged; train the head again")
    try:
        config = HeadConfig.from_json(header.config["head"])
        backbone = Backbone.from_json(header.config["backbone"])
        low, high = _sigmas(header.config["sigmas"])
        threshold = _threshold(header.config.get("threshold", {}))
        _require_fit(config, backbone, tensors)
        head = PrismHead(config)
        head.load_state_dict(tensors)
    except (*formats.DAMAGED, AttributeError, RuntimeError) as e:
        raise FormatError(f"{path}: its header and its tensors do not make a PRISM head ({e}); train the head again") from e
    return LoadedHead(
        head.train(False).requires_grad_(False), backbone, header.latent_space, (low, high), threshold, header.metrics,
        header.provenance, path.stem,
    )  # fmt: skip


def _sigmas(values: list) -> tuple[float, float]:
    low, high = values
    if not all(type(s) in (int, float) for s in values) or not 0 <= low <= high <= 1:
        raise ValueError(f"sigmas {values}, expected the lowest and the highest noise level, from 0 to 1")
    return low, high


def _threshold(values: dict) -> dict[str, float]:
    if not all(type(v) in (int, float) for v in values.values()):
        raise ValueError("threshold, expected a number for each dimension")
    return values


def _require_fit(config: HeadConfig, backbone: Backbone, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless a head of this configuration has these tensors and reads this backbone."""
    if config.backbone_dim != backbone.width or config.taps[-1] >= backbone.depth:
        raise ValueError(
            f"taps {', '.join(map(str, config.taps))} and width {config.backbone_dim} in a backbone of {backbone.depth} "
            f"blocks and width {backbone.width}"
        )
    if 2 * config.layers > len(tensors):
        raise ValueError(f"{config.layers} layers in {len(tensors)} tensors")
    # Without data: a head of any size that the header names would fill the memory.
    with torch.device("meta"):
        expected = {name: t.shape for name, t in PrismHead(config).state_dict().items()}
    formats.require_shapes(tensors, expected)
