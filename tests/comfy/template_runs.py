"""Runs of the shipped workflow templates in a ComfyUI server: small files for them, variations, and what a run leaves.

Shared by the tests and `python -m benchmarks.template_stress`. A variation of a template differs from its other variations
from an early node on, so that ComfyUI's cache answers none of what the pack computes.
"""

import fnmatch
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import comfyui_install
from .comfyui_server import ComfyUIServer
from .random_da3 import NAME as DA3_NAME
from .random_da3 import STAND_IN as DA3_STAND_IN
from .tiny_wan import STAND_INS, T2V_NAME, write_models
from .workflow_api import override_inputs, replace_values, to_api

PROBE_ROOT = Path(__file__).resolve().parent / "server_probe"
WORKFLOWS = comfyui_install.PACK_ROOT / "workflows"
# Variations of most templates, and files of each kind that those which read files are given.
VARIATIONS = 10
RECORDS = "records_for_training"
SAMPLED = {
    "EmptyHunyuanLatentVideo.width": 64, "EmptyHunyuanLatentVideo.height": 64, "EmptyHunyuanLatentVideo.length": 9,
}  # fmt: skip
CLIPS = {
    "IntrinsicReward_EncodeClips.width": 64, "IntrinsicReward_EncodeClips.height": 64, "IntrinsicReward_EncodeClips.frames": 9,
}
RACE, LORA, HEAD = (f"IntrinsicReward_{n}" for n in ("PrismKSampler", "TrainPreferenceLora", "TrainPrismHead"))
DA3 = "15 Consistency with Depth Anything 3"


@dataclass(frozen=True)
class Template:
    """smaller: widgets that make a run short; vary: (variation, serial number of the run) -> widgets; count: of variations."""

    smaller: dict
    vary: Callable[[int, int], dict]
    count: int = VARIATIONS


def _seeds(*widgets: str) -> Callable[[int, int], dict]:
    # Far apart: a race takes the seeds that follow as well, and neighbours could have one winner.
    return lambda variation, serial: dict.fromkeys(widgets, 100 * variation)


def _clips(**more: str) -> Callable[[int, int], dict]:
    """Another folder of clips each time, and another seed in the widgets."""
    return lambda variation, serial: {
        "IntrinsicReward_EncodeClips.folder": f"clips_{variation}", **dict.fromkeys(more.values(), variation)
    }


def _training(node: str) -> Callable[[int, int], dict]:
    """A training of another name each time: the same name with another seed is refused."""
    return lambda variation, serial: {f"{node}.seed": variation, f"{node}.name": f"run_{serial}"}


