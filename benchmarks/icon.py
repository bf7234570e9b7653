"""Draws the icon and the banner of the Comfy registry: a manifold, the shell around it, and the candidate that is kept.

    python -m benchmarks.icon [--output_dir docs/images]

icon.png     400x400, the largest that the registry takes
banner.png   1260x540 (21:9), with the pack's name. Tokens lie in the band of the shell (grey), within it as blurred ones do
             (blue), or outside as noisy ones do (red to yellow). Candidates come from noise step by step; weak ones end early

Both illustrate; they measure nothing. Shapes are added as distances to their edges in pixels, so edges are smooth without
drawing at a larger size.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.command_line import make_parser
from trainers.kernels.colours import HEAT_MAP, heat_map_colour

# Those of the race board (nodes/race_board.py, which needs ComfyUI), and a bright one for the curve and the name.
BACKGROUND, PLAIN, WINNER, DROPPED, BRIGHT = torch.tensor(
    ((24, 24, 28), (150, 150, 160), (110, 220, 130), (205, 125, 105), (240, 240, 245))
) / 255  # fmt: skip
ICON, BANNER = (400, 400), (1260, 540)
NAME, SUBTITLE = "Intrinsic Reward", "for Wan Video"
CLAIM = ("Score, select and correct clips in ComfyUI", "by rewards that need no labels")
SEED, TOKENS = 3, 480
# The banner's shell in pixels: its radius, the spread of real tokens around it, and the half width of its 90 % band.
RADIUS, SPREAD = 84.0, 9.0
BAND = 1.645 * SPREAD
# Of each candidate: where it starts, where its path bends, and the step after which it is dropped.
STEPS = 8
RACE = (
    ((1068.0, 492.0), (1046.0, 452.0), 3), ((1150.0, 496.0), (1100.0, 440.0), 3), ((1216.0, 450.0), (1150.0, 410.0), STEPS),
    ((1222.0, 372.0), (1165.0, 350.0), 5),
)  # fmt: skip


class Canvas:
    """A picture [H, W, 3] in [0, 1], and at: the centre of each of its pixels, [H, W, 2] (x, y)."""

    def __init__(self, size: tuple[int, int]):
        x, y = (torch.arange(n) + 0.5 for n in size)
        self.at = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        self.pixels = BACKGROUND.expand(*self.at.shape[:2], 3)

    def distance(self, line: Tensor) -> Tensor:
        """[H, W]: distance of every pixel to a line of points [N, 2]."""
        # A row at a time: all distances of the banner at once would take gigabytes.
        return torch.stack([torch.cdist(row, line).amin(-1) for row in self.at])

    def blend(self, share: Tensor, colour: Tensor) -> None:
        """share: [H, W]; colour: [3] or [H, W, 3]."""
        self.pixels = torch.lerp(self.pixels, colour.expand_as(self.pixels), share[..., None])

    def add(self, distance: Tensor, colour: Tensor, opacity: float = 1.0) -> None:
        """distance: [H, W], to the edge of a shape; negative inside."""
        self.blend(opacity * (0.5 - distance).clamp(0, 1), colour)

    def dot(self, centre: Tensor, radius: float, colour: Tensor, opacity: float = 1.0) -> None:
        self.add((self.at - centre).norm(dim=-1) - radius, colour, opacity)

    def image(self) -> Image.Image:
        return Image.fromarray((self.pixels * 255).round().to(torch.uint8).numpy())


def bezier(*controls: Sequence[float], points: int = 900) -> Tensor:
    """[points, 2] of a cubic Bezier curve: by default near enough to each other for `Canvas.distance`."""
    t = torch.linspace(0, 1, points)[:, None]
    a, b, c, d = (torch.as_tensor(p) for p in controls)
    return (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d


def normals(line: Tensor) -> Tensor:
    """[N, 2]: unit vectors across a line [N, 2]."""
    (along,) = torch.gradient(line, dim=0)
    along = along / along.norm(dim=-1, keepdim=True)
    return torch.stack((along[:, 1], -along[:, 0]), dim=-1)


def icon() -> Image.Image:
    """The shell as a ring: few and thick shapes, to be told apart at 32 pixels."""
    canvas = Canvas(ICON)
    middle, radius = torch.tensor((200.0, 200.0)), 146.0
    curve = canvas.distance(bezier((118.0, 254.0), (184.0, 300.0), (216.0, 100.0), (282.0, 146.0)))
    ring = (canvas.at - middle).norm(dim=-1) - radius
    canvas.blend(0.6 * torch.exp(-curve / 55) * (0.5 - ring).clamp(0, 1), torch.tensor(HEAT_MAP[1]))
    canvas.add(ring.abs() - 13, PLAIN)
    canvas.add(curve - 16, BRIGHT)
    kept = middle + radius * 0.5**0.5
    canvas.dot(kept, 62, BACKGROUND)
    canvas.dot(kept, 44, WINNER)
    return rounded(canvas.image(), 72)


def rounded(picture: Image.Image, radius: int) -> Image.Image:
    """The same with transparent corners."""
    # Pillow's shapes have hard edges.
    large = Image.new("L", (4 * picture.width, 4 * picture.height), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), 4 * radius, fill=255)
    out = picture.convert("RGBA")
    out.putalpha(large.resize(picture.size, Image.Resampling.LANCZOS))
    return out


def banner() -> Image.Image:
    canvas = Canvas(BANNER)
    curve = bezier((560.0, 640.0), (820.0, 560.0), (800.0, 100.0), (1330.0, 90.0))
    d = canvas.distance(curve)
    # Heat maps of the pack say it with these colours.
    field = heat_map_colour(((d - RADIUS) / (7 * SPREAD)).clamp(-1, 1))
    canvas.blend(0.32 * torch.exp(-((d / (1.6 * RADIUS)) ** 4)), field)
    canvas.add((d - RADIUS).abs() - BAND, PLAIN, 0.3)
    draw_tokens(canvas, curve)
    canvas.add(d - 4, BRIGHT)
    draw_race(canvas, curve[540] - RADIUS * normals(curve)[540])
    return with_name(canvas.image())


def draw_tokens(canvas: Canvas, curve: Tensor) -> None:
    generator = torch.Generator().manual_seed(SEED)
    places = torch.randint(len(curve), (TOKENS,), generator=generator)
    offsets = SPREAD * torch.randn(TOKENS, generator=generator)
    # Of ten tokens, one is blurred and one noisy.
    offsets[::10] -= 4 * SPREAD
    offsets[1::10] += 4 * SPREAD
    sides = torch.where(torch.rand(TOKENS, generator=generator) < 0.5, -1.0, 1.0)
    at = curve[places] + (sides * (RADIUS + offsets))[:, None] * normals(curve)[places]
    for centre, offset in zip(at, offsets, strict=True):
        outside = offset.abs() > BAND
        colour = heat_map_colour((offset / (4 * SPREAD)).clamp(-1, 1)) if outside else BRIGHT
        canvas.dot(centre, 3, colour, 0.9 if outside else 0.5)


def draw_race(canvas: Canvas, goal: Tensor) -> None:
    for start, bend, steps in RACE:
        won = steps == STEPS
        colour = WINNER if won else PLAIN
        path = bezier(start, bend, goal + torch.tensor((60.0, 40.0)), goal, points=25 * STEPS + 1)[: 25 * steps + 1]
        canvas.add(canvas.distance(path) - 0.75, colour, 0.35)
        for k, centre in enumerate(path[::25]):
            canvas.dot(centre, 4.5, colour, 0.35 + 0.5 * k / STEPS)
        if not won:
            canvas.dot(path[-1], 8, DROPPED)
    canvas.dot(goal, 25, BACKGROUND)
    canvas.dot(goal, 17, WINNER)


def with_name(picture: Image.Image) -> Image.Image:
    draw = ImageDraw.Draw(picture)
    claim = [(326 + 34 * k, 25, PLAIN, line) for k, line in enumerate(CLAIM)]
    lines = [(160, 74, BRIGHT, NAME), (250, 42, WINNER, SUBTITLE), *claim]
    for top, size, colour, text in lines:
        fill = tuple((colour * 255).round().int().tolist())
        # The one font that comes with Pillow has one weight; a stroke makes the name heavier.
        draw.text((72, top), text, fill, ImageFont.load_default(size), stroke_width=int(text == NAME))
    return picture


def main(argv=None) -> None:
    parser = make_parser("benchmarks.icon", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, draw in (("icon", icon), ("banner", banner)):
        draw().save(args.output_dir / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
