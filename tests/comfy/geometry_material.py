"""Clips of the benchmark's ray-cast room, with their true depth and cameras, for the tests of the geometry nodes."""

from dataclasses import replace
from functools import cache

import torch

from benchmarks.geometry import room
from trainers.kernels.geometry import tracks
from trainers.kernels.geometry.views import Views, sample_indices

# A box of a tenth of the picture, with texture.
SEED, FRAMES = 4, 9
WIDTH, HEIGHT = 192, 160


@cache
def clip(move=None, **defects):
    """A small clip: room.Clip. Defects are those of room.Scene, such as drift and breathing."""
    sizes = {"frames": FRAMES, "width": WIDTH, "height": HEIGHT}
    return room.render(replace(room.draw_scene(SEED, move, **sizes), **defects))


def images(made):
    """IMAGE of a clip."""
    return made.frames.float() / 255


@cache
def scored(move=None, **defects):
    """What the kernel says of the clip's frames."""
    return tracks.score_clip(images(clip(move, **defects)), "torch")


def views(made, count=5):
    """True geometry of some of a clip's frames."""
    at = sample_indices(len(made.frames), count)
    return Views(images(made)[at], made.depth[at], made.K[at], made.world_to_camera[at], None, at, len(made.frames))


def da3(made, count=5):
    """The same as core's DA3_GEOMETRY, with K in pixels of the picture that a model might have run at."""
    v = views(made, count)
    scale = torch.tensor([[0.5], [0.5], [1.0]])
    return {
        "depth": v.depth, "image": v.images, "mode": "multiview", "extrinsics": v.world_to_camera[None, :, :3],
        "intrinsics": (v.K * scale)[None],
    }  # fmt: skip
