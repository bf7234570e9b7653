"""The oracle judge: classifies a clip's attributes from its pixels and measures how sharp, smooth and rigid it is.

It is trained on renders of the toy world and uses neither latents nor the models under test, so that it can replace human
preference. Two small networks, trained by `train_judge`: Looks classifies colour, shape and room from single frames; Motion
classifies camera move, speed and rigidity from all frames. All other figures are computed directly.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import ROOMS, VALUES, Attributes

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
LOOKS = ("colour", "shape", "room")
MOTION = ("move", "speed")
LOOK_FRAMES = (0, 4, 8, 12, 16)
FEATURES = 64
# Sharpness is relative to renders of the same room, whose means train_judge stores: brick walls have more edges than wood.
REFERENCE = ("laplacian", "high_frequency")
DIMENSIONS = ("alignment", "sharpness", "smoothness", "dynamics", "rigidity")


class Looks(nn.Module):
    """Frames [N, 3, 64, 64] in 0..1 -> features [N, 32] -> logits, and estimates of blur and noise as "quality"."""

    def __init__(self):
        super().__init__()
        self.body = _body(3, (16, 32, 48), 2)
        self.out = nn.Conv2d(48 * 16, FEATURES // 2, 1)
        self.heads = _heads({k: len(VALUES[k]) for k in LOOKS} | {"quality": 2})

    def features(self, x: Tensor) -> Tensor:
        h = F.adaptive_avg_pool2d(self.body(x - 0.5), 4)
        return self.out(h.flatten(1)[..., None, None]).relu()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return _read(self.heads, self.features(x))


class Motion(nn.Module):
    """Grey clips [N, 17, 64, 64] in 0..1 -> features [N, 32] -> logits of move, speed and rigidity."""

    def __init__(self):
        super().__init__()
        self.body = _body(32, (32, 48, 64), 1)
        self.out = nn.Conv2d(64 * 16, FEATURES // 2, 1)
        self.heads = _heads({k: len(VALUES[k]) for k in MOTION} | {"rigid": 1})
        self.first = nn.Conv2d(17, 32, 5, stride=2, padding=2)

    def features(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1] - x.mean(dim=(1, 2, 3), keepdim=True), 4 * x.diff(dim=1)], dim=1)
        h = F.adaptive_avg_pool2d(self.body(self.first(x).relu()), 4)
        return self.out(h.flatten(1)[..., None, None]).relu()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return _read(self.heads, self.features(x))


@dataclass(frozen=True)
class Reading:
    """The judge's results for N clips.

    probabilities: attribute -> [N, values]; rigid: [N], probability that the world is rigid; features: [N, 64];
    laplacian, high_frequency, roughness, dynamics: [N], see `measure`; reference: means over renders, see Judge.
    """

    probabilities: dict[str, Tensor]
    rigid: Tensor
    features: Tensor
    laplacian: Tensor
    high_frequency: Tensor
    roughness: Tensor
    dynamics: Tensor
    reference: dict[str, Tensor]

    def relative(self, truth: list[Attributes], figure: str) -> Tensor:
        """[N]: laplacian or high_frequency over its mean in renders of the room in the caption."""
        rooms = torch.tensor([ROOMS.index(a.room) for a in truth])
        return getattr(self, figure) / self.reference[figure][rooms]

    def correct(self, truth: list[Attributes], attribute: str) -> Tensor:
        """bool [M]: whether the most probable value is the true one, over clips that have the attribute."""
        has, index = _indices(truth, attribute)
        return self.probabilities[attribute][has].argmax(dim=1) == index

    def scores(self, truth: list[Attributes]) -> dict[str, Tensor]:
        """dimension -> [N] in 0..1, and "overall", their geometric mean.

        alignment: geometric mean of the captioned values' probabilities; sharpness: 1 where Laplacian variance equals that of
        renders of the room, lower on either side; smoothness: 1 without jerks; dynamics: 1 where frames change under a moving
        camera and do not under a still one; rigidity: probability of a rigid world.
        """
        logs = torch.zeros(len(truth))
        counts = torch.zeros(len(truth))
        for attribute in VALUES:
            has, index = _indices(truth, attribute)
            logs[has] += self.probabilities[attribute][has, index].clamp(min=1e-4).log()
            counts[has] += 1
        still = torch.tensor([a.move == "still" for a in truth])
        moves = self.dynamics / (self.dynamics + 1.5)
        out = {
            "alignment": (logs / counts).exp(),
            "sharpness": (-self.relative(truth, "laplacian").clamp(min=1e-4).log().abs()).exp(),
            # Renders stay below 0.9, jitter lies around 1.5.
            "smoothness": (-2 * (self.roughness - 0.9).clamp(min=0)).exp(),
            "dynamics": torch.where(still, 1 - moves, moves),
            "rigidity": self.rigid,
        }
        overall = torch.stack([out[k].clamp(min=1e-4).log() for k in DIMENSIONS]).mean(dim=0).exp()
        return out | {"overall": overall}


class FrechetTarget:
    """Target of Frechet distances: M signatures of clips, each component in units of its own standard deviation.

    A signature is the networks' features and the logarithms of the four measured figures: the networks are trained to be
    invariant to blur and noise, so their features alone would not show it. Components constant in the target are left out.
    """

    def __init__(self, reading: dict[str, Tensor]):
        target = signature(reading)
        spread = target.std(dim=0)
        self.kept = spread > 1e-3
        self.centre, self.spread = target[:, self.kept].mean(dim=0), spread[self.kept]
        self.target = self.normalise(target)

    def normalise(self, signatures: Tensor) -> Tensor:
        """[N, 68] -> [N, kept]."""
        return (signatures[:, self.kept] - self.centre) / self.spread

    def distance(self, normalised: Tensor) -> float:
        """Squared Frechet distance between normalised signatures [N, kept] and the target."""
        return frechet(normalised, self.target)


def signature(reading: dict[str, Tensor]) -> Tensor:
    """[N, 68] of the named tensors of a reading: see FrechetTarget."""
    measured = [
        reading[k] + floor for k, floor in (("laplacian", 1), ("high_frequency", 1e-3), ("dynamics", 0.1), ("roughness", 0.1))
    ]
    return torch.cat([reading["features"], torch.stack(measured, dim=1).log()], dim=1)


class Judge:
    """The trained networks, and the mean sharpness of renders: figure -> [rooms]."""

    def __init__(self, looks: Looks, motion: Motion, reference: dict[str, Tensor]):
        self.looks, self.motion = (m.train(False).requires_grad_(False) for m in (looks, motion))
        self.reference = reference

    @torch.no_grad()
    def read(self, frames: Tensor) -> Reading:
        """Clips uint8 [N, 17, 3, 64, 64] -> Reading."""
        parts = [self._read(part) for part in frames.split(32)]
        columns = {k: [p[k] for p in parts] for k in parts[0]}
        probabilities = {k: torch.cat(columns.pop(k)) for k in VALUES}
        return Reading(probabilities, reference=self.reference, **{k: torch.cat(v) for k, v in columns.items()})

    def _read(self, frames: Tensor) -> dict[str, Tensor]:
        n = len(frames)
        looked = self.looks.features(frames[:, LOOK_FRAMES].flatten(0, 1).float() / 255)
        seen = _read(self.looks.heads, looked)
        out = {k: seen[k].view(n, len(LOOK_FRAMES), -1).mean(dim=1).softmax(-1) for k in LOOKS}
        moved = self.motion.features(grey(frames) / 255)
        seen = _read(self.motion.heads, moved)
        out |= {k: seen[k].softmax(-1) for k in MOTION}
        out["rigid"] = seen["rigid"].flatten().sigmoid()
        out["features"] = torch.cat([looked.view(n, len(LOOK_FRAMES), -1).mean(dim=1), moved.flatten(1)], dim=1)
        return out | measure(frames)


def grey(frames: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> luma float [..., H, W] in 0..255."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (frames.float() * weights).sum(dim=-3)


def measure(frames: Tensor) -> dict[str, Tensor]:
    """Absolute figures of clips uint8 [N, T, 3, H, W], each [N].

    laplacian: variance of the 4-neighbour Laplacian of luma; high_frequency: share of the spectrum's power (without the
    mean) above half the Nyquist frequency; roughness: mean |second| over mean |first| difference in time of 8x8 pixel
    means, small under smooth camera motion; dynamics: mean |first difference| of pixels in grey levels.
    """
    y = grey(frames)
    inner = y[..., 1:-1, 1:-1]
    around = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    power = torch.fft.rfft2(y - y.mean(dim=(-2, -1), keepdim=True)).abs().square()
    fy, fx = torch.fft.fftfreq(y.shape[-2]), torch.fft.rfftfreq(y.shape[-1])
    high = (fy[:, None].square() + fx.square()).sqrt() > 0.25
    small = F.avg_pool2d(y, 8)
    first = small.diff(dim=1).abs().mean(dim=(1, 2, 3))
    second = small.diff(n=2, dim=1).abs().mean(dim=(1, 2, 3))
    return {
        "laplacian": (around - 4 * inner).flatten(1).var(dim=1),
        "high_frequency": (power * high).flatten(1).sum(dim=1) / power.flatten(1).sum(dim=1).clamp(min=1e-9),
        # In still clips, half a grey level of rounding must not count as jerks.
        "roughness": second / (first + 0.5),
        "dynamics": y.diff(dim=1).abs().mean(dim=(1, 2, 3)),
    }


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to features [N, D] and [M, D]."""
    a, b = a.double(), b.double()
    ca, cb = (torch.cov(x.T) + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype) for x in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross)


