"""Hostile files and texts in the nodes: a result, or an error that says which file or input is wrong; nothing else happens.

Files that nodes open are damaged byte by byte, and rewritten with wrong names, types, shapes, values and headers; texts of
widgets are paths, device names, markup and other things that a name is not. After each of these the nodes may return, or raise
one of ORDINARY with the file's or the input's name in its message. Code from a file must not run, nothing may be written
outside of the folders of ComfyUI that the pack writes to, and files beside those folders are neither opened nor shown: what
Python opens is heard of, and what other libraries open would show by its content.
"""

import contextlib
import copy
import inspect
import io
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ..test_shell_lcc_import import synthetic_reference
from .prism_material import make_head, node
from .shell_lcc_material import write_video
from .test_training_nodes import HEAD, LORA
from .tiny_wan import wan_dit

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module", autouse=True)
def nothing_stays(comfy):
    """Removes what these tests leave in ComfyUI's folders, which other modules use."""
    folders = [comfy.base / "input", *(comfy.base / "models").glob("*"), comfy.base / "output"]
    folders += [folders[-1] / f"intrinsic_reward_{kind}" for kind in ("preferences", "training")]
    before = {path for folder in folders for path in folder.glob("*")}
    yield
    for path in [path for folder in folders for path in folder.glob("*") if path not in before]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


SEED = 20260801
# Tries of each kind of file, and of each widget.
FILES = {
    "manifold": 1400, "released": 900, "head": 1000, "geometry": 900, "perceptual network": 150, "records": 600,
    "candidates": 600, "records to append to": 150, "state of a LoRA": 350, "state of a head": 300, "video": 300,
}  # fmt: skip
TEXTS = 130
# A JSONDecodeError or a UnicodeDecodeError is a ValueError, and a RecursionError a RuntimeError, but none names a file.
ORDINARY, NAMELESS = (ValueError, OSError), (UnicodeError, json.JSONDecodeError)
# In the files beside ComfyUI's folders: it must not come out of a node.
CANARY, CANARY_FRAMES = "canary-5e1f0c", 98765
# A try takes milliseconds.
SECONDS = 20
# Memory that the process may take beyond what it has when the tests begin.
ROOM = 3 << 30
STEM, TRAINED = "hostile", "hostile_training"

# The widgets: those of type STRING, and combos whose options are files or folders.
COMBOS = {
    ("LoadShellLCC", "file"), ("LoadPrism", "file"), ("LoadGeometry", "file"), ("EncodeClips", "folder"),
    ("GeometryDA3", "perceptual"), ("GeometryDA3", "vgg"), ("ExampleClip", "clip"),
}  # fmt: skip
SOCKETS = sorted(
    COMBOS
    | {
        ("SaveShellLCC", "name"), ("SaveGeometry", "filename_prefix"), ("RecordPreference", "prompt"),
        ("RecordPreference", "negative"), ("RecordPreference", "model"), ("RecordPreference", "name"),
        ("RecordPreference", "score_name"), ("RecordPreference", "geometry"), ("RecordPreference", "seed_list"),
        ("PrismScore", "sigmas"), ("ModelReward", "sigmas"), ("FlowResidualScore", "sigmas"), ("PrismBestOfN", "checkpoints"),
        ("PrismKSampler", "checkpoints"), ("ImageScorerReward", "node_id"), ("ImageScorerReward", "settings"),
        ("TrainPreferenceLora", "folder"), ("TrainPreferenceLora", "decided_by"), ("TrainPreferenceLora", "name"),
        ("TrainPrismHead", "folder"), ("TrainPrismHead", "decided_by"), ("TrainPrismHead", "name"), ("TrainPrismHead", "taps"),
    }
)  # fmt: skip


# ---- What a node does beside returning


class Watch:
    """What this process opens, writes and starts while it is on, by Python's audit events. One for all: hooks are for good."""

    WRITES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown"}
    STARTS = {
        "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen",
        "socket.connect", "socket.bind", "pickle.find_class",
    }  # fmt: skip
    FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self):
        self.on, self.written, self.read, self.started = False, set(), set(), set()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path, mode, flags = args
            writes = set(mode or "") & set("wax+") or (mode is None and flags & self.FLAGS)
            (self.written if writes else self.read).add(os.fsdecode(path))
        elif event in self.WRITES:
            self.written |= {os.fsdecode(a) for a in args if isinstance(a, (str, bytes, os.PathLike))}
        elif event in self.STARTS:
            self.started.add(f"{event} {args!r}")

    @contextlib.contextmanager
    def listening(self):
        self.on = True
        try:
            yield
        finally:
            self.on = False


WATCH = Watch()


class Place:
    """ComfyUI's folders and the files beside them, which no node may reach.

    base: the base directory; outside: a folder of good files beside it, all with CANARY in them.
    """

    def __init__(self, base: Path, outside: Path):
        self.base, self.outside = base, outside
        self.writable = [base / "output", base / "temp_in_process", base / "models" / "shell_lcc", base / "models" / "prism"]
        # Good files in the base directory, but in none of the folders that they belong in.
        self.beside = [base / "canary.safetensors", base / "models" / "canary.safetensors", base / "input" / "canary.txt"]
        self.sentinel = outside / "ran"

    def tree(self) -> dict[str, tuple]:
        """(size, time of modification) of all files outside the writable folders, but for those that are damaged here. Servers
        of other tests write to user/ and temp/."""
        left_out = {*self.writable, self.base / "custom_nodes", self.base / "user", self.base / "temp"}
        found = {}
        for root in (self.base, self.outside):
            for folder, folders, files in os.walk(root):
                folders[:] = [f for f in folders if Path(folder, f) not in left_out and not f.startswith(STEM)]
                for name in (*folders, *files):
                    if not name.startswith(STEM):
                        status = os.lstat(os.path.join(folder, name))
                        found[os.path.join(folder, name)] = name in folders or (status.st_size, status.st_mtime_ns)
        return found

    def require_nothing_else(self, before: dict[str, tuple]) -> None:
        """Raises AssertionError where something beside the writable folders was written or read, or code ran."""
        assert self.tree() == before
        assert not self.sentinel.exists()
        allowed = [os.path.realpath(p) for p in self.writable]
        foreign = {p for p in map(os.path.realpath, WATCH.written) if not any(f"{p}/".startswith(f"{a}/") for a in allowed)}
        # Modules that are imported on first use.
        assert not {p for p in foreign if "__pycache__" not in p and p != os.devnull}
        hidden = [os.path.realpath(p) for p in (self.outside, *self.beside)]
        assert not {p for p in map(os.path.realpath, WATCH.read) if any(p.startswith(h) for h in hidden)}
        assert not WATCH.started


