"""The objective and the held-out figures of Train PRISM Head: Rao-Kupper loss on features of ComfyUI's model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import comfy.model_management
import torch

from ..kernels import held_out
from ..kernels.files.latents import digest_of_one, read_one
from ..kernels.prism import accuracy
from ..kernels.prism.head import PrismHead
from ..kernels.prism.preference_loss import TIE, rao_kupper
from . import wan_features
from .recorded_pairs import Comparison
from .training_guider import LOWEST, Prompts, generator_of

# Noise levels to measure a head at.
SIGMAS = (0.99, 0.95, 0.9, 0.7, 0.5, 0.3, 0.1)
# Of a step: loss, and share of decided pairs that the head orders right.
LOSS, RIGHT = 0, 1
FIGURES = 2


class Scorer:
    """A head on the features of a model that a guider has loaded."""

    def __init__(self, head: PrismHead, prompts: Prompts):
        self.head, self.prompts = head, prompts

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, prompt: str) -> torch.Tensor:
        """Scores [B], differentiable in the head, of noisy latents x [B, C, T, H, W] at sigma [B], under one prompt."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        p, config = self.prompts, self.head.config
        with torch.no_grad():
            found = wan_features.read(p.inner, [p.conditioning(prompt)], x, sigma, p.options, config.taps)
            # Copies: a layer's output may be a tensor of the executor's inference mode, which autograd refuses.
            visual, text = [v.float().clone() for v in found.visual], found.text.float().clone()
        return self.head(visual, text, found.mask.clone(), sigma)[:, 0]


class PrismObjective:
    """See training_loop.Objective. count: pairs a step; sigmas: range of noise levels; progress: called after each pair."""

    healthy = True

    def __init__(
        self, comparisons: Sequence[Comparison], scorer: Scorer, count: int, eta: float, sigmas: tuple[float, float],
        seed: int, progress: Callable[[], None],
    ):  # fmt: skip
        self.comparisons, self.scorer, self.count, self.eta = comparisons, scorer, count, eta
        self.sigmas, self.seed, self.progress = sigmas, seed, progress

    def accumulate(self, step: int) -> list[float]:
        generator, rows = generator_of(self.seed, f"step {step}"), []
        low, high = self.sigmas
        for place in torch.randint(0, len(self.comparisons), (self.count,), generator=generator).tolist():
            comparison = self.comparisons[place]
            z = torch.stack([read_one(path) for path in (comparison.pair.winner, comparison.pair.loser)])
            sigma = torch.clamp(low + (high - low) * torch.rand((), generator=generator), min=LOWEST)
            # The same noise for both, so that they differ in content only.
            x = sigma * torch.randn(z.shape[1:], generator=generator) + (1 - sigma) * z
            device = self.scorer.prompts.device
            better, worse = self.scorer(x.to(device), sigma.repeat(2).to(device), comparison.pair.prompt)
            d = (better - worse)[None]
            loss = rao_kupper(d, torch.full_like(d, comparison.outcome), self.eta)
            # Pair after pair, so that one graph is alive; the loss is a mean over pairs.
            (loss.sum() / self.count).backward()
            rows.append((float(loss.detach()), comparison.outcome, float(d.detach())))
            self.progress()
        decided = [(d > 0) + 0.5 * (d == 0) for _, outcome, d in rows if outcome != TIE]
        right = sum(decided) / len(decided) if decided else 0.5
        return [sum(row[0] for row in rows) / len(rows), right]

    def finish(self, figures: list[float]) -> None:
        pass

    def stop_reason(self) -> str | None:
        return None

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def split(comparisons: Sequence[Comparison], share: float, seed: int) -> tuple[list, list, list]:
    """(training, held-out to fit the tie threshold on, held-out to report) comparisons, with no prompt and no clip in two.

    share: of the prompts, or of the groups of those that share equal clips, at least one, never all. With two held-out groups
    or fewer none is for the threshold. Raises ValueError for a single group, and where all training pairs are ties;
    FormatError for a damaged file.
    """
    names = [c.pair.prompt for c in comparisons]
    files = {path for c in comparisons for path in (c.pair.winner, c.pair.loser)}
    digests = {path: digest_of_one(path) for path in files}
    groups = held_out.linked_names(names, [[digests[c.pair.winner], digests[c.pair.loser]] for c in comparisons])
    if len(set(groups)) < 2:
        found = "one prompt only" if len(set(names)) == 1 else "prompts that share their clips only"
        raise ValueError(
            f"the accuracy is measured on prompts that were held out, and the records have {found}; record candidates of at "
            "least two, with clips of their own"
        )
    held = sorted(held_out.draw(groups, share, seed))
    ties = set(held[1::2]) if len(held) > 2 else set()
    parts = ([], [], [])
    for c, group in zip(comparisons, groups, strict=True):
        parts[0 if group not in held else 1 if group in ties else 2].append(c)
    if all(c.outcome == TIE for c in parts[0]):
        raise ValueError("all training pairs are ties, so there is nothing to learn; record more, or give another 'seed'")
    return parts


