"""Processes of a launcher without its start-up time: as `torch.distributed.run --nproc_per_node 2 -m MODULE` starts them.

A server that has imported the trainers once is forked for every process (multiprocessing's "forkserver"), which saves ten
seconds of imports each. Real launchers are tested in test_shell_lcc_fit.py and test_dpo.py.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from . import fast_convolutions

# What a process imports in any case.
PRELOADED = [
    "torch", "accelerate", "diffusers", "trainers.prism.cli", "trainers.geometry.cli", "trainers.pairs.cli", "trainers.encode",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """Exit code of each process, and what all wrote."""

    codes: list[int]
    stdout: str
    stderr: str


def launch(module: str, argv, folder: Path, count: int = 2, timeout: float = 240) -> Ended:
    """Run `main(argv)` of a module in `count` processes of one group. folder: where their output is kept."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(a) for a in argv]
    processes = [context.Process(target=_run, args=(module, arguments, rank, count, port, folder)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    said = {kind: "".join((folder / f"{rank}.{kind}").read_text() for rank in range(count)) for kind in ("out", "err")}
    return Ended([p.exitcode for p in processes], said["out"], said["err"])


def _run(module: str, argv: list[str], rank: int, count: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    fast_convolutions.use()
    with open(folder / f"{rank}.out", "w") as out, open(folder / f"{rank}.err", "w") as err:
        sys.stdout, sys.stderr = out, err
        code = importlib.import_module(module).main(argv)
    sys.exit(code)