@contextlib.contextmanager
def limited_time():
    """Raises TimeoutError in a try that computes for SECONDS, where the system has timers."""
    if not hasattr(signal, "SIGPROF"):
        yield
        return

    def ring(*_):
        raise TimeoutError(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGPROF, ring)
    # Of this process, so that others which keep the machine busy do not count.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Tries:
    """Counts tries and what is wrong with them. names: of which an error's message must have one."""

    def __init__(self, place: Place):
        self.place, self.count, self.results, self.faults, self.before = place, 0, Counter(), {}, None

    def run(self, call, names, what: str):
        """call() as one try. Returns whether it returned."""
        if self.before is None:
            self.before = self.place.tree()
        self.count += 1
        error, shown = None, ""
        try:
            with WATCH.listening(), limited_time():
                shown = repr(call())
        except Exception as e:
            error, shown = e, str(e)
        self.results["returned" if error is None else type(error).__name__] += 1
        if error is not None:
            fits = isinstance(error, ORDINARY) and not isinstance(error, (*NAMELESS, TimeoutError))
            if not fits or not any(name in shown for name in names):
                self._note(f"{type(error).__name__}: {shown[:200]!r}", what)
        if CANARY in shown:
            self._note("the canary came out", what)
        return error is None

    def _note(self, fault: str, what: str) -> None:
        # Numbers differ between faults of one cause.
        self.faults.setdefault(re.sub(r"\d+", "0", fault), []).append(what)

    def finish(self, count: int) -> None:
        print(f"{self.count} tries: {dict(self.results)}")
        listed = "\n".join(f"{len(found)} x {fault}, first {found[0]!r}" for fault, found in self.faults.items())
        assert not self.faults, f"{sum(map(len, self.faults.values()))} faults in {self.count} tries:\n{listed}"
        assert self.count >= count
        self.place.require_nothing_else(self.before)


# ---- Damage of files

PIECES = [
    b"", b"\n", b"\x00", b"\x00" * 8, b"\xff" * 8, b"\xff\xfe", b"{", b"}", b"[", b"]", b'"', b",", b":", b"NaN", b"1e999",
    b"-1", b"null", b"9" * 400, b"[" * 3000, b"../" * 8, b"\\ud800", b"\xc3\x28", b"PK\x03\x04", b"\x80\x02", b"GIF89a",
    b"<html>",
]  # fmt: skip
# Stand for texts that json.dumps does not write.
DEEP, DIGITS, ENDLESS = "@deep@", "@digits@", "@endless@"
WRONG = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**9, 10**400, 0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf, "", "x",
    "0", "nan", "\ud800", "\x00", "\n", "a" * 5000, "../../canary.safetensors", "/etc/passwd", "%s%n{0}", [], [1], [[]], ["x"],
    {}, {"a": 1}, {"": []}, [1] * 1000, DEEP, DIGITS, ENDLESS,
]  # fmt: skip
NAMES = ["", "x", "__proto__", "latents/x", "../x", "\ud800", "a" * 300]


def damaged(good: bytes, draw: random.Random) -> bytes:
    """A copy of good bytes with one to four changes."""
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        # Headers are at the beginning.
        at = draw.randint(0, min(len(data), draw.choice([12, 400, len(data)])))
        length = draw.randint(0, 12)
        match draw.randint(0, 5):
            case 0:
                data[at : at + length] = draw.choice(PIECES)
            case 1:
                data[at : at + length] = draw.randbytes(length)
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[max(0, at - 40) : at]
            case 4 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 5:
                del data[at : at + 8 * length]
    return bytes(data)


def places_in(value) -> list[tuple]:
    """(container, key) of every value in lists and dictionaries, however deep."""
    own = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in own] + [place for _, inner in own for place in places_in(inner)]


def changed_tree(value, draw: random.Random, wrong=WRONG):
    """A copy of JSON values with one to three values replaced, removed, renamed or added."""
    root = [copy.deepcopy(value)]
    for _ in range(draw.choice([1, 1, 2, 3])):
        container, key = draw.choice(places_in(root) or [(root, 0)])
        match draw.randint(0, 5):
            case 0 if container is not root:
                del container[key]
            case 1 if isinstance(container, dict):
                container[draw.choice(NAMES)] = container.pop(key)
            case 2 if isinstance(container, dict):
                container[draw.choice(NAMES)] = copy.deepcopy(draw.choice(wrong))
            case 3 if isinstance(container[key], list):
                container[key] *= 2
            case _:
                container[key] = copy.deepcopy(draw.choice(wrong))
    return root[0] if root else None


def json_text(value) -> str:
    """JSON, with what the markers stand for: nesting that is too deep, too many digits, a number that is infinite."""
    text = json.dumps(value)
    for marker, raw in ((DEEP, "[" * 20_000 + "]" * 20_000), (DIGITS, "9" * 5000), (ENDLESS, "1e999")):
        text = text.replace(f'"{marker}"', raw)
    return text


