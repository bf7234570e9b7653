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
    bad = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise FormatError(f"{path}: tensor '{bad[0]}' has NaN or infinite values: the training diverged; train the head again")
    try:
        config = HeadConfig.from_json(header.config["head"])
        backbone = Backbone.from_json(header.config["backbone"])
        low, high = header.config["sigmas"]
        head = PrismHead(config)
        head.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise FormatError(f"{path}: its header and its tensors do not make a PRISM head ({e}); train the head again") from e
    threshold = header.config.get("threshold", {})
    return LoadedHead(
        head.train(False).requires_grad_(False), backbone, header.latent_space, (low, high), threshold, header.metrics,
        header.provenance, path.stem,
    )  # fmt: skip
