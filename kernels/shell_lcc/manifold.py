"""Shell-LCC manifold (arXiv 2606.30248): coder, latent space and calibration; scoring, correction, save and load."""

from collections.abc import Iterable
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
# Shell radius without calibration: the fit's objective puts real tokens at distance 1.
NOMINAL_RADIUS = 1.0
# Share of the band's width. Moving a token also moves its skeleton point, so a token moved exactly to the band's edge would
# be measured just outside.
BAND_MARGIN = 0.05


class UncalibratedError(ValueError):
    """The operation needs held-out quantiles, and the manifold has no calibration."""


class ShellManifold(torch.nn.Module):
    """Scores and corrects each token of *normalised* video latents z [B, C, T, H, W].

    coder: Predictor or Anchors; space: LatentSpace in which it was fitted; calibration: held-out quantiles or None;
    name: used in error messages. Latents can have any float dtype and memory layout and be on any device. Arithmetic is
    fp32 on the coder's device; distances are fp32, corrected latents have the dtype of z.
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
        """Shell radius: RMS of the held-out distances, or 1 (the fit's target) without calibration."""
        return self.calibration.radius if self.calibration else NOMINAL_RADIUS

    @property
    def band(self) -> tuple[float, float]:
        """(5 %, 95 %) quantiles of the held-out token distances. Raises UncalibratedError if not calibrated."""
        return self.calibrated("a band").band

    def calibrated(self, wanted: str) -> Calibration:
        """The calibration. Without one, raises UncalibratedError that names `wanted` and how to calibrate."""
        if self.calibration is None:
            raise UncalibratedError(
                f"manifold '{self.name}' has no calibration, so {wanted} is not known; "
                "fit a manifold with the Fit Shell-LCC node or `python -m trainers.shell_lcc fit`, "
                "or pass --calibrate LATENTS to `import`"
            )
        return self.calibration

    def distance(self, z: Tensor) -> Tensor:
        """Distance map [B, T, H, W] (fp32, >= 0, on z's device) of z [B, C, T, H, W]; differentiable with respect to z.

        Raises ValueError if z is not 5-dimensional or has other channels than the latent space.
        """
        tokens = self._tokens(z)
        d = streamed.Distance.apply(tokens, self.coder) if tokens.requires_grad else streamed.distance(self.coder, tokens)
        return d.view(z.shape[0], *z.shape[2:]).to(z.device)

    def outside_band(self, distance: Tensor) -> Tensor:
        """Boolean mask, same shape: True where a distance is outside `band`. Raises UncalibratedError if not calibrated."""
        low, high = self.band
        return (distance < low) | (distance > high)

    def token_percentile(self, distance: Tensor) -> Tensor:
        """Share (0 to 1) of held-out tokens with a smaller distance; same shape.

        Raises UncalibratedError without calibration.
        """
        return percentile(distance, self.calibrated("a percentile").token_quantiles)

    def frame_percentile(self, mean_distance: Tensor) -> Tensor:
        """Share (0 to 1) of held-out latent frames with a smaller mean distance; same shape.

        Raises UncalibratedError without calibration.
        """
        return percentile(mean_distance, self.calibrated("a percentile").frame_quantiles)

    def pull(
        self, z: Tensor, method: str = "project", strength: float = 1.0, radius: float | None = None, trust: float = 0.2
    ) -> Tensor:
        """Correct each token of z [B, C, T, H, W]; same shape, dtype and device.

        method: `project`: closed-form projection onto the shell; `band`: closed-form projection into the calibrated 5-95 %
        band; `gradient`: gradient steps into that band; `minimise`: gradient steps that minimise the distance, as in the
        released code (for comparison only).
        strength: 0 (unchanged) to 1 (full correction). radius: replaces the calibrated radius, > 0; the band scales with it.
        trust: largest ||change|| / ||token||, > 0.
        Raises ValueError on an unknown method, a value out of range or latents of another shape, UncalibratedError if the
        method needs the band and there is no calibration.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method '{method}': choose one of {', '.join(METHODS)}")
        if trust <= 0 or strength < 0 or (radius is not None and radius <= 0):
            raise ValueError(
                "trust and radius must be > 0 and strength >= 0, "
                f"got trust {trust}, radius {radius} and strength {strength}"
            )
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
            raise ValueError(f"manifold '{self.name}': expected {wanted}, found shape {list(z.shape)}")
        return z.movedim(1, -1).reshape(-1, z.shape[1]).to(self.device, torch.float32)


def save(manifold: ShellManifold, path: str | Path) -> None:
    """Write the manifold to a safetensors file in the pack's format, atomically. Raises OSError if it cannot be written."""
    formats.write(path, *_stored(manifold))


def save_unused(manifold: ShellManifold, names: Iterable[Path]) -> Path:
    """The same under the first of `names` that no file has, which is returned. Raises OSError."""
    return formats.write_unused(names, *_stored(manifold))


def load(path: str | Path, device: str | torch.device = "cpu") -> ShellManifold:
    """Read a manifold written by `save`, onto `device`. Raises FormatError or FileNotFoundError that names the file."""
    path = Path(path)
    tensors, header = formats.read(path, KIND, device)
    calibration = None
    if "token_quantiles" in tensors:
        shapes = {"token_quantiles": (LEVELS,), "frame_quantiles": (LEVELS,), "radius": (1,)}
        found = {k: tensors.pop(k, None) for k in shapes}
        if any(t is None or t.shape != shapes[k] for k, t in found.items()) or not _is_calibration(found):
            raise FormatError(
                f"{path}: calibration is damaged (expected tensors token_quantiles and frame_quantiles of {LEVELS} finite "
                "values each, ascending from 0, and a radius above 0); fit or import it again"
            )
        tables = (found[k].float().cpu() for k in ("token_quantiles", "frame_quantiles"))
        calibration = Calibration(*tables, float(found["radius"]))
    bad = formats.not_finite(tensors)
    if bad is not None:
        raise FormatError(f"{path}: tensor '{bad}' has NaN or infinite values: the fit diverged; fit it again")
    kind = header.config.get("coder")
    if kind not in (Predictor.kind, Anchors.kind):
        raise FormatError(f"{path}: found coder '{kind}', expected 'predictor' or 'anchors'; update the pack")
    try:
        coder = Predictor.from_state(tensors) if kind == Predictor.kind else Anchors.from_state(tensors, header.config)
    except (KeyError, IndexError, ValueError, RuntimeError) as e:
        raise FormatError(f"{path}: tensors do not match coder '{kind}' ({e}); fit or import it again") from e
    channels = coder.config()["embedding_dim"]
    if channels != header.latent_space.channels:
        raise FormatError(
            f"{path}: coder has {channels} channels, its latent space {header.latent_space.channels}; expected the same "
            "number; fit or import it again"
        )
    manifold = ShellManifold(coder.to(device), header.latent_space, calibration, path.stem)
    # Finite weights may still overflow.
    if not bool(manifold.distance(torch.linspace(-3, 3, 16 * channels).view(1, channels, 1, 4, 4)).isfinite().all()):
        raise FormatError(f"{path}: its tensors give no finite distance of a latent: the fit diverged; fit it again")
    manifold.metrics, manifold.provenance = header.metrics, header.provenance
    return manifold


def _is_calibration(found: dict[str, Tensor]) -> bool:
    """Whether tensors of the right shapes are quantiles of distances and a radius."""
    if formats.not_finite(found) is not None:
        return False
    token, frame, radius = (t.float() for t in found.values())
    return float(radius) > 0 and all(bool(q[0] >= 0) and bool((q.diff() >= 0).all()) for q in (token, frame))


def _stored(manifold: ShellManifold) -> tuple[dict[str, Tensor], Header]:
    tensors = dict(manifold.coder.state_dict())
    if manifold.calibration is not None:
        tensors["token_quantiles"] = manifold.calibration.token_quantiles
        tensors["frame_quantiles"] = manifold.calibration.frame_quantiles
        tensors["radius"] = torch.tensor([manifold.calibration.radius], dtype=torch.float64)
    return tensors, Header(KIND, manifold.space, manifold.coder.config(), manifold.metrics, manifold.provenance)
