"""Scores of finished clips by the video model itself: flow residual (arXiv 2605.28230) and prompt gap (arXiv 2305.16397).

Candidates of a group are compared, so they share their noise and their length (the shortest clip's, from the first frame; a
causal VAE gives the first frames of a longer clip the same latents).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.latent_space import WAN21, LatentSpaceError
from ..kernels.rewards.flow_residual import FlowResidual
from ..kernels.rewards.prompt_gap import PromptGap
from ..kernels.rewards.reward import Reward
from ..preferences.clips import BAD_CLIP, ClipReader
from ..preferences.groups import Group
from ..running.device import DTYPES, pick_device
from ..running.identity import digest_of, weights_identity
from ..running.progress import Bar
from ..wan import dit as wan_dit
from ..wan.prompts import EncoderOptions, embed, read_embeddings, text_id
from .cache import ScoreCache, file_identities, skipped
from .latent_view import ConditionalNetwork, LatentView

FLOW_RESIDUAL, PROMPT_GAP = "flow_residual", "prompt_gap"
MODEL_REWARDS = (FLOW_RESIDUAL, PROMPT_GAP)


class ModelRewardError(ValueError):
    """Clips cannot be scored by the video model as asked; the message states what is missing."""


@dataclass(frozen=True)
class ModelRewardOptions:
    """backbone: file or folder of the whole model; texts: a file of embedded prompts or None; encoder: for prompts that it
    lacks; negative: the negative prompt, "" without one; draws: noise samples per level; seed: of the noise."""

    backbone: str | None
    backbone_dtype: str = "float32"
    texts: str | None = None
    encoder: EncoderOptions | None = None
    negative: str = ""
    draws: int = 4
    seed: int = 0
    device: str = "auto"


def reward_of(name: str, draws: int, seed: int) -> Reward:
    """The reward with a name of MODEL_REWARDS."""
    return FlowResidual(noises=draws, seed=seed) if name == FLOW_RESIDUAL else PromptGap(noises=draws, seed=seed)


def score(
    groups: Sequence[Group], name: str, options: ModelRewardOptions, reader: ClipReader, cache: ScoreCache
) -> Iterator[dict]:
    """Rows of the cache for every candidate, higher is better.

    Raises ModelRewardError, or what loading a model raises; a clip that cannot be read gives a row with "skipped".
    """
    reward = reward_of(name, options.draws, options.seed)
    settings = {
        "backbone": weights_identity(options.backbone), "dtype": options.backbone_dtype, "levels": list(reward.sigmas),
        "draws": options.draws, "seed": options.seed, "negative": options.negative,
    } | reader.described(cache.groups)  # fmt: skip
    # Clips of a group share their length, so a clip's score depends on its group.
    members = {g.name: [(c.name, file_identities(c)) for c in g.candidates] for g in groups}
    digests = {group: digest_of(settings | {"group": found}) for group, found in members.items()}
    todo = []
    for group in groups:
        rows = [cache.find(c, name, digests[group.name]) for c in group.candidates]
        if None in rows:
            todo.append(group)
        else:
            yield from rows
    if not todo:
        return
    texts = _texts(sorted({g.prompt for g in todo}), options)
    dit = wan_dit.load(options.backbone, None, DTYPES[options.backbone_dtype], pick_device(options.device)).model
    with Bar(name.replace("_", " "), sum(len(g.candidates) for g in todo), "clip", cache.shown) as bar:
        for group in todo:
            network = ConditionalNetwork(dit, texts[text_id(group.prompt)].float(), texts[text_id(options.negative)].float())
            found = _score_group(group, reward, network, reader)
            for candidate in group.candidates:
                yield cache.add(candidate, name, digests[group.name], found[candidate.name])
                bar.add()


@torch.no_grad()
def _score_group(group: Group, reward: Reward, network: ConditionalNetwork, reader: ClipReader) -> dict[str, dict]:
    """{candidate: the part of its row}."""
    latents: dict[str, Tensor] = {}
    rows: dict[str, dict] = {}
    for candidate in group.candidates:
        reader.prepare(candidate)
        try:
            z, found = reader.latents(candidate)
            if not found.same_as(WAN21):
                raise LatentSpaceError(f"the model reads '{WAN21.id}' latents, the clip has '{found.id}' latents")
            latents[candidate.name] = z
        except BAD_CLIP as e:
            rows[candidate.name] = skipped(candidate, e)
    length = min((z.shape[1] for z in latents.values()), default=0)
    for name, z in latents.items():
        figures = reward.measure(LatentView(network, z[None, :, :length].float()))
        rows[name] = {"value": float(reward.scores(figures))}
    return rows


def _texts(prompts: Sequence[str], options: ModelRewardOptions) -> dict[str, Tensor]:
    """{id: embedded text} of the prompts and of the negative prompt."""
    known = read_embeddings(options.texts) if options.texts is not None else {}
    missing = [p for p in dict.fromkeys([*prompts, options.negative]) if text_id(p) not in known]
    if missing and options.encoder is not None:
        return known | embed(missing, options.encoder)
    if missing == [""]:
        # As `prism collect` samples without --negative: an embedding without words.
        width = next(iter(known.values())).shape[1]
        return known | {text_id(""): torch.zeros(0, width)}
    if missing:
        raise ModelRewardError(
            f"{options.texts}: lacks {len(missing)} prompts, such as '{missing[0][:60]}'; give --text_encoder"
        )
    return known
