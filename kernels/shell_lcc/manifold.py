"""A fitted Shell-LCC manifold: a coder, its latent space and its calibration, in memory and on disk."""

from pathlib import Path

import torch
from torch import Tensor

from ..files import header as formats
from ..files.header import FormatError, Header
from ..latent_space import LatentSpace
from . import coder as streamed
from .anchors import Anchors
from .calibration import LEVELS, Calibration, percentile
from .predictor import Predictor
from .pull import descend, project

KIND = "shell_lcc"
METHODS = ("project", "band", "gradient", "minimise")
# The fit's own objective puts real tokens at distance 1; it stands in where no held-out data was ever seen.
NOMINAL_RADIUS = 1.0
# Moving a token moves its skeleton point a little: one that is put on the band's edge would be found just outside.
BAND_MARGIN = 0.05


class UncalibratedError(ValueError):
    """The manifold has no held-out quantiles and something was asked that only they can answer."""


class ShellManifold(torch.nn.Module):
    """Scores and corrects *normalised* video latents z [B, C, T, H, W] of its latent space, token by token.

    coder: Predictor or Anchors; space: the LatentSpace it was fitted in; calibration: held-out quantiles or None;
    name: shown in messages. Latents of any float dtype and layout go in; arithmetic is fp32, results keep the dtype.
    """

    def __init__(
        self, coder: Predictor | Anchors, space: LatentSpace, calibration: Calibration | None = None, name: str = "manifold"
    ):
        super().__init__()
        self.coder = coder.train(False).requires_grad_(False)
        self.space, self.calibration, self.name = space, calibration, name
        self.metrics: dict = {}
        self.provenance: dict = {}

    @property
    def device(self) -> torch.device:
        return self.coder.device

    @property
    def radius(self) -> float:
        """The shell's radius: the held-out root mean square distance, or 1, the fit's own target, without calibration."""
        return self.calibration.radius if self.calibration else NOMINAL_RADIUS

    @property
    def band(self) -> tuple[float, float]:
        """The distances between which the central 90 % of held-out tokens lie. Raises UncalibratedError."""
        return self.calibrated("a band").band

    def calibrated(self, wanted: str) -> Calibration:
        """The calibration, or UncalibratedError saying what was wanted of it and how to make one."""
        if self.calibration is None:
            raise UncalibratedError(
                f"manifold '{self.name}' has no calibration, so {wanted} is not known; "
                "fit one with the Fit Shell-LCC node or `python -m trainers.shell_lcc fit`, "
                "or give --calibrate LATENTS to `import`"
            )
        return self.calibration

    def distance(self, z: Tensor) -> Tensor:
        """Distance map [B, T, H, W] (fp32, on z's device) of z [B, C, T, H, W]; differentiable with respect to z."""
        tokens = self._tokens(z)
        d = streamed.Distance.apply(tokens, self.coder) if tokens.requires_grad else streamed.distance(self.coder, tokens)
        return d.view(z.shape[0], *z.shape[2:]).to(z.device)

    def outside_band(self, distance: Tensor) -> Tensor:
        """True where a distance lies outside the calibrated band; same shape. Raises UncalibratedError."""
        low, high = self.band
        return (distance < low) | (distance > high)

    def token_percentile(self, distance: Tensor) -> Tensor:
        """Share (0 to 1) of held-out tokens with a smaller distance; same shape. Raises UncalibratedError."""
        return percentile(distance, self.calibrated("a percentile").token_quantiles)

    def frame_percentile(self, mean_distance: Tensor) -> Tensor:
        """Share (0 to 1) of held-out latent frames with a smaller mean distance. Raises UncalibratedError."""
        return percentile(mean_distance, self.calibrated("a percentile").frame_quantiles)

    def pull(
        self, z: Tensor, method: str = "project", strength: float = 1.0, radius: float | None = None, trust: float = 0.2
    ) -> Tensor:
        """z [B, C, T, H, W] corrected token by token; same shape, dtype and device.

        method: `project` onto the shell; `band` into the calibrated 5-95 % band; `gradient` steps into that band;
        `minimise` the distance itself, the released objective, for comparison only.
        strength: 0 (unchanged) to 1 (all the way). radius: replaces the calibrated one; the band scales with it.
        trust: largest relative change of a token's length, > 0.
        Raises ValueError on an unknown method or a value out of range, UncalibratedError when a band is not known.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method '{method}': choose one of {', '.join(METHODS)}")
        if trust <= 0 or strength < 0 or (radius is not None and radius <= 0):
            raise ValueError(f"trust and radius must be > 0 and strength >= 0, got {trust}, {radius} and {strength}")
        if strength == 0:
            return z
        tokens = self._tokens(z)
        if method == "minimise":
            moved = descend(self.coder, tokens, 0.0, 0.0, strength, trust)
        elif method == "project":
            target = self.radius if radius is None else radius
            moved = project(self.coder, tokens, target, target, strength, trust)
        else:
            scale = 1.0 if radius is None else radius / self.radius
            low, high = (edge * scale for edge in self.band)
            low, high = low + BAND_MARGIN * (high - low), high - BAND_MARGIN * (high - low)
            move = project if method == "band" else descend
            moved = move(self.coder, tokens, low, high, strength, trust)
        return moved.view(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1).to(z).contiguous()

    def _tokens(self, z: Tensor) -> Tensor:
        if z.ndim != 5 or z.shape[1] != self.space.channels:
            wanted = f"latents [B, {self.space.channels}, T, H, W] of '{self.space.id}'"
            raise ValueError(f"manifold '{self.name}' takes {wanted}, found {list(z.shape)}")
        return z.movedim(1, -1).reshape(-1, z.shape[1]).to(self.device, torch.float32)


def save(manifold: ShellManifold, path: str | Path) -> None:
    """Writes the manifold in the pack's format; never leaves half a file."""
    tensors = dict(manifold.coder.state_dict())
    if manifold.calibration is not None:
        tensors["token_quantiles"] = manifold.calibration.token_quantiles
        tensors["frame_quantiles"] = manifold.calibration.frame_quantiles
        tensors["radius"] = torch.tensor([manifold.calibration.radius], dtype=torch.float64)
    formats.write(path, tensors, Header(KIND, manifold.space, manifold.coder.config(), manifold.metrics, manifold.provenance))


