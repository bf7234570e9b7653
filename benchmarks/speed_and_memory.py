"""Time and peak memory of calls, and a table of them: what speed benchmarks share."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

MIB = 1 << 20


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device synchronised before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed_in_turn(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """name -> seconds in each round. In a round every call runs once, so that other load on the machine slows all of them."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(timed(call, device))
    return seconds


def median_speedup(base: list[float], seconds: list[float]) -> float:
    """Median over rounds of how many times as fast as `base` it was."""
    return statistics.median(b / s for b, s in zip(base, seconds, strict=True))


def extra_peak(call: Callable[[], object], device: torch.device) -> float:
    """Bytes by which one call raises the peak above what is allocated before it; NaN where the system does not report it."""
    gc.collect()
    if sys.platform == "linux":
        # Memory that the C library keeps from an earlier call would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return float("nan")
    # Writing 5 resets the peak to the current resident set.
    reset.write_text("5")
    before = resident(status, "VmRSS")
    call()
    return resident(status, "VmHWM") - before


def resident(status: Path, field: str) -> int:
    """Bytes in one line of /proc/self/status."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def print_table(rows: list[tuple[str, float, float, float]]) -> None:
    """rows: (name, seconds, times as fast as the first, extra peak in bytes), as markdown."""
    print("| | seconds | x faster | extra peak MiB |\n|---|---|---|---|")
    for name, seconds, ratio, memory in rows:
        print(f"| {name} | {seconds:.3f} | {ratio:.2f} | {memory / MIB:.0f} |")
