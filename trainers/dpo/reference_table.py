"""The frozen reference's errors at a fixed table of (pair, slot): computed once, so that training runs no reference pass.

One JSON line for each entry, synced as it is computed, in a file for each process: a run that is killed continues, and the
result does not depend on the number of processes. The file's name has a digest of what decides the numbers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..kernels.tuning.split_step import NoisyPair, Reference, Velocity, measure_reference
from ..running import results_log
from ..running.identity import digest_of
from ..running.progress import Bar
from .draws import Draw

VALUES = ("winner", "loser", "winner_motion", "loser_motion")


class ReferenceTable:
    """folder: of the files; described: JSON values that decide the numbers: backbone, dtype, seed, noise levels, crop."""

    def __init__(self, folder: Path, described: dict):
        self.folder, self.name = folder, f"reference-{digest_of(described)}"
        self.known: dict[tuple[str, int], list[float]] = {}
        self.read()

    def read(self) -> None:
        """Reads the entries that any process has written. Raises LogError for a damaged file."""
        for path in sorted(self.folder.glob(f"{self.name}-*.jsonl")):
            for row in results_log.read(path):
                self.known[row["pair"], row["slot"]] = [row[v] for v in VALUES]

    def fill(
        self, draws: Sequence[Draw], load: Callable[[Draw], NoisyPair], velocity_of: Callable[[Draw], Velocity], accelerator
    ) -> None:
        """Computes the entries of these draws that are missing, each process its share; then all processes know all.

        Raises OSError where a line cannot be written, ValueError where a value is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        todo = [d for d in draws if (d.row.key, d.slot) not in self.known]
        accelerator.wait_for_everyone()
        rank, world = accelerator.process_index, accelerator.num_processes
        path = self.folder / f"{self.name}-{rank}of{world}.jsonl"
        with results_log.Log(path) as log, Bar("reference errors", len(todo), "pair", rank == 0) as bar:
            for i, draw in enumerate(todo):
                if i % world == rank:
                    found = measure_reference(velocity_of(draw), load(draw))
                    values = {v: float(getattr(found, v)) for v in VALUES}
                    if not all(map(torch.isfinite, map(torch.tensor, values.values()))):
                        raise ValueError(f"pair {draw.row.key}: the reference's error is not finite; check --base_dtype")
                    log.add({"pair": draw.row.key, "slot": draw.slot} | values)
                bar.add()
        accelerator.wait_for_everyone()
        self.read()

    def of(self, draws: Sequence[Draw], device: torch.device) -> Reference:
        """The entries of draws, each [B] fp32. Raises KeyError for one that was not computed."""
        rows = torch.tensor([self.known[d.row.key, d.slot] for d in draws], dtype=torch.float32, device=device)
        return Reference(*rows.unbind(1))
