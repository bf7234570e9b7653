"""One training step of each tuning trainer at the shape of Wan2.1-1.3B, with random weights: peak memory and the plan's.

    python -m benchmarks.tuning_full_shape --output_dir outputs/tuning_full_shape [--latent 16 2 60 104] [--threads 2]

Writes a transformer of that shape in bf16, pairs and latents of noise, and a manifold fitted to the latents, then runs the
commands of `trainers.dpo` and `trainers.shell_reward` for one step of one pair or one prediction each, with their defaults
otherwise (LoRA 32 and 16, checkpointing, the base as stored) but no measurements of held-out clips. Each command runs in its
own process, whose peak resident set is printed with the plan of --dry_run. Linux counts pages of mapped files in a resident
set, which it takes back when memory is short; so the peak without them is printed too, sampled ten times a second.
"""

import argparse
import contextlib
import io
import multiprocessing
import re
import threading
import time
from pathlib import Path

import torch

from benchmarks.full_shape import write_transformer
from trainers.kernels.files import preference_records
from trainers.kernels.files.latents import write_latents
from trainers.kernels.latent_space import WAN21
from trainers.wan.prompts import text_id, write_embeddings

PROMPTS = ("a cat on a sofa", "a ship in a storm")
TRAINERS = ("dpo", "shell_reward")
TEXT_WIDTH, WORDS = 4096, 40


def write_material(folder: Path, latent: tuple[int, ...]) -> None:
    """Texts, records of two clips for each prompt, and their latents as files."""
    generator = torch.Generator().manual_seed(0)
    keyed = {text_id(p): p for p in (*PROMPTS, "")}
    texts = {k: 0.1 * torch.randn(WORDS, TEXT_WIDTH, generator=generator) for k in keyed}
    write_embeddings(folder / "texts.safetensors", texts, WAN21, {}, keyed)
    records = folder / "records"
    (records / "latents").mkdir(parents=True, exist_ok=True)
    lines = b""
    for prompt in PROMPTS:
        z = torch.randn(2, *latent, generator=generator)
        record = preference_records.new_record(records, prompt, z, WAN21, preference=(0, 1))
        for i, clip in enumerate(z):
            preference_records.write_candidate(record, i, clip, WAN21)
            write_latents(folder / "latents" / f"{record.id}-{i}.safetensors", {f"{record.id}-{i}": clip}, WAN21,
                          {f"{record.id}-{i}": {"source": record.id, "video": record.id, "frames": 4 * clip.shape[1] - 3}},
                          provenance={})  # fmt: skip
        lines += preference_records.to_line(record, records)
    (records / preference_records.RECORDS).write_bytes(lines)


def status_kib(name: str) -> int:
    """A figure of /proc/self/status (Linux), KiB; getrusage's peak would be the parent's where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.split("\n") if line.startswith(f"{name}:")).split()[1])


class AnonymousPeak(threading.Thread):
    """Largest resident set without pages of files, `kib`, sampled until `stop` is called (Linux)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.kib, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.1):
            self.kib = max(self.kib, status_kib("RssAnon"))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.kib


def measured(arguments: tuple[str, list[str], int]) -> tuple[int, float, int, int, str]:
    """(exit code, seconds, MiB of the peak, MiB of the peak without pages of files, output) of a trainer's command in this
    process."""
    name, argv, threads = arguments
    torch.set_num_threads(threads)
    from trainers.dpo import cli as dpo
    from trainers.shell_lcc import cli as shell_lcc
    from trainers.shell_reward import cli as shell_reward

    main = {"dpo": dpo, "shell_reward": shell_reward, "shell_lcc": shell_lcc}[name].main
    said, anonymous = io.StringIO(), AnonymousPeak()
    anonymous.start()
    start = time.perf_counter()
    with contextlib.redirect_stdout(said):
        code = main(argv)
    seconds = time.perf_counter() - start
    return code, seconds, status_kib("VmHWM") // 1024, anonymous.stop() // 1024, said.getvalue()


def run(name: str, argv: list, threads: int) -> tuple[float, int, int, str]:
    """`measured` in a process of its own; raises SystemExit where the command fails."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        code, seconds, peak, anonymous, said = pool.map(measured, [(name, [str(a) for a in argv], threads)])[0]
    if code:
        raise SystemExit(f"trainers.{name} {' '.join(map(str, argv))}: exit code {code}\n{said}")
    return seconds, peak, anonymous, said


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--latent", type=int, nargs=4, default=(16, 2, 60, 104), metavar=("C", "T", "H", "W"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    args = parser.parse_args(argv)
    folder, latent = args.output_dir, tuple(args.latent)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = folder / "wan_bf16.safetensors"
    if not backbone.exists():
        write_transformer(backbone, "bf16")
    if not (folder / "records").exists():
        write_material(folder, latent)
    texts, data, manifold = folder / "texts.safetensors", folder / "pairs", folder / "manifold.safetensors"
    if not (data / "report.json").exists():
        run("dpo", ["cache", "--pairs", folder / "records", "--embeddings", texts, "--output", data], args.threads)
    if not manifold.exists():
        run("shell_lcc", ["fit", "--latents", folder / "latents", "--output", manifold], args.threads)
    frames, height, width = 4 * latent[1] - 3, 8 * latent[2], 8 * latent[3]
    commands = {
        "dpo": ["train", "--data", data, "--gradient_accumulation_steps", 1, "--held_out", 0],
        "shell_reward": ["train", "--manifold", manifold, "--embeddings", texts, "--size", width, height, "--frames", frames,
                         "--train_batch_size", 1, "--gradient_accumulation_steps", 1, "--held_out", 0,
                         "--validation_steps", 0],
    }  # fmt: skip
    print(f"Wan2.1-1.3B's shape, bf16, latent {'x'.join(map(str, latent))} ({width}x{height}, {frames} frames), one step\n")
    print("| trainer | peak MiB | without pages of files, MiB | plan, MiB | seconds |\n|---|---|---|---|---|")
    for name, command in ((n, commands[n]) for n in args.trainers):
        common = ["--backbone", backbone, "--output", folder / f"{name}.safetensors", "--max_train_steps", 1, "--overwrite"]
        *_, planned = run(name, [*command, *common, "--dry_run"], args.threads)
        total = re.findall(r"together\D*([\d.]+)", planned)
        seconds, peak, anonymous, _ = run(name, [*command, *common], args.threads)
        plan = f"{1024 * float(total[-1]):.0f}" if total else planned
        print(f"| {name} | {peak} | {anonymous} | {plan} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
