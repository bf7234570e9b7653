"""The outcome of a Best-of-N and its score board: as text, as an image, and as metadata of saved files."""

from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw, ImageFont

from ..kernels.prism.plan import Plan
from ..kernels.prism.race import CandidateResult
from ..kernels.rewards.prism import PrismReward
from ..kernels.rewards.reward import FINISHED, Reward
from ..kernels.rewards.schedule import at
from .race import Race

COLUMNS = 4
WIDTH, MARGIN, LINE = 256, 10, 18
BACKGROUND, PLAIN, WINNER, DROPPED = (24, 24, 28), (150, 150, 160), (110, 220, 130), (205, 125, 105)


@dataclass
class Outcome:
    """The result of a Best-of-N.

    latents: LATENTs of the winners, best first, each of one, or one of all; seeds: of all candidates; board: one entry for
    each; winners: their indices; plan: None where all candidates are kept. evaluations, blocks: what ran, as in
    GuiderNetwork; depth: blocks of the network; notes: sentences for the report; thumbnails: candidate -> uint8 [h, w, 3].
    """

    latents: list[dict]
    seeds: list[int]
    reward: Reward
    board: list[CandidateResult]
    winners: list[int]
    depth: int
    plan: Plan | None = None
    evaluations: int = 0
    blocks: int = 0
    notes: tuple[str, ...] = ()
    thumbnails: dict[int, torch.Tensor] = field(default_factory=dict)

    def add_forwards(self, forwards: int) -> None:
        """Adds the cost of ordinary runs."""
        self.evaluations += forwards
        self.blocks += forwards * self.depth


def outcome_of(racing: Race, latent: dict) -> Outcome:
    """The outcome of a race. latent: of its winners, as one batch."""
    network, plan = racing.network, racing.plan
    notes = list(plan.notes)
    if racing.settings.chunk > 1 and network.one_by_one is not None:
        notes.append(f"Candidates were evaluated one by one: {network.one_by_one}")
    elif network.stateful:
        notes.append(f"Every candidate had its own state of {', '.join(network.stateful)}")
    return Outcome(
        [latent], racing.candidates.seeds, racing.reward, racing.outcome.board, racing.outcome.winners, plan.depth, plan,
        network.evaluations, network.blocks, tuple(notes), racing.thumbnails,
    )  # fmt: skip


def as_text(outcome: Outcome) -> str:
    """What the scores mean, the winners, the cost, and the scores of every candidate."""
    plan, winners = outcome.plan, ", ".join(str(outcome.seeds[i]) for i in outcome.winners)
    lines = []
    if plan is None:
        kept = len(outcome.winners)
        all_of_them = f"All {kept} candidates are kept and none is scored: seeds {winners}"
        lines.append(all_of_them if kept > 1 else f"One candidate, not scored: seed {winners}")
        lines.append(f"{outcome.evaluations} evaluations, {outcome.blocks} blocks")
    else:
        last = at(outcome.reward, plan.checkpoints[-1].sigma if plan.finalists == plan.keep and plan.checkpoints else FINISHED)
        # Scores are shown so that higher is better, whatever the reward's own figure is.
        sign = "" if last.info.higher_is_better else "minus "
        lines.append(f"Best of {plan.candidates}: seed {winners}. Scores, higher is better: {sign}{last.info.meaning}.")
        full = plan.full_cost
        lines.append(
            f"{outcome.evaluations} evaluations, {outcome.blocks} blocks: "
            f"{100 * outcome.blocks / full.blocks:.1f} % of plain Best-of-{plan.candidates} ({full.blocks})"
        )
        for point in plan.checkpoints:
            lines.append(f"Step {point.step} (sigma {point.sigma:.3f}): {point.survivors} stay")
            info = at(outcome.reward, point.sigma).info
            if not info.valid_at(point.sigma):
                low, high = info.sigmas
                lines.append(f"  {info.name} is known to work at sigma {low:.3f} to {high:.3f}; {point.sigma:.3f} is outside")
    lines += outcome.notes
    for s in outcome.board:
        scores = ", ".join(f"{v:.3f}" for v in s.scores.values())
        lines.append(f"  seed {outcome.seeds[s.index]}: {scores or 'not scored'}; {_status(s, plan)}")
    return "\n".join(lines)


def as_metadata(outcome: Outcome) -> dict:
    """The same as JSON values."""
    points = () if outcome.plan is None else outcome.plan.checkpoints
    return {
        "node": "PRISM Best-of-N",
        "reward": outcome.reward.info.name,
        **({"head": outcome.reward.loaded.name} if isinstance(outcome.reward, PrismReward) else {}),
        "winners": [outcome.seeds[i] for i in outcome.winners],
        "finish": None if outcome.plan is None else outcome.plan.finish,
        "checkpoints": [[p.step, p.sigma, p.survivors] for p in points],
        "candidates": [
            {"seed": outcome.seeds[s.index], "scores": list(s.scores.values()), "dropped": s.dropped} for s in outcome.board
        ],
    }


def as_image(outcome: Outcome) -> torch.Tensor:
    """float32 [1, H, W, 3] in 0..1: the last x0 of each candidate, with its seed, its scores and whether it was dropped."""
    board = outcome.board
    # A sampler that never calls back leaves no thumbnails.
    missing = torch.full((9, 16, 3), 60, dtype=torch.uint8)
    h, w = next(iter(outcome.thumbnails.values()), missing).shape[:2]
    tall = max(1, round(WIDTH * h / w))
    columns = min(COLUMNS, len(board))
    cell = (WIDTH + MARGIN, tall + 3 * LINE + 2 * MARGIN)
    rows = -(-len(board) // columns)
    canvas = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for s in board:
        x, y = MARGIN + s.index % columns * cell[0], MARGIN + s.index // columns * cell[1]
        won = s.dropped is None
        picture = Image.fromarray(outcome.thumbnails.get(s.index, missing).numpy())
        picture = picture.resize((WIDTH, tall), Image.Resampling.NEAREST)
        canvas.paste(picture, (x, y))
        if won:
            draw.rectangle((x - 3, y - 3, x + WIDTH + 2, y + tall + 2), outline=WINNER, width=3)
        lines = (
            (f"seed {outcome.seeds[s.index]}", PLAIN),
            (" > ".join(f"{v:.2f}" for v in list(s.scores.values())[-4:]) or "not scored", PLAIN),
            (_status(s, outcome.plan), WINNER if won else DROPPED),
        )
        for k, (line, colour) in enumerate(lines):
            draw.text((x, y + tall + 5 + k * LINE), line, fill=colour, font=font)
    flat = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return flat.view(1, canvas.height, canvas.width, 3).float() / 255


def _status(candidate: CandidateResult, plan: Plan | None) -> str:
    if candidate.dropped is None:
        return "kept"
    ended = plan is None or not plan.checkpoints or candidate.dropped >= plan.steps
    return "dropped at the finish" if ended else f"dropped at step {candidate.dropped}"