def load(path: str | Path, device: str | torch.device = "cpu") -> ShellManifold:
    """Reads a manifold. Raises FormatError or FileNotFoundError naming the file and what is wrong with it."""
    path = Path(path)
    tensors, header = formats.read(path, KIND, device)
    calibration = None
    if "token_quantiles" in tensors:
        shapes = {"token_quantiles": (LEVELS,), "frame_quantiles": (LEVELS,), "radius": (1,)}
        found = {k: tensors.pop(k, None) for k in shapes}
        if any(t is None or t.shape != shapes[k] or not bool(torch.isfinite(t).all()) for k, t in found.items()):
            raise FormatError(f"{path}: its calibration is damaged (expected {LEVELS} quantiles twice and a radius)")
        tables = (found[k].float().cpu() for k in ("token_quantiles", "frame_quantiles"))
        calibration = Calibration(*tables, float(found["radius"]))
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise FormatError(f"{path}: tensor '{bad[0]}' has NaN or infinite values: the fit diverged; fit it anew")
    kind = header.config.get("coder")
    try:
        if kind == Predictor.kind:
            coder = Predictor.from_state(tensors)
        elif kind == Anchors.kind:
            coder = Anchors.from_state(tensors, header.config)
        else:
            raise FormatError(f"{path}: found coder '{kind}', this pack knows 'predictor' and 'anchors'; update the pack")
    except (KeyError, RuntimeError) as e:
        raise FormatError(f"{path}: its tensors do not make a {kind} coder ({e}); fit or import it anew") from e
    channels = coder.config()["embedding_dim"]
    if channels != header.latent_space.channels:
        raise FormatError(f"{path}: its coder has {channels} channels, its latent space {header.latent_space.channels}")
    manifold = ShellManifold(coder.to(device), header.latent_space, calibration, path.stem)
    manifold.metrics, manifold.provenance = header.metrics, header.provenance
    return manifold
