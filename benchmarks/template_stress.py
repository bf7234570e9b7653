"""Memory, interruptions and leftovers of the workflow templates in one ComfyUI server, on tiny models.

    python -m benchmarks.template_stress --comfyui ~/comfy/ComfyUI [--templates 02 12] [--prompts 10] [--interruptions 10]
        [--seed 0] [--json figures.json] [--output_dir outputs/template_stress]

Run it with ComfyUI's own Python, OMP_NUM_THREADS=1 and HF_HUB_OFFLINE=1; without --comfyui the variable COMFYUI_PATH counts.
Two studies of every template:

Memory: prompts in a row, each another variation (seed, clip or folder), so that none is answered from ComfyUI's cache. The
resident set of the server after the third prompt is compared with that after the last one: as it is, and after garbage is
collected and the C library has given back what it holds free. The number of live tensors tells a leak from fragmentation.

Interruptions: POST /interrupt at random shares of the template's median duration. The next prompt, in turn the interrupted one
once more and another one, must show and save what an uninterrupted run did: texts, pixels and tensors. An interrupted training
goes on where it stopped and must end with the same tensors. No thread and no open file is left, and every new file is one that
is kept on purpose and can be read. A prompt that ends before it notices the interruption counts as too late; it must be clean
as well.

At last a variation of each template is run once more, after all others, and compared with its first run.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .command_line import make_parser

MIB = 1 << 20
# The prompt whose memory the last one's is compared with: models are loaded and pools are filled by then.
SETTLED = 3
# Seconds that threads and open files are given: ComfyUI collects garbage every ten, which ends what a cycle of objects holds.
PATIENCE = 15.0
# MiB a prompt, collected, above which memory counts as growing.
FLAT = 1.0


@dataclass
class Memory:
    """seconds: of each prompt; rss: bytes after each, as it is; at two prompts, the third and the last: collected, bytes after
    garbage was collected; tensors alive, and their bytes; threads of the process.
    """

    seconds: list[float]
    rss: list[int]
    collected: tuple[int, int]
    tensors: tuple[int, int]
    tensor_bytes: tuple[int, int]
    threads: tuple[int, int]

    @property
    def growth(self) -> float:
        """MiB a prompt between the third and the last, as it is."""
        return (self.rss[-1] - self.rss[self.first]) / MIB / self.between

    @property
    def growth_collected(self) -> float:
        """The same, with garbage collected."""
        return (self.collected[1] - self.collected[0]) / MIB / self.between

    @property
    def first(self) -> int:
        return min(SETTLED, len(self.rss) - 1) - 1

    @property
    def between(self) -> int:
        return len(self.rss) - 1 - self.first


@dataclass
class Interruptions:
    """interrupted, late: counts; stops: seconds from each interruption to the prompt's end; nodes: {class: interruptions};
    different: runs after an interruption that differ from an uninterrupted one, each with where; threads, files: left.
    """

    interrupted: int = 0
    late: int = 0
    stops: list[float] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.different or self.threads or self.files)


def study_memory(server, name: str, prompts: int) -> tuple[Memory, dict[int, dict]]:
    """(figures, {variation: results of its first run}) of prompts in a row."""
    from tests.comfy.template_runs import TEMPLATES, differences

    seconds, rss, probes, first = [], [], [], {}
    for i in range(prompts):
        run = server.complete(name, i % TEMPLATES[name].count)
        seconds.append(run.seconds)
        rss.append(server.rss())
        if i + 1 in (min(SETTLED, prompts - 1), prompts):
            probes.append(server.probe())
        other = differences(first.setdefault(run.variation, run.results), run.results)
        assert not other, f"{name}: variation {run.variation} is not deterministic: {', '.join(other)}"
    keys = ("rss_collected", "tensors", "tensor_bytes", "system_threads")
    return Memory(seconds, rss, *(tuple(p[key] for p in probes) for key in keys)), first


def study_interruptions(
    server, name: str, expected: dict[int, dict], seconds: float, shares: Sequence[float]
) -> Interruptions:
    """expected: results of uninterrupted runs by variation, at least three; seconds: of one; shares: of that, when to stop."""
    from tests.comfy.template_runs import changed, differences, faults, snapshot

    found, variations = Interruptions(), sorted(expected)
    # What the cache holds must be another variation than those that follow.
    server.complete(name, variations[0])
    position, before = 0, server.probe(collect=False)
    for number, share in enumerate(shares):
        stopped, other = (variations[(position + step) % len(variations)] for step in (1, 2))
        since = snapshot(server.base)
        run, stop = server.interrupt_after(name, stopped, share * seconds)
        found.stops.append(stop)
        if run.interrupted:
            found.interrupted += 1
            (data,) = (d for event, d in run.entry["status"]["messages"] if event == "execution_interrupted")
            found.nodes[data["node_type"]] = found.nodes.get(data["node_type"], 0) + 1
        else:
            # Raises where it did not succeed either.
            server.wait(run.entry["prompt"][1])
            found.late += 1
        where = f"interruption {number + 1} at {100 * share:.0f} %"
        threads, opened = _left(server, before)
        found.threads += [f"{where}: {thread}" for thread in threads]
        found.files += [f"{where}: {path}: left open" for path in opened]
        found.files += [f"{where}: {fault}" for fault in faults(server.base, changed(since, snapshot(server.base)))]
        # After a late interruption the cache would answer for the same variation.
        again = run.interrupted and number % 2 == 0
        before_following = snapshot(server.base)
        following = server.complete(name, stopped, since) if again else server.complete(name, other)
        # The load of the machine may have changed.
        seconds = seconds if again else following.seconds
        written = changed(before_following, snapshot(server.base))
        found.files += [f"after {where}: {fault}" for fault in faults(server.base, written)]
        unlike = differences(expected[following.variation], following.results)
        if unlike:
            found.different.append(f"{where}, then {'the same' if again else 'another'}: {', '.join(unlike)}")
        position = variations.index(following.variation)
    return found


def _left(server, before: dict) -> tuple[list[str], list[str]]:
    """(threads, open files) that are still there after a while and were not `before`, an answer of the probe."""
    from tests.comfy.template_runs import extra_files, extra_threads

    deadline = time.monotonic() + PATIENCE
    while True:
        now = server.probe(collect=False)
        left = extra_threads(before, now), extra_files(before, now)
        if not any(left) or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def random_shares(count: int, seed: int, name: str) -> list[float]:
    """Shares of a duration, even over (0, 1) and random within their parts, in random order."""
    generator = random.Random(f"{seed} {name}")
    shares = [(i + generator.random()) / count for i in range(count)]
    generator.shuffle(shares)
    return shares


def as_table(figures: dict[str, dict]) -> str:
    """Markdown of both studies. figures: {template: {"memory": Memory, "interruptions": Interruptions, "last": list}}."""
    lines = [
        "| template | seconds a prompt | RSS after prompt 3, MiB | after the last | growth, MiB a prompt | growth collected, "
        "MiB a prompt | live tensors | interrupted in | slowest stop, s | next prompt the same | threads left | "
        "files left |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in figures.items():
        m, i = found["memory"], found["interruptions"]
        runs = i.interrupted + i.late
        where = ", ".join(f"{node.removeprefix('IntrinsicReward_')} {n}" for node, n in sorted(i.nodes.items()))
        where += f"{'; ' * bool(where)}too late {i.late}" * bool(i.late)
        same = f"{runs - len(i.different)} of {runs}" + ("" if not found["last"] else ", not at the end")
        lines.append(
            f"| {name} | {statistics.median(m.seconds):.2f} | {m.rss[m.first] / MIB:.0f} | {m.rss[-1] / MIB:.0f} | "
            f"{m.growth:+.2f} | {m.growth_collected:+.2f} | {m.tensors[0]}, {m.tensors[1]} | {where} | "
            f"{max(i.stops, default=0):.2f} | {same} | {len(i.threads)} | {len(i.files)} |"
        )
    return "\n".join(lines)


def run_all(server, names: Sequence[str], prompts: int, interruptions: int, seed: int, report=print) -> dict[str, dict]:
    """{template: its figures}, as `as_table` takes them. report: is told how it goes on."""
    from tests.comfy.template_runs import differences

    figures, firsts = {}, {}
    for number, name in enumerate(names, 1):
        # Templates that share a variation's first nodes would be answered from the cache of the one before.
        server.free()
        start = time.monotonic()
        memory, firsts[name] = study_memory(server, name, prompts)
        report(
            f"[{number}/{len(names)}] {name}: {prompts} prompts of {statistics.median(memory.seconds):.2f} s, "
            f"{memory.growth:+.2f} MiB a prompt, {memory.growth_collected:+.2f} collected, tensors {memory.tensors}"
        )
        shares = random_shares(interruptions, seed, name)
        found = study_interruptions(server, name, firsts[name], statistics.median(memory.seconds), shares)
        figures[name] = {"memory": memory, "interruptions": found, "last": []}
        report(
            f"    {found.interrupted} interrupted {found.nodes}, {found.late} too late, slowest stop "
            f"{max(found.stops, default=0):.2f} s, {'clean' if found.clean else 'NOT CLEAN'} "
            f"({time.monotonic() - start:.0f} s)"
        )
        for fault in (*found.different, *found.threads, *found.files):
            report(f"    {fault}")
    for name in names:
        server.free()
        run = server.complete(name, 1)
        figures[name]["last"] = differences(firsts[name][1], run.results)
        if figures[name]["last"]:
            report(f"{name}, after all others: {', '.join(figures[name]['last'])}")
    return figures


def is_good(found: dict) -> bool:
    """Whether a template's memory is flat and all was clean."""
    memory = found["memory"]
    grows = memory.growth_collected > FLAT and memory.tensors[1] > memory.tensors[0]
    return not grows and found["interruptions"].clean and not found["last"]