def load(path: str | Path = WEIGHTS) -> Judge:
    """The committed judge."""
    tensors = load_file(path)
    looks, motion = Looks(), Motion()
    for name, model in (("looks.", looks), ("motion.", motion)):
        model.load_state_dict({k.removeprefix(name): v.float() for k, v in tensors.items() if k.startswith(name)})
    return Judge(looks, motion, {k: tensors[f"reference.{k}"] for k in REFERENCE})


def _body(channels: int, widths: tuple[int, ...], first_stride: int) -> nn.Sequential:
    layers = []
    for i, width in enumerate(widths):
        stride = first_stride if i == 0 else 2
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())


def _heads(sizes: dict[str, int]) -> nn.ModuleDict:
    return nn.ModuleDict({k: nn.Conv2d(FEATURES // 2, n, 1) for k, n in sizes.items()})


def _read(heads, features: Tensor) -> dict[str, Tensor]:
    return {k: head(features).flatten(1) for k, head in heads.items()}


def _indices(truth: list[Attributes], attribute: str) -> tuple[Tensor, Tensor]:
    has = torch.tensor([i for i, a in enumerate(truth) if getattr(a, attribute) is not None], dtype=torch.long)
    return has, torch.tensor([VALUES[attribute].index(getattr(truth[i], attribute)) for i in has.tolist()], dtype=torch.long)
