"""Train PRISM Head (arXiv 2606.20310): a reward head on preference records, from ComfyUI's own features."""

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.latent_space import from_comfy
from ..kernels.prism import files
from ..kernels.prism.head import HeadConfig, PrismHead
from ..kernels.prism.preference_loss import ETA, TIE
from ..kernels.version import CREATED_BY
from . import embedded_prompts, recorded_pairs, training_loop, training_state
from .output_names import require_plain
from .prism_files import FOLDER
from .prism_objective import FIGURES, LOSS, RIGHT, SIGMAS, PrismObjective, Scorer, accuracies, optimiser_of, split
from .prism_type import PrismType, for_wire
from .trainable_model import identity, require_trainable, source_name
from .training_guider import Prompts, Training, empty_prompt
from .training_loop import CONSTANT, LoopSettings, Outcome

TITLE = "Train PRISM Head"
RECENT = 50


@dataclass(frozen=True)
class HeadSettings:
    """The widgets of the node that decide the result, under their names."""

    decided_by: str
    taps: tuple[int, ...]
    dim: int
    heads: int
    layers: int
    queries: int
    steps: int
    learning_rate: float
    pairs_per_step: int
    seed: int
    held_out: float
    sigma_low: float
    sigma_high: float
    weight_decay: float
    eta: float
    warmup_steps: int

    @property
    def dimension(self) -> str:
        """What is scored, as the command-line trainer calls it."""
        return self.decided_by or "overall"


def parse_taps(text: str, depth: int) -> tuple[int, ...]:
    """Blocks from a text such as "5, 11". Raises ValueError unless they ascend and the model, of `depth` blocks, has them."""
    source = f"{TITLE}, input 'taps'"
    try:
        taps = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"{source}: found {text!r}, expected numbers of blocks such as 11, or 5, 11") from None
    if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < depth:
        raise ValueError(f"{source}: found {text!r}, expected ascending numbers of blocks from 0 to {depth - 1}")
    return taps


def train(model, head: PrismHead, settings: HeadSettings, parts: tuple, words: tuple, shape: Sequence[int], loop: LoopSettings,
          state, on_step) -> tuple[Outcome, float, list[dict]]:  # fmt: skip
    """(outcome, tie threshold, accuracy table) of training the head in place, inside a guider of ComfyUI.

    parts: of prism_objective.split; words: of embedded_prompts.embed; shape: [C, T, h, w] of the clips.
    """
    fit, tie_rows, held = parts
    sigmas = [s for s in SIGMAS if settings.sigma_low - 1e-4 <= s <= settings.sigma_high + 1e-4]
    sigmas = sigmas or [0.5 * (settings.sigma_low + settings.sigma_high)]
    clips = [{(c.pair.prompt, f) for c in rows for f in (c.pair.winner, c.pair.loser)} for rows in (tie_rows, held)]
    done = state.step if state else 0
    bar = comfy.utils.ProgressBar(loop.steps * settings.pairs_per_step + len(sigmas) * sum(map(len, clips)))
    bar.update(done * settings.pairs_per_step)

    def run(guider, options):
        prompts = Prompts(guider, options, *words)
        head.to(prompts.device).train(True)
        scorer = Scorer(head, prompts)
        objective = PrismObjective(
            fit, scorer, settings.pairs_per_step, settings.eta, (settings.sigma_low, settings.sigma_high), settings.seed,
            lambda: bar.update(1),
        )  # fmt: skip
        optimiser = optimiser_of(head, settings.learning_rate, settings.weight_decay)
        parameters = dict(head.named_parameters())
        outcome = training_loop.train(parameters, optimiser, objective, loop, state, on_step, lambda step, tensors: None)
        head.train(False)
        return outcome, *accuracies(scorer, held, tie_rows, sigmas, settings.seed, lambda: bar.update(1))

    guider, training = comfy.samplers.CFGGuider(model.clone()), Training(run)
    prompt = empty_prompt(*words)
    guider.set_conds(prompt, prompt)
    # Both clips of a pair at once.
    empty = torch.zeros(2, *shape)
    guider.sample(empty, empty, training, torch.tensor([0.5, 0.0]), disable_pbar=True, seed=0)
    return training.outcome


def report(
    settings: HeadSettings, outcome: Outcome, table: list[dict], parts: tuple, file: Path, folder: Path, backbone: str
) -> str:
    """What was trained and how good it is, for people."""
    fit, _, held = parts
    prompts = [len({c.pair.prompt for c in rows}) for rows in (fit, held)]
    lines = [
        f"PRISM head of width {settings.dim} on block {', '.join(map(str, settings.taps))}, trained for {outcome.steps} steps "
        f"on {len(fit)} pairs of {prompts[0]} prompts: models/{FOLDER.kind}/{file.name}",
        *figures_text(outcome.history),
    ]
    measured = [row for row in table if row["without_ties"] is not None]
    if measured:
        mean = sum(row["without_ties"] for row in measured) / len(measured)
        by_sigma = ", ".join(f"{row['sigma']:g}: {row['without_ties']:.2f}" for row in measured)
        lines.append(
            f"Held-out accuracy {mean:.2f} (chance is 0.50), on {measured[0]['decided']} decided pairs of {prompts[1]} "
            f"prompts that it was not trained on; by sigma {by_sigma}"
        )
    else:
        lines.append("The held-out pairs are all ties, so there is no accuracy: record more prompts, or give another 'seed'")
    if outcome.skipped:
        lines.append(f"{outcome.skipped} steps were skipped: their loss or gradient was not finite")
    lines += ["The same on the command line:", command_line(settings, folder, file, backbone)]
    return "\n".join(lines)


