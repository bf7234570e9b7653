"""Device selection, and the distributed context of a process started by `accelerate launch`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from .inputs import InputError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Help of --backbone_dtype.
BACKBONE_DTYPE = "auto: float32 on a CPU, else bfloat16 (default auto)"
ACCELERATORS = ("cuda", "xpu", "mps")
# Processes wait for one that is not done, validates or writes. torch.distributed gives up after 10 or 30 minutes by default.
LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class DistributedContext:
    """rank: of this process among world_size; state: accelerate's PartialState, None where accelerate is not installed."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    state: object = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Destroys the process group, if there is one."""
        if self.world_size > 1:
            self.state.destroy_process_group()


def pick_device(wanted: str, accelerators: Sequence[str] = ACCELERATORS) -> torch.device:
    """The device that --device names; for "auto" the first available one of `accelerators`, else the CPU.

    Raises InputError for a device that cannot be used.
    """
    if wanted == "auto":
        for name in accelerators:
            backend = torch.backends.mps if name == "mps" else getattr(torch, name)
            if backend.is_available():
                return torch.device(name)
        return torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {wanted}: cannot be used here ({' '.join(str(e).split())[:120]})") from e
    return device


def dtype_for(wanted: str, device: torch.device) -> str:
    """A name of DTYPES for a flag such as --vae_dtype: "auto" is float32 on a CPU, else bfloat16."""
    if wanted != "auto":
        return wanted
    return "float32" if device.type == "cpu" else "bfloat16"


def init_distributed(wanted: str, accelerators: Sequence[str] = ACCELERATORS) -> DistributedContext:
    """This process's context; under `accelerate launch` every process gets its own device of the wanted kind.

    accelerators: that "auto" may pick. Raises InputError for a device that cannot be used.
    """
    device = pick_device(wanted, accelerators)
    try:
        from accelerate import PartialState
    except ImportError:
        return DistributedContext(device)
    # Without cpu=True and without a GPU it would ignore the other processes.
    state = PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)
    if state.num_processes > 1 and device.type != "cpu":
        # On a CPU it would be "cpu:0", which safetensors does not know.
        device = state.device
    return DistributedContext(device, state.process_index, state.num_processes, state)