def as_json(figures: dict[str, dict]) -> dict:
    return {
        name: {
            "memory": asdict(found["memory"]) | {
                "growth_mib": found["memory"].growth, "growth_collected_mib": found["memory"].growth_collected
            },
            "interruptions": asdict(found["interruptions"]),
            "last": found["last"],
            "good": is_good(found),
        }
        for name, found in figures.items()
    }  # fmt: skip


def chosen(parser: argparse.ArgumentParser, wanted: Sequence[str]) -> list[str]:
    """Names of the templates that begin with one of the texts; all of them for none."""
    from tests.comfy.template_runs import TEMPLATES

    if missing := [w for w in wanted if not any(name.startswith(w) for name in TEMPLATES)]:
        parser.error(f"--templates: found {', '.join(missing)}, expected beginnings of {', '.join(TEMPLATES)}")
    return [name for name in TEMPLATES if not wanted or name.startswith(tuple(wanted))]


def main(argv=None) -> int:
    parser = make_parser("benchmarks.template_stress", __doc__)
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="ComfyUI's folder (default: COMFYUI_PATH)")
    parser.add_argument("--templates", nargs="+", default=(), metavar="NAME", help="beginnings of names, such as 02")
    parser.add_argument("--prompts", type=int, default=10, help="in a row, at least 4")
    parser.add_argument("--interruptions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the interruptions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all figures there")
    parser.add_argument("--output_dir", type=Path, help="an empty folder for ComfyUI's base directory, which is kept")
    args = parser.parse_args(argv)
    if args.prompts < SETTLED + 1:
        parser.error(f"--prompts: found {args.prompts}, expected at least {SETTLED + 1}")
    if args.comfyui:
        os.environ["COMFYUI_PATH"] = str(args.comfyui)
    from tests.comfy.comfyui_install import find_comfyui, reason_to_skip
    from tests.comfy.template_runs import TemplateServer

    names = chosen(parser, args.templates)
    if reason := reason_to_skip():
        parser.error(reason)
    comfyui = find_comfyui()
    with tempfile.TemporaryDirectory(prefix="template_stress_") as folder:
        base = (args.output_dir or Path(folder)).resolve()
        base.mkdir(parents=True, exist_ok=True)
        if any(base.iterdir()):
            parser.error(f"--output_dir: {base} is not empty; give another folder")
        with TemplateServer(comfyui, base, names) as server:
            version = server.get("/system_stats")["system"]["comfyui_version"]
            print(f"ComfyUI {version} in {comfyui}", flush=True)
            figures = run_all(
                server, names, args.prompts, args.interruptions, args.seed, lambda line: print(line, flush=True)
            )
    print(f"\n{args.prompts} prompts and {args.interruptions} interruptions of each template, ComfyUI {version}\n")
    print(as_table(figures))
    bad = [name for name, found in figures.items() if not is_good(found)]
    print(f"\n{len(figures) - len(bad)} of {len(figures)} templates are flat and clean", *(f"; not {name}" for name in bad))
    if args.json:
        described = {"comfyui": version, "prompts": args.prompts, "interruptions": args.interruptions, "seed": args.seed}
        args.json.write_text(json.dumps(described | {"templates": as_json(figures)}, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
