"""What a run is made of: embedded prompts, those kept apart, and clips with captions where predictions start from them."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import held_out as held_out_groups
from ..kernels.files.header import read_header
from ..kernels.latent_space import LatentSpace
from ..kernels.shell_lcc.manifold import ShellManifold
from ..latents.read import ClipRef, list_clips, read_clip, related
from ..running.output import provenance
from ..tuning.backbone import TunableDit
from ..wan.prompts import embed, encoder_options, read_embeddings, read_prompts, text_id, write_embeddings
from .draws import seed_of

TEXTS = "texts.safetensors"
# Held-out prompts that are measured.
MOST_MEASURED = 8


class ShellRewardError(ValueError):
    """A run cannot be set up as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Material:
    """texts: {text id: [words, width]}; names: {text id: prompt}; fit, held_out: text ids; measured: those of the held-out
    clips; clips: {clip id: file} with `captions` {clip id: text id}, [C, T, h, w] of one shape.
    """

    texts: dict[str, Tensor]
    names: dict[str, str]
    fit: tuple[str, ...]
    held_out: tuple[str, ...]
    measured: tuple[str, ...]
    clips: dict[str, ClipRef]
    captions: dict[str, str]

    def items(self, noised: bool) -> list[tuple[str, str | None]]:
        """(prompt, clip) to draw from: clips of prompts in `fit`, or the prompts alone."""
        if not noised:
            return [(p, None) for p in self.fit]
        known = set(self.fit)
        return [(caption, clip) for clip, caption in self.captions.items() if caption in known]

    def latents(self, clip: str) -> Tensor:
        """[C, T, h, w], normalised, fp32 on the CPU."""
        return read_clip(self.clips[clip])