class Tensors:
    """The content of a safetensors file as plain values. metadata: str by name; tensors: [dtype, shape, bytes] by name."""

    SIZES = {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "I64": 8, "I32": 4,
        "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F4": 1, "X": 4, "": 4,
    }  # fmt: skip

    def __init__(self, data: bytes):
        length = int.from_bytes(data[:8], "little")
        header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
        # Writers have no order of their own, and the same seed is to damage the same place.
        self.metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        self.tensors = {
            k: [v["dtype"], v["shape"], payload[slice(*v["data_offsets"])]] for k, v in sorted(header.items())
        }  # fmt: skip

    def dump(self, draw: random.Random | None = None) -> bytes:
        """The file's bytes. draw: for a header that contradicts them."""
        header, payload = {"__metadata__": self.metadata} if self.metadata else {}, b""
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)]}
            payload += data
        if draw is not None:
            header = changed_tree(header, draw)
        text = json_text(header).encode()
        length = len(text) if draw is None else draw.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1, *[len(text)] * 20])
        return length.to_bytes(8, "little") + text + payload

    def change(self, draw: random.Random) -> None:
        """One change that leaves the file whole: readers of the format itself find nothing wrong with it."""
        change = draw.choice([self._metadata, self._metadata, self._values, self._type, self._shape, self._names])
        if self.tensors or change == self._metadata:
            change(draw)

    def _metadata(self, draw):
        name = draw.choice(list(self.metadata) or ["format"])
        text = self.metadata.get(name, "")
        try:
            text = json_text(changed_tree(json.loads(text), draw))
        except (ValueError, RecursionError):
            text = draw.choice(["", "x", "1", "0", "99999", "-1", "\u00b2", "9" * 5000, "null", "[" * 20_000, "NaN"])
        match draw.randint(0, 7):
            case 0:
                self.metadata.pop(name, None)
            case 1:
                self.metadata[name] = draw.choice(["", "null", "[]", "3", '"x"', "{", "[" * 20_000, "\x00", "1e999", "true"])
            case 2:
                self.metadata[draw.choice(NAMES[:5])] = text
            case _:
                self.metadata[name] = text

    def _values(self, draw):
        tensor = self.tensors[draw.choice(list(self.tensors))]
        size = self.SIZES[tensor[0]]
        word = draw.choice([b"\xff", b"\x7f", b"\x80", b"\x00", draw.randbytes(1)]) * size
        if tensor[0] in ("F32", "F64"):
            # Infinity in 32 bits, and the largest numbers.
            word = draw.choice([word, (b"\x00\x00\x80\x7f" * 2)[:size], b"\xff" * (size - 1) + b"\x7e"])
        count = len(tensor[2]) // size
        at = draw.randrange(count) if count else 0
        many = draw.choice([1, count])
        tensor[2] = (tensor[2][: at * size] + word * many + tensor[2][(at + many) * size :])[: count * size]

    def _type(self, draw):
        tensor = self.tensors[draw.choice(list(self.tensors))]
        tensor[0] = draw.choice(list(self.SIZES))
        self._fill(tensor)

    def _shape(self, draw):
        tensor = self.tensors[draw.choice(list(self.tensors))]
        shape = list(tensor[1])
        place = draw.randrange(len(shape)) if shape else 0
        options = [[], [0], [0, *shape[1:]], [*shape, 1], [1, *shape], [math.prod(shape)], shape[::-1], shape[1:], [1000, 0]]
        if shape:
            options += [[n + d if i == place else n for i, n in enumerate(shape)] for d in (-1, 1, 7)]
        tensor[1] = draw.choice(options)
        self._fill(tensor)

    def _names(self, draw):
        name = draw.choice(list(self.tensors))
        match draw.randint(0, 3):
            case 0:
                del self.tensors[name]
            case 1:
                self.tensors[draw.choice(["", "x", "a" * 300])] = self.tensors.pop(name)
            case 2:
                other = draw.choice(list(self.tensors))
                self.tensors[name], self.tensors[other] = self.tensors[other], self.tensors[name]
            case 3:
                self.tensors[f"{name}.more"] = list(self.tensors[name])

    def _fill(self, tensor) -> None:
        wanted = math.prod(tensor[1]) * self.SIZES[tensor[0]]
        data = tensor[2] or b"\x01"
        tensor[2] = (data * (wanted // len(data) + 1))[:wanted]


def damaged_tensors(good: bytes, draw: random.Random) -> bytes:
    """A safetensors file with a few changes: of its content, of its header, or of its bytes."""
    content, kind = Tensors(good), draw.random()
    if kind < 0.2:
        return damaged(content.dump(), draw)
    for _ in range(draw.choice([1, 1, 1, 2])):
        content.change(draw)
    return content.dump(draw if kind > 0.9 else None)


# ---- Code in files


class Code:
    """Runs when it is unpickled by Python's own reader."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def code_files(sentinel: Path) -> list[bytes]:
    """Checkpoints with code that would create the sentinel, in the layouts and protocols that torch reads."""
    path, found = str(sentinel), []
    # Harmless ones: a test runs them.
    commands = [
        Code(os.system, f"touch {path}"), Code(os.mkdir, path), Code(open, path, "w"), Code(exec, f"open({path!r}, 'w')"),
        Code(eval, f"open({path!r}, 'w')"), Code(shutil.copy, __file__, path), Code(torch.save, {}, path),
        Code(getattr(torch, "load"), path), Code(os.symlink, __file__, path),  # noqa: B009 (as a file would name it)
    ]  # fmt: skip
    for command in commands:
        for content in (command, {"model": command}, {"model": {"basis": command}, "config": {}}, [command], {command: 1}):
            if isinstance(content, dict) and command in content:
                content = {"model": content}
            for protocol in (2, 4):
                with contextlib.suppress(TypeError, pickle.PicklingError):
                    found.append(pickle.dumps(content, protocol))
            for legacy in (False, True):
                file = io.BytesIO()
                torch.save(content, file, _use_new_zipfile_serialization=not legacy)
                found.append(file.getvalue())
    return found


def with_pickle(checkpoint: bytes, code: bytes) -> bytes:
    """A checkpoint of torch's zip layout with another data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, code if name.endswith("data.pkl") else source.read(name))
    return out.getvalue()


def odd_tensors(t: torch.Tensor) -> list:
    """What torch.load gives without running code, and a state dict should not have in a tensor's place."""
    return [
        None, True, 3, "x", [], {}, [t], {"x": t}, t.new_zeros(0), t[None], t.flatten(), t.double(), t.half(),
        t.to(torch.int8), t.bool(), t.to(torch.complex64), t.to(torch.float8_e4m3fn), t * math.nan, t * math.inf, t.to("meta"),
        t.to_sparse(), torch.nn.Parameter(t.float()), torch.zeros(()), torch.zeros(1).expand(10**9, *t.shape[1:]),
        t.expand(2, *t.shape), torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), torch.Size([1]), torch.float32, b"x",
        10**400, math.nan,
    ]  # fmt: skip


def odd_checkpoint(state: dict, draw: random.Random):
    """A checkpoint in the released layout with one to three entries replaced."""
    config = {"embedding_dim": 16, "num_bases": 6, "hidden_dim": 5}
    content = {"model": dict(state), "config": config}
    for _ in range(draw.randint(1, 3)):
        model = content["model"] if isinstance(content.get("model"), dict) else {}
        name = draw.choice(list(state))
        match draw.randint(0, 8):
            case 0:
                model.pop(name, None)
            case 1:
                model[draw.choice([3, None, "module.module.x", "a" * 300, ("a", 1), True])] = state[name]
            case 2:
                content["config"] = draw.choice([*odd_tensors(state[name]), [1], "x"])
            case 3:
                config[draw.choice([*config, 3, "x"])] = draw.choice([*odd_tensors(state[name]), 10**30, "16"])
            case 4 if draw.random() < 0.3:
                content["model"] = draw.choice(odd_tensors(state[name]))
            case _:
                model[name] = draw.choice(odd_tensors(state[name]))
    return content if draw.random() < 0.8 else content["model"]


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def damaged_checkpoint(state: dict, code: list[bytes], draw: random.Random) -> bytes:
    """A .pth with code in it, odd entries or changed bytes."""
    kind, good = draw.random(), saved({"model": state, "config": {}})
    if kind < 0.25:
        data = draw.choice(code)
        data = with_pickle(good, data) if data[:1] == b"\x80" and draw.random() < 0.5 else data
        return damaged(data, draw) if draw.random() < 0.3 else data
    return saved(odd_checkpoint(state, draw)) if kind < 0.75 else damaged(good, draw)


# ---- Hostile texts

PARTS = [
    "../", "..\\", "/", "\\", "./", "....//", "%2e%2e%2f", "~/", "$HOME/", "%s", "%n", "{0}", "{name!r}", "${x}", "`id`",
    "$(id)", "\x00", "\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\u202e", "\u200b", "\ufeff", "\ud800", "\U0001f600", "e\u0301",
    "\u4e2d\u6587", "CON", "NUL.txt", "aux", "COM1", "LPT\u00b9", "C:", "\\\\host\\share\\", "file:///", "http://127.0.0.1:9/",
    "*", "?", "[a-z]", "' OR 1=1 --", "\"; DROP TABLE x;", "<script>alert(1)</script>", "&lt;", "a", " ", ".", "..", "-rf",
    "--help", ";", "|", "&&", "0.5", "1e999", "nan", "-1", "99999999999999999999", "0x10", "1_0", "\u0663", "5 %", "%year%",
    "[output]", "[input]", "null", "true", '{"a": 1}', "[" * 5000, "{", '"', "canary", ".safetensors", "hostile",
]  # fmt: skip


def hostile_texts(place: Place, good: str, draw: random.Random, count: int) -> list[str]:
    """`count` texts: paths to the files beside ComfyUI's folders, names that are none, long ones, and mixtures of them."""
    folder, canaries = place.base / "models" / "shell_lcc", [*place.outside.rglob("*"), *place.beside]
    paths = [str(p) for p in canaries if p.is_file() or p.name == "records"]
    up = [os.path.relpath(p, start) for p in paths for start in (folder, place.base / "output", place.base / "output" / "x")]
    draw.shuffle(up)
    texts = [
        "", " ", ".", "..", "/", "~", "\x00", f"{good}\x00", f"\x00{good}", f"{good}\n", f" {good} ", f"./{good}",
        f"x/../{good}", f"../{good}", good.upper(), "a" * 300, "a" * 20_000, "\u4e2d" * 90, "\U0001f600" * 60, "../" * 2000,
        "/" * 5000, "\ud800", "CON", "nul", "COM1.safetensors", "LPT9", "aux.", "a.", "a ", *paths, *up[:8],
        json_text(DEEP), "[" * 20_000, "{" * 900, json_text(draw.choice(WRONG)), "9" * 6000, "0.5, " * 40, "1,2,3", "0",
    ]  # fmt: skip
    while len(texts) < count:
        parts = draw.choices(PARTS, k=draw.randint(1, 4))
        if draw.random() < 0.4:
            parts.insert(draw.randint(0, len(parts)), good)
        texts.append("".join(parts))
    return texts[:count]


# ---- Good files and inputs


class Material:
    """Good files, inputs of the nodes, and the nodes with what is not about files made cheap."""

    def __init__(self, comfy, models: Path):
        self.comfy, self.models, self.output = comfy, models, comfy.base / "output"
        kinds = ("shell_lcc", "prism", "lpips", "diffusion_models")
        self.files = {kind: models / kind / f"{STEM}.safetensors" for kind in kinds}
        for path in self.files.values():
            path.parent.mkdir(exist_ok=True)
        save_file(wan_dit(layers=2, seed=3), self.files["diffusion_models"])
        (self.model,) = comfy.run("UNETLoader", unet_name=self.files["diffusion_models"].name, weight_dtype="default")
        g = torch.Generator().manual_seed(SEED)
        self.latent = {"samples": 2 * torch.randn(2, 16, 1, 4, 4, generator=g)}
        self.positive = [[0.1 * torch.randn(1, 3, 4096, generator=g), {}]]
        self.state = synthetic_reference(6, 5)

    def module(self, name):
        return self.comfy.module(name)

    def manifolds(self) -> list[bytes]:
        """Files of a predictor and of an anchor manifold, both calibrated; the latter is left in its place."""
        manifold, calibration = self.module("kernels.shell_lcc.manifold"), self.module("kernels.shell_lcc.calibration")
        anchors, predictor = self.module("kernels.shell_lcc.anchors"), self.module("kernels.shell_lcc.predictor")
        g = torch.Generator().manual_seed(1)
        coders = [
            predictor.Predictor.from_state(self.state),
            anchors.Anchors(torch.randn(8, 16, generator=g), torch.rand(8, 16, generator=g) + 0.1, 3),
        ]
        found = []
        for coder in coders:
            made = manifold.ShellManifold(coder, self.module("kernels.latent_space").WAN21)
            made.calibration = calibration.calibrate([torch.rand(2, 4, 4, generator=g)])
            made.provenance = {"command": "a test", "seed": 3}
            manifold.save(made, self.files["shell_lcc"])
            found.append(self.files["shell_lcc"].read_bytes())
        return found

    def head(self) -> bytes:
        backbone = self.module("kernels.prism.backbone").of_wan_module(self.model.model.diffusion_model)
        sizes = {"dim": 8, "heads": 2, "layers": 2, "taps": (0, 1), "dimensions": ("look", "motion"), "time": True}
        make_head(self.comfy, self.files["prism"], backbone, sigmas=(0.2, 0.8), **sizes)
        return self.files["prism"].read_bytes()

    def geometry(self) -> bytes:
        """A file of three views, left in input/geometry."""
        path, g = self.comfy.base / "input" / "geometry" / f"{STEM}.safetensors", torch.Generator().manual_seed(2)
        poses = torch.eye(4).repeat(3, 1, 1)
        poses[:, 0, 3] = 0.1 * torch.arange(3)
        K = torch.tensor([[20.0, 0, 12], [0, 20, 8], [0, 0, 1]]).repeat(3, 1, 1)
        views = self.module("kernels.geometry.views").Views(
            torch.rand(3, 16, 24, 3, generator=g), 1 + torch.rand(3, 16, 24, generator=g), K, poses,
            torch.rand(3, 16, 24, generator=g) + 1, [0, 2, 4], 5, ["a note"],
        )  # fmt: skip
        self.module("kernels.geometry.view_files").save_views(path, views)
        return path.read_bytes()

    def record(self, folder: str = STEM, prompt: str = "a", **changes) -> Path:
        """A record of two candidates, by the node; returns the folder."""
        widgets = {
            "latent": self.latent, "negative": "", "model": "tiny", "name": folder, "latent_space": "auto",
            "score_name": "steady", "winner": 0, "loser": 1, "prompt": prompt,
        }  # fmt: skip
        _, found = self.comfy.run(node("RecordPreference"), lists={"scores": [0.25, 0.5]}, **{**widgets, **changes})
        return Path(found)

    def records(self) -> Path:
        """A folder of two records of different prompts and clips."""
        shutil.rmtree(self.output / "intrinsic_reward_preferences" / STEM, ignore_errors=True)
        self.record(prompt="a cat")
        return self.record(prompt="a dog", latent={"samples": self.latent["samples"].flip(-1)})

    def video(self) -> Path:
        path = self.comfy.base / "input" / "clips" / f"{STEM}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, 7, 64, 64)
        return path

    def score(self, head):
        """PRISM Score with a head."""
        widgets = {"sigmas": "0.2", "draws": 1, "seed": 0, "positive": self.positive, "latent": self.latent}
        return self.comfy.run(node("PrismScore"), model=self.model, head=head, **widgets)

    def encode(self, folder: str = "clips"):
        vae = SimpleNamespace(latent_dim=3, encode=lambda frames: torch.zeros(1, 16, 2, 8, 8))
        sizes = {"width": 64, "height": 64, "frames": 5, "fps": 16.0, "max_clips": 2}
        return self.comfy.run(node("EncodeClips"), vae=vae, folder=folder, **sizes)

    def train(self, head: bool, **changes):
        """Train PRISM Head or Train Preference LoRA, by `without_a_model` on a stand-in for the model's forward."""
        own = HEAD | {"dim": 8, "taps": "1"} if head else LORA
        common = {"folder": STEM, "name": TRAINED, "steps": 2, "save_every": 1, "resume": False, "pairs_per_step": 1}
        name = "TrainPrismHead" if head else "TrainPreferenceLora"
        return self.comfy.run(node(name), model=self.model, clip=None, **{**own, **common, **changes})

    def without_a_model(self, monkeypatch) -> None:
        """Lets the training nodes do all but run the model and its text encoder."""
        loops, lora, head = (self.module(f"nodes.{n}") for n in ("training_loop", "train_preference_lora", "train_prism_head"))

        def embed(clip, prompts, source):
            # As a tokenizer does.
            return {p: torch.zeros(1, len(p.encode())) for p in prompts}, 1

        @torch.enable_grad()
        def train_lora(self, shape, loop, state, on_step, on_save):
            parameters, s = self.adapters.parameters(), self.settings

            def velocity(prompt):
                return lambda x, sigma: x * (1 + sum(p.sum() for p in parameters.values()))

            objective = lora.PreferenceObjective(
                self.pairs, SimpleNamespace(velocity=velocity), self.adapters.off, s.levels, s.loss, lora.AutoBeta(),
                s.pairs_per_step, s.seed, s.max_winner_rise, torch.device("cpu"), lambda: None,
            )  # fmt: skip
            assert len(shape) == 4
            optimiser = torch.optim.AdamW(parameters.values())
            return loops.train(parameters, optimiser, objective, loop, state, on_step, on_save)

        @torch.enable_grad()
        def train_head(model, prism, settings, parts, words, shape, loop, state, on_step):
            fit, tie_rows, held = parts
            scorer = Scorer(prism)
            objective = head.PrismObjective(fit, scorer, 1, settings.eta, (0.0, 1.0), settings.seed, lambda: None)
            optimiser, parameters = head.optimiser_of(prism, 1e-3, 0.0), dict(prism.named_parameters())
            outcome = loops.train(parameters, optimiser, objective, loop, state, on_step, lambda *_: None)
            with torch.no_grad():
                return outcome, *head.accuracies(scorer, held, tie_rows, [0.5], settings.seed, lambda: None)

        class Scorer:
            def __init__(self, prism):
                self.head, self.prompts = prism, SimpleNamespace(device=torch.device("cpu"))

            def __call__(self, x, sigma, prompt):
                return x.flatten(1).mean(dim=1) * (1 + next(self.head.parameters()).sum())

        monkeypatch.setattr(self.module("nodes.embedded_prompts"), "embed", embed)
        monkeypatch.setattr(lora, "own_copy", lambda model, source: model)
        monkeypatch.setattr(lora.LoraTraining, "run", train_lora)
        monkeypatch.setattr(head, "train", train_head)


# ---- Fixtures


@pytest.fixture(scope="module")
def material(comfy, models_dir):
    return Material(comfy, models_dir)


@pytest.fixture(scope="module")
def place(material, base_dir, tmp_path_factory):
    """Good files with the canary in them, outside of ComfyUI's folders."""
    found = Place(base_dir, tmp_path_factory.mktemp("outside"))
    marked = [material.manifolds()[1], material.head(), material.geometry()]
    for number, data in enumerate(marked):
        content = Tensors(data)
        content.metadata |= {"provenance": json.dumps({"command": CANARY}), "frames": str(CANARY_FRAMES)}
        (found.outside / f"{number}.safetensors").write_bytes(content.dump())
    for path in found.beside:
        path.write_bytes((found.outside / "0.safetensors").read_bytes() if path.suffix == ".safetensors" else CANARY.encode())
    folder = material.record("aside", CANARY)
    shutil.move(folder, found.outside / "records")
    write_video(found.outside / "canary.mp4", 7, 64, 64)
    return found


@pytest.fixture
def tries(place):
    WATCH.written, WATCH.read, WATCH.started = set(), set(), set()
    return Tries(place)


@pytest.fixture(autouse=True)
def limited_memory():
    """A file that asks for much memory gets an error instead of what the machine has, where the system has limits."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pages.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def quiet(comfy, monkeypatch):
    """Thousands of warnings and pictures cost more than what is tested, and so does a printed handler of Ctrl-C with all that
    a node returned, which asyncio makes in each run where the handler is Python's own."""
    import comfy_api.latest._ui as shown

    def interrupt(*args):
        signal.default_int_handler(*args)

    logging.disable(logging.CRITICAL)
    monkeypatch.setattr(shown.ImageSaveHelper, "save_images", staticmethod(lambda *args, **kwargs: []))
    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)
    logging.disable(logging.NOTSET)


