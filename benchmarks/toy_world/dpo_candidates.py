"""Samples seeds of training captions of the toy world and writes them as preference records, scored by judge and rewards.

    python -m benchmarks.toy_world.dpo_candidates --output_dir outputs/toy_world/dpo/candidates --captions 400 --part 0 2

Each record has the clips of one caption with the scores oracle.<dimension> (the judge's, from decoded pictures), prism (the
toy world's head), flow_residual, prompt_gap and random, so that `python -m trainers.dpo cache --by NAME` makes pairs by any
of them. Captions that have a record are not sampled again; --part I N gives one of N processes its share.

    python -m benchmarks.toy_world.dpo_candidates --agreement outputs/toy_world/dpo/candidates/part-*

prints how often each score orders two seeds of a caption as the judge's overall score does.
"""

from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.command_line import make_parser
from trainers.kernels.files import preference_records
from trainers.kernels.files.preference_records import RECORDS, new_record, to_line, write_candidate
from trainers.kernels.latent_space import WAN21
from trainers.kernels.rewards.flow_residual import FlowResidual
from trainers.kernels.rewards.prompt_gap import PromptGap
from trainers.scorers.latent_view import ConditionalNetwork, LatentView

from . import candidates, judge, pipeline, statistics, weights

# Captions that no earlier figure used.
SPLIT, FIRST = "train", 60_000
COUNT = 8
# The judge's score, and a difference of it that is no accident.
OVERALL, CLEAR = "oracle.overall", 0.15
MODEL = "toy_wan_t2v"


@torch.no_grad()
def scored(world, j: judge.Judge, heads: candidates.Heads, index: int, count: int):
    """(caption, latents [N, 16, 5, 8, 8], {score: [N]}) of one caption; all scores are higher for better clips."""
    caption = candidates.caption_of(world, SPLIT, index)
    z = world.sample([caption.text] * count, candidates.seeds(index, count))
    (negative,) = world.text.words([""])
    network = ConditionalNetwork(world.dit, caption.words, negative)
    found = candidates.of_reading(j.read(world.decode(z)), caption)
    for name, reward in (("flow_residual", FlowResidual(seed=index)), ("prompt_gap", PromptGap(seed=index))):
        found[name] = reward.scores(reward.measure(LatentView(network, z)))
    found["prism"] = candidates.finished(heads, z, caption, index)["query"]
    found["random"] = random_scores(index, count)
    return caption, z, {k: v.tolist() for k, v in found.items()}


def random_scores(index: int, count: int) -> torch.Tensor:
    """Scores [count] that say nothing: the control of what training on any pairs does."""
    return torch.rand(count, generator=torch.Generator().manual_seed(index))


def agreement(records, least: float = 0.0) -> dict[str, statistics.Estimate]:
    """{score: share of the pairs of a caption's seeds that it orders as oracle.overall does}, with the interval over captions;
    pairs whose overall scores differ by more than `least`."""
    found: dict[str, list[float]] = {}
    for record in records:
        pairs = [(a.scores, b.scores) for a, b in combinations(record.candidates, 2)]
        pairs = [(a, b) for a, b in pairs if abs(a[OVERALL] - b[OVERALL]) > least]
        for name in record.candidates[0].scores if pairs else ():
            right = [(a[name] > b[name]) == (a[OVERALL] > b[OVERALL]) for a, b in pairs]
            found.setdefault(name, []).append(sum(right) / len(right))
    return {name: statistics.mean(torch.tensor(values)) for name, values in found.items()}


def print_agreement(folders: list[Path]) -> None:
    records = [r for folder in folders for r in preference_records.read(folder)]
    every, clear = agreement(records), agreement(records, CLEAR)
    print(f"| score | all pairs ({len(records)} captions) | difference above {CLEAR:g} ({clear[OVERALL].n} captions) |")
    print("|---|---|---|")
    for name in every:
        if name != OVERALL:
            print(f"| {name} | {every[name].text()} | {clear[name].text()} |")


def write(folder: Path, caption, index: int, z, scores: dict) -> None:
    """One record: latents first, its line last."""
    seeds = candidates.seeds(index, len(z))
    record = new_record(folder, caption.text, z, WAN21, model=MODEL, seeds=seeds, scores=scores)
    for i, latent in enumerate(z):
        write_candidate(record, i, latent, WAN21)
    with open(folder / RECORDS, "ab") as f:
        f.write(to_line(record, folder))


def main(argv=None) -> None:
    parser = make_parser("benchmarks.toy_world.dpo_candidates", __doc__)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--agreement", type=Path, nargs="+", metavar="DIR", help="folders of an earlier run: print a table")
    parser.add_argument("--weights", type=Path, default=weights.FOLDER)
    parser.add_argument("--captions", type=int, default=400)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="share of one of N processes")
    args = parser.parse_args(argv)
    if args.agreement:
        return print_agreement(args.agreement)
    if args.output_dir is None:
        parser.error("give --output_dir or --agreement")
    torch.set_num_threads(1)
    world, j = pipeline.load(args.weights), judge.load()
    heads = {"query": candidates.load_heads(candidates.heads_folder(args.weights), args.weights / weights.DIT)["query"]}
    part, parts = args.part
    folder = args.output_dir / f"part-{part}-of-{parts}"
    (folder / "latents").mkdir(parents=True, exist_ok=True)
    known = preference_records.read(folder) if (folder / RECORDS).exists() else []
    done = {r.candidates[0].seed for r in known}
    for index in tqdm(range(FIRST + part, FIRST + args.captions, parts), unit="caption"):
        if candidates.seeds(index, COUNT)[0] not in done:
            caption, z, scores = scored(world, j, heads, index, COUNT)
            write(folder, caption, index, z, scores)


if __name__ == "__main__":
    main()