def optimiser_of(head: PrismHead, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without weight decay on norms, biases and the query."""
    named = [(p, p.ndim == 2 and n != "query") for n, p in head.named_parameters()]
    groups = [
        {"params": [p for p, is_matrix in named if is_matrix == matrices], "weight_decay": decay}
        for matrices, decay in ((True, weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


@torch.no_grad()
def accuracies(
    scorer: Scorer, rows: Sequence[Comparison], tie_rows: Sequence[Comparison], sigmas: Sequence[float], seed: int,
    progress: Callable[[], None],
) -> tuple[float, list[dict]]:  # fmt: skip
    """(tie threshold, [{dimension, sigma, pairs, decided, without_ties, with_ties, calibration}]) on held-out comparisons.

    The threshold is fitted on `tie_rows` over all sigmas; it is 0 where these have no ties.
    """
    outcome, name = _outcomes(rows), scorer.head.config.dimensions[0]
    threshold = 0.0
    fit = _outcomes(tie_rows)
    if bool((fit == TIE).any()):
        pooled = torch.cat([_differences(scorer, tie_rows, s, seed, progress) for s in sigmas])
        threshold = accuracy.tie_threshold(pooled, fit.repeat(len(sigmas)))
    table = []
    for sigma in sigmas:
        difference = _differences(scorer, rows, sigma, seed, progress)
        found = {k: v for k, v in asdict(accuracy.accuracy(difference, outcome, threshold)).items() if k != "threshold"}
        error = accuracy.calibration_error(difference, outcome)
        table.append({"dimension": name, "sigma": sigma, **found, "calibration": error})
    return threshold, table


def _outcomes(rows: Sequence[Comparison]) -> torch.Tensor:
    return torch.tensor([c.outcome for c in rows])


def _differences(scorer: Scorer, rows: Sequence[Comparison], sigma: float, seed: int, progress) -> torch.Tensor:
    """Score differences [N] at a noise level; each clip is scored once, and all clips of a prompt share their noise."""
    scores: dict[Path, float] = {}
    clips = sorted({(c.pair.prompt, path) for c in rows for path in (c.pair.winner, c.pair.loser)})
    device = scorer.prompts.device
    for prompt, group in groupby(clips, key=lambda clip: clip[0]):
        noise = None
        for _, path in group:
            z = read_one(path)
            if noise is None:
                noise = torch.randn(z.shape, generator=generator_of(seed, f"held out {prompt}"))
            x = (sigma * noise + (1 - sigma) * z)[None].to(device)
            scores[path] = float(scorer(x, torch.tensor([sigma], device=device), prompt))
            progress()
    return torch.tensor([scores[c.pair.winner] - scores[c.pair.loser] for c in rows], dtype=torch.float64)
