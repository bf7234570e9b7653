"""Draws the README's pictures from what the pack computes, and renders the clips of the node Example Clip.

    python -m benchmarks.pictures [--output_dir docs/images] [--examples web/examples]

geometry.jpg      a rigid clip and the same clip warped: a frame, its tracks and its heat map, on one scale, with the verdicts
shell_lcc.jpg     a decoded clip of the toy world, clean, blurred and noisy: the heat map of the distances to the shell
rigid_room.mp4    33 frames of 640x368 of a room with boxes and a moving camera; warped_room.mp4: the same, warped by 3 pixels
"""

import argparse
from dataclasses import replace
from pathlib import Path

import av
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from benchmarks.geometry import room
from benchmarks.toy_world import pipeline, weights
from trainers.kernels.geometry.heat_map import full_error, heat_map
from trainers.kernels.geometry.record import TRACKS
from trainers.kernels.geometry.tracks import score_clip
from trainers.kernels.latent_space import WAN21
from trainers.kernels.shell_lcc import heat_map as shell_heat_map
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.diagnostics import add_noise, blur
from trainers.kernels.shell_lcc.evaluation import score, tokens
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold
from trainers.latents.read import list_clips, read_clip

SEED, PIXELS, SHOWN = 4, 3.0, 24
TILE = (300, 173)
CAPTION = 22


def grid(rows: list[list[tuple[Tensor, str]]], size: tuple[int, int]) -> Image.Image:
    """Pictures [H, W, 3] in [0, 1] with captions, in rows. size: (width, height) of each."""
    width, height = size
    sheet = Image.new("RGB", (len(rows[0]) * (width + 6) - 6, len(rows) * (height + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (picture, caption) in enumerate(row):
            shown = F.interpolate(picture.movedim(-1, 0)[None].float(), (height, width), mode="bicubic", antialias=True)[0]
            pixels = (shown.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1)
            left, top = c * (width + 6), r * (height + CAPTION)
            sheet.paste(Image.fromarray(pixels.numpy()), (left, top + CAPTION))
            draw.text((left + 2, top + 5), caption, fill="black")
    return sheet


def geometry() -> Image.Image:
    rigid = room.render(room.draw_scene(SEED, "arc"))
    clips = {"rigid": rigid.frames, f"warped by {PIXELS:g} px": room.warp(rigid, PIXELS, SEED)[0].frames}
    scored = {name: score_clip(frames) for name, frames in clips.items()}
    full = full_error([s.error_map for s in scored.values()], TRACKS)
    rows = []
    for name, s in scored.items():
        frames = clips[name].float() / 255
        heat = heat_map(frames, s.error_map, s.record.frame_indices, full, s.greys)
        nearest = min(range(len(s.record.frame_indices)), key=lambda i: abs(s.record.frame_indices[i] - SHOWN))
        rows.append([
            (frames[SHOWN], name), (s.preview[min(nearest, len(s.preview) - 1)], "tracks"),
            (heat[SHOWN], f"{s.record.verdict}, score {s.record.score:.2f} of 1"),
        ])  # fmt: skip
    return grid(rows, TILE)


def shell() -> Image.Image:
    world = pipeline.load()
    clips = [read_clip(r) for r in list_clips([weights.FOLDER / weights.LATENTS], WAN21)]
    found = torch.cat([tokens(z) for z in clips[:200]])
    manifold = ShellManifold(fit_anchors(found, 1024), WAN21)
    manifold.calibration = calibrate([score(manifold, z) for z in clips[200:240]])
    z, row, heats = clips[245], [], []
    for name, x in (("clean", z), ("blurred", blur(z)), ("noisy", add_noise(z, 0.6))):
        picture = world.decode(x[None])[0, 8].movedim(0, -1).float() / 255
        d = manifold.distance(x[None])
        heat = shell_heat_map.heat_map(manifold, d, False)[2]
        share = float(manifold.outside_band(d).double().mean())
        row.append((picture, f"latents {name}"))
        heats.append((heat, f"{100 * share:.0f} % outside the band"))
    return grid([row, heats], (TILE[1], TILE[1]))


def example_clips() -> dict[str, Tensor]:
    """{file name: frames uint8 [33, 368, 640, 3]}."""
    rigid = room.render(replace(room.draw_scene(SEED, "arc", frames=33, width=640, height=368), noise=0.0))
    return {"rigid_room.mp4": rigid.frames, "warped_room.mp4": room.warp(rigid, PIXELS, SEED)[0].frames}


def write_video(path: Path, frames: Tensor) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=16)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "26", "preset": "veryslow"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    parser.add_argument("--examples", type=Path, default=Path("web/examples"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.examples.mkdir(parents=True, exist_ok=True)
    for name, frames in example_clips().items():
        write_video(args.examples / name, frames)
    for name, draw in (("geometry", geometry), ("shell_lcc", shell)):
        draw().save(args.output_dir / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
