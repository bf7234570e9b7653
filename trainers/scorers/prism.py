"""PRISM score of finished clips (arXiv 2606.20310): mean over noise levels and dimensions of a head's scores.

Candidates of a group are compared, so they share what is not their own: the noise of each level, and their length (the
shortest clip's, from the first frame; a causal VAE gives the first frames of a longer clip the same latents).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..kernels.prism import files as head_files
from ..kernels.prism.backbone import BackboneError
from ..preferences.clips import BAD_CLIP, ClipReader
from ..preferences.groups import Group
from ..running.device import DTYPES, pick_device
from ..running.identity import digest_of, file_digest, weights_identity
from ..running.progress import Bar
from ..wan import dit as wan_dit
from ..wan.prompts import EncoderOptions, embed, read_embeddings, text_id
from .cache import ScoreCache, file_identities, skipped
from .prism_network import SIGMAS, Scorer, noised

PRISM = "prism"
# Finished clips are scored at low noise: the lowest noise levels that the head was trained on.
LOW_SIGMAS = 3


class PrismScoringError(ValueError):
    """Clips cannot be scored by a PRISM head as asked; the message states what is missing."""


@dataclass(frozen=True)
class PrismOptions:
    """head, backbone: files, the latter also a folder; sigmas: noise levels, None for the head's LOW_SIGMAS lowest;
    dimensions: of the head's, None for all; texts: a file of embedded prompts or None; encoder: for prompts that it lacks;
    other_weights: score although the backbone's weights are not those that the head was trained on; seed: of the noise."""

    head: str
    backbone: str
    backbone_dtype: str = "float32"
    sigmas: tuple[float, ...] | None = None
    dimensions: tuple[str, ...] | None = None
    texts: str | None = None
    encoder: EncoderOptions | None = None
    other_weights: bool = False
    seed: int = 0
    device: str = "auto"


def score(groups: Sequence[Group], options: PrismOptions, reader: ClipReader, cache: ScoreCache) -> Iterator[dict]:
    """Rows of the cache for every candidate.

    Raises PrismScoringError, BackboneError, FormatError or what loading a model raises; a clip that cannot be read gives
    a row with "skipped".
    """
    head = head_files.load(options.head)
    dimensions = options.dimensions or head.head.config.dimensions
    unknown = [d for d in dimensions if d not in head.head.config.dimensions]
    if unknown:
        raise PrismScoringError(
            f"{options.head}: has no dimension '{unknown[0]}'; it scores {', '.join(head.head.config.dimensions)}"
        )
    low, high = head.sigmas
    sigmas = list(options.sigmas or [s for s in SIGMAS if low <= s <= high][-LOW_SIGMAS:] or [low])
    settings = {
        "head": file_digest(Path(options.head)), "backbone": weights_identity(options.backbone),
        "dtype": options.backbone_dtype, "levels": sigmas, "dimensions": list(dimensions), "seed": options.seed,
    }  # fmt: skip
    encoding = reader.described(cache.groups)
    # Clips of one prompt share their noise and their length, so a clip's score depends on its group.
    members = {g.name: [(c.name, file_identities(c)) for c in g.candidates] for g in groups}
    digests = {name: digest_of(settings | {"group": group} | encoding) for name, group in members.items()}
    todo = []
    for group in groups:
        rows = [cache.find(c, PRISM, digests[group.name]) for c in group.candidates]
        if None in rows:
            todo.append(group)
        else:
            yield from rows
    if not todo:
        return
    texts = _texts(sorted({g.prompt for g in todo}), options)
    scorer = load_scorer(head, options)
    columns = [head.head.config.dimensions.index(d) for d in dimensions]
    with Bar("PRISM", sum(len(g.candidates) for g in todo), "clip", cache.shown) as bar:
        for group in todo:
            found = _score_group(group, scorer, head.space, texts[text_id(group.prompt)].float(), sigmas, options, reader)
            for candidate in group.candidates:
                part = found[candidate.name]
                part = part if isinstance(part, dict) else {"value": float(part[columns].mean())}
                yield cache.add(candidate, PRISM, digests[group.name], part)
                bar.add()


def load_scorer(head: head_files.LoadedHead, options: PrismOptions) -> Scorer:
    """The head on its backbone. Raises BackboneError for another architecture, or for other weights unless allowed."""
    device = pick_device(options.device)
    dit = wan_dit.load(options.backbone, max(head.head.config.taps), DTYPES[options.backbone_dtype], device)
    head.backbone.require_architecture(dit.backbone, head.name)
    if not head.backbone.same_weights(dit.backbone) and not options.other_weights:
        raise BackboneError(
            f"{options.backbone}: other weights than {options.head} was trained on; --other_weights scores anyway"
        )
    return Scorer(dit, head.head.to(device))


@torch.no_grad()
def _score_group(
    group: Group, scorer: Scorer, space: LatentSpace, words: Tensor, sigmas: Sequence[float], options: PrismOptions,
    reader: ClipReader,
) -> dict[str, Tensor | dict]:  # fmt: skip
    """{candidate: scores [dimensions], mean over sigmas, or the part of a row that states why it was skipped}."""
    latents, rows = {}, {}
    for candidate in group.candidates:
        reader.prepare(candidate)
        try:
            z, found = reader.latents(candidate)
            if not found.same_as(space):
                raise LatentSpaceError(f"{options.head}: reads '{space.id}' latents, the clip has '{found.id}' latents")
            latents[candidate.name] = z
        except BAD_CLIP as e:
            rows[candidate.name] = skipped(candidate, e)
    length = min((z.shape[1] for z in latents.values()), default=0)
    key = text_id(group.prompt)
    for name, z in latents.items():
        x = [noised(z[:, :length], s, options.seed, key)[None] for s in sigmas]
        found = [scorer(one, torch.tensor([s]), [words])[0].float().cpu() for one, s in zip(x, sigmas, strict=True)]
        rows[name] = torch.stack(found).mean(dim=0)
    return rows


def _texts(prompts: Sequence[str], options: PrismOptions) -> dict[str, Tensor]:
    known = read_embeddings(options.texts) if options.texts is not None else {}
    missing = [p for p in prompts if text_id(p) not in known]
    if missing and options.encoder is None:
        raise PrismScoringError(
            f"{options.texts}: lacks {len(missing)} prompts, such as '{missing[0][:60]}'; give --text_encoder"
        )
    return known | (embed(missing, options.encoder) if missing else {})
