"""Flow-DPO in the toy world: LoRAs trained on pairs by oracle labels and by the pack's own rewards, on held-out prompts.

    python -m benchmarks.toy_world.dpo_candidates --output_dir outputs/dpo/candidates --captions 400
    python -m benchmarks.toy_world.dpo_rows --candidates outputs/dpo/candidates/part-* --output_dir outputs/dpo

Every arm is a run of `python -m trainers.dpo` with the flags in ARMS; the arms of one label see the same pairs. Held-out
prompts are combinations of attributes that neither the model nor the pairs contain, each with two seeds; the same noise for
all arms, so differences to the base are paired. No arm is trained on the scores in SECOND but the one that is named after
them: a gain in the trained score without one in the others is over-optimisation. Finished arms are kept, so an interrupted run
goes on. Intervals are 95 % over prompts.
"""

import json
from pathlib import Path

import torch

from benchmarks.command_line import make_parser
from trainers.dpo import cli as dpo
from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.latent_space import WAN21
from trainers.kernels.rewards.flow_residual import FlowResidual
from trainers.kernels.rewards.prompt_gap import PromptGap
from trainers.scorers.latent_view import ConditionalNetwork, LatentView
from trainers.tuning import backbone, lora_files
from trainers.wan.prompts import write_embeddings

from . import candidates, judge, pipeline, statistics, text_encoder, weights
from .captions import VALUES
from .dpo_candidates import COUNT
from .dpo_candidates import FIRST as FIRST_CANDIDATE
from .dpo_candidates import SPLIT as CANDIDATE_SPLIT

SPLIT, SEEDS = "unseen", 2
RANK = 16
TRAIN = [
    "--rank", RANK, "--lora_alpha", RANK, "--train_batch_size", 8, "--gradient_accumulation_steps", 1, "--shift",
    pipeline.SHIFT, "--base_dtype", "fp32", "--save_dtype", "fp32", "--no-gradient_checkpointing", "--lr_warmup_steps", 20,
    "--checkpointing_steps", 100, "--held_out", 0.1,
]  # fmt: skip
PUBLISHED = ["--beta", 1, "--winner_anchor", 0, "--max_winner_rise", 0]
# Arm -> (the score that labels the pairs, least margin of a pair, flags). Margins of rewards are in their own units.
ARMS = {
    "dpo": ("oracle.overall", 0.08, []),
    "sft on winners": ("oracle.overall", 0.08, ["--loss", "sft"]),
    "published": ("oracle.overall", 0.08, [*PUBLISHED, "--static_penalty", 0]),
    "published, static penalty": ("oracle.overall", 0.08, [*PUBLISHED, "--static_penalty", 0.1]),
    "dpo by chance": ("random", 0.0, []),
    "dpo by prism": ("prism", 0.0, []),
    "dpo by flow residual": ("flow_residual", 0.0, []),
}
# Pairs of a caption with the largest margins.
PAIRS_PER_GROUP = 3
SHOWN = ("oracle.overall", "oracle.alignment", "oracle.sharpness", "oracle.smoothness", "oracle.dynamics", "oracle.rigidity")
SECOND = ("prism", "flow_residual", "prompt_gap")


def write_texts(path: Path, folder: Path, captions: int) -> None:
    """Embeddings of the candidates' captions and the empty negative prompt."""
    encoder = text_encoder.load(folder / weights.TEXT)
    prompts = sorted({candidates.scene_of(CANDIDATE_SPLIT, FIRST_CANDIDATE + i)[1] for i in range(captions)})
    keyed = {f"c{i:04d}": p for i, p in enumerate(prompts)} | {"negative": ""}
    write_embeddings(path, dict(zip(keyed, encoder.words(list(keyed.values())), strict=True)), WAN21, {}, keyed)


def run_dpo(arguments: list) -> None:
    if dpo.main([str(a) for a in arguments]):
        raise SystemExit(f"trainers.dpo {' '.join(map(str, arguments))} failed")


