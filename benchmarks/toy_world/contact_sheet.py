"""Draws clips as one image: each clip a row of five frames with its caption below.

python -m benchmarks.toy_world.contact_sheet --output sheet.png [--kind renders|reconstructions|samples] [--split unseen]
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.command_line import make_parser

from . import pipeline, weights
from .clips import SPLITS, clip, scene_of

SHOWN = (0, 4, 8, 12, 16)
ZOOM, LINE, COLUMNS = 2, 14, 2


def draw(frames: Tensor, captions: list[str], columns: int = COLUMNS) -> Image.Image:
    """Clips uint8 [N, 17, 3, H, W] and their captions -> image."""
    n, _, _, h, w = frames.shape
    width, height = len(SHOWN) * w * ZOOM + 8, h * ZOOM + LINE
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (one, text) in enumerate(zip(frames, captions, strict=True)):
        left, top = (i % columns) * width, (i // columns) * height
        strip = torch.cat([one[t] for t in SHOWN], dim=2).permute(1, 2, 0).contiguous().numpy()
        sheet.paste(Image.fromarray(strip).resize((width - 8, h * ZOOM), Image.Resampling.NEAREST), (left, top))
        pen.text((left + 2, top + h * ZOOM + 1), text, fill="black")
    return sheet


def main(argv=None) -> int:
    parser = make_parser("benchmarks.toy_world.contact_sheet", __doc__)
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--kind", choices=("renders", "reconstructions", "samples"), default="samples")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--cfg", type=float, default=pipeline.CFG)
    parser.add_argument("--shift", type=float, default=pipeline.SHIFT)
    parser.add_argument("--weights", type=Path, default=weights.FOLDER, metavar="DIR")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    captions = [scene_of(args.split, i)[1] for i in range(args.count)]
    if args.kind == "samples":
        world = pipeline.load(args.weights)
        frames = world.decode(world.sample(captions, range(args.count), cfg=args.cfg, shift=args.shift))
    else:
        frames = torch.stack([clip(args.split, i).frames for i in range(args.count)])
        if args.kind == "reconstructions":
            world = pipeline.load(args.weights)
            frames = world.decode(world.encode(frames))
    draw(frames, captions).save(args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