TEMPLATES = {
    "01 Check a video for consistency": Template(
        {},
        lambda variation, serial: {
            "IntrinsicReward_ExampleClip.clip": ("rigid room", "warped room")[variation % 2],
            "IntrinsicReward_GeometryTracks.clips": (1, 3)[variation // 2],
        },
        4,
    ),
    "02 Best of 8 without a trained head": Template(
        {**SAMPLED, f"{RACE}.steps": 6, f"{RACE}.draft_steps": 3}, _seeds(f"{RACE}.seed")
    ),
    "03 Most consistent of several clips": Template({**SAMPLED, "KSampler.steps": 6}, _seeds("KSampler.seed")),
    "04 Fit a Shell-LCC manifold on your clips": Template(
        {**CLIPS, "IntrinsicReward_FitShellLCC.anchors": 64}, _clips(seed="IntrinsicReward_FitShellLCC.seed")
    ),
    "05 Guide sampling with Shell-LCC": Template({**SAMPLED, "KSampler.steps": 30}, _seeds("KSampler.seed")),
    "06 Refine a clip with Shell-LCC": Template(CLIPS, _clips()),
    "07 Rank clips by several rewards": Template(CLIPS, _clips(seed="IntrinsicReward_ModelReward.draw_seed")),
    "08 Record preferences": Template({**SAMPLED, "KSampler.steps": 6}, _seeds("KSampler.seed")),
    "09 Train a preference LoRA": Template(
        {
            f"{LORA}.folder": RECORDS, f"{LORA}.decided_by": "", f"{LORA}.rank": 4, f"{LORA}.pairs_per_step": 1,
            f"{LORA}.steps": 8, f"{LORA}.save_every": 3,
        },
        _training(LORA),
    ),
    "10 Compare a tuned LoRA with its base": Template(
        {**SAMPLED, "EmptyHunyuanLatentVideo.length": 17, "KSampler.steps": 6}, _seeds("KSampler.seed")
    ),
    "11 Train a PRISM head": Template(
        {
            f"{HEAD}.folder": RECORDS, f"{HEAD}.decided_by": "", f"{HEAD}.taps": "3", f"{HEAD}.dim": 24,
            f"{HEAD}.pairs_per_step": 1, f"{HEAD}.steps": 16, f"{HEAD}.save_every": 6,
        },
        _training(HEAD),
    ),
    "12 Best of N with a PRISM head": Template({**SAMPLED, f"{RACE}.steps": 20}, _seeds(f"{RACE}.seed")),
    "13 Best three with custom sampling": Template({**SAMPLED, "BasicScheduler.steps": 20}, _seeds("RandomNoise.noise_seed")),
    "14 Rank clips by a PRISM head": Template(CLIPS, _clips(seed="IntrinsicReward_PrismScore.seed")),
    DA3: Template(
        {"IntrinsicReward_GeometryDA3.views": 3, "IntrinsicReward_GeometryDA3.resolution": 140},
        lambda variation, serial: {"LoadVideo.file": f"clip_{variation}.mp4"},
    ),
    "16 Consistency from saved geometry": Template(
        {},
        lambda variation, serial: {"IntrinsicReward_LoadGeometry.file": f"geometry/clip_{variation}.safetensors [input]"},
    ),
}  # fmt: skip


def write_material(base: Path, names: Sequence[str]) -> None:
    """The files that the templates name, except the depth model, in a ComfyUI base directory."""
    from trainers.kernels.geometry import view_files
    from trainers.kernels.latent_space import WAN21

    from . import geometry_material
    from .shell_lcc_material import write_video

    models, inputs = base / "models", base / "input"
    write_models(models)
    for variation in range(VARIATIONS):
        folder = inputs / f"clips_{variation}"
        folder.mkdir()
        for i in range(3):
            write_video(folder / f"{i}.mp4", 9, seed=10 * variation + i)
    _write_manifold(models / "shell_lcc" / "my_manifold_00001.safetensors")
    _write_head(models)
    _write_lora(models)
    _write_records(base / "output" / "intrinsic_reward_preferences" / RECORDS, WAN21)
    if any(name.startswith(("15", "16")) for name in names):
        views = geometry_material.views(geometry_material.clip())
        for variation in range(VARIATIONS):
            write_video(inputs / f"clip_{variation}.mp4", 9, seed=100 + variation)
            noise = torch.randn(views.depth.shape, generator=torch.Generator().manual_seed(variation))
            noisy = replace(views, depth=views.depth * (1 + 0.01 * noise))
            view_files.save_views(inputs / "geometry" / f"clip_{variation}.safetensors", noisy)
        # The template's own names, which its combos must list.
        write_video(inputs / "clip.mp4", 9)


def _write_manifold(path: Path) -> None:
    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.shell_lcc.calibration import calibrate
    from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
    from trainers.kernels.shell_lcc.manifold import ShellManifold, save

    from .shell_lcc_material import sheet

    z = sheet(6)
    manifold = ShellManifold(fit_anchors(z.movedim(1, -1).reshape(-1, z.shape[1]), 64), WAN21, name="sheet")
    manifold.calibration = calibrate([*manifold.distance(z)])
    save(manifold, path)


def _write_head(models: Path) -> None:
    from safetensors.torch import load_file

    from trainers.kernels.latent_space import WAN21
    from trainers.kernels.prism import files
    from trainers.kernels.prism.backbone import of_wan

    backbone = of_wan(load_file(models / "diffusion_models" / T2V_NAME))
    torch.manual_seed(0)
    head = files.PrismHead(files.HeadConfig(backbone.width, dim=64, heads=4, taps=(3,)))
    loaded = files.LoadedHead(head, backbone, WAN21, (0.05, 0.99), name="my_head")
    files.save(loaded, models / "prism" / "my_head.safetensors")


def _write_lora(models: Path) -> None:
    from safetensors.torch import load_file, save_file

    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(models / "diffusion_models" / T2V_NAME).items():
        if re.fullmatch(r"blocks\.\d+\.self_attn\.[qkvo]\.weight", name):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, weight.shape[1], generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 4, generator=generator)
    (models / "loras").mkdir(exist_ok=True)
    save_file(tensors, models / "loras" / "my_preference_lora.safetensors")


