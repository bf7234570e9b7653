"""The race board's data: every candidate's seed, scores, rank and animated preview, sent while a Best-of-N runs.

The browser gets the whole state after every ranking, and again with the node's result, so that a page that is opened later, or
a saved workflow, can show it. Seeds are strings: JavaScript has no exact integers above 2^53.
"""

import time
from collections.abc import Sequence

import torch

from ..kernels.prism.plan import Plan
from ..kernels.prism.race import CandidateResult
from ..kernels.rewards.reward import FINISHED, Reward
from ..kernels.rewards.schedule import at
from . import panel_events, sprite_sheet
from .latent_thumbnail import rgb_frames

VERSION = 1
# Key of the state among the results that ComfyUI sends to the browser.
PANEL = "intrinsic_reward_race"
# Seconds between two previews of running candidates, and between two events about their steps.
PREVIEW_INTERVAL, STEP_INTERVAL = 1.0, 0.2
# With more candidates a saved workflow would hold too many pictures.
MOST_POSTERS = 32


class LiveRace:
    """Collects the state of a race and sends it. node_id: of the node that runs it; seeds: of all candidates."""

    def __init__(self, node_id: str | None, seeds: Sequence[int], reward: Reward):
        self._node_id, self._seeds, self._reward = node_id, list(seeds), reward
        self._name = sprite_sheet.new_name()
        self._sheets: dict[int, dict] = {}
        self._posters: dict[int, str] = {}
        self._steps: dict[int, int] = {}
        self._plan: Plan | None = None
        self._last_preview = self._last_step = 0.0

    def begin(self, plan: Plan) -> None:
        self._plan = plan
        self._send([CandidateResult(i) for i in range(len(self._seeds))])

    def step(self, candidate: int, step: int, x0: torch.Tensor, latent_format) -> None:
        """A candidate has finished a step, from 0. Sends at most one preview a second."""
        self._steps[candidate] = step + 1
        now = time.monotonic()
        if now - self._last_preview >= PREVIEW_INTERVAL:
            self._last_preview = now
            self.preview(candidate, x0, latent_format)
        elif now - self._last_step < STEP_INTERVAL:
            return
        self._last_step = now
        panel_events.send(
            panel_events.RACE_STEP, self._node_id,
            {"candidate": candidate, "step": step + 1, "sheet": self._sheets.get(candidate)},
        )  # fmt: skip

    def preview(self, candidate: int, x0: torch.Tensor, latent_format) -> None:
        """Draws a prediction [B, C, T, H, W] in model space; of a batch its first clip."""
        frames = rgb_frames(x0, latent_format)
        self._sheets[candidate] = sprite_sheet.save(frames, f"{self._name}_{candidate}")
        if len(self._seeds) <= MOST_POSTERS:
            self._posters[candidate] = sprite_sheet.poster(frames[len(frames) // 2])

    def ranked(self, board: Sequence[CandidateResult]) -> None:
        """The candidates have been ranked at a checkpoint."""
        self._send(board)

    def state(
        self, board: Sequence[CandidateResult], winners: Sequence[int] | None = None, plan: Plan | None = None
    ) -> dict:
        """The state as JSON values. winners: best first, None while the race runs; plan: None for that of `begin`."""
        plan, reward = plan or self._plan, at(self._reward, FINISHED)
        ranks = {i: place + 1 for place, i in enumerate(order_of(board, winners))}
        return {
            "version": VERSION,
            "done": winners is not None,
            "meaning": ("" if reward.info.higher_is_better else "minus ") + reward.info.meaning,
            "steps": None if plan is None else plan.steps,
            "checkpoints": [] if plan is None else [[p.step, round(p.sigma, 4), p.survivors] for p in plan.checkpoints],
            "candidates": [
                {
                    "seed": str(self._seeds[c.index]),
                    "scores": [[step, score] for step, score in c.scores.items()],
                    "dropped": c.dropped,
                    "rank": ranks.get(c.index),
                    "step": self._steps.get(c.index, 0),
                    "sheet": self._sheets.get(c.index),
                    "poster": self._posters.get(c.index),
                }
                for c in board
            ],
        }

    def _send(self, board: Sequence[CandidateResult]) -> None:
        panel_events.send(panel_events.RACE, self._node_id, {"state": self.state(board)})


def order_of(board: Sequence[CandidateResult], winners: Sequence[int] | None) -> list[int]:
    """Indices of the scored candidates, best first: winners, then by how far each came, then by its last score."""
    first = list(winners or ())
    others = [c for c in board if c.scores and c.index not in first]

    def place(c: CandidateResult) -> tuple[float, float]:
        # Step 0 is a finished draft's.
        steps, scores = list(c.scores), list(c.scores.values())
        return (-(steps[-1] or float("inf")), -scores[-1])

    return first + [c.index for c in sorted(others, key=place)]
