"""Held-out evaluation of a Shell-LCC manifold (arXiv 2606.30248), and the split and subsampling of clips for it.

The fit's loss alone does not show quality: it barely moves while results differ. A clip is a pair (id, z) with
z [C, T, h, w] fp32 in the manifold's normalised latent space. Clips come from any iterable, so a caller can read them
one at a time; no tensor [all tokens, bases] is stored.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from . import coder as streamed
from .anchors import Anchors
from .calibration import quantiles
from .coder import Coder
from .diagnostics import add_noise, auroc, blur
from .manifold import ShellManifold

QUANTILES = {"p01": 1, "p05": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "p99": 99}
# A basis is dead if its mean softmax weight is at most this fraction of an even share (1 / K).
DEAD_SHARE = 0.01
NOISE_LEVEL = 0.3


class SplitError(ValueError):
    """The clips cannot be split into a fitting set and a held-out set."""


def held_out_split(groups: Sequence[str], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split clips into (fitting indices, held-out indices), both ascending and not empty; deterministic given `seed`.

    groups: one name per clip; clips with the same name (such as windows of one video) stay on one side, unless all
    clips have the same name. share: fraction of clips to hold out, 0 to 1; at most max(1, round(share * clips)) are held
    out, or the smallest group if none fits. Raises SplitError for fewer than two clips.
    """
    if len(groups) < 2:
        raise SplitError(f"a split by clip needs at least two clips, found {len(groups)}; use split_frames for a single clip")
    if len(set(groups)) == 1:
        groups = [str(i) for i in range(len(groups))]
    names = sorted(set(groups))
    sizes = Counter(groups)
    order = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]
    wanted = max(1, round(share * len(groups)))
    held: set[str] = set()
    for name in order[: len(names) - 1]:
        if sum(sizes[n] for n in held) + sizes[name] <= wanted:
            held.add(name)
    # If no group fits into the share, hold out the smallest: this leaves most clips for fitting.
    held = held or {min(order, key=sizes.get)}
    sides = ([i for i, g in enumerate(groups) if (g in held) == side] for side in (False, True))
    return tuple(sides)