def figures_text(history: Sequence[Sequence[float]]) -> list[str]:
    """The figures of the last steps, in a line."""
    rows = [row for row in history[-max(1, min(RECENT, len(history) // 4)) :] if math.isfinite(row[LOSS])]
    if not rows:
        return ["No step had finite figures"]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [f"Over the last {len(rows)} steps: accuracy {mean[RIGHT]:.2f} on training pairs, loss {mean[LOSS]:.4f}"]


def command_line(settings: HeadSettings, folder: Path, file: Path, backbone: str) -> str:
    """The commands that train the same head without ComfyUI."""
    s, data = settings, f"{file.stem}_data"
    cache = ["python", "-m", "trainers.prism", "cache", "--pairs", str(folder), "--dimensions", s.dimension]
    cache += ["--text_encoder", "umt5_xxl_fp16.safetensors", "--output", data]
    train = ["python", "-m", "trainers.prism", "train", "--data", data, "--backbone", backbone, "--output", str(file)]
    train += ["--taps", *map(str, s.taps), "--sigma_range", f"{s.sigma_low:g}", f"{s.sigma_high:g}"]
    options = {
        "dim": s.dim, "heads": s.heads, "layers": s.layers, "queries": s.queries, "max_train_steps": s.steps,
        "train_batch_size": s.pairs_per_step, "learning_rate": s.learning_rate, "seed": s.seed, "held_out": s.held_out,
        "weight_decay": s.weight_decay, "eta": s.eta, "lr_warmup_steps": s.warmup_steps,
    }  # fmt: skip
    for key, value in options.items():
        train += [f"--{key}", f"{value:g}" if isinstance(value, float) else str(value)]
    return f"{shlex.join(cache)} && {shlex.join(train)}"


class TrainPrismHead(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="IntrinsicReward_TrainPrismHead",
            display_name=TITLE,
            category="model/training",
            description=(
                "Trains a PRISM head on preference records: it learns to score noisy latents from the hidden states of the "
                "model that made them. The model itself is not changed. The head is saved in models/prism, with its accuracy "
                "on prompts that were held out."
            ),
            search_aliases=["prism", "train reward", "reward model", "preference", "best of n", "intrinsic reward"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan text-to-video model, the one that the candidates were made with."),
                io.Clip.Input("clip", tooltip="Its text encoder: embeds the records' prompts once, then it is unloaded."),
                io.String.Input(
                    "folder",
                    default="my_preferences",
                    tooltip="Name of a folder that Record Preference wrote, or its folder output.",
                ),
                io.String.Input(
                    "decided_by",
                    default="",
                    tooltip=(
                        "Empty: the recorded winner and loser. Name of a score: all pairs of a record's candidates by it, "
                        "equal scores being ties."
                    ),
                ),
                io.String.Input("name", default="my_prism_head", tooltip="The head is models/prism/<name>.safetensors."),
                io.String.Input(
                    "taps", default="11", tooltip="Blocks whose outputs the head reads, ascending, such as 11, or 5, 11."
                ),
                io.Int.Input("steps", default=1000, min=1, max=1000000, tooltip="Optimiser steps."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-8,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Of the steps after the warm-up.",
                ),
                io.Int.Input(
                    "pairs_per_step", default=8, min=1, max=1024, tooltip="Pairs a step, one after the other in memory."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0x7FFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides initial values, held-out prompts, the pairs of each step, noise and noise levels.",
                ),
                io.Float.Input(
                    "held_out",
                    default=0.1,
                    min=0.01,
                    max=0.9,
                    step=0.01,
                    tooltip="Share of the prompts that the accuracy is measured on, and not trained on; at least one.",
                ),
                io.Int.Input("save_every", default=100, min=0, max=1000000, tooltip="Steps between saves; 0: at the end."),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Go on with the interrupted training of this name. Off: start again and replace it.",
                ),
                io.Int.Input("dim", default=1536, min=8, max=8192, step=8, advanced=True, tooltip="Width of the head."),
                io.Int.Input("heads", default=12, min=1, max=128, advanced=True, tooltip="Attention heads; they divide dim."),
                io.Int.Input("layers", default=5, min=1, max=32, advanced=True, tooltip="Layers of the MLP."),
                io.Int.Input("queries", default=1, min=1, max=64, advanced=True, tooltip="Learned queries."),
                io.Float.Input(
                    "sigma_low", default=0.0, min=0.0, max=1.0, step=0.001, advanced=True, tooltip="Lowest noise level."
                ),
                io.Float.Input(
                    "sigma_high", default=1.0, min=0.0, max=1.0, step=0.001, advanced=True, tooltip="Highest noise level."
                ),
                io.Float.Input(
                    "weight_decay", default=0.01, min=0.0, max=10.0, step=0.001, advanced=True, tooltip="Of the matrices."
                ),
                io.Float.Input(
                    "eta",
                    default=ETA,
                    min=1.001,
                    max=1000.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Width of the region of ties in the Rao-Kupper loss, above 1.",
                ),
                io.Int.Input(
                    "warmup_steps", default=100, min=0, max=100000, advanced=True, tooltip="Steps of rising learning rate."
                ),
            ],
            outputs=[
                PrismType.Output(display_name="head", tooltip="For PRISM Score and the PRISM rewards."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.String.Output(
                    display_name="report", tooltip="Held-out accuracy, where the file is, and the equal command line."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, folder, decided_by, name, taps, steps, learning_rate, pairs_per_step, seed, held_out, save_every,
        resume, dim, heads, layers, queries, sigma_low, sigma_high, weight_decay, eta, warmup_steps,
    ) -> io.NodeOutput:  # fmt: skip
        require_plain(name, f"{TITLE}, input 'name'", "file")
        if not sigma_low < sigma_high:
            raise ValueError(f"{TITLE}: sigma_low {sigma_low:g} and sigma_high {sigma_high:g}; give the lower first")
        # The head takes part in autograd, which tensors of the executor's inference mode cannot.
        with torch.inference_mode(False), torch.no_grad():
            backbone = require_trainable(model, f"{TITLE}, input 'model'")
            settings = HeadSettings(
                decided_by.strip(), parse_taps(taps, backbone.depth), dim, heads, layers, queries, steps, learning_rate,
                pairs_per_step, seed, held_out, sigma_low, sigma_high, weight_decay, eta, warmup_steps,
            )  # fmt: skip
            config = HeadConfig(backbone.width, dim, heads, layers, settings.taps, queries, (settings.dimension,))
            records = recorded_pairs.folder_of(folder, f"{TITLE}, input 'folder'")
            comparisons = recorded_pairs.read_comparisons(records, settings.decided_by)
            space = from_comfy(model.get_model_object("latent_format"))
            clips = [path for c in comparisons for path in (c.pair.winner, c.pair.loser)]
            shape = recorded_pairs.require_fit(clips, space, f"model {type(model.model).__name__}")
            parts = split(comparisons, held_out, seed)
            path = training_state.path_of(name)
            file = Path(os.path.join(folder_paths.get_folder_paths(FOLDER.kind)[0], f"{name}.safetensors"))
            described = vars(settings) | {
                "taps": list(settings.taps), "pairs": recorded_pairs.digest([c.pair for c in comparisons]),
                "ties": [c.outcome for c in comparisons].count(TIE),
                "model": identity(backbone),
            }  # fmt: skip
            loop = LoopSettings(steps, learning_rate, warmup_steps, CONSTANT, save_every, path, described)
            if not path.is_file() and file.exists():
                raise FileExistsError(f"{file}: exists, and no training of this name was begun here; give another 'name'")
            state = training_loop.load(loop, FIGURES) if resume else None

            def stepped(step: int, history: list[list[float]]) -> None:
                text = "\n".join([f"Step {step} of {steps}", *figures_text(history)])
                PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                head = PrismHead(config)
            words = embedded_prompts.embed(clip, (c.pair.prompt for c in comparisons), TITLE)
            outcome, threshold, table = train(model, head, settings, parts, words, shape, loop, state, stepped)
            losses = {"loss": [row[LOSS] for row in outcome.history]}
            loaded = files.LoadedHead(
                head.to("cpu").requires_grad_(False), backbone, space, (sigma_low, sigma_high),
                {settings.dimension: threshold}, {"accuracy": table},
                {
                    "created_by": CREATED_BY, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "command": f"{TITLE} node", "seed": seed, "pairs": len(parts[0]), "held_out_pairs": len(parts[2]),
                    "prompts": len({c.pair.prompt for c in parts[0]}),
                },
                name,
            )  # fmt: skip
            files.save(loaded, file)
            text = report(settings, outcome, table, parts, file, records, source_name(model))
            PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
            return io.NodeOutput(for_wire(loaded), losses, text, ui=ui.PreviewText(text))

    @classmethod
    def validate_inputs(cls, name):
        # A connected value is None before the workflow runs.
        if name is not None:
            try:
                require_plain(name, f"{TITLE}, input 'name'", "file")
            except ValueError as e:
                return str(e)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        return folder and recorded_pairs.state_of(folder, TITLE)


NODES = [TrainPrismHead]
