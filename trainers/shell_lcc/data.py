"""Latents for the Shell-LCC commands: tokens to fit on and held-out clips to measure on, read one clip at a time."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels import held_out, latent_space
from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..kernels.shell_lcc import evaluation
from ..kernels.shell_lcc.manifold import ShellManifold
from ..latents.read import ClipRef, digest_of, list_clips, read_clip, related, shape_of

ONE_CLIP = "one clip only: its last third of latent frames is held out, which flatters the figures; give more clips"
ONE_VIDEO = "all clips are of one video: the held-out ones resemble the others, which flatters the figures"


@dataclass
class FitData:
    """tokens: [N, C] to fit on, shuffled; held_out: (id, z [C, T, h, w]) clips; facts: counts and names for the file."""

    space: LatentSpace
    tokens: Tensor
    held_out: list[tuple[str, Tensor]]
    facts: dict
    notes: list[str]


def load_fit_data(args: argparse.Namespace, on_clip=lambda clip_id: None) -> FitData:
    """Reads args.latents and splits them by args.held_out, args.seed, args.max_tokens and args.max_held_out_tokens.

    Clips of one video, of its copies, and equal latents are on one side. Where all clips are related, only equal latents are
    kept together, and a note says so. The same arguments and files give the same tokens in the same order. Raises InputError,
    LatentDataError, FormatError, LatentSpaceError or SplitError.
    """
    space = latent_space.by_id(args.latent_space) if args.latent_space else None
    notes: list[str] = []
    refs = list_clips(args.latents, space, say=notes.append)
    resolutions: set[str] = set()

    def read(ref: ClipRef) -> Tensor:
        z = _read(ref, args)
        resolutions.add(resolution(z, ref.space))
        on_clip(ref.clip_id)
        return z

    videos = [] if len(refs) == 1 else groups_of(refs, args)
    if len(refs) > 1 and len(set(videos)) == 1:
        notes.append(ONE_VIDEO)
        digests = [digest_of(ref, lambda ref: _read(ref, args)) for ref in refs]
        videos = [str(first) for first in held_out.linked([[digest] for digest in digests])]
    if len(set(videos)) < 2:
        notes.append(ONE_CLIP)
        first, last = evaluation.split_frames(read(refs[0]))
        clip_id, total = refs[0].clip_id, first[0].numel()
        parts = [evaluation.draw_tokens(clip_id, first, args.max_tokens, args.seed)]
        held = [(clip_id, evaluation.draw_frames(last, args.max_held_out_tokens))]
        fit_count = 1
    else:
        fit, measure = evaluation.held_out_split(videos, args.held_out, args.seed)
        sizes = [_size(refs[i], args) for i in fit]
        total, fit_count = sum(sizes), len(fit)
        shares = evaluation.quotas(sizes, args.max_tokens)
        parts = [
            evaluation.draw_tokens(refs[i].clip_id, read(refs[i]), share, args.seed)
            for i, share in zip(fit, shares, strict=True)
        ]
        cap = args.max_held_out_tokens // len(measure)
        held = [(refs[i].clip_id, evaluation.draw_frames(read(refs[i]), cap)) for i in measure]
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
    return FitData(refs[0].space, tokens[order], held, facts, notes)


def groups_of(refs: list[ClipRef], args: argparse.Namespace) -> list[str]:
    """A name for the side of a split that each clip belongs on: clips with one name are related (`latents.read.related`)."""
    names = [str((ref.entry or {}).get("video", ref.clip_id)) for ref in refs]
    return held_out.linked_names(names, [related(ref, lambda ref: _read(ref, args)) for ref in refs])


def list_clips_for(manifold: ShellManifold, path: Path, args: argparse.Namespace) -> list[ClipRef]:
    """The clips of args.latents, which must be of the manifold's latent space.

    Raises LatentSpaceError naming both spaces where they differ, InputError, LatentDataError or FormatError.
    """
    try:
        return list_clips(args.latents, manifold.space)
    except LatentSpaceError as e:
        raise LatentSpaceError(f"{path} is a manifold of '{manifold.space.id}' latents, but {e}") from e


def iterate_clips(refs: list[ClipRef], args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """(clip id, normalised z [C, T, h, w] fp32) of every clip, read one at a time."""
    for ref in refs:
        yield ref.clip_id, _read(ref, args)


def resolution(z: Tensor, space: LatentSpace) -> str:
    """The size in pixels of a clip z [C, T, h, w], such as "832x480"."""
    return f"{z.shape[3] * space.spatial_stride}x{z.shape[2] * space.spatial_stride}"


def _size(ref: ClipRef, args: argparse.Namespace) -> int:
    """Tokens of a clip: from a shard's header where possible, so that a large folder is read only once."""
    if ref.path.suffix.lower() == ".safetensors":
        shape = shape_of(ref)
        if len(shape) == 4:
            return shape[1] * shape[2] * shape[3]
    return _read(ref, args)[0].numel()


def _read(ref: ClipRef, args: argparse.Namespace) -> Tensor:
    return read_clip(ref, args.pt_state, args.trust_state, args.pt_axes)