def path_of(arm: str, args) -> Path:
    return args.output_dir / f"{arm.replace(' ', '-').replace(',', '')}.safetensors"


def train(arm: str, args) -> Path | None:
    """Trains an arm unless its file exists. Returns the LoRA, None where the run ended without a healthy step."""
    by, margin, flags = ARMS[arm]
    data = args.output_dir / f"pairs-{by}"
    if not (data / "report.json").exists():
        run_dpo(
            ["cache", "--pairs", *args.candidates, "--by", by, "--pairs_per_group", PAIRS_PER_GROUP, "--min_margin", margin,
             "--embeddings", args.output_dir / "texts.safetensors", "--latent_dtype", "float32", "--output", data]
        )  # fmt: skip
    output = path_of(arm, args)
    work = output.with_suffix(".checkpoints")
    if not output.exists() and not (work / "report.json").exists():
        run_dpo(
            ["train", "--data", data, "--backbone", args.weights / weights.DIT, "--output", output, *TRAIN,
             "--learning_rate", args.learning_rate, "--max_train_steps", args.steps,
             "--resume_from_checkpoint", "latest", *flags]
        )  # fmt: skip
    return output if output.exists() else None


@torch.no_grad()
def judged(world, j: judge.Judge, heads: candidates.Heads, index: int) -> dict[str, torch.Tensor]:
    """Scores [SEEDS] of one held-out prompt's clips, and "accuracy": share of the attributes that the judge reads."""
    caption = candidates.caption_of(world, SPLIT, index)
    seeds = candidates.seeds(index, SEEDS)
    z = world.sample([caption.text] * SEEDS, seeds)
    (negative,) = world.text.words([""])
    reading = j.read(world.decode(z))
    found = candidates.of_reading(reading, caption)
    truth = [caption.attributes] * SEEDS
    right = [reading.correct(truth, k).float() for k in VALUES if getattr(caption.attributes, k) is not None]
    found |= {"accuracy": torch.stack(right).mean(dim=0), "motion": reading.dynamics}
    found["prism"] = candidates.finished(heads, z, caption, index)["query"]
    return found | {"z": z}