def test_code_in_files_is_noticed_when_it_runs(place, tries):
    """By Python's own reader: what the tests of hostile files rely on."""
    ran = 0
    for data in code_files(place.sentinel):
        if data[:1] == b"\x80":
            with WATCH.listening(), contextlib.suppress(Exception):
                pickle.loads(data)
            ran += os.path.lexists(place.sentinel)
            place.sentinel.rmdir() if place.sentinel.is_dir() else place.sentinel.unlink(missing_ok=True)
    assert ran > 20
    assert any("pickle.find_class" in event for event in WATCH.started)
    assert any("os.system" in event for event in WATCH.started)
    assert str(place.sentinel) in WATCH.written
    with WATCH.listening():
        place.beside[0].read_bytes()
    assert str(place.beside[0]) in WATCH.read
    with pytest.raises(AssertionError):
        place.require_nothing_else(place.tree())


def test_at_least_ten_thousand_tries_are_made():
    assert sum(FILES.values()) + TEXTS * len(SOCKETS) >= 10_000


# ---- Files


def fuzz_file(tries: Tries, kind: str, path: Path, make, use, names=()) -> None:
    """Tries of a kind: make(draw) gives the bytes of `path`, use() runs nodes that read it."""
    draw = random.Random(f"{SEED} {kind}")
    for number in range(FILES[kind]):
        path.write_bytes(make(draw))
        tries.run(use, (path.name, STEM, *names), f"{kind} {number}")
    tries.finish(FILES[kind])
    # Some damage does no harm: the nodes can do all that they are asked to do here.
    assert tries.results["returned"] > FILES[kind] // 50 or kind == "perceptual network"


