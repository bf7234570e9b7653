"""The parameters of the best measurement: best-<step>.safetensors in the run's folder, and a copy in main memory.

A resumed run needs those that were best at its checkpoint, so the newest file at or before each checkpoint is kept, too.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..kernels.files.atomic import write_atomic
from ..running import checkpoint
from ..running.checkpoint import CheckpointError

NAME = re.compile(r"best-(\d+)\.safetensors")
FORMAT = "intrinsic_reward_best"


class BestParameters:
    """folder: of the run; parameters: in training; writes: whether this process writes the files."""

    def __init__(self, folder: Path, parameters: Mapping[str, torch.nn.Parameter], writes: bool = True):
        self.folder, self.parameters, self.writes = folder, parameters, writes
        self.tensors: dict[str, Tensor] | None = None

    def keep(self, step: int) -> None:
        """Keeps the parameters as they are now, as those of `step`. Raises OSError."""
        self.tensors = {n: p.detach().to("cpu", copy=True).contiguous() for n, p in self.parameters.items()}
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                path = self.folder / f"best-{step}.safetensors"
                write_atomic(path, lambda partial: save_file(self.tensors, partial, metadata={"format": FORMAT}))
            except SafetensorError as e:
                raise OSError(f"{self.folder / f'best-{step}.safetensors'}: could not be written ({e})") from e
            self._remove_old(step)

    def restore(self, step: int) -> None:
        """Copies the parameters that `keep(step)` kept back, from memory or from the file. Raises CheckpointError."""
        if self.tensors is None:
            path = self.folder / f"best-{step}.safetensors"
            try:
                self.tensors = load_file(path)
            except (OSError, SafetensorError) as e:
                raise CheckpointError(
                    f"{path}: cannot be read ({type(e).__name__}), and it holds the best step's parameters; resume in the "
                    "folder of the run, or start again"
                ) from e
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.tensors[name])

    def remove_after(self, step: int) -> None:
        """Deletes the files of steps after `step`, where training starts."""
        for path, own in self._files():
            if own > step:
                path.unlink()

    def _files(self) -> list[tuple[Path, int]]:
        found = [(p, NAME.fullmatch(p.name)) for p in self.folder.glob("best-*.safetensors")]
        return sorted(((p, int(m[1])) for p, m in found if m), key=lambda f: f[1])

    def _remove_old(self, step: int) -> None:
        files = self._files()
        saved = [int(checkpoint.NAME.fullmatch(p.name)[1]) for p in checkpoint.list_checkpoints(self.folder)]
        needed = {step} | {max((s for _, s in files if s <= at), default=step) for at in saved}
        for path, own in files:
            if own not in needed:
                path.unlink()
