"""Train Preference LoRA: Flow-DPO (arXiv 2501.13918) on preference records, inside ComfyUI."""

import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from server import PromptServer

from ..kernels.latent_space import from_comfy
from ..kernels.prism.backbone import Backbone
from ..kernels.tuning.auto_beta import AutoBeta, FixedBeta
from ..kernels.tuning.noise_levels import LOGIT_NORMAL, SHIFTED, UNIFORM, NoiseLevels
from ..kernels.tuning.preference_loss import PreferenceLoss
from ..kernels.version import CREATED_BY
from . import embedded_prompts, recorded_pairs, training_loop, training_state
from .lora_adapters import Adapters, attention_layers, lora_model
from .output_names import in_output, require_plain
from .preference_objective import (
    BASE_LOSER,
    BASE_WINNER,
    BETA,
    DIFFERENCE,
    FACTOR,
    FIGURES,
    LOSER,
    LOSS,
    RIGHT,
    WINNER,
    PreferenceObjective,
)
from .recorded_pairs import RecordedPair
from .trainable_model import core_training, identity, own_copy, require_trainable, source_name
from .training_guider import Prompts, Training, empty_prompt
from .training_loop import COSINE, LoopSettings, Outcome, TrainingError

TITLE = "Train Preference LoRA"
LORA_FOLDER = "loras"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Entry of the file's header with the training record, as the command-line trainer writes it.
RECORD = "intrinsic_reward.training"
# Steps that figures are averaged over, at most.
RECENT = 50


@dataclass(frozen=True)
class LoraSettings:
    """The widgets of the node that decide the result, under their names."""

    decided_by: str
    steps: int
    rank: int
    learning_rate: float
    beta: float
    pairs_per_step: int
    seed: int
    noise_levels: str
    shift: float
    sigma_low: float
    sigma_high: float
    winner_anchor: float
    sft_weight: float
    static_penalty: float
    max_winner_rise: float
    warmup_steps: int

    @property
    def levels(self) -> NoiseLevels:
        return NoiseLevels(self.noise_levels, self.shift, self.sigma_low, self.sigma_high)

    @property
    def loss(self) -> PreferenceLoss:
        return PreferenceLoss(sft=self.sft_weight, anchor=self.winner_anchor, static=self.static_penalty)


class LoraTraining:
    """One training of the node: a copy of the model, with adapters in it, inside core's guider."""

    def __init__(
        self, model, settings: LoraSettings, pairs: Sequence[RecordedPair], words: Mapping[str, torch.Tensor], length: int,
        checkpointing: bool, offloading: bool,
    ):  # fmt: skip
        self.core = core_training(TITLE)
        self.model, self.settings, self.pairs = model, settings, pairs
        self.words, self.length, self.checkpointing, self.offloading = words, length, checkpointing, offloading
        self.adapters = Adapters(attention_layers(model.model.diffusion_model), settings.rank, settings.seed)

    def run(self, shape: Sequence[int], loop: LoopSettings, state, on_step, on_save) -> Outcome:
        """Trains from a state, or from the beginning. shape: [C, T, h, w] of the clips; the rest as in training_loop.train."""
        network, injections = self.model.model.diffusion_model, self.adapters.injections(self.model.model)
        bar = comfy.utils.ProgressBar(loop.steps * self.settings.pairs_per_step)
        bar.update((state.step if state else 0) * self.settings.pairs_per_step)

        def train(guider, options) -> Outcome:
            device = guider.model_patcher.load_device
            prompts = Prompts(guider, options, self.words, self.length)
            parameters = self.adapters.parameters()
            beta = FixedBeta(self.settings.beta) if self.settings.beta else AutoBeta()
            objective = PreferenceObjective(
                self.pairs, prompts, self.adapters.off, self.settings.levels, self.settings.loss, beta,
                self.settings.pairs_per_step, self.settings.seed, self.settings.max_winner_rise, device,
                lambda: bar.update(1),
            )  # fmt: skip
            optimiser = torch.optim.AdamW(parameters.values(), lr=loop.learning_rate)
            return training_loop.train(parameters, optimiser, objective, loop, state, on_step, on_save)

        guider = self.core.TrainGuider(self.model, offloading=self.offloading)
        guider.set_conds(empty_prompt(self.words, self.length))
        training = Training(train)
        try:
            comfy.model_management.in_training = True
            comfy.model_management.training_fp8_bwd = False
            # As core's node does, before the adapters are put in; the guider finds the model loaded.
            comfy.model_management.load_models_gpu([self.model], memory_required=1e20, force_full_load=not self.offloading)
            for injection in injections:
                injection.inject(self.model)
            if self.checkpointing:
                for block in network.blocks:
                    self.core.patch(block)
            empty = torch.zeros(1, *shape)
            guider.sample(empty, empty, training, torch.tensor([0.5, 0.0]), disable_pbar=True, seed=0)
        finally:
            comfy.model_management.in_training = False
            for module in network.modules():
                self.core.unpatch(module)
            for injection in injections:
                injection.eject(self.model)
        return training.outcome