def test_damaged_manifolds(comfy, material, tries):
    good, count = material.manifolds(), 0

    def use():
        nonlocal count
        count += 1
        (shell,) = comfy.run(node("LoadShellLCC"), file=f"{STEM}.safetensors")
        scores = ()
        if count % 4 == 0:
            scores = comfy.run(node("ShellLCCScore"), latent=material.latent, manifold=shell, frames="video frames")
        return scores[:2], shell.manifold.provenance

    path = material.files["shell_lcc"]
    fuzz_file(tries, "manifold", path, lambda draw: damaged_tensors(draw.choice(good), draw), use, ["Shell-LCC Score"])
    path.write_bytes(good[1])


def test_checkpoints_with_code_and_odd_tensors(comfy, material, place, tries):
    path, code, count = material.models / "shell_lcc" / f"{STEM}.pth", code_files(place.sentinel), 0

    def use():
        nonlocal count
        count += 1
        calibrate = {"calibrate": material.latent} if count % 2 else {}
        (shell,) = comfy.run(node("LoadShellLCC"), file=path.name, **calibrate)
        return shell.manifold.distance(torch.zeros(1, 16, 1, 2, 2))

    fuzz_file(tries, "released", path, lambda draw: damaged_checkpoint(material.state, code, draw), use)
    path.unlink()


