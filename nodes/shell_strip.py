"""The shell strip's data: the share of tokens outside the manifold's band at each step of a guided run."""

import math

import torch

from ..kernels.shell_lcc.manifold import ShellManifold
from . import panel_events, timeline
from .shell_lcc_pull import OUTSIDE_UNIT, shares_by_frame

# Tokens that are measured at a step; a full-size clip has 130,000. The share is then known to about 1 %.
MOST_TOKENS = 4096


class ShellStrip:
    """Sends a value after every step to the panel of a guidance node. Without calibration there is no band and no value."""

    def __init__(self, manifold: ShellManifold, node_id: str | None):
        self._manifold, self._node_id = manifold, node_id

    def step(self, args: dict, before: torch.Tensor, after: torch.Tensor, last: bool) -> None:
        """args: of a post-CFG function; before, after: the prediction [B, C, T, H, W] without and with the correction; last:
        whether this is the last step, after which both are shown as clips."""
        if self._manifold.calibration is None:
            return
        schedule = args["model_options"].get("transformer_options", {}).get("sample_sigmas")
        sigma = float(args["sigma"][0])
        number, steps = (0, 0) if schedule is None else (step_of(sigma, schedule.tolist()), len(schedule) - 1)
        data = {
            "step": number, "steps": steps, "sigma": round(sigma, 4),
            "before": outside_share(self._manifold, before), "after": outside_share(self._manifold, after),
        }  # fmt: skip
        if last:
            data["clips"] = self._clips(before[:1], after[:1])
        panel_events.send(panel_events.SHELL, self._node_id, data)

    def _clips(self, *pair: torch.Tensor) -> dict:
        shares = [shares_by_frame(self._manifold, self._manifold.distance(z)[0]) for z in pair]
        frames = range(pair[0].shape[2])
        series = [timeline.Series(n, frames, s) for n, s in zip(("before", "after"), shares, strict=True)]
        pictures = [timeline.pictures(z, self._manifold.space) for z in pair]
        return timeline.state([timeline.TimelineClip("Last step", len(frames), series, *pictures)], OUTSIDE_UNIT)


def step_of(sigma: float, schedule: list[float]) -> int:
    """The step, from 0, whose noise level is nearest: samplers with several evaluations call between the levels."""
    return min(range(len(schedule) - 1), key=lambda i: abs(schedule[i] - sigma))


def outside_share(manifold: ShellManifold, z: torch.Tensor) -> float:
    """Share (0 to 1) of tokens outside the band, of at most about MOST_TOKENS evenly spaced ones of z [B, C, T, H, W]."""
    stride = math.ceil(math.sqrt(max(1.0, z[:, 0].numel() / MOST_TOKENS)))
    return float(manifold.outside_band(manifold.distance(z[..., ::stride, ::stride])).float().mean())
