"""The PRISM head: scores a noisy latent from the features of a frozen DiT's first blocks (arXiv 2606.20310, section 3).

Visual tokens after block `tap` and text tokens after the backbone's own text embedding are normalised, concatenated along
the tokens, projected once, read by learned queries through one cross-attention, and scored by an MLP.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import LayerNorm, Linear
from torch.nn import functional as F

from .query_attention import masked_mean, query_attention

POOLINGS = ("query", "mean")
FREQUENCIES = 128


@dataclass(frozen=True)
class HeadConfig:
    """The configuration of a head.

    backbone_dim: width of the DiT; dim: of the head; heads: of its attention, dividing dim; layers: of the MLP.
    taps: indices of the blocks whose outputs are read, each with a norm of its own; queries: how many; dimensions: what
    is scored ("overall", or several). time: condition on sigma, the identity until trained. sigmas: noise levels that have
    a temperature each, by which scores are divided; empty without.
    pooling: "query", or "mean" over the tokens, the ablation.
    """

    backbone_dim: int
    dim: int = 1536
    heads: int = 12
    layers: int = 5
    taps: tuple[int, ...] = (11,)
    queries: int = 1
    dimensions: tuple[str, ...] = ("overall",)
    time: bool = False
    sigmas: tuple[float, ...] = ()
    pooling: str = "query"

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("backbone_dim", "dim", "heads", "layers", "queries")}
        wrong = [f"{name} {size!r}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: expected whole numbers above 0")
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} do not divide dim {self.dim}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling '{self.pooling}': expected one of {', '.join(POOLINGS)}")
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or not self.dimensions or self.layers < 1:
            raise ValueError(
                f"taps {self.taps} must ascend, dimensions {self.dimensions} must not be empty, layers {self.layers} at "
                "least 1"
            )

    def to_json(self) -> dict:
        """JSON values under the names that files use: `sigmas` is called "levels" there."""
        values = asdict(self)
        return values | {"levels": values.pop("sigmas")}

    @classmethod
    def from_json(cls, values: dict) -> "HeadConfig":
        """The inverse of `to_json`; an unknown entry is a TypeError, one of a wrong type a ValueError."""
        tuples = {"sigmas" if k == "levels" else k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = cls(**tuples)
        lists = {"taps": (int,), "dimensions": (str,), "sigmas": (int, float)}
        wrong = [
            name for name, types in lists.items()
            if not isinstance(getattr(config, name), tuple) or any(type(v) not in types for v in getattr(config, name))
        ]  # fmt: skip
        if wrong or config.taps[0] < 0 or not all(0 <= s <= 1 for s in config.sigmas) or not isinstance(config.time, bool):
            raise ValueError("expected taps, dimensions, levels and time as trainers write them")
        return config


class PrismHead(nn.Module):
    """Scores noisy latents from features of a frozen DiT."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        width = config.dim
        # The residual stream has a few very large channels, which would dominate attention without norms.
        self.visual_norms = nn.ModuleList(LayerNorm(config.backbone_dim) for _ in config.taps)
        self.text_norm = LayerNorm(config.backbone_dim)
        self.project = Linear(config.backbone_dim, width)
        if config.pooling == "query":
            self.query = nn.Parameter(torch.empty(config.queries, width))
            self.to_q, self.to_k, self.to_v, self.to_out = (Linear(width, width) for _ in range(4))
        if config.time:
            self.time = Linear(FREQUENCIES, 2 * width)
        self.norm = LayerNorm(width)
        widths = [width * (config.queries if config.pooling == "query" else 1), *[width] * (config.layers - 1)]
        ends = [*widths[1:], len(config.dimensions)]
        self.mlp = nn.ModuleList(Linear(a, b) for a, b in zip(widths, ends, strict=True))
        if config.sigmas:
            self.log_temperature = nn.Parameter(torch.zeros(len(config.sigmas)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights other than the layers' defaults: a small query, and time conditioning as the identity."""
        if self.config.pooling == "query":
            nn.init.normal_(self.query, std=0.02)
        if self.config.time:
            nn.init.zeros_(self.time.weight)
            nn.init.zeros_(self.time.bias)

    def forward(
        self, visual: Sequence[Tensor], text: Tensor, text_mask: Tensor | None = None, sigma: Tensor | None = None
    ) -> Tensor:
        """Scores [B, dimensions], in the head's dtype.

        visual: one [B, N, backbone_dim] a tap; text: [B, L, backbone_dim]; text_mask: bool [B, L], False at padding (None:
        all are words); sigma: [B] in 0..1, needed by `time` and `sigmas`. Raises ValueError where shapes do not fit.
        """
        self.check(visual, text, text_mask)
        features = [*visual, text]
        mask = torch.ones(text.shape[0], sum(v.shape[1] for v in visual), dtype=torch.bool, device=text.device)
        words = mask.new_ones(text.shape[:2]) if text_mask is None else text_mask
        pool = query_attention if self.config.pooling == "query" else masked_mean
        return self.score(pool(self, features, torch.cat([mask, words], dim=1)), sigma)

    @property
    def norms(self) -> list[nn.Module]:
        """The norms of the taps' features and of the text's, in the order of the features."""
        return [*self.visual_norms, self.text_norm]

    def score(self, pooled: Tensor, sigma: Tensor | None) -> Tensor:
        """[B, queries or 1, dim] -> [B, dimensions]."""
        x = self.norm(pooled)
        if self.config.time:
            scale, shift = self.time(frequencies(self._needed(sigma)).to(x)).chunk(2, dim=-1)
            x = x * (1 + scale[:, None]) + shift[:, None]
        x = x.flatten(1)
        for i, layer in enumerate(self.mlp):
            x = layer(x if i == 0 else F.gelu(x))
        if self.config.sigmas:
            sigmas = torch.tensor(self.config.sigmas, device=x.device)
            nearest = (self._needed(sigma).to(x.device)[:, None] - sigmas).abs().argmin(dim=1)
            x = x / self.log_temperature.to(x)[nearest].exp()[:, None]
        return x

    def check(self, visual: Sequence[Tensor], text: Tensor, text_mask: Tensor | None) -> None:
        """Raises ValueError naming the input that does not fit this head."""
        c = self.config
        if len(visual) != len(c.taps):
            raise ValueError(f"this head reads {len(c.taps)} taps ({', '.join(map(str, c.taps))}), got {len(visual)}")
        for x in (*visual, text):
            if x.ndim != 3 or x.shape[0] != text.shape[0] or x.shape[2] != c.backbone_dim:
                wanted = f"[{text.shape[0]}, tokens, {c.backbone_dim}]"
                raise ValueError(f"this head reads features {wanted}, got {list(x.shape)}: it was trained on another backbone")
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise ValueError(f"text mask {list(text_mask.shape)} does not fit text {list(text.shape)}")

    def _needed(self, sigma: Tensor | None) -> Tensor:
        if sigma is None:
            raise ValueError("this head is conditioned on the noise level: give sigma")
        return sigma.float()


def frequencies(sigma: Tensor) -> Tensor:
    """Sinusoids [B, 128] of the timestep 1000 sigma, as diffusion transformers embed it."""
    half = FREQUENCIES // 2
    rate = torch.exp(torch.arange(half, device=sigma.device) * (-9.210340371976184 / half))
    angle = 1000.0 * sigma[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