def split_frames(z: Tensor) -> tuple[Tensor, Tensor]:
    """Split one clip z [C, T, h, w] in time: (first latent frames to fit on, last third to hold out).

    Neighbouring frames are similar, so metrics on such a split are optimistic. Raises SplitError if T is 1.
    """
    frames = z.shape[1]
    if frames < 2:
        raise SplitError("cannot split one clip with a single latent frame: give more clips or a longer clip")
    held = max(1, frames // 3)
    return z[:, : frames - held], z[:, frames - held :]


def quotas(sizes: Sequence[int], cap: int) -> list[int]:
    """Tokens to draw from each of the clips with `sizes` tokens: at most `cap` in total, as even as short clips allow."""
    left, share = cap, [0] * len(sizes)
    for place, i in enumerate(sorted(range(len(sizes)), key=lambda i: (sizes[i], i))):
        share[i] = min(sizes[i], left // (len(sizes) - place))
        left -= share[i]
    return share


def tokens(z: Tensor) -> Tensor:
    """Tokens [T * h * w, C] of a clip z [C, T, h, w]."""
    return z.flatten(1).t().contiguous()


def draw_tokens(clip_id: str, z: Tensor, count: int, seed: int = 0) -> Tensor:
    """Draw `count` tokens [count, C] of z [C, T, h, w] without replacement; all tokens, in order, if z has no more.

    The draw depends only on the seed and the clip's id, not on other clips.
    """
    rows = tokens(z)
    if count >= len(rows):
        return rows
    generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(clip_id.encode()))
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def draw_frames(z: Tensor, cap: int) -> Tensor:
    """Evenly spaced latent frames of z [C, T, h, w], as many as have at most `cap` tokens; at least one frame."""
    frames = max(1, min(z.shape[1], cap // (z.shape[2] * z.shape[3])))
    if frames == z.shape[1]:
        return z
    return z[:, torch.linspace(0, z.shape[1] - 1, frames).round().long()]


def summary(d: Tensor) -> dict[str, float]:
    """Mean and quantiles (p01, p05, p25, median, p75, p95, p99) of distances d of any shape."""
    table = quantiles(d.detach().float().cpu())
    return {"mean": float(d.double().mean())} | {name: float(table[place]) for name, place in QUANTILES.items()}


@torch.no_grad()
def score(manifold: ShellManifold, z: Tensor) -> Tensor:
    """Distance map [T, h, w] of one clip z [C, T, h, w], on the CPU."""
    return manifold.distance(z[None])[0].cpu()


def evaluate(
    manifold: ShellManifold,
    clips: Iterable[tuple[str, Tensor]],
    noise: float = NOISE_LEVEL,
    seed: int = 0,
    on_clip: Callable[[str], None] | None = None,
) -> dict:
    """Metrics of a manifold on held-out clips, as a JSON-serialisable dict.

    clips, tokens            counts
    distance                 `summary` of the clean tokens' distances (unitless)
    reconstruction           mse of the skeleton per value, and relative: mse over the tokens' variance per channel
    codebook                 bases; perplexity exp(entropy of usage), 1 to bases; number of dead bases. Usage of a basis:
                             mean softmax weight (predictor; dead if at most 1 % of an even share), or share of tokens
                             with this nearest anchor (anchors; dead if 0)
    auroc_clean_over_blurred, auroc_noisy_over_clean
                             probability that a token of the first kind has the larger distance (0.5 is chance)
    ordered                  share of clips whose mean distances are ordered blurred < clean < noisy
    outside_band             share of clean tokens outside the calibrated band, or None without calibration

    blurred: `diagnostics.blur`; noisy: Gaussian noise of standard deviation `noise`, from `seed`.
    on_clip(id) is called after every clip and may raise to interrupt. Raises ValueError if there are no clips.
    """
    seen = {"clean": [], "blurred": [], "noisy": []}
    ordered = []
    coding = CodingStatistics(manifold.coder)
    for clip_id, z in clips:
        z = z.float()
        coding.add(tokens(z))
        maps = {"clean": z, "blurred": blur(z), "noisy": add_noise(z, noise, seed ^ zlib.crc32(clip_id.encode()))}
        for name, variant in maps.items():
            seen[name].append(score(manifold, variant).flatten())
        blurred, clean, noisy = (float(seen[name][-1].double().mean()) for name in ("blurred", "clean", "noisy"))
        ordered.append(blurred < clean < noisy)
        if on_clip is not None:
            on_clip(clip_id)
    if not ordered:
        raise ValueError("evaluation needs at least one held-out clip, found none")
    clean, blurred, noisy = (torch.cat(seen[name]) for name in ("clean", "blurred", "noisy"))
    outside = None if manifold.calibration is None else float(manifold.outside_band(clean).double().mean())
    return {
        "clips": len(ordered),
        "tokens": clean.numel(),
        "distance": summary(clean),
        **coding.figures(),
        "auroc_clean_over_blurred": auroc(blurred, clean),
        "auroc_noisy_over_clean": auroc(clean, noisy),
        "ordered": sum(ordered) / len(ordered),
        "outside_band": outside,
    }


class CodingStatistics:
    """Running sums over tokens, in chunks: reconstruction error and variance, and how much each basis is used."""

    def __init__(self, coder: Coder):
        self.coder = coder
        bases, channels = coder.config()["num_bases"], coder.config()["embedding_dim"]
        self.usage = torch.zeros(bases, dtype=torch.float64)
        self.error, self.count = 0.0, 0
        self.sums, self.squares = torch.zeros(2, channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, z: Tensor) -> None:
        """Add tokens z [N, C] (fp32, on any device) to the sums."""
        z = z.to(self.coder.device)
        for rows in streamed.chunks(self.coder, z):
            token = z[rows]
            if isinstance(self.coder, Anchors):
                skeleton = self.coder.code(token).skeleton
                self.usage += torch.bincount(self.coder.nearest(token)[:, 0].cpu(), minlength=len(self.usage))
            else:
                weights = self.coder.weights(token)
                skeleton = self.coder.skeleton(weights)
                self.usage += weights.sum(dim=0).cpu().double()
            self.error += float((token - skeleton).square().sum())
        self.count += len(z)
        wide = z.cpu().double()
        self.sums += wide.sum(dim=0)
        self.squares += wide.square().sum(dim=0)

    def figures(self) -> dict:
        """The entries `reconstruction` and `codebook` of `evaluate`."""
        variance = (self.squares / self.count - (self.sums / self.count).square()).mean().clamp_min(1e-12)
        mse = self.error / (self.count * len(self.sums))
        share = self.usage / self.usage.sum()
        entropy = -float(torch.special.xlogy(share, share).sum())
        floor = 0.0 if isinstance(self.coder, Anchors) else DEAD_SHARE / len(share)
        return {
            "reconstruction": {"mse": mse, "relative": mse / float(variance)},
            "codebook": {
                "bases": len(share),
                "perplexity": math.exp(entropy),
                "dead": int((share <= floor).sum()),
            },
        }