def test_damaged_heads(comfy, material, tries):
    good, count = material.head(), 0

    def use():
        nonlocal count
        count += 1
        (head,) = comfy.run(node("LoadPrism"), file=f"{STEM}.safetensors")
        found = material.score(head) if count % 4 == 0 else head.require_model(material.model)
        return found, head.loaded.provenance

    fuzz_file(tries, "head", material.files["prism"], lambda draw: damaged_tensors(good, draw), use, ["PRISM"])
    material.files["prism"].write_bytes(good)


def test_damaged_geometry(comfy, material, tries):
    good, count, widgets = material.geometry(), 0, {"views": 3, "resolution": 140, "pose_method": "cam_dec"}

    def use():
        nonlocal count
        count += 1
        geometry, _ = comfy.run(node("LoadGeometry"), file=f"geometry/{STEM}.safetensors [input]")
        if count % 4:
            return geometry["mode"]
        found = comfy.run(node("GeometryDA3"), da3_geometry=geometry, perceptual="none", vgg="none", **widgets)
        return found[:3], found[5]

    path = comfy.base / "input" / "geometry" / f"{STEM}.safetensors"
    fuzz_file(tries, "geometry", path, lambda draw: damaged_tensors(good, draw), use, ["Geometry Consistency (DA3)"])


def test_damaged_networks_of_lpips(comfy, material, place, tries):
    """Whole ones have 15 million numbers: what is missing or wrong is named before any is needed."""
    material.geometry()
    geometry, _ = comfy.run(node("LoadGeometry"), file=f"geometry/{STEM}.safetensors [input]")
    code = code_files(place.sentinel)
    state = {f"lin{i}.model.1.weight": torch.zeros(1, w, 1, 1) for i, w in enumerate((64, 128, 256, 512, 512))}
    state |= {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}
    save_file(state, material.files["lpips"])
    good, widgets = material.files["lpips"].read_bytes(), {"views": 3, "resolution": 140, "pose_method": "cam_dec"}
    for suffix, make in (
        (".safetensors", lambda draw: damaged_tensors(good, draw)),
        (".pth", lambda draw: damaged_checkpoint(state, code, draw)),
    ):
        path = material.files["lpips"].with_suffix(suffix)

        def use(path=path):
            return comfy.run(node("GeometryDA3"), da3_geometry=geometry, perceptual=path.name, vgg="none", **widgets)[:3]

        fuzz_file(tries, "perceptual network", path, make, use)


def test_damaged_records(comfy, material, tries, monkeypatch):
    material.without_a_model(monkeypatch)
    path = material.records() / "records.jsonl"
    good, count = path.read_bytes(), 0

    def make(draw):
        if draw.random() < 0.2:
            return damaged(good, draw)
        lines = [json.loads(line) for line in good.splitlines()]
        lines[draw.randrange(2)] = changed_tree(lines[draw.randrange(2)], draw)
        return "\n".join(map(json_text, lines)).encode() + b"\n"

    def use():
        nonlocal count
        count += 1
        return material.train(head=count % 2 == 0, decided_by="steady" if count % 3 == 0 else "")[-1]

    fuzz_file(tries, "records", path, make, use, ["the records have"])


def test_records_that_name_files_elsewhere(material, place, tries, monkeypatch):
    material.without_a_model(monkeypatch)
    folder = material.records()
    path, good = folder / "records.jsonl", (folder / "records.jsonl").read_bytes()
    (foreign,) = [p for p in (place.outside / "records" / "latents").iterdir() if "-0." in p.name]
    way = os.path.relpath(foreign, folder)
    for latent in (str(foreign), way, f"latents/../{way}", f"/{foreign}", way.replace("/", "\\")):
        first, second = (json.loads(line) for line in good.splitlines())
        first["candidates"][0]["latent"] = latent
        path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
        for head in (True, False):
            assert not tries.run(lambda head=head: material.train(head), ["records.jsonl, line 1"], latent)
    tries.finish(10)


