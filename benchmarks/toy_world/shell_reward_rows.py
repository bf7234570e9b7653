"""Shell-LCC reward tuning in the toy world: how long each objective improves clips before it ruins them.

    python -m benchmarks.toy_world.shell_reward_rows --output_dir outputs/toy_world/shell_reward

Every arm trains a LoRA with trainers.shell_reward's objective and the trainers' loop on captions of the training split, and is
measured on captions whose combinations of attributes no training caption has. All arms and steps share captions and noise, so
changes against the base are paired. Clips are sampled in two ways: with few steps and much guidance, where a third of the
base's tokens lie outside the band, and with the world's defaults, where they lie on the shell as those of real clips do. The
judge and the Frechet distance read decoded pictures and are in no objective.

An arm's useful window is the last measured step up to which, without a gap from the first measured step on, the held-out
violation of clips is below the base's, and neither the Frechet distance nor the judge's overall score nor its alignment with
the caption is worse than the base's beyond the 95 % interval of the paired change. Finished arms are kept, so an interrupted
run goes on; several processes can share the arms of one folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.command_line import make_parser
from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.shell_lcc import manifold as manifolds
from trainers.kernels.shell_lcc.diagnostics import high_frequency_share
from trainers.kernels.tuning import latent_detail
from trainers.kernels.tuning import shell_objective as shell
from trainers.kernels.tuning.noise_levels import UNIFORM, NoiseLevels
from trainers.kernels.tuning.shell_objective import SigmaTargets
from trainers.latents.read import list_clips, read_clip
from trainers.running import results_log
from trainers.running.loop import CheckpointOptions
from trainers.shell_reward.draws import Draws
from trainers.shell_reward.objective import ShellObjective, ShellSettings
from trainers.shell_reward.predict import Network, OneStep
from trainers.tuning import backbone, loop, lora
from trainers.tuning.loop import LoopSettings
from trainers.tuning.lora import LoraOptions
from trainers.wan.prompts import text_id

from . import jobs, judge, pipeline, report, statistics, weights
from .clips import clip, scene_of, sibling
from .shell_lcc_rows import frechet_values
from .statistics import Estimate

# Captions that no earlier figure used.
TRAIN_SPLIT, TRAIN_FIRST, TRAIN_COUNT = "train", 100_000, 192
SPLIT, FIRST, SIBLINGS = "unseen", 40_000, 4
# Sampling steps and cfg, and the training steps after which clips are sampled so.
SAMPLING = {"few": (4, 5.0), "default": (pipeline.STEPS, pipeline.CFG)}
MEASURED = {"few": (8, 16, 32, 64, 128), "default": (16, 64)}
RANK, BATCH, RATE, SEED = 16, 8, 3e-4, 0
LEVELS = NoiseLevels(UNIFORM, low=0.7, high=1.0)
PROBES = (0.7, 0.8, 0.9, 1.0)
# Predictions at each level that a band per sigma is measured on.
TABLE_CLIPS = 48


@dataclass(frozen=True)
class Arm:
    """objective: of shell_objective.OBJECTIVES; noised: whether training starts from noised latents of real clips instead of
    pure noise; radius: "file", "noise" or "noised": the band of real tokens, or of the base's predictions from such starts.
    """

    objective: str
    noised: bool = False
    radius: str = "file"


ARMS = {
    "distance": Arm(shell.DISTANCE),
    "mean_tau": Arm(shell.MEAN_TAU),
    "band": Arm(shell.BAND),
    "band per sigma": Arm(shell.BAND, radius="noised"),
    "distance noised": Arm(shell.DISTANCE, noised=True),
    "band noised": Arm(shell.BAND, noised=True),
    "band noised per sigma": Arm(shell.BAND, noised=True, radius="noised"),
}
# What --arms are by default: the others take as long again.
DEFAULT_ARMS = ("distance", "band", "mean_tau", "band per sigma")


class Bench:
    """The models, captions and target of all arms. clips: held-out captions measured."""

    def __init__(self, folder: Path, files: jobs.Files, clips: int):
        self.world, self.judge = pipeline.load(files.weights), judge.load(files.judge)
        self.manifold = manifolds.load(files.manifold)
        self.files, self.folder = files, folder
        index = range(FIRST, FIRST + clips)
        self.captions = [scene_of(SPLIT, i)[1] for i in index]
        self.truth = [scene_of(SPLIT, i)[0].attributes for i in index]
        self.seeds = list(index)
        others = torch.stack([sibling(SPLIT, i, k).frames for i in index for k in range(SIBLINGS)])
        self.target = judge.FrechetTarget(jobs.flatten(self.judge.read(others)))
        prompts = [scene_of(TRAIN_SPLIT, i)[1] for i in range(TRAIN_FIRST, TRAIN_FIRST + TRAIN_COUNT)]
        self.prompts = list(dict.fromkeys(prompts))
        refs = list_clips([files.latents], self.manifold.space)
        self.real = {r.clip_id: (r.entry["caption"], read_clip(r)) for r in refs}
        every = list(dict.fromkeys([*self.prompts, *(c for c, _ in self.real.values())]))
        self.texts = dict(zip(map(text_id, every), self.world.text.words(every), strict=True))
        self.base = {}
        for key in SAMPLING:
            path = folder / f"base-{key}-{clips}.safetensors"
            if not path.exists():
                found = {k: v.contiguous().clone() for k, v in self.clips(key).items()}
                write_atomic(path, lambda partial, found=found: save_file(found, partial))
            self.base[key] = load_file(path)

    @torch.no_grad()
    def clips(self, key: str) -> dict[str, torch.Tensor]:
        """Tables [N] of the held-out clips by the world's transformer as it is, sampled as SAMPLING[key] says."""
        steps, cfg = SAMPLING[key]
        z = torch.cat([
            self.world.sample(self.captions[i : i + 16], self.seeds[i : i + 16], steps=steps, cfg=cfg)
            for i in range(0, len(self.seeds), 16)
        ])  # fmt: skip
        d, target = self.manifold.distance(z), shell.target_of([self.manifold.calibration] * len(z))
        reading = self.judge.read(self.world.decode(z))
        scores = reading.scores(self.truth)
        return jobs.flatten(reading) | {f"score.{k}": v for k, v in scores.items()} | {
            "z": z, "violation": shell.violation(d, target).flatten(1).mean(1),
            "outside": self.manifold.outside_band(d).float().flatten(1).mean(1), "distance": d.flatten(1).mean(1),
            "latent.laplacian": torch.tensor([latent_detail.laplacian_variance(x) for x in z]),
            "latent.high_frequency": torch.tensor([high_frequency_share(x) for x in z]),
        }  # fmt: skip

    @torch.no_grad()
    def predictions(self, model: torch.nn.Module, sigma: float, noised: bool, count: int) -> torch.Tensor:
        """Distances [N, T, h, w] of one-step predictions for real clips' captions, without guidance."""
        rows = list(self.real.values())[:count]
        z = torch.stack([x for _, x in rows])
        noise = pipeline.initial_noise([30_000_000 + i for i in range(len(rows))])
        x = sigma * noise + (1 - sigma) * z if noised else noise
        text = torch.nn.utils.rnn.pad_sequence([self.texts[text_id(c)] for c, _ in rows], batch_first=True)
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        found = []
        for i in range(0, len(rows), 16):
            s = torch.full((len(x[i : i + 16]),), sigma)
            v = backbone.velocity(model, x[i : i + 16], s, text[i : i + 16])
            found.append(self.manifold.distance(x[i : i + 16] - sigma * v))
        return torch.cat(found)

    def targets(self, noised: bool) -> SigmaTargets:
        """Bands of the base's predictions at levels of the training's range."""
        sigmas = [float(s) for s in LEVELS.fixed(8)]
        return SigmaTargets.measured(sigmas, [list(self.predictions(self.world.dit, s, noised, TABLE_CLIPS)) for s in sigmas])