def report(
    settings: LoraSettings, outcome: Outcome, pairs: Sequence[RecordedPair], file: Path | None, folder: Path, name: str,
    backbone: str,
) -> str:  # fmt: skip
    """What was trained and how it went, for people."""
    prompts = len({p.prompt for p in pairs})
    lines = [outcome.stopped] if outcome.stopped else []
    lines.append(
        f"LoRA of rank {settings.rank}, trained for {outcome.healthy_step} steps on {len(pairs)} pairs of {prompts} prompts"
        + (f": output/{LORA_FOLDER}/{file.name}" if file else "")
    )
    lines += figures_text(outcome.history)
    if outcome.skipped:
        lines.append(f"{outcome.skipped} steps were skipped: their loss or gradient was not finite")
    lines += ["The same on the command line:", command_line(settings, folder, name, backbone)]
    return "\n".join(lines)


def figures_text(history: Sequence[Sequence[float]]) -> list[str]:
    """The figures of the last steps, in a few lines."""
    rows = [row for row in history[-max(1, min(RECENT, len(history) // 4)) :] if all(map(math.isfinite, row))]
    if not rows:
        return ["No step had finite figures"]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    winner, loser = (mean[own] / (mean[base] or math.nan) - 1 for own, base in ((WINNER, BASE_WINNER), (LOSER, BASE_LOSER)))
    lines = [
        f"Over the last {len(rows)} steps: implicit accuracy {mean[RIGHT]:.2f} (chance is 0.50), loss {mean[LOSS]:.4f}, "
        f"difference {mean[DIFFERENCE]:+.2e}, gradient factor {mean[FACTOR]:.2f}, beta {mean[BETA]:.0f}",
        f"Error against the base model: winners {100 * winner:+.2f} %, losers {100 * loser:+.2f} %",
    ]
    if winner > 0 and loser > 0:
        lines.append("Both errors grew: the model unlearns both clips; lower 'learning_rate', or raise 'winner_anchor'")
    lines.append("These are the pairs it was trained on: compare new clips with and without the LoRA before you trust it")
    return lines


def command_line(settings: LoraSettings, folder: Path, name: str, backbone: str) -> str:
    """The commands that train the same LoRA without ComfyUI."""
    s = settings
    data = f"{name}_pairs"
    cache = ["python", "-m", "trainers.dpo", "cache", "--pairs", str(folder)]
    cache += ["--by", s.decided_by] if s.decided_by else []
    cache += ["--text_encoder", "umt5_xxl_fp16.safetensors", "--output", data]
    train = ["python", "-m", "trainers.dpo", "train", "--data", data, "--backbone", backbone]
    options = {
        "output": f"{name}.safetensors", "max_train_steps": s.steps, "rank": s.rank, "lora_alpha": s.rank,
        "learning_rate": s.learning_rate, "beta": s.beta or "auto", "gradient_accumulation_steps": s.pairs_per_step,
        "seed": s.seed, "sigma_sampling": s.noise_levels, "shift": s.shift, "winner_anchor": s.winner_anchor,
        "sft_weight": s.sft_weight, "static_penalty": s.static_penalty, "max_winner_rise": s.max_winner_rise,
        "lr_warmup_steps": s.warmup_steps, "held_out": 0,
    }  # fmt: skip
    for key, value in options.items():
        train += [f"--{key}", f"{value:g}" if isinstance(value, float) else str(value)]
    train += ["--sigma_range", f"{s.sigma_low:g}", f"{s.sigma_high:g}"]
    return f"{shlex.join(cache)} && {shlex.join(train)}"


def header_of(settings: LoraSettings, step: int, backbone: Backbone, source: str, pairs: int) -> dict[str, str]:
    """The header of the LoRA's file, as the command-line trainer writes it: modelspec, kohya's entries and the record."""
    version = "wan2.2" if backbone.channels == 48 else "wan2.1"
    record = {
        "backbone": source, "architecture": backbone.architecture, "rank": settings.rank, "alpha": float(settings.rank),
        "targets": ["q", "k", "v", "o"], "steps": step, "pairs": pairs, "learning_rate": settings.learning_rate,
        "seed": settings.seed, "beta": settings.beta or "auto", "created_by": CREATED_BY, "command": f"{TITLE} node",
    }  # fmt: skip
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{version}/lora",
        "modelspec.title": f"LoRA of {source}",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": f"{settings.rank:g}",
        "ss_base_model_version": version,
        "ss_steps": str(step),
        RECORD: json.dumps(record, sort_keys=True),
    }


class TrainPreferenceLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = PreferenceLoss()
        return io.Schema(
            node_id="IntrinsicReward_TrainPreferenceLora",
            display_name=TITLE,
            category="model/training",
            description=(
                "Trains a LoRA that makes a Wan model prefer the winners of recorded preferences over the losers (Flow-DPO), "
                "with the model itself as its reference. It is saved in output/loras while it trains, and an interrupted "
                "training goes on where it stopped."
            ),
            search_aliases=["dpo", "preference", "train lora", "finetune", "rlhf", "reward", "intrinsic reward"],
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
                        "Empty: the recorded winner and loser. Name of a score: the best against the worst candidate of each "
                        "record by it."
                    ),
                ),
                io.String.Input("name", default="my_preference_lora", tooltip="The LoRA is output/loras/<name>.safetensors."),
                io.Int.Input("steps", default=1000, min=1, max=1000000, tooltip="Optimiser steps."),
                io.Int.Input("rank", default=32, min=1, max=1024, tooltip="Rank of the LoRA on q, k, v and o."),
                io.Float.Input(
                    "learning_rate",
                    default=5e-6,
                    min=1e-8,
                    max=1.0,
                    step=1e-8,
                    round=False,
                    tooltip="Peak of the schedule: warm-up, then half a cosine to 0.",
                ),
                io.Float.Input(
                    "beta",
                    default=0.0,
                    min=0.0,
                    max=100000.0,
                    step=1.0,
                    tooltip=(
                        "How strongly the LoRA is held to the base model. 0: follows the errors, so that a typical pair "
                        "pushes with a quarter of its weight. Fixed values are 500 to 2500."
                    ),
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
                    tooltip="Decides the LoRA's initial values, the order of pairs, noise and noise levels.",
                ),
                io.Int.Input(
                    "save_every", default=50, min=0, max=1000000, tooltip="Steps between saves. 0: only when it ends."
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Go on with the interrupted training of this name. Off: start again and replace it.",
                ),
                io.Combo.Input(
                    "noise_levels",
                    options=[SHIFTED, UNIFORM, LOGIT_NORMAL],
                    default=SHIFTED,
                    advanced=True,
                    tooltip="How noise levels are drawn. shifted: as a sampler's schedule with this shift visits them.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Shift of the noise levels, as in ModelSamplingSD3. uniform ignores it.",
                ),
                io.Float.Input(
                    "sigma_low",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Lowest noise level. Wan 2.2 14B: 0.875 for the high-noise model.",
                ),
                io.Float.Input(
                    "sigma_high",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Highest noise level. Wan 2.2 14B: 0.875 for the low-noise model.",
                ),
                io.Float.Input(
                    "winner_anchor",
                    default=defaults.anchor,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Weight against a rise of the winner's error, in units of the preference's slope.",
                ),
                io.Float.Input(
                    "sft_weight",
                    default=defaults.sft,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Weight of ordinary training on the winners, in the same units.",
                ),
                io.Float.Input(
                    "static_penalty",
                    default=defaults.static,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Weight against predictions that move less than the base model's, in the same units.",
                ),
                io.Float.Input(
                    "max_winner_rise",
                    default=0.05,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Stop where the winners' error is this share above the base model's, and keep the last healthy LoRA. "
                        "0: never."
                    ),
                ),
                io.Int.Input(
                    "warmup_steps", default=100, min=0, max=100000, advanced=True, tooltip="Steps of rising learning rate."
                ),
                io.Combo.Input(
                    "lora_dtype", options=list(DTYPES), default="bf16", advanced=True, tooltip="Of the saved LoRA."
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=True,
                    advanced=True,
                    tooltip="Compute each block again in the backward pass: far less memory, about a third more time.",
                ),
                io.Boolean.Input(
                    "offloading",
                    default=False,
                    advanced=True,
                    tooltip="Keep the weights in main memory and bring them to the GPU layer by layer: slower, less memory.",
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(display_name="lora", tooltip="For Load LoRA Model and Save LoRA Weights."),
                io.Custom("LOSS_MAP").Output(display_name="loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Steps that the LoRA was trained for."),
                io.String.Output(
                    display_name="report", tooltip="Accuracy, both errors, where the file is, and the equal command line."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, folder, decided_by, name, steps, rank, learning_rate, beta, pairs_per_step, seed, save_every, resume,
        noise_levels, shift, sigma_low, sigma_high, winner_anchor, sft_weight, static_penalty, max_winner_rise, warmup_steps,
        lora_dtype, checkpointing, offloading,
    ) -> io.NodeOutput:  # fmt: skip
        settings = LoraSettings(
            decided_by.strip(), steps, rank, learning_rate, beta, pairs_per_step, seed, noise_levels, shift, sigma_low,
            sigma_high, winner_anchor, sft_weight, static_penalty, max_winner_rise, warmup_steps,
        )  # fmt: skip
        core_training(TITLE)
        require_plain(name, f"{TITLE}, input 'name'", "file")
        # A range without a level is a mistake to say before anything is loaded.
        settings.levels  # noqa: B018
        with torch.inference_mode(False), torch.no_grad():
            backbone = require_trainable(model, f"{TITLE}, input 'model'")
            records = recorded_pairs.folder_of(folder, f"{TITLE}, input 'folder'")
            pairs = recorded_pairs.read(records, settings.decided_by)
            space = from_comfy(model.get_model_object("latent_format"))
            files = [path for pair in pairs for path in (pair.winner, pair.loser)]
            shape = recorded_pairs.require_fit(files, space, f"model {type(model.model).__name__}")
            recorded_pairs.require_different(pairs)
            path, file = training_state.path_of(name), Path(in_output(LORA_FOLDER, f"{name}.safetensors"))
            described = vars(settings) | {
                "pairs": recorded_pairs.digest(pairs), "model": identity(backbone),
            }  # fmt: skip
            loop = LoopSettings(steps, learning_rate, warmup_steps, COSINE, save_every, path, described)
            if not path.is_file() and file.exists():
                raise FileExistsError(f"{file}: exists, and no training of this name was begun here; give another 'name'")
            state = training_loop.load(loop, FIGURES) if resume else None
            dtype, source = DTYPES[lora_dtype], source_name(model)

            def save(step: int, parameters: Mapping[str, torch.Tensor]) -> None:
                if step:
                    header = header_of(settings, step, backbone, source, len(pairs))
                    training_state.write_tensors(file, lora_model(parameters, rank, dtype), header)

            def stepped(step: int, history: list[list[float]]) -> None:
                text = "\n".join([f"Step {step} of {steps}", *figures_text(history)[:2]])
                PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)

            outcome = training_loop.finished(state, loop)
            if outcome is None:
                words, length = embedded_prompts.embed(clip, (p.prompt for p in pairs), TITLE)
                training = LoraTraining(
                    own_copy(model, f"{TITLE}, input 'model'"), settings, pairs, words, length, checkpointing, offloading
                )
                outcome = training.run(shape, loop, state, stepped, save)
            if outcome.stopped:
                if outcome.healthy_step == 0:
                    raise TrainingError(f"{TITLE}: {outcome.stopped}; no step was healthy, so there is no LoRA")
                logging.warning("%s: %s", TITLE, outcome.stopped)
            save(outcome.healthy_step, outcome.parameters)
            text = report(settings, outcome, pairs, file, records, name, source)
            PromptServer.instance.send_progress_text(text, cls.hidden.unique_id)
            losses = {"loss": [row[LOSS] for row in outcome.history]}
            lora = lora_model(outcome.parameters, rank, dtype)
            return io.NodeOutput(lora, losses, outcome.healthy_step, text, ui=ui.PreviewText(text))

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


NODES = [TrainPreferenceLora]