def test_damaged_candidates(comfy, material, tries, monkeypatch):
    material.without_a_model(monkeypatch)
    folder, count = material.records(), 0
    path = min((folder / "latents").iterdir())
    good = path.read_bytes()

    def use():
        nonlocal count
        count += 1
        return material.train(head=count % 2 == 0)[-1]

    fuzz_file(tries, "candidates", path, lambda draw: damaged_tensors(good, draw), use)


def test_records_are_appended_to_damaged_ones(comfy, material, tries):
    path = material.records() / "records.jsonl"
    good, draw = path.read_bytes(), random.Random(SEED)
    for number in range(FILES["records to append to"]):
        path.write_bytes(damaged(good, draw) if number % 3 else good + json_text(draw.choice(WRONG)).encode())
        prompt = f"prompt {number}"
        if tries.run(lambda prompt=prompt: material.record(prompt=prompt), [path.name], f"appending {number}"):
            assert json.loads(path.read_bytes().splitlines()[-1])["prompt"] == prompt
    tries.finish(FILES["records to append to"])


@pytest.mark.parametrize("head", [False, True], ids=["LoRA", "head"])
def test_damaged_states_of_trainings(comfy, material, tries, monkeypatch, head):
    material.without_a_model(monkeypatch)
    material.records()
    material.train(head)
    path = comfy.base / "output" / "intrinsic_reward_training" / TRAINED / "state.safetensors"
    finished = path.read_bytes()
    # The same, as it was after the first of two steps.
    begun = Tensors(finished)
    note = json.loads(begun.metadata["state"])
    note["step"] = note["notes"]["healthy"] = 1
    begun.metadata["state"] = json.dumps(note)
    history = begun.tensors["history"]
    history[1][0], history[2] = 1, history[2][: len(history[2]) // 2]
    good = [finished, begun.dump()]
    for data in good:
        path.write_bytes(data)
        material.train(head, resume=True)

    def use():
        return material.train(head, resume=True)[-1]

    kind = f"state of a {'head' if head else 'LoRA'}"
    fuzz_file(tries, kind, path, lambda draw: damaged_tensors(draw.choice(good), draw), use, ["'resume'", "score differences"])


def test_damaged_videos(comfy, material, tries):
    path = material.video()
    good = path.read_bytes()
    fuzz_file(tries, "video", path, lambda draw: damaged(good, draw), material.encode)


def test_a_video_with_a_frame_days_later_ends(comfy, material, tries):
    """What is sampled sixteen times a second would be sampled for days."""
    import av

    (folder := comfy.base / "input" / f"{STEM}_gap").mkdir()
    for days in (1, 20, 400):
        with av.open(str(folder / f"{STEM}.mkv"), "w") as container:
            stream = container.add_stream("mpeg4", rate=16)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(12):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 9 * number, np.uint8), format="rgb24")
                frame.pts, frame.time_base = 62 * number + 86_400_000 * days * (number > 2), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert not tries.run(lambda: material.encode(folder.name), ["its timestamps are wrong"], days)
    shutil.rmtree(folder)
    tries.finish(3)


def test_what_is_no_video(comfy, material, tries):
    folder = comfy.base / "input" / f"{STEM}_others"
    (folder / "folder.mp4").mkdir(parents=True)
    (folder / "empty.mkv").touch()
    (folder / "link.mp4").symlink_to(folder / "nowhere")
    (folder / "text.avi").write_text("#EXTM3U\nfile:///etc/passwd\n")
    (folder / "far.mp4").write_text(f"ffconcat version 1.0\nfile {tries.place.outside / 'canary.mp4'}\n")
    shutil.copy(tries.place.outside / "canary.mp4", folder / "a.bin")
    (folder / "near.mp4").write_text("ffconcat version 1.0\nfile a.bin\n")
    assert not tries.run(lambda: material.encode(folder.name), [folder.name], "a folder of other things")
    shutil.rmtree(folder)
    tries.finish(1)


# ---- Widgets


def text_sockets(comfy) -> set[tuple[str, str]]:
    """(node, input) of the pack's nodes whose value is a text that a user may type."""
    found = set()
    for name, cls in comfy.nodes.NODE_CLASS_MAPPINGS.items():
        if name.startswith(node("")):
            found |= {(name.removeprefix(node("")), i.id) for i in cls.define_schema().inputs if i.get_io_type() == "STRING"}
    return found


def test_every_text_widget_is_tried(comfy):
    assert {socket for socket in SOCKETS if socket not in COMBOS} == text_sockets(comfy)


