"""Clips of fixed prompts and seeds in the middle of a training, at LoRA strengths 0, 0.5 and 1, as files and with scores.

Noise and schedule are those of trainers.wan.sampling, so the same prompt, seed and strength give the same clip in every run
and on every number of processes. Each process samples its share; strength 0 is sampled once.
"""

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.files.atomic import write_atomic
from ..kernels.files.latents import write_latents
from ..kernels.latent_space import LatentSpace
from ..kernels.rewards.flow_residual import FlowResidual
from ..kernels.shell_lcc.diagnostics import high_frequency_share
from ..kernels.tuning.preference_loss import motion
from ..preferences.clips import ClipOptions, ClipReader, decode
from ..preferences.groups import Candidate, Group
from ..reporting import embed
from ..running import results_log
from ..running.identity import digest_of
from ..running.progress import Bar
from ..scorers import scores as clip_scores
from ..scorers.geometry import GEOMETRY, GeometryOptions
from ..scorers.latent_view import ConditionalNetwork, LatentView
from ..scorers.model_reward import FLOW_RESIDUAL
from ..scorers.scores import ScoringOptions
from ..scorers.shell_lcc import SHELL_LCC
from ..wan import sampling
from . import lora
from .backbone import TunableDit

# Has the digest of what decides the clips.
SETTINGS = "settings.txt"
REWARDS = (FLOW_RESIDUAL, SHELL_LCC, GEOMETRY)
STRENGTHS = (0.0, 0.5, 1.0)
FPS = 16.0


class ValidationError(ValueError):
    """Validation clips cannot be made as asked; the message says which flag and what to do."""


@dataclass(frozen=True)
class ValidationOptions:
    """prompts: text ids; names: {text id: the prompt} for reports; seeds: of the noise, for each prompt; shape: [C, T, h, w];
    steps, shift, cfg: of the sampler; vae: for videos, None without; manifold: for shell_lcc; rewards: of REWARDS.
    """

    prompts: tuple[str, ...]
    names: dict[str, str]
    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    steps: int = 30
    shift: float = 5.0
    cfg: float = 5.0
    strengths: tuple[float, ...] = STRENGTHS
    rewards: tuple[str, ...] = ()
    vae: str | None = None
    vae_dtype: str = "auto"
    tiling: bool = False
    manifold: str | None = None
    device: str = "auto"

    def __post_init__(self):
        for name, needed, flag in ((SHELL_LCC, self.manifold, "--manifold"), (GEOMETRY, self.vae, "--vae")):
            if name in self.rewards and needed is None:
                raise ValidationError(f"--validation_rewards {name}: needs {flag}")
        if not self.prompts or not self.seeds:
            raise ValidationError("--validation_prompts and --validation_seeds: expected at least one of each")
        if self.steps < 1 or self.cfg < 1:
            raise ValidationError("--validation_steps_per_clip and --validation_cfg must be 1 or more")


@dataclass(frozen=True)
class ValidationClip:
    """prompt: text id; name: of its files, without suffix."""

    prompt: str
    seed: int
    strength: float
    name: str