def run(bench: Bench, name: str, arm: Arm, steps: int) -> list[dict]:
    """Trains an arm and returns its rows, one for each measured step."""
    from accelerate import Accelerator

    dit = backbone.load(bench.files.weights / weights.DIT, torch.float32)
    lora.add(dit.model, LoraOptions(RANK, RANK), SEED)
    parameters = lora.parameters(dit.model)
    world = pipeline.ToyWorld(dit.model, bench.world.vae, bench.world.text)
    tuned = object.__new__(Bench)
    tuned.__dict__ |= bench.__dict__ | {"world": world}
    items = [(text_id(p), None) for p in bench.prompts]
    if arm.noised:
        items = [(text_id(c), key) for key, (c, _) in bench.real.items()]
    targets = None if arm.radius == "file" else bench.targets(arm.radius == "noised")
    network = Network(
        lambda x, sigma, text, bias: backbone.velocity(dit.model, x, sigma, text, bias),
        lambda: lora.without_adapter(dit.model), lambda: lora.change_norm(dit.model), torch.device("cpu"),
    )  # fmt: skip
    objective = ShellObjective(
        bench.manifold, ShellSettings(arm.objective, targets), Draws(items, LEVELS, SEED, BATCH),
        OneStep(network, bench.texts, pipeline.LATENT_SHAPE, lambda key: bench.real[key][1]), batch=BATCH,
    )  # fmt: skip
    rows = []

    def measured(step: int, values: dict) -> None:
        keys = [k for k in SAMPLING if step in MEASURED[k]]
        if keys:
            rows.append({"arm": name, "step": step, "loss": values["loss"]} | row_of(bench, tuned, dit.model, keys))
            print(json.dumps(rows[-1]), flush=True)

    settings = LoopSettings(steps, RATE, 5, "constant", 1.0, optimiser_args={"weight_decay": 0.0})
    keep = CheckpointOptions(bench.folder / "checkpoints" / slug(name), 0, 1)
    loop.train(Accelerator(cpu=True), parameters, objective, settings, {"arm": name}, keep, measured)
    return rows


