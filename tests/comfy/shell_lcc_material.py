"""Latents, clips and default widget values for the tests of the Shell-LCC nodes."""

import torch
from torch.nn import functional as F

GUIDANCE = {
    "strength": 1.0, "method": "project", "target": "auto", "radius": 1.0, "start_percent": 0.0, "end_percent": 1.0,
    "trust": 0.2,
}
REFINE = {"strength": 1.0, "method": "project", "target": "auto", "radius": 1.0, "trust": 1.0}
FIT = {
    "anchors": 64, "neighbours": 16, "seed": 0, "held_out": 0.25, "latent_space": "auto", "locality": 0.2,
    "max_tokens": 1_000_000,
}


def sheet(count, seed=0, channels=16, frames=3, size=8):
    """Normalised latents [count, channels, frames, size, size] near a curved sheet, the same for every seed."""
    shape = torch.Generator().manual_seed(99)
    first, second = torch.randn(4, 32, generator=shape), torch.randn(32, channels, generator=shape) * 0.35
    own = torch.Generator().manual_seed(seed)
    coarse = 1.5 * torch.randn(count, 4, 2, 4, 4, generator=own)
    place = F.interpolate(coarse, size=(frames, size, size), mode="trilinear")
    z = (torch.tanh(place.movedim(1, -1) @ first) @ second).movedim(-1, 1)
    return z + 0.15 * torch.randn(z.shape, generator=own)


def write_video(path, frames, width=96, height=64, fps=16, seed=0):
    """An mp4 of coloured blobs that move."""
    import av
    import numpy as np

    generator = np.random.default_rng(seed)
    centres, colours = generator.uniform(0, 1, (6, 2)), generator.uniform(60, 255, (6, 3))
    y, x = np.mgrid[0:height, 0:width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            image = np.zeros((height, width, 3))
            for (cx, cy), colour in zip(centres, colours, strict=True):
                place = (cx + 0.02 * index) % 1 * width
                image += colour * np.exp(-((x - place) ** 2 + (y - cy * height) ** 2) / 90)[..., None]
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
