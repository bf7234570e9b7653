"""Tokens to fit on and clips to measure on, read from disk one clip at a time."""

import argparse
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from ..kernels import latent_space
from ..kernels.latent_space import LatentSpace
from ..kernels.shell_lcc import evaluation
from ..latents import read as latent_data
from .arguments import resolution

ONE_CLIP = "one clip only: its last third of latent frames is held out, which flatters the figures; give more clips"


@dataclass
class Data:
    """tokens: [N, C] to fit on, shuffled; held: (id, z [C, T, h, w]) clips; facts: counts and names for the file."""

    space: LatentSpace
    tokens: Tensor
    held: list[tuple[str, Tensor]]
    facts: dict
    notes: list[str]


def gather(args: argparse.Namespace, on_clip=lambda clip_id: None) -> Data:
    """Reads args.latents and parts them by args.held_out, args.seed, args.max_tokens and args.max_held_out_tokens.

    Raises InputError, LatentDataError, FormatError, LatentSpaceError or SplitError. The same arguments and files give
    the same tokens in the same order.
    """
    space = latent_space.by_id(args.latent_space) if args.latent_space else None
    refs = latent_data.list_clips(args.latents, space)
    resolutions: set[str] = set()

    def read(ref: latent_data.ClipRef) -> Tensor:
        z = latent_data.read_clip(ref, args.pt_state, args.trust_state)
        resolutions.add(resolution(z, ref.space))
        on_clip(ref.clip_id)
        return z

    notes = []
    if len(refs) == 1:
        notes.append(ONE_CLIP)
        first, last = evaluation.split_frames(read(refs[0]))
        clip_id, total = refs[0].clip_id, first[0].numel()
        parts = [evaluation.draw_tokens(clip_id, first, args.max_tokens, args.seed)]
        held = [(clip_id, evaluation.draw_frames(last, args.max_held_out_tokens))]
        fit_count = 1
    else:
        videos = [str((ref.entry or {}).get("video", ref.clip_id)) for ref in refs]
        fit, hold = evaluation.held_out_split(videos, args.held_out, args.seed)
        if len({videos[i] for i in fit} & {videos[i] for i in hold}):
            notes.append("all clips are of one video: the held-out ones resemble the others, which flatters the figures")
        sizes = [_size(refs[i], args) for i in fit]
        total, fit_count = sum(sizes), len(fit)
        shares = evaluation.quotas(sizes, args.max_tokens)
        parts = [
            evaluation.draw_tokens(refs[i].clip_id, read(refs[i]), share, args.seed)
            for i, share in zip(fit, shares, strict=True)
        ]
        caps = args.max_held_out_tokens // len(hold)
        held = [(refs[i].clip_id, evaluation.draw_frames(read(refs[i]), caps)) for i in hold]
    tokens = torch.cat(parts)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(args.seed))
    facts = {
        "clips": len(refs),
        "fitted_clips": fit_count,
        "held_out_clips": [clip_id for clip_id, _ in held],
        "tokens": len(tokens),
        "tokens_available": total,
        "held_out_tokens": sum(z[0].numel() for _, z in held),
        "resolutions": sorted(resolutions),
        "latent_space": refs[0].space.id,
    }
    return Data(refs[0].space, tokens[order], held, facts, notes)


def _size(ref: latent_data.ClipRef, args: argparse.Namespace) -> int:
    """Tokens of a clip: from the file's header where there is one, so that a large folder is read only once."""
    if ref.path.suffix.lower() == ".safetensors":
        with safe_open(ref.path, framework="pt") as f:
            shape = f.get_slice(ref.key).get_shape()
        if len(shape) == 4:
            return shape[1] * shape[2] * shape[3]
    return latent_data.read_clip(ref, args.pt_state, args.trust_state)[0].numel()
