"""The demo's second half: early Best-of-8 with a PRISM head in the toy world, compared with the first seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.toy_world import candidates, pipeline, prism_rows, search, statistics, weights
from trainers.wan.sampling import euler

from .page import Shown, prompt_row

SIZE = 8
HEAD = "query"
COLUMNS = 4

INTRODUCTION = """<h2>Best of {size}, pruned early (PRISM)</h2>
<p>For each of the same prompts {size} seeds were started. A small head, trained on the judge's preferences between seeds of
other prompts, scored features of the model's own blocks at sigma {levels}, and the worse half was dropped each time. This ran
{share:.0f}&#8239;% of the blocks of {size} whole runs. The judge's overall score of the finished clip, mean &#177; half of the
95&#8239;% interval over {count} prompts: first seed {first}, winner {winner}, change {change}. The search works as planned,
but this head, trained on a few hundred prompts, is too weak to gain anything beyond chance, as the toy world's report shows.
</p>"""


@dataclass(frozen=True)
class Raced:
    """One prompt: clips uint8 [T, 3, H, W] of the first seed and of the winner, and the judge's overall scores of both.

    place: index of the winner among the seeds; share: blocks run over those of SIZE whole runs.
    """

    caption: str
    first: Tensor
    winner: Tensor
    scores: tuple[float, float]
    place: int
    share: float


@torch.no_grad()
def race_all(world, the_judge, split: str, count: int) -> list[Raced]:
    """Early Best-of-N for the first `count` captions of a split."""
    scorer = candidates.load_heads(candidates.heads_folder(), weights.FOLDER / weights.DIT)[HEAD]
    plan = prism_rows.plan_of(SIZE, prism_rows.HALVING, max(scorer.head.config.taps))
    sigmas = pipeline.schedule()
    found = []
    for index in tqdm(range(count), desc="racing", unit="prompt"):
        caption = candidates.caption_of(world, split, index)
        won = search.search(world, scorer, caption, index, plan)
        noise = pipeline.initial_noise(candidates.seeds(index, 1))
        first = euler(world.denoiser([caption.text]), noise, sigmas)
        frames = world.decode(torch.cat([first, won.z]))
        scores = the_judge.read(frames).scores([caption.attributes] * 2)["overall"].tolist()
        found.append(Raced(caption.text, *frames, tuple(scores), won.winner, won.blocks / plan.full_cost.blocks))
    return found


def summary(found: Sequence[Raced]) -> dict[str, str]:
    """The figures of the introduction as text."""
    first, winner = (torch.tensor([r.scores[k] for r in found]) for k in (0, 1))
    change = statistics.difference(winner, first)
    return {
        "first": statistics.mean(first).text(),
        "winner": statistics.mean(winner).text(),
        "change": f"{change.mean:+.3f} \u00b1 {change.half:.3f}",
    }


def section(found: Sequence[Raced], shown: int) -> str:
    """HTML: the figures, and the clips of the first `shown` prompts."""
    known = summary(found) | {
        "size": SIZE, "count": len(found), "share": 100 * found[0].share,
        "levels": ", ".join(f"{s:g}" for s in prism_rows.HALVING),
    }  # fmt: skip
    rows = [
        prompt_row(
            r.caption,
            [
                Shown("first seed", r.first, None, (f"judge, overall {r.scores[0]:.2f}",)),
                Shown(f"winner, seed {r.place + 1} of {SIZE}", r.winner, None, (f"judge, overall {r.scores[1]:.2f}",)),
            ],
            COLUMNS,
        )
        for r in found[:shown]
    ]
    return "\n".join([INTRODUCTION.format_map(known), *rows])