@torch.no_grad()
def second_rewards(base, caption, z: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
    """Scores [SEEDS] of clips by the untuned model: a tuned one would judge itself."""
    (negative,) = base.text.words([""])
    network = ConditionalNetwork(base.dit, caption.words, negative)
    rewards = {"flow_residual": FlowResidual(seed=index), "prompt_gap": PromptGap(seed=index)}
    return {name: reward.scores(reward.measure(LatentView(network, z))) for name, reward in rewards.items()}


def evaluate(arm: str, file: Path | None, args) -> dict[str, list[float]]:
    """{score: one mean over seeds for each prompt} of an arm, kept in a file. file: the LoRA, None for the base."""
    kept = args.output_dir / f"judged-{arm.replace(' ', '-').replace(',', '')}.json"
    if kept.exists():
        found = json.loads(kept.read_text())
        if len(found["oracle.overall"]) >= args.prompts:
            return {k: v[: args.prompts] for k, v in found.items()}
    base, j = pipeline.load(args.weights), judge.load()
    heads = {"query": candidates.load_heads(candidates.heads_folder(args.weights), args.weights / weights.DIT)["query"]}
    world = base
    if file is not None:
        dit = backbone.load(args.weights / weights.DIT, torch.float32, torch.device("cpu")).model
        lora_files.attach(dit, lora_files.load(file))
        world = pipeline.ToyWorld(dit, base.vae, base.text)
    rows: dict[str, list[float]] = {}
    for index in range(args.first_prompt, args.first_prompt + args.prompts):
        found = judged(world, j, heads, index)
        z = found.pop("z")
        found |= second_rewards(base, candidates.caption_of(base, SPLIT, index), z, index)
        for name, values in found.items():
            rows.setdefault(name, []).append(float(values.mean()))
    write_atomic(kept, lambda partial: Path(partial).write_text(json.dumps(rows)))
    return rows


def row_of(found: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, statistics.Estimate]:
    """{score: paired change against the base}; "motion": ratio of the change between frames."""
    rows = {k: statistics.difference(torch.tensor(found[k]), torch.tensor(base[k])) for k in (*SHOWN, *SECOND, "accuracy")}
    return rows | {"motion": statistics.ratio(torch.tensor(found["motion"]), torch.tensor(base["motion"]))}


def training_of(arm: str, args) -> dict:
    """What the trainer measured on held-out pairs: {"accuracy": Markdown with its interval, "winner", "loser": changes of the
    errors in per cent of the base's, "stopped": reason or None}."""
    found = json.loads((path_of(arm, args).with_suffix(".checkpoints") / "report.json").read_text())
    held = found["held_out"]
    accuracy = held["accuracy"]
    return {
        "accuracy": f"{accuracy['mean']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}]",
        "winner": 100 * held["winner_relative"], "loser": 100 * held["loser_relative"],
        "stopped": found["outcome"]["stopped"],
    }  # fmt: skip


def training_table(arms: list[str], args) -> str:
    """Markdown: implicit accuracy and errors of every arm on the pairs of held-out training captions."""
    lines = ["| arm | implicit accuracy | winners' error, % | losers' error, % | stopped |", "|---|---|---|---|---|"]
    for arm in arms:
        t = training_of(arm, args)
        lines.append(f"| {arm} | {t['accuracy']} | {t['winner']:+.1f} | {t['loser']:+.1f} | {t['stopped'] or ''} |")
    return "\n".join(lines)


def report(arms: dict[str, dict], base: dict[str, list[float]], args) -> str:
    """Markdown of all arms."""
    names = (*SHOWN, "accuracy", "motion", *SECOND)
    titles = ["arm", "labels", *(n.removeprefix("oracle.") for n in names)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    means = [statistics.mean(torch.tensor(base[n])) for n in names]
    lines.append("| base (means) | | " + " | ".join(m.text() for m in means) + " |")
    for arm, found in arms.items():
        cells = []
        for name, e in row_of(found, base).items():
            text = e.text()
            apart = e.low > 0 or e.high < 0
            cells.append((name, f"**{text}**" if apart and name != "motion" else text))
        values = dict(cells)
        lines.append(f"| {arm} | {ARMS[arm][0]} | " + " | ".join(values[n] for n in names) + " |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = make_parser("benchmarks.toy_world.dpo_rows", __doc__)
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="folders of dpo_candidates")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=weights.FOLDER)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--captions", type=int, default=400, help="of dpo_candidates")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--first_prompt", type=int, default=62_000, help="index of the first held-out prompt")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts that are judged, two seeds each")
    parser.add_argument("--train_only", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    texts = args.output_dir / "texts.safetensors"
    if not texts.exists():
        write_texts(texts, args.weights, args.captions)
    files = {arm: train(arm, args) for arm in args.arms}
    if args.train_only:
        return
    base = evaluate("base", None, args)
    arms = {arm: evaluate(arm, file, args) for arm, file in files.items() if file is not None}
    trained = [arm for arm in args.arms if files[arm] is not None]
    text = report(arms, base, args) + "\n\nOn pairs of held-out training captions:\n\n" + training_table(trained, args)
    print(text)
    facts = {
        "prompts": args.prompts, "first_prompt": args.first_prompt, "seeds": SEEDS, "steps": args.steps,
        "learning_rate": args.learning_rate, "captions": args.captions, "candidates": COUNT,
        "failed": [arm for arm, file in files.items() if file is None], "base": base, "arms": arms,
        "training": {arm: training_of(arm, args) for arm in trained},
    }  # fmt: skip
    write_atomic(args.output_dir / "dpo.json", lambda partial: Path(partial).write_text(json.dumps(facts)))
    write_atomic(args.output_dir / "dpo.md", lambda partial: Path(partial).write_text(text + "\n"))


if __name__ == "__main__":
    main()