def row_of(bench: Bench, tuned: Bench, model: torch.nn.Module, keys: list[str]) -> dict:
    """Figures of the tuned clips by key of SAMPLING, and mean distances of predictions by noise level."""
    return {k: figures(bench, bench.base[k], tuned.clips(k)) for k in keys} | {"predictions": probes(bench, model)}


def probes(bench: Bench, model: torch.nn.Module) -> dict:
    """Mean distance of one-step predictions without guidance, by what they start from and the noise level."""
    return {
        kind: {f"{s:g}": round(float(bench.predictions(model, s, kind == "noised", 16).mean()), 4) for s in PROBES}
        for kind in ("noise", "noised")
    }


def slug(name: str) -> str:
    return name.replace(" ", "-")


def figures(bench: Bench, base: dict, found: dict) -> dict:
    """Means and paired changes as [mean, half of the interval]; ratios as plain numbers."""

    def pair(e: Estimate) -> list[float]:
        return [round(e.mean, 5), round(e.half, 5)]

    mine, theirs = (frechet_values(x, bench.target) for x in (found, base))
    out = {k: pair(statistics.mean(found[k])) for k in ("violation", "outside", "distance")}
    out |= {k: pair(statistics.difference(found[f"score.{k}"], base[f"score.{k}"])) for k in judge.DIMENSIONS}
    out["overall"] = pair(statistics.difference(found["score.overall"], base["score.overall"]))
    out["violation_change"] = pair(statistics.difference(found["violation"], base["violation"]))
    out["frechet"] = pair(statistics.of_pseudo_values(mine, len(found["z"])))
    out["frechet_change"] = pair(statistics.of_pseudo_values(mine - theirs, len(found["z"])))
    for k in ("laplacian", "high_frequency", "latent.laplacian", "latent.high_frequency"):
        out[f"{k}_ratio"] = pair(statistics.ratio(found[k], base[k]))
    change = (found["z"] - base["z"]).flatten(1).norm(dim=1) / base["z"].flatten(1).norm(dim=1)
    return out | {"change": pair(statistics.mean(change))}


def window(rows: list[dict], key: str) -> int:
    """The last measured step of the useful window of clips sampled as SAMPLING[key] says; 0: there is none."""
    last = 0
    for row in sorted((r for r in rows if key in r), key=lambda r: r["step"]):
        f = row[key]
        worse = f["frechet_change"][0] > f["frechet_change"][1] or any(f[k][0] < -f[k][1] for k in ("overall", "alignment"))
        if f["violation_change"][0] >= 0 or worse:
            break
        last = row["step"]
    return last


def base_row(bench: Bench) -> dict:
    """The base and, for scale, real clips of the same captions through the VAE."""
    real = bench.world.encode(torch.stack([clip(SPLIT, i).frames for i in bench.seeds[:16]]))
    found = {k: figures(bench, bench.base[k], bench.base[k]) for k in SAMPLING}
    found["real"] = {"distance": round(float(bench.manifold.distance(real).mean()), 4)}
    return {"arm": "base", "step": 0} | found | {"predictions": probes(bench, bench.world.dit)}


def main(argv=None) -> None:
    parser = make_parser("benchmarks.toy_world.shell_reward_rows", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/toy_world/shell_reward"))
    parser.add_argument("--weights", type=Path, default=weights.FOLDER)
    parser.add_argument("--clips", type=int, default=32, help="held-out captions, at least 32 (default 32)")
    parser.add_argument("--steps", type=int, default=max(MEASURED["few"]))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(DEFAULT_ARMS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    none, latents = out / "none", args.weights / weights.LATENTS
    files = jobs.Files(args.weights, judge.WEIGHTS, out / "manifold.safetensors", none, none, latents, none)
    report.fit(files)
    bench = Bench(out, files, args.clips)
    if not (out / "rows-base.jsonl").exists():
        results_log.write(out / "rows-base.jsonl", [base_row(bench)])
    for name in args.arms:
        path = out / f"rows-{slug(name)}.jsonl"
        if not path.exists():
            results_log.write(path, run(bench, name, ARMS[name], args.steps))
    write(bench, args.clips)


def write(bench: Bench, clips: int) -> None:
    """Gathers the rows of all finished arms into shell_reward.json."""
    found = {name: results_log.read(bench.folder / f"rows-{slug(name)}.jsonl") for name in ("base", *ARMS)}
    settings = {
        "clips": clips, "sampling": SAMPLING, "rank": RANK, "batch": BATCH, "learning_rate": RATE,
        "sigma": [LEVELS.low, LEVELS.high], "seed": SEED, "training_captions": len(bench.prompts),
        "radius": bench.manifold.radius, "band": bench.manifold.band, "tau": shell.mean_distance(bench.manifold.calibration),
    }  # fmt: skip
    windows = {name: {k: window(rows, k) for k in SAMPLING} for name, rows in found.items() if rows and name != "base"}
    every = [r for rows in found.values() for r in rows]
    text = json.dumps({"settings": settings, "windows": windows, "rows": every}, indent=1)
    write_atomic(bench.folder / "shell_reward.json", lambda partial: Path(partial).write_text(text + "\n", encoding="utf-8"))
    print(json.dumps(windows, indent=1))


if __name__ == "__main__":
    main()
