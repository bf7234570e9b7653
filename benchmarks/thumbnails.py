"""Draws the pictures of the template browser, workflows/*.jpg, and of help pages: what a workflow gives, by the pack itself.

    python -m benchmarks.thumbnails [--output_dir workflows] [--help_pages web/docs/images]

Clips are of the ray-caster (`benchmarks.geometry.room`), with the verdicts of the geometry score, and of the toy world, with
the scores of its judge.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from benchmarks.geometry import room
from benchmarks.pictures import PIXELS, SEED
from benchmarks.toy_world import candidates, judge, pipeline, weights
from trainers.kernels.colours import heat_map_colour
from trainers.kernels.geometry.heat_map import full_error, heat_map
from trainers.kernels.geometry.record import TRACKS
from trainers.kernels.geometry.tracks import score_clip
from trainers.kernels.latent_space import WAN21
from trainers.kernels.shell_lcc import heat_map as shell_heat_map
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.diagnostics import add_noise
from trainers.kernels.shell_lcc.evaluation import score, tokens
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold
from trainers.latents.read import list_clips, read_clip

SIZE = (480, 300)
GOOD, BAD = (110, 220, 130), (205, 125, 105)
CAPTION_INDEX = 7
Cell = tuple[Tensor, str, tuple[int, int, int] | None]


def sheet(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Cells (picture [H, W, 3] in [0, 1], caption, colour of its frame) in a picture of SIZE."""
    rows = -(-len(cells) // columns)
    w, h = SIZE[0] // columns, SIZE[1] // rows
    out = Image.new("RGB", SIZE, (24, 24, 28))
    draw = ImageDraw.Draw(out)
    for i, (picture, caption, colour) in enumerate(cells):
        left, top = i % columns * w, i // columns * h
        scale = max((w - 8) / picture.shape[1], (h - 22) / picture.shape[0])
        size = (round(picture.shape[0] * scale), round(picture.shape[1] * scale))
        shown = F.interpolate(picture.movedim(-1, 0)[None].float(), size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        y, x = (size[0] - (h - 22)) // 2, (size[1] - (w - 8)) // 2
        pixels = (shown[:, y : y + h - 22, x : x + w - 8] * 255).round().to(torch.uint8).movedim(0, -1)
        out.paste(Image.fromarray(pixels.contiguous().numpy()), (left + 4, top + 4))
        if colour:
            draw.rectangle((left + 2, top + 2, left + w - 4, top + h - 18), outline=colour, width=3)
        draw.text((left + 6, top + h - 16), caption, fill=colour or (220, 220, 225))
    return out


def geometry() -> dict[str, Image.Image]:
    rigid = room.render(room.draw_scene(SEED, "arc"))
    clips = [rigid.frames, *(room.warp(rigid, p, SEED)[0].frames for p in (PIXELS, 2 * PIXELS))]
    other = room.render(replace(room.draw_scene(SEED, "arc"), drift=0.6)).frames
    clips.append(other)
    scored = [score_clip(c) for c in clips]
    full = full_error([s.error_map for s in scored], TRACKS)
    pairs = list(zip(clips, scored, strict=True))
    heats = [heat_map(c.float() / 255, s.error_map, s.record.frame_indices, full, s.greys)[24] for c, s in pairs]
    names = [f"{s.record.verdict} {s.record.score:.2f}" for s in scored]
    frames = [c[24].float() / 255 for c in clips]
    depth = rigid.depth[24]
    near = heat_map_colour(2 * (depth.min() / depth) - 1)
    best = max(range(len(scored)), key=lambda i: scored[i].record.score)
    ranked = [(f, n, GOOD if i == best else None) for i, (f, n) in enumerate(zip(frames, names, strict=True))]
    verdicts = [(heats[0], names[0], GOOD), (heats[1], names[1], BAD)]
    return {
        "01": sheet([(frames[0], "", None), verdicts[0], (frames[1], "", None), verdicts[1]], 2),
        "03": sheet(ranked, 2),
        "08": sheet([(frames[0], f"winner, {names[0]}", GOOD), (frames[1], f"loser, {names[1]}", BAD)], 2),
        "15": sheet([(frames[0], "frame", None), (near, "depth", None), *verdicts], 2),
        "16": sheet([(near, "depth and cameras from a file", None), (heats[0], names[0], GOOD)], 2),
    }


def toy() -> dict[str, Image.Image]:
    world, j = pipeline.load(), judge.load()
    caption = candidates.caption_of(world, "unseen", CAPTION_INDEX)
    z = world.sample([caption.text] * 8, candidates.seeds(CAPTION_INDEX, 8))
    frames = world.decode(z)
    overall = j.read(frames).scores([caption.attributes] * 8)["overall"].tolist()
    order = sorted(range(8), key=lambda i: -overall[i])
    pictures = [f[8].movedim(0, -1).float() / 255 for f in frames]

    def ranked(count: int, kept: int, columns: int) -> Image.Image:
        place = {i: r for r, i in enumerate(o for o in order if o < count)}
        cells = [(pictures[i], f"#{place[i] + 1}  {overall[i]:.2f}", GOOD if place[i] < kept else None) for i in range(count)]
        return sheet(cells, columns)

    best, worst = order[0], order[-1]
    pair = [(pictures[best], "winner", GOOD), (pictures[worst], "loser", BAD)]
    clips = [read_clip(r) for r in list_clips([weights.FOLDER / weights.LATENTS], WAN21)]
    manifold = ShellManifold(fit_anchors(torch.cat([tokens(c) for c in clips[:200]]), 1024), WAN21)
    manifold.calibration = calibrate([score(manifold, c) for c in clips[200:240]])

    def shown(x: Tensor) -> tuple[Tensor, Tensor]:
        picture = world.decode(x[None])[0, 8].movedim(0, -1).float() / 255
        return picture, shell_heat_map.heat_map(manifold, manifold.distance(x[None]), False)[2]

    noisy = add_noise(clips[245], 0.4)
    few, guided = (world.sample([caption.text], [3], hook, steps=5, cfg=5.0)[0] for hook in (None, _band(manifold)))
    worse, better = (f"{name}  {overall[i]:.2f}" for name, i in (("A", worst), ("B", best)))
    before, after, real = shown(noisy), shown(manifold.pull(noisy[None], "project")[0]), shown(clips[245])
    return {
        "02": ranked(8, 1, 4), "12": ranked(8, 1, 4), "13": ranked(8, 3, 4), "07": ranked(4, 1, 2), "14": ranked(4, 2, 2),
        "04": sheet([(real[0], "clip", None), (real[1], "distances to the shell", None)], 2),
        "05": sheet([(shown(few)[0], "5 steps", None), (shown(guided)[0], "5 steps, guided", GOOD)], 2),
        "06": sheet([(before[0], "noisy", None), (before[1], "", None), (after[0], "refined", GOOD), (after[1], "", None)], 2),
        "09": sheet([*pair, (pictures[order[1]], "winner", GOOD), (pictures[order[-2]], "loser", BAD)], 2),
        "11": sheet([*pair, (pictures[order[2]], "winner", GOOD), (pictures[order[-3]], "loser", BAD)], 2),
        "10": sheet([(pictures[worst], worse, None), (pictures[best], better, None)], 2),
    }  # fmt: skip


def _band(manifold: ShellManifold):
    return lambda x0, sigma, step: manifold.pull(x0, "band")


# Number of a workflow -> name of the same picture on help pages.
HELP_PAGES = {
    "01": "check_a_clip", "03": "most_consistent", "04": "manifold", "05": "guidance", "06": "refine", "07": "rank",
    "08": "preferences", "09": "train_lora", "11": "train_head", "12": "best_of_n", "13": "best_three", "14": "rank_by_head",
    "15": "depth", "16": "saved_geometry",
}  # fmt: skip


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("workflows"))
    parser.add_argument("--help_pages", type=Path, default=Path("web/docs/images"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.no_grad():
        drawn = geometry() | toy()
    for path in sorted(args.output_dir.glob("*.json")):
        drawn[path.name[:2]].save(path.with_suffix(".jpg"), quality=88)
    for number, name in HELP_PAGES.items():
        drawn[number].save(args.help_pages / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