class Widgets:
    """Inputs of the nodes with text widgets, and a good value of each widget."""

    BEST_OF_N = {"candidates": 2, "keep": 1, "finish": "continue", "chunk": 1, "plan": "checkpoints", "finalists": 0}
    GOOD = {
        ("LoadShellLCC", "file"): f"{STEM}.safetensors", ("LoadPrism", "file"): f"{STEM}.safetensors",
        ("LoadGeometry", "file"): f"geometry/{STEM}.safetensors [input]", ("EncodeClips", "folder"): "clips",
        ("ExampleClip", "clip"): "rigid room", ("GeometryDA3", "perceptual"): "none", ("GeometryDA3", "vgg"): "none",
        ("SaveGeometry", "filename_prefix"): "geometry/clip", ("PrismScore", "sigmas"): "0.2",
        ("ModelReward", "sigmas"): "0.5", ("FlowResidualScore", "sigmas"): "0.5", ("PrismBestOfN", "checkpoints"): "50 %",
        ("PrismKSampler", "checkpoints"): "0.9", ("ImageScorerReward", "node_id"): node("GeometryTracks"),
        ("ImageScorerReward", "settings"): '{"clips": 1}', ("RecordPreference", "name"): "texts",
        ("RecordPreference", "seed_list"): "5", ("TrainPrismHead", "taps"): "1", ("TrainPrismHead", "decided_by"): "",
        ("TrainPreferenceLora", "decided_by"): "", ("RecordPreference", "geometry"): "{}",
        ("TrainPreferenceLora", "folder"): STEM, ("TrainPrismHead", "folder"): STEM,
    }  # fmt: skip

    def __init__(self, material: Material):
        comfy = material.comfy
        material.manifolds(), material.head(), material.geometry(), material.video(), material.records()
        (shell,) = comfy.run(node("LoadShellLCC"), file=f"{STEM}.safetensors")
        (head,) = comfy.run(node("LoadPrism"), file=f"{STEM}.safetensors")
        (geometry, _) = comfy.run(node("LoadGeometry"), file=f"geometry/{STEM}.safetensors [input]")
        (noise,) = comfy.run("RandomNoise", noise_seed=1)
        (guider,) = comfy.run("BasicGuider", model=material.model, conditioning=material.positive)
        (sampler,) = comfy.run("KSamplerSelect", sampler_name="euler")
        make_record = material.module("kernels.geometry.record").GeometryRecord
        found = make_record("tracks", 2, 0.5, "consistent", "", {"error": 1.0}, 9, [0], [0.1])
        self.GOOD = self.GOOD | {("RecordPreference", "geometry"): found.dumps()}
        model = {"model": material.model, "positive": material.positive}
        one = {"samples": material.latent["samples"][:1]}
        train = {"model": material.model, "clip": None}
        changes = {"folder": STEM, "steps": 1, "pairs_per_step": 1, "resume": False}
        self.inputs = {
            "GeometryDA3": {"views": 3, "resolution": 140, "pose_method": "cam_dec", "da3_geometry": geometry},
            "EncodeClips": {
                "vae": SimpleNamespace(latent_dim=3, encode=lambda frames: torch.zeros(1, 16, 2, 8, 8)), "width": 64,
                "height": 64, "frames": 5, "fps": 16.0, "max_clips": 1,
            },
            "SaveShellLCC": {"manifold": shell},
            "SaveGeometry": {"da3_geometry": geometry},
            "RecordPreference": {
                "latent": one, "negative": "", "model": "", "prompt": "", "latent_space": "auto", "score_name": "steady",
                "winner": -1, "loser": -1,
            },
            "PrismScore": {**model, "head": head, "latent": one, "draws": 1, "seed": 0},
            "ModelReward": {"kind": "both", "draws": 1, "draw_seed": 0, "motion": 0.0},
            "FlowResidualScore": {**model, "latent": one, "draws": 1, "draw_seed": 0, "motion": 0.0},
            "PrismBestOfN": {
                "noise": noise, "guider": guider, "sampler": sampler, "sigmas": torch.tensor([1.0, 0.6, 0.0]),
                "latent_image": one, "head": head, **self.BEST_OF_N,
            },
            "PrismKSampler": {
                **model, "negative": material.positive, "head": head, "seed": 1, "steps": 2, "cfg": 1.0,
                "sampler_name": "euler", "scheduler": "simple", "latent_image": one, "denoise": 1.0, **self.BEST_OF_N,
            },
            "ImageScorerReward": {"every": 1, "higher_is_better": True},
            "TrainPreferenceLora": {**train, **LORA, **changes},
            "TrainPrismHead": {**train, **HEAD, "dim": 8, **changes},
        }  # fmt: skip
        for (name, key), value in self.GOOD.items():
            if (name, key) != ("RecordPreference", "geometry"):
                self.inputs.setdefault(name, {}).setdefault(key, value)
        self.lists = {"RecordPreference": {"scores": [0.5]}}


# What else an error of a widget may say: the folder that is searched, the node that was named, the noise level.
OTHER_NAMES = [
    STEM, "records.jsonl", "'shell_lcc'", "'prism'", "'lpips'", "node with the id", f"node '{node('')}", "name of a score",
    "sigma", "Best-of-N", "File name too long",
]  # fmt: skip


def texts_of(value) -> list:
    """What a node's output says of where it came from: texts, and the canaries of loaded files."""
    if isinstance(value, (str, list, float)):
        return [value]
    if isinstance(value, dict):
        return [CANARY] if value.get("frames") == CANARY_FRAMES else []
    loaded = getattr(value, "manifold", None) or getattr(value, "loaded", None)
    return [getattr(loaded, "provenance", {})]


def validated(cls, inputs: dict) -> bool:
    """Whether a node's own check takes the inputs, called as ComfyUI does."""
    parameters = inspect.signature(cls.validate_inputs).parameters
    if "kwargs" in parameters:
        # The base class, which has no check.
        return True
    answer = cls.validate_inputs(**{k: v for k, v in inputs.items() if k in parameters})
    assert answer is True or (isinstance(answer, str) and answer and CANARY not in answer), answer
    return answer is True


def test_combos_refuse_what_is_no_text(comfy):
    """ComfyUI leaves the value of a combo that has a check of its own to that check."""
    for name, socket in COMBOS:
        cls = comfy.node(node(name))
        if socket in inspect.signature(cls.validate_inputs).parameters:
            for value in (5, -1.5, True, [], ["x", 0], {"a": 1}):
                assert isinstance(cls.validate_inputs(**{socket: value}), str)
            assert cls.validate_inputs(**{socket: None}) is True


@pytest.fixture(scope="module")
def widgets(material):
    return Widgets(material)


@pytest.mark.parametrize(("name", "socket"), SOCKETS, ids=lambda value: value)
def test_hostile_texts(comfy, material, place, widgets, tries, monkeypatch, name, socket):
    """Of the node's own check, of its fingerprint and of the node itself, whose check an input from a wire goes past."""
    material.without_a_model(monkeypatch)
    cls, draw = comfy.node(node(name)), random.Random(f"{SEED} {name} {socket}")
    good, lists = widgets.GOOD.get((name, socket), "texts"), widgets.lists.get(name, {})
    listed = cls.GET_SCHEMA().is_input_list
    title = cls.GET_SCHEMA().display_name
    names = [f"'{socket}'", f"{socket}: found", title, *OTHER_NAMES]
    for number, text in enumerate([good, *hostile_texts(place, good, draw, TEXTS)]):
        inputs = {**widgets.inputs.get(name, {}), socket: text}

        def use(inputs=inputs):
            own = {k: [v] for k, v in inputs.items()} if listed else inputs
            fits = validated(cls, own)
            if "fingerprint_inputs" in vars(cls):
                cls.fingerprint_inputs(**{k: own[k] for k in own if k not in ("model", "clip", "vae")})
            extra = {**lists, "geometry": [inputs["geometry"]]} if "geometry" in inputs else lists
            plain = {k: v for k, v in inputs.items() if k != "geometry"}
            try:
                found = comfy.run(node(name), lists=extra, **plain)
            except Exception as e:
                if socket == "name" and fits and name != "SaveShellLCC":
                    raise AssertionError("the node's check took it") from e
                raise
            # A value that the check refuses, the node must refuse as well.
            assert fits or socket != "name"
            return [text for value in found for text in texts_of(value)]

        returned = tries.run(use, names, f"{number}: {text[:80]!r}")
        assert returned or number, tries.faults
    tries.finish(TEXTS)
