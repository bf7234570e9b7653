"""Batches of clips, generated and judged in several processes; results are kept on disk, so an interrupted run can be resumed.

A job is up to eight clips of one kind. Its result is a dict of tensors whose first dimension is clips: the judge's readings,
and for samples the latents. It is determined by the job, the weights and the manifold, from which its file's name is made.
"""

import hashlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from trainers.kernels.files.atomic import write_atomic
from trainers.kernels.shell_lcc import manifold as manifolds
from trainers.kernels.shell_lcc.diagnostics import add_noise, half_blur
from trainers.latents.read import ClipRef, list_clips, read_clip

from . import candidates, few_steps, judge, pipeline, training_free, weights
from .captions import VALUES
from .clips import clip, scene_of, sibling
from .guidance import Guidance, SigmaTable
from .pipeline import Hook

BATCH = 8
# To be raised when the results of jobs change for a reason that their file names do not contain.
VERSION = 1
# Siblings: how many other scenes of its caption are rendered for each clip, as the distribution that samples should match.
SIBLINGS = {"siblings": 4, "sibling reconstructions": 2}
# Tables of one caption's candidates; the clips of such a job are seeds of the caption of clip `start`.
TABLES = {
    "candidates": candidates.run, "drafts": candidates.run_drafts, "judged": candidates.run_judged,
    "training free": training_free.run,
}  # fmt: skip
# Few-step samples with and without guidance, by cfg.
FEW_STEPS = {f"few steps cfg {cfg:g}": cfg for cfg in few_steps.CFGS}
DAMAGES = {"half blur": half_blur, "noise": add_noise}


@dataclass(frozen=True)
class Files:
    """The inputs of jobs. patches (a manifold of 2x2 squares), table and heads may be missing where no job needs them."""

    weights: Path
    judge: Path
    manifold: Path
    patches: Path
    table: Path
    latents: Path
    heads: Path

    def digest(self) -> str:
        """16 hexadecimal digits of all files but heads, and but patches and table, which are derived from the others."""
        found = hashlib.sha256(f"{VERSION} {pipeline.STEPS} {pipeline.CFG} {pipeline.SHIFT}".encode())
        for path in (*sorted(self.weights.glob("*.safetensors")), self.judge, self.manifold):
            found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()[:16]

    def heads_digest(self) -> str:
        """8 hexadecimal digits of the heads' files."""
        found = hashlib.sha256()
        for path in sorted(self.heads.glob("*.safetensors")):
            found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()[:8]


@dataclass(frozen=True)
class Job:
    """Clips start to start + count of a split. guidance: of samples and of refined latents, None without any.

    kind: renders, reconstructions (renders through the VAE), samples, predictions, one of SIBLINGS, or "refined <damage>":
    latents of renders with one of DAMAGES applied, then corrected once by the guidance; or one of TABLES or FEW_STEPS.
    """

    kind: str
    split: str
    start: int
    count: int
    guidance: Guidance | None = None

    def name(self, digest: str) -> str:
        setting = "none" if self.guidance is None else "-".join(str(v) for v in astuple(self.guidance))
        return f"{self.kind.replace(' ', '_')}-{self.split}-{self.start}-{self.count}-{setting}-{digest}.safetensors"


