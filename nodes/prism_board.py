"""The score board of a race: as text, as an image, and as metadata of saved files."""

import torch
from PIL import Image, ImageDraw, ImageFont

from .prism_race import Race

COLUMNS = 4
WIDTH, MARGIN, LINE = 256, 10, 18
BACKGROUND, PLAIN, WINNER, DROPPED = (24, 24, 28), (150, 150, 160), (110, 220, 130), (205, 125, 105)


def as_text(racing: Race, warning: str | None) -> str:
    """The winners, the cost, and the scores of every candidate."""
    plan, network, lines = racing.plan, racing.network, [] if warning is None else [warning]
    full = plan.full_cost
    winners = ", ".join(str(racing.candidates.seeds[i]) for i in racing.outcome.winners)
    lines.append(f"Best of {plan.candidates}: seed {winners}")
    lines.append(
        f"{network.evaluations} evaluations, {network.blocks} blocks: "
        f"{100 * network.blocks / full.blocks:.1f} % of plain Best-of-{plan.candidates} ({full.blocks})"
    )
    low, high = racing.prism.loaded.sigmas
    beyond = [p.sigma for p in plan.checkpoints if not low - 1e-3 <= p.sigma <= high + 1e-3]
    if beyond:
        lines.append(f"The head was trained on sigma {low:.3f} to {high:.3f}; {beyond[0]:.3f} is outside.")
    for point in plan.checkpoints:
        lines.append(f"Step {point.step} (sigma {point.sigma:.3f}): {point.survivors} stay")
    for s in racing.outcome.board:
        scores = ", ".join(f"{v:.3f}" for v in s.scores.values())
        lines.append(f"  seed {racing.candidates.seeds[s.index]}: {scores or 'not scored'}; {_status(s)}")
    return "\n".join(lines)


def as_metadata(racing: Race) -> dict:
    """The same as JSON values."""
    return {
        "node": "PRISM Best-of-N",
        "head": racing.prism.loaded.name,
        "winners": [racing.candidates.seeds[i] for i in racing.outcome.winners],
        "finish": racing.plan.finish,
        "checkpoints": [[p.step, p.sigma, p.survivors] for p in racing.plan.checkpoints],
        "candidates": [
            {"seed": racing.candidates.seeds[s.index], "scores": list(s.scores.values()), "dropped": s.dropped}
            for s in racing.outcome.board
        ],
    }


def as_image(racing: Race) -> torch.Tensor:
    """float32 [1, H, W, 3] in 0..1: the last x0 of each candidate, with its seed, its scores and whether it was dropped."""
    board = racing.outcome.board
    # A sampler that never calls back leaves no thumbnails.
    missing = torch.full((9, 16, 3), 60, dtype=torch.uint8)
    h, w = next(iter(racing.thumbnails.values()), missing).shape[:2]
    tall = max(1, round(WIDTH * h / w))
    columns = min(COLUMNS, len(board))
    cell = (WIDTH + MARGIN, tall + 3 * LINE + 2 * MARGIN)
    rows = -(-len(board) // columns)
    canvas = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for s in board:
        x, y = MARGIN + s.index % columns * cell[0], MARGIN + s.index // columns * cell[1]
        won = s.dropped is None
        picture = Image.fromarray(racing.thumbnails.get(s.index, missing).numpy())
        picture = picture.resize((WIDTH, tall), Image.Resampling.NEAREST)
        canvas.paste(picture, (x, y))
        if won:
            draw.rectangle((x - 3, y - 3, x + WIDTH + 2, y + tall + 2), outline=WINNER, width=3)
        lines = (
            (f"seed {racing.candidates.seeds[s.index]}", PLAIN),
            (" > ".join(f"{v:.2f}" for v in list(s.scores.values())[-4:]) or "not scored", PLAIN),
            (_status(s), WINNER if won else DROPPED),
        )
        for k, (line, colour) in enumerate(lines):
            draw.text((x, y + tall + 5 + k * LINE), line, fill=colour, font=font)
    flat = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return flat.view(1, canvas.height, canvas.width, 3).float() / 255


def _status(candidate) -> str:
    return "kept" if candidate.dropped is None else f"dropped at step {candidate.dropped}"
