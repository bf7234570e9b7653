"""Which device a command runs on, and which of the processes of `accelerate launch` it is."""

from dataclasses import dataclass

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Place:
    """index, count: this process among all; state: accelerate's, None where it is not installed."""

    device: torch.device
    index: int = 0
    count: int = 1
    state: object = None

    @property
    def main(self) -> bool:
        return self.index == 0

    def leave(self) -> None:
        """Ends the process group, if there is one."""
        if self.count > 1:
            self.state.destroy_process_group()


def pick_device(wanted: str) -> torch.device:
    """`auto`: the first accelerator there is, else the CPU. Raises ValueError for a device that cannot be used."""
    if wanted == "auto":
        for name in ("cuda", "xpu", "mps"):
            backend = torch.backends.mps if name == "mps" else getattr(torch, name)
            if backend.is_available():
                return torch.device(name)
        return torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {wanted}: cannot be used here ({' '.join(str(e).split())[:120]})") from e
    return device


def join(wanted: str) -> Place:
    """This process' place; under `accelerate launch` every process gets its own device of the wanted kind."""
    device = pick_device(wanted)
    try:
        from accelerate import PartialState
    except ImportError:
        return Place(device)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        device = state.device
    return Place(device, state.process_index, state.num_processes, state)