class Worker:
    """The models of one process, and the jobs run with them."""

    def __init__(self, files: Files):
        self.world, self.judge = pipeline.load(files.weights), judge.load(files.judge)
        self.manifold = manifolds.load(files.manifold)
        self.manifolds = {1: self.manifold} | ({2: manifolds.load(files.patches)} if files.patches.exists() else {})
        self.table = SigmaTable.load(files.table) if files.table.exists() else None
        self.latents = files.latents
        self.heads = candidates.load_heads(files.heads, files.weights / weights.DIT)

    @torch.no_grad()
    def run(self, job: Job) -> dict[str, Tensor]:
        if job.kind in TABLES:
            return TABLES[job.kind](self.world, self.judge, self.heads, job.split, job.start, job.count)
        if job.kind in FEW_STEPS:
            cfg = FEW_STEPS[job.kind]
            return few_steps.run(self.world, self.judge, self.manifold, job.split, job.start, job.count, cfg)
        index = range(job.start, job.start + job.count)
        if job.kind == "predictions":
            return {"distance": self._predictions(index)}
        if job.kind == "samples":
            captions = [scene_of(job.split, i)[1] for i in index]
            hook = self._hook(job)
            z = self.world.sample(captions, list(index), hook)
            frames, more = self.world.decode(z), {"z": z}
        elif job.kind.startswith("refined "):
            z = DAMAGES[job.kind.removeprefix("refined ")](self.world.encode(self._real(job, index)))
            z = z if job.guidance is None else self._hook(job)(z, 0.5, 0)
            frames, more = self.world.decode(z), {"z": z}
        else:
            frames, more = self._real(job, index), {}
            if job.kind.endswith("reconstructions"):
                before = frames
                frames = self.world.decode(self.world.encode(frames))
                error = ((frames.float() - before.float()) / 255).square().mean(dim=(2, 3, 4))
                more = {"squared_error": error}
        return more | flatten(self.judge.read(frames))

    def _hook(self, job: Job) -> Hook | None:
        if job.guidance is None:
            return None
        return job.guidance.hook(self.manifolds[job.guidance.patch], self.table, seed=job.start)

    def _real(self, job: Job, index: range) -> Tensor:
        if job.kind in SIBLINGS:
            return torch.stack([sibling(job.split, i, k).frames for i in index for k in range(SIBLINGS[job.kind])])
        return torch.stack([clip(job.split, i).frames for i in index])

    def _predictions(self, index: range) -> Tensor:
        """Distances [N, S, T, H, W] of the model's x0 for bundled latents `index` noised to each sampling sigma."""
        refs = held_out(self.latents, self.manifold)[index.start : index.stop]
        z = torch.stack([read_clip(ref) for ref in refs])
        captions = [ref.entry["caption"] for ref in refs]
        noise = pipeline.initial_noise([10_000_000 + i for i in index])
        rows = []
        for sigma in pipeline.sigmas(pipeline.STEPS, pipeline.SHIFT)[:-1].tolist():
            x0 = self.world.predict_x0(sigma * noise + (1 - sigma) * z, sigma, captions)
            rows.append(self.manifold.distance(x0))
        return torch.stack(rows, dim=1)


def held_out(latents: Path, manifold: manifolds.ShellManifold) -> list[ClipRef]:
    """The bundled clips that the manifold was not fitted on."""
    names = set(manifold.provenance["held_out_clips"])
    return [ref for ref in list_clips([latents], manifold.space) if ref.clip_id in names]


def flatten(reading: judge.Reading) -> dict[str, Tensor]:
    """A reading as named tensors [N, ...]."""
    plain = {f.name: getattr(reading, f.name) for f in fields(reading) if f.name not in ("probabilities", "reference")}
    return plain | {f"probability.{k}": v for k, v in reading.probabilities.items()}


def as_reading(tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> judge.Reading:
    """The inverse of `flatten`; other tensors are left out."""
    plain = {f.name: tensors[f.name] for f in fields(judge.Reading) if f.name not in ("probabilities", "reference")}
    return judge.Reading({k: tensors[f"probability.{k}"] for k in VALUES}, reference=reference, **plain)


def split_up(kind: str, split: str, count: int, guidance: Guidance | None = None, start: int = 0) -> list[Job]:
    """Jobs for clips start to start + count."""
    edges = range(start, start + count, BATCH)
    return [Job(kind, split, i, min(BATCH, start + count - i), guidance) for i in edges]


def run(jobs: Sequence[Job], files: Files, folder: Path, processes: int, title: str) -> dict[Job, dict[str, Tensor]]:
    """Results of all jobs. Jobs whose file is in `folder` are not run again."""
    plain, with_heads = files.digest(), f"{files.digest()}-{files.heads_digest()}"
    paths = {job: folder / job.name(with_heads if job.kind in TABLES else plain) for job in jobs}
    missing = [job for job, path in paths.items() if not path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(missing)), context, _start, (files,)) as pool:
            waiting = {pool.submit(_do, job, paths[job]): job for job in missing}
            clips = sum(job.count for job in missing)
            try:
                with tqdm(total=clips, desc=title, unit="clip") as bar:
                    for done in as_completed(waiting):
                        done.result()
                        bar.update(waiting[done].count)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return {job: load_file(path) for job, path in paths.items()}


def gather(results: dict[Job, dict[str, Tensor]], jobs: Sequence[Job]) -> dict[str, Tensor]:
    """The results of some jobs, concatenated in their order."""
    return {k: torch.cat([results[job][k] for job in jobs]) for k in results[jobs[0]]}


_worker: Worker | None = None


def _start(files: Files) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Worker(files)


def _do(job: Job, path: Path) -> None:
    state = {k: v.contiguous() for k, v in _worker.run(job).items()}
    write_atomic(path, lambda partial: save_file(state, partial))