class Validator:
    """folder: gets a folder for each validation; texts: {text id: [words, width]}; negative: embedded negative prompt, needed
    unless cfg is 1; adapter: whether the model has a LoRA, otherwise only strength 0 (before training) and 1 exist.
    """

    def __init__(
        self, folder: Path, dit: TunableDit, texts: dict[str, Tensor], negative: Tensor | None, space: LatentSpace,
        options: ValidationOptions, accelerator, adapter: bool = True,
    ):  # fmt: skip
        missing = [p for p in options.prompts if p not in texts]
        if missing:
            shown = options.names.get(missing[0], missing[0])
            raise ValidationError(
                f"--validation_prompts: '{shown[:60]}' is not embedded in the data folder; give the file to "
                "`python -m trainers.dpo cache --validation_prompts` as well"
            )
        if negative is None and options.cfg != 1:
            raise ValidationError(
                "validation with --validation_cfg above 1 needs the embedded negative prompt, which the data folder lacks; "
                "run `python -m trainers.dpo cache` with --text_encoder, or give --validation_cfg 1"
            )
        self.folder, self.dit, self.texts, self.negative = folder, dit, texts, negative
        self.space, self.options, self.accelerator, self.adapter = space, options, accelerator, adapter
        where = str(accelerator.device) if options.device == "auto" else options.device
        self.reader = ClipReader(ClipOptions(options.vae, options.vae_dtype, options.tiling, device=where))

    def prepare(self, step: int) -> None:
        """Deletes the clips of steps after `step`, where training starts, and all of them where they were made by other
        settings or another run began. Called on every process. Raises OSError.
        """
        if self.accelerator.is_main_process:
            o, note = self.options, self.folder / SETTINGS
            described = [list(o.prompts), list(o.seeds), list(o.shape), o.steps, o.shift, o.cfg, o.vae is None]
            digest = digest_of({"clips": described, "backbone": self.dit.backbone.fingerprint})
            same = step > 0 and note.is_file() and note.read_text(encoding="utf-8") == digest
            for path in self.folder.glob("step-*"):
                if not same or int(path.name.removeprefix("step-")) > step:
                    shutil.rmtree(path)
            write_atomic(note, lambda partial: Path(partial).write_text(digest, encoding="utf-8"))
        self.accelerator.wait_for_everyone()

    def run(self, step: int) -> list[dict]:
        """Samples the clips of a step that are not there yet, and scores all. Called on every process.

        Returns on the first process rows {step, prompt, seed, strength, file, size: [width, height], scores: {name: number}},
        [] on the others.
        """
        clips = self.clips(step)
        mine = clips[self.accelerator.process_index :: self.accelerator.num_processes]
        with Bar(f"validation of step {step}", len(mine), "clip", self.accelerator.is_main_process) as bar:
            for clip in mine:
                if not self._path(step, clip).is_file():
                    self._write(step, clip)
                bar.add()
        self.accelerator.wait_for_everyone()
        rows = []
        if self.accelerator.is_main_process:
            rows = self._scored(step, clips)
            results_log.write(self._folder(step) / "clips.jsonl", rows)
        self.accelerator.wait_for_everyone()
        return rows

    def clips(self, step: int) -> list[ValidationClip]:
        """Those of a step: strength 0 belongs to step 0."""
        o = self.options
        strengths = [s for s in o.strengths if (s == 0) == (step == 0) and (self.adapter or s in (0, 1))]
        return [
            ValidationClip(p, seed, s, f"{i:03d}-{seed}-at-{s:g}")
            for i, p in enumerate(o.prompts) for seed in o.seeds for s in strengths
        ]  # fmt: skip

    def _write(self, step: int, clip: ValidationClip) -> None:
        z = self.sample(clip)
        path = self._path(step, clip)
        entry = {"source": path.name, "video": clip.name, "seed": clip.seed, "prompt": clip.prompt}
        entry["frames"] = (z.shape[1] - 1) * self.space.temporal_stride + 1
        if self.options.vae is not None:
            media = embed.video(decode(self.reader.vae, z), FPS, max_side=4096, max_bytes=None)
            write_atomic(path.with_suffix(media.suffix), lambda partial: Path(partial).write_bytes(media.data))
        write_latents(path, {clip.name: z}, self.space, {clip.name: entry})

    @torch.no_grad()
    def sample(self, clip: ValidationClip) -> Tensor:
        """The clip's latent [C, T, h, w], normalised, fp32 on the CPU."""
        o = self.options
        weight = self.dit.model.patch_embedding.weight
        words = self.texts[clip.prompt]
        denoiser = sampling.Denoiser(self.dit.model, [words], self.negative, o.cfg)
        x = sampling.noise(o.shape, [clip.seed]).to(weight.device)
        with lora.at_strength(self.dit.model, clip.strength) if self.adapter else nullcontext():
            z = sampling.euler(denoiser, x, sampling.sigmas(o.steps, o.shift).tolist())[0].float().cpu()
        if not bool(torch.isfinite(z).all()):
            raise ValidationError(f"the validation clip {clip.name} is not finite; see --base_dtype and --learning_rate")
        return z

    def _scored(self, step: int, clips: Sequence[ValidationClip]) -> list[dict]:
        read = {c.name: self.reader.latents(self._candidate(step, c))[0] for c in clips}
        found = {
            c.name: {"motion": float(motion(read[c.name][None])), "high_frequency": high_frequency_share(read[c.name])}
            for c in clips
        }
        if FLOW_RESIDUAL in self.options.rewards:
            with lora.without_adapter(self.dit.model) if self.adapter else nullcontext():
                for c in clips:
                    network = ConditionalNetwork(self.dit.model, self.texts[c.prompt], None)
                    view = LatentView(network, read[c.name][None])
                    found[c.name][FLOW_RESIDUAL] = -float(FlowResidual().measure(view)[0, 0])
        by_file = [r for r in self.options.rewards if r != FLOW_RESIDUAL]
        if by_file:
            groups = [Group(p, p, [self._candidate(step, c) for c in clips if c.prompt == p]) for p in self.options.prompts]
            where = self.reader.options.device
            options = ScoringOptions(GeometryOptions(jobs=1), manifold=self.options.manifold, device=where)
            scored = clip_scores.score(groups, by_file, options, self.reader, self._folder(step) / "scores.jsonl")
            for name in by_file:
                for c in clips:
                    found[c.name][name] = scored.values[name].get(c.name)
        names, stride = self.options.names, self.space.spatial_stride
        size = [self.options.shape[3] * stride, self.options.shape[2] * stride]
        return [
            {"step": step, "prompt": names.get(c.prompt, c.prompt), "seed": c.seed, "strength": c.strength,
             "file": self._path(step, c).name, "size": size, "scores": found[c.name]}
            for c in clips
        ]  # fmt: skip

    def _candidate(self, step: int, clip: ValidationClip) -> Candidate:
        path = self._path(step, clip)
        video = next((p for p in (path.with_suffix(s) for s in (".mp4", ".webm")) if p.is_file()), None)
        return Candidate(clip.name, video, path, clip.seed)

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _path(self, step: int, clip: ValidationClip) -> Path:
        return self._folder(step) / f"{clip.name}.safetensors"


def means(rows: Sequence[dict]) -> dict[str, float]:
    """{"validation/<score> at <strength>": mean over clips} of a validation's rows, for logs."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["scores"].items():
            if value is not None:
                found.setdefault(f"validation/{name} at {row['strength']:g}", []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