def _write_records(folder: Path, space) -> None:
    from trainers.kernels.files import preference_records

    (folder / "latents").mkdir(parents=True)
    lines = b""
    for seed, prompt in enumerate(("a red ball in a wood room", "a blue cube in a brick room")):
        z = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        record = preference_records.new_record(folder, prompt, z, space, preference=(1, 0))
        for i in (0, 1):
            preference_records.write_candidate(record, i, z[i], space)
        lines += preference_records.to_line(record, folder)
    (folder / preference_records.RECORDS).write_bytes(lines)


def write_depth_model(comfyui: Path, base: Path) -> None:
    """The depth model, whose shapes ComfyUI's own classes say: in a process of its own, which imports ComfyUI."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_write_depth_model, (comfyui, base))


def _write_depth_model(comfyui: Path, base: Path) -> None:
    from .comfyui_in_process import load_comfyui
    from .random_da3 import write_model

    torch.set_num_threads(1)
    load_comfyui(comfyui, base)
    write_model(base / "models" / "geometry_estimation" / DA3_NAME)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Within it this process has these environment variables, which those that it starts inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class Run:
    """One prompt. entry: of the history; seconds: from sending it to its end; results: of its texts, pictures and files."""

    variation: int
    entry: dict
    seconds: float
    results: dict

    @property
    def interrupted(self) -> bool:
        return any(event == "execution_interrupted" for event, _ in self.entry["status"]["messages"])


class TemplateServer(ComfyUIServer):
    """A server with the files of some templates, a folder of its own for temporary files, and the probe."""

    def __init__(self, comfyui: Path, base: Path, names: Sequence[str], extra_args: Sequence[str] = ()):
        comfyui_install.make_base_directory(base)
        shutil.copytree(PROBE_ROOT, base / "custom_nodes" / PROBE_ROOT.name, ignore=shutil.ignore_patterns("__pycache__"))
        write_material(base, names)
        if DA3 in names:
            write_depth_model(comfyui, base)
        super().__init__(comfyui, base, extra_args)
        self.temporary = base / "system_temp"
        self.temporary.mkdir()
        self._serial, self._prompts = 0, {}

    def _start(self):
        # Sums of several threads, and pictures that they draw, differ in their last digits from run to run.
        with _environment(TMPDIR=str(self.temporary), OMP_NUM_THREADS="1"):
            return super()._start()

    def probe(self, collect: bool = True) -> dict:
        """What the probe says, and the number of threads that the system knows. collect: memory as well, which takes time."""
        answer, tasks = self.get("/probe", collect=int(collect)), Path(f"/proc/{self.process.pid}/task")
        return answer | {"system_threads": len(list(tasks.iterdir())) if tasks.is_dir() else None}

    def prompt(self, name: str, variation: int, again: bool = False) -> dict:
        """The API prompt of a template's variation. again: the one before, which has not come to its end, once more."""
        if name not in self._prompts:
            workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
            self._prompts[name] = replace_values(to_api(workflow, self.object_info), STAND_INS | DA3_STAND_IN)
        self._serial += not again
        template = TEMPLATES[name]
        return override_inputs(self._prompts[name], template.smaller | template.vary(variation, self._serial))

    def complete(self, name: str, variation: int, since: dict | None = None) -> Run:
        """Runs a variation to its end. Raises AssertionError where it fails, or where the cache answers for the pack.

        since: a snapshot from before the run that was interrupted, which this one continues; files of both are results.
        """
        again = since is not None
        prompt, before = self.prompt(name, variation, again), snapshot(self.base) if since is None else since
        start = time.monotonic()
        entry = self.end_of(self.submit(prompt))
        seconds = time.monotonic() - start
        self.wait(entry["prompt"][1])
        if not again:
            require_executed(prompt, entry, TEMPLATES[name].vary(variation, self._serial))
        return Run(variation, entry, seconds, results(self.base, entry, changed(before, snapshot(self.base))))

    def interrupt_after(self, name: str, variation: int, seconds: float) -> tuple[Run, float]:
        """(the run, seconds from the interruption to its end) of a variation that is interrupted some time after its start."""
        prompt_id = self.submit(self.prompt(name, variation))
        start = time.monotonic()
        time.sleep(seconds)
        stop = time.monotonic()
        self.interrupt()
        entry = self.end_of(prompt_id)
        end = time.monotonic()
        return Run(variation, entry, end - start, {}), end - stop

    def end_of(self, prompt_id: str, timeout: float = 300) -> dict:
        """The history entry of a prompt, however it ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            if self.process.poll() is not None:
                raise AssertionError(f"ComfyUI ended with status {self.process.returncode}:\n{self.log()[-5000:]}")
            time.sleep(0.01)
        raise AssertionError(f"the prompt was not done after {timeout} s:\n{self.log()[-5000:]}")


def require_executed(prompt: dict, entry: dict, varied: dict) -> None:
    """Raises AssertionError if a node that depends on a varied widget was answered from the cache."""
    own = {target.partition(".")[0] for target in varied}
    depends = {key for key, node in prompt.items() if node["class_type"] in own}
    while True:
        more = {
            key for key, node in prompt.items()
            if any(isinstance(v, list) and v and v[0] in depends for v in node["inputs"].values())
        }  # fmt: skip
        if more <= depends:
            break
        depends |= more
    skipped = sorted(prompt[key]["class_type"] for key in _cached(entry) & depends)
    assert not skipped, f"answered from the cache: {', '.join(skipped)}"


# --- What is on the disk -------------------------------------------------------------------------------------------------

WATCHED = ("input", "models", "output", "temp", "system_temp")
# What runs keep on purpose: results of the pack and of core's saving and previewing nodes.
KEPT = (
    "output/*.webm", "output/geometry/*.safetensors", "output/loras/*.safetensors",
    "output/intrinsic_reward_training/*/state.safetensors", "output/intrinsic_reward_preferences/*/records.jsonl",
    "output/intrinsic_reward_preferences/*/latents/*.safetensors", "models/prism/*.safetensors",
    "models/shell_lcc/*.safetensors", "temp/*.png", "temp/intrinsic_reward_*.jpg",
)  # fmt: skip


def snapshot(base: Path) -> dict[str, tuple[int, int]]:
    """{path relative to the base directory: (time of change, size)} of all files that a server may write."""
    found = {}
    for folder in WATCHED:
        for path in (base / folder).rglob("*"):
            if path.is_file():
                status = path.stat()
                found[path.relative_to(base).as_posix()] = (status.st_mtime_ns, status.st_size)
    return found


def changed(before: dict, after: dict) -> list[str]:
    """Paths of new and rewritten files."""
    return sorted(path for path, state in after.items() if before.get(path) != state)


def faults(base: Path, paths: Sequence[str]) -> list[str]:
    """What is wrong with written files: of no kind that is kept, unreadable, or latents that no record names."""
    found = []
    for path in paths:
        if Path(path).name.startswith(".") or not any(fnmatch.fnmatch(path, kind) for kind in KEPT):
            found.append(f"{path}: left behind")
        else:
            try:
                content(base / path)
            except Exception as e:  # noqa: BLE001 (readers of five formats)
                found.append(f"{path}: unreadable ({type(e).__name__}: {e})")
    for records in (base / "output" / "intrinsic_reward_preferences").glob("*/records.jsonl"):
        lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
        named = {candidate["latent"] for line in lines for candidate in line["candidates"]}
        there = {p.relative_to(records.parent).as_posix() for p in (records.parent / "latents").iterdir()}
        found += [f"{records.parent.name}/{name}: without a record" for name in sorted(there - named)]
        found += [f"{records.parent.name}/{name}: missing" for name in sorted(named - there)]
    return found


def content(path: Path) -> str:
    """A digest of what a file holds, without what differs from run to run: dates, ids and names in its metadata."""
    digest = hashlib.sha256()
    if path.suffix == ".webm":
        import av

        with av.open(str(path)) as container:
            frames = 0
            for frame in container.decode(video=0):
                digest.update(frame.to_ndarray(format="rgb24").tobytes())
                frames += 1
        if not frames:
            raise ValueError("no frame")
    elif path.suffix in (".png", ".jpg"):
        from PIL import Image

        with Image.open(path) as picture:
            digest.update(picture.convert("RGB").tobytes())
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{NAMES.sub('N', name)} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            json.loads(line)
    else:
        raise ValueError(f"unknown kind {path.suffix}")
    return digest.hexdigest()[:16]


# Of a run and not of its variation: numbers of files, ids of records, names of trainings and of sprite sheets.
NAMES = re.compile(r"(?<=_)\d{5}|\d{8}-\d{6}-\d{6}-[0-9a-f]{8}|run_\d+|(?<=intrinsic_reward_)[0-9a-f]{12}")


def results(base: Path, entry: dict, written: Sequence[str]) -> dict:
    """What a run showed and what it saved, comparable between runs of one variation."""
    files: dict[str, set[str]] = {}
    # Pictures are compared as what was shown; their names in the temp folder are random.
    for path in written:
        if not path.startswith("temp/"):
            files.setdefault(NAMES.sub("N", path), set()).add(content(base / path))
    shown = {key: _shown(base, output) for key, output in entry["outputs"].items()}
    return {"shown": shown, "files": files, "cached": _cached(entry)}


def _cached(entry: dict) -> set[str]:
    """Nodes that ComfyUI's cache answered for."""
    return {key for event, data in entry["status"]["messages"] if event == "execution_cached" for key in data["nodes"]}