def shape_of(args, space: LatentSpace) -> tuple[int, ...]:
    """[C, T, h, w] of the latents of --size and --frames."""
    width, height = args.size
    stride = space.spatial_stride
    return (space.channels, 1 + (args.frames - 1) // space.temporal_stride, height // stride, width // stride)


def require_fit(manifold: ShellManifold, dit: TunableDit, path: str, texts: dict[str, Tensor]) -> None:
    """Raises ShellRewardError where model, manifold and texts do not belong together."""
    if dit.image_to_video:
        raise ShellRewardError(f"{dit.name}: is an image-to-video model, which pure noise and a prompt do not suffice for")
    channels = dit.model.config.out_channels
    if channels != manifold.space.channels:
        raise ShellRewardError(
            f"{path}: is a manifold of '{manifold.space.id}' latents with {manifold.space.channels} channels, and {dit.name} "
            f"makes latents with {channels}; fit one on latents of this model's VAE"
        )
    for text in texts.values():
        if text.shape[-1] != dit.model.config.text_dim:
            raise ShellRewardError(
                f"the embedded prompts are {text.shape[-1]} wide, and {dit.name} takes texts of width "
                f"{dit.model.config.text_dim}; embed them with this model's text encoder"
            )


def load(args, space: LatentSpace, work: Path, context, held_out: float, seed: int) -> Material:
    """Prompts of --prompts, of all --embeddings, or with --start noised the captions of --latents, embedded.

    work: folder that keeps what a text encoder has embedded. held_out: share of prompts kept apart. Raises ShellRewardError,
    FormatError, LatentDataError or FileNotFoundError.
    """
    clips, captions, names = {}, {}, {}
    if args.latents:
        for ref in list_clips(args.latents, space):
            caption = (ref.entry or {}).get("caption")
            if not caption:
                raise ShellRewardError(f"{ref.path} ({ref.clip_id}): has no caption; --latents need shards with captions")
            clips[ref.clip_id], captions[ref.clip_id] = ref, text_id(caption)
            names[text_id(caption)] = caption
    if args.start == "noised":
        prompts = dict(names)
    elif args.prompts is not None:
        prompts = {text_id(p): p for p in read_prompts(args.prompts)}
    elif args.embeddings is not None:
        prompts = _named(args.embeddings)
        prompts.pop(text_id(args.negative_prompt), None)
    else:
        raise ShellRewardError("no prompts: give --prompts FILE.txt with --text_encoder, or --embeddings FILE")
    measured = {text_id(p): p for p in read_prompts(args.validation_prompts)} if args.validation_prompts else {}
    wanted = prompts | measured | names
    negative = {text_id(args.negative_prompt): args.negative_prompt} if args.validation_cfg != 1 else {}
    texts = _texts(args, wanted | negative, space, work, context)
    groups = _groups_of(dict.fromkeys([*prompts, *measured]), clips, captions)
    known = {groups[p] for p in measured}
    fit, apart = _split({p: groups[p] for p in prompts if groups[p] not in known}, held_out, seed)
    if not fit:
        raise ShellRewardError("there is no prompt to train on other than those of --validation_prompts; give more prompts")
    shown = tuple(measured) or tuple(apart or fit)[:MOST_MEASURED]
    return Material(texts, prompts | measured | names, fit, apart, shown, clips, captions)


def _groups_of(prompts: Iterable[str], clips: dict[str, ClipRef], captions: dict[str, str]) -> dict[str, str]:
    """{prompt: name of its group}: captions of related clips (`latents.read.related`) are in one group."""
    keys: dict[str, list] = {prompt: [] for prompt in prompts}
    for clip, caption in captions.items():
        if caption in keys:
            keys[caption] += related(clips[clip])
    return dict(zip(keys, held_out_groups.linked_names(list(keys), list(keys.values())), strict=True))


def _split(groups: Mapping[str, str], share: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts to train on, kept apart), by a random order that follows from the seed and the prompts' ids.

    groups: {prompt: its group}, of which none is on both sides.
    """
    if share == 0:
        return tuple(groups), ()
    members: dict[str, list[str]] = {}
    for prompt, group in groups.items():
        members.setdefault(group, []).append(prompt)
    if len(members) < 2:
        found = len(groups) if len(groups) < 2 else f"{len(groups)} that share clips"
        raise ShellRewardError(
            f"--held_out {share:g} needs two prompts or more with clips of their own, found {found}; give more, or "
            "--held_out 0 to measure the training's prompts with other noises"
        )
    count = min(len(members) - 1, max(1, round(share * len(members))))
    order = sorted(members, key=lambda group: seed_of(seed, f"held out {group}"))[:count]
    apart = tuple(prompt for group in order for prompt in members[group])
    return tuple(p for p in groups if p not in apart), apart


def _named(path: str) -> dict[str, str]:
    """{text id: prompt, or the id where it is not known} of a file of embeddings."""
    known = read_header(path, "texts").config.get("prompts", {})
    by_id = {text_id(p): p for p in known.values()}
    return {k: by_id.get(k, k) for k in read_embeddings(path)}


def _texts(args, wanted: dict[str, str], space: LatentSpace, work: Path, context) -> dict[str, Tensor]:
    known = read_embeddings(args.embeddings) if args.embeddings else {}
    missing = {k: p for k, p in wanted.items() if k not in known}
    if missing and args.text_encoder is None:
        where = f"{args.embeddings} lacks" if args.embeddings else "--text_encoder or --embeddings is needed for"
        raise ShellRewardError(f"{where} {len(missing)} prompts, such as '{next(iter(missing.values()))[:60]}'")
    if missing:
        path = work / TEXTS
        # The first process embeds, the others read.
        with context.state.main_process_first() if context.world_size > 1 else nullcontext():
            stored = read_embeddings(path) if path.is_file() else {}
            if not missing.keys() <= stored.keys():
                stored |= embed(missing.values(), encoder_options(args))
                work.mkdir(parents=True, exist_ok=True)
                write_embeddings(path, stored, space, provenance(args.argv, "trainers.shell_reward"), missing)
                stored = read_embeddings(path)
        known |= stored
    for key, prompt in wanted.items():
        if not bool(torch.isfinite(known[key]).all()):
            raise ShellRewardError(f"the embedding of '{prompt[:60]}' contains NaN or Inf; embed it again")
    return {k: known[k].float() for k in wanted}