def _shown(base: Path, value):
    if isinstance(value, dict) and {"filename", "subfolder", "type"} <= value.keys():
        # The version of a sprite sheet is random as well.
        rest = {k: v for k, v in value.items() if k not in ("filename", "subfolder", "version")}
        return {**rest, "content": content(base / value["type"] / value["subfolder"] / value["filename"])}
    if isinstance(value, dict):
        return {k: _shown(base, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shown(base, v) for v in value]
    return NAMES.sub("N", value) if isinstance(value, str) else value


def differences(a: dict, b: dict) -> list[str]:
    """Where the results of run `b` differ from those of a run `a` that the cache answered nothing for."""
    # ComfyUI does not show again what a node shows that ran before an interruption, unless it is an output node.
    not_again = b["cached"] - b["shown"].keys()
    keys = sorted((a["shown"].keys() | b["shown"].keys()) - not_again, key=int)
    found = [f"node {key} shows something else" for key in keys if a["shown"].get(key) != b["shown"].get(key)]
    for path in sorted(a["files"].keys() | b["files"].keys()):
        if a["files"].get(path) != b["files"].get(path):
            both = path in a["files"] and path in b["files"]
            found.append(f"{path}: {'other content' if both else 'in one of them only'}")
    return found


def extra_threads(before: dict, now: dict) -> list[str]:
    """Names of threads that `now` has and `before` had not, of two answers of the probe.

    The pool in which asyncio does blocking work, such as reading a file, grows to its limit on its own.
    """

    def named(answer):
        names = (re.sub(r"\d+", "N", name) for name in answer["threads"])
        found = Counter("of asyncio" if name.startswith("asyncio_") else name for name in names)
        if answer["system_threads"] is not None:
            found["of a library"] = answer["system_threads"] - len(answer["threads"])
        return found

    found = named(now) - named(before)
    return sorted(name for name in found.elements() if name != "of asyncio")


def extra_files(before: dict, now: dict) -> list[str]:
    """Paths that the server has open `now` and had not `before`, of two answers of the probe."""
    return sorted((Counter(now["open_files"]) - Counter(before["open_files"])).elements())
