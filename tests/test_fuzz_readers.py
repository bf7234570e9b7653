"""Readers of what users bring, on damaged and random files: usable data or an error that names the file, nothing else.

Every reader gets EXAMPLES files: random bytes, and good files that were cut, changed and doubled in places. What a reader may
raise is a ValueError or an OSError (the commands turn both into one sentence); what it accepts must be finite and consistent.
"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainers.kernels.files import header, preference_records
from trainers.kernels.latent_space import WAN21
from trainers.latents.read import list_clips, read_clip
from trainers.preferences import manifest, tables
from trainers.prism import data as prism_data
from trainers.prism import label
from trainers.running import config_file, results_log
from trainers.scorers import depth_files
from trainers.wan import stored_weights, weight_files
from trainers.wan.prompts import read_embeddings, read_prompts

EXAMPLES = 650
# What a damaged file often contains, or what other programs write in the place of a number or a string.
PIECES = [
    b"", b"\n", b"\r", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b",", b";", b"\t", b'"', b"{", b"}", b"[", b"]", b":", b"NaN",
    b"nan", b"Infinity", b"1e999", b"-1", b"null", b"true", b"N/A", "\u2028".encode(), "\x85".encode(), b"\x0c", b"9" * 400,
    b"[" * 3000, "\u96ea".encode("gbk"), b"\\ud800", b"../", b"../../etc/passwd",
]  # fmt: skip


def damaged(good: bytes, seed: int) -> bytes:
    """A copy of good bytes with one to four changes."""
    draw = random.Random(seed)
    data = bytearray(good)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randint(0, len(data)), draw.randint(0, 12)
        match draw.randint(0, 4):
            case 0:
                data[at : at + length] = draw.choice(PIECES)
            case 1:
                data[at : at + length] = bytes(draw.randrange(256) for _ in range(length))
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[max(0, at - 40) : at]
            case 4 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
    return bytes(data)


def latents_shard() -> bytes:
    entry = {"c": {"source": "a.mp4", "video": "v", "window": 0}}
    head = header.Header("latents", WAN21, {"state": "normalised", "clips": entry, "settings": {}, "videos": {}})
    return save({"c": torch.zeros(16, 1, 2, 2)}, header.to_metadata(head))


def comfy_latent() -> bytes:
    return save({"latent_tensor": torch.zeros(1, 16, 2, 2, 2), "latent_format_version_0": torch.zeros(1)})


def embeddings() -> bytes:
    return save({"a": torch.zeros(2, 4)}, header.to_metadata(header.Header("texts", WAN21, {"prompts": {"a": "p"}})))


def torch_file() -> bytes:
    import io

    file = io.BytesIO()
    torch.save(torch.zeros(2, 16, 2, 2), file)
    return file.getvalue()


def geometry_file() -> bytes:
    import io

    file = io.BytesIO()
    poses = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    poses[:, 0, 3] = 0.1 * np.arange(3)
    K = np.float32([[8, 0, 4], [0, 8, 4], [0, 0, 1]])
    np.savez(file, depth=np.ones((3, 8, 8), np.float32), K=K, world_to_camera=poses)
    return file.getvalue()


def read_latents(path: Path) -> None:
    for ref in list_clips([path]):
        z = read_clip(ref, trust_state=True)
        assert z.ndim == 4
        assert bool(torch.isfinite(z).all())


def read_table(path: Path) -> None:
    notes = tables.TableNotes()
    pairs = tables.read(path, notes=notes)
    for pair in pairs:
        assert pair.outcome
        assert pair.a != pair.b
        assert set(pair.outcome.values()) <= {1, 0, -1}
    assert all(isinstance(line, str) for line in (*notes.text(), *tables.counts(pairs)))


def read_geometry(path: Path) -> None:
    saved = depth_files.read(path)
    depth_files.views_of(saved, torch.zeros(3, 16, 16, 3, dtype=torch.uint8))


def read_weight(path: Path) -> None:
    with weight_files.OpenWeights([path], "a Wan transformer") as f:
        for key in (k for k in f.keys() if not k.endswith(stored_weights.STORAGE)):  # noqa: SIM118 (not a mapping)
            try:
                stored_weights.read(f, key, set(f.keys()))
            except stored_weights.StorageError as e:
                # As the readers of models do.
                raise ValueError(f"{path}: {e}") from e


def read_scores(path: Path) -> None:
    for scores in label.read_scores(path).values():
        assert all(map(math.isfinite, scores.values()))


def read_log(path: Path) -> None:
    assert all(isinstance(row, dict) for row in results_log.read(path))


def described() -> bytes:
    text = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    tensors = {"a.weight": torch.ones(2, 2, dtype=torch.int8), "a.weight_scale": torch.ones(2), "a.comfy_quant": text}
    return save(tensors, {"_quantization_metadata": json.dumps({"layers": {"b": {"format": "float8_e4m3fn"}}})})


PAIR = b'{"prompt": "p", "a": "x", "b": "y", "preference": {"look": "a", "motion": "tie"}, "scores_a": {"look": 1}}\n'
SCORE = b'{"prompt": "q", "video": "1", "scores": {"look": 0.5}}\n{"prompt": "q", "video": "2", "scores": {"look": 1}}\n'
LABELS = b'path_A,path_B,prompt,VQ,Overall\na,b,"p, q",A,same\nc,d,r,B,A\n'
# Reader -> (name of the file, a good one, the reader).
READERS = {
    "pairs.csv": ("t.csv", LABELS, read_table),
    "scores.csv": ("t.csv", b"prompt,video,VQ,seed\np,1,1,4\np,2,2,5\np,3,2.5,6\n", read_table),
    "pairs.jsonl": ("t.jsonl", PAIR + SCORE, read_table),
    "manifest": ("t.jsonl", PAIR.replace(b'{"look": "a", "motion": "tie"}', b'"a"'), manifest.read),
    "scores of runs": ("s.jsonl", b'{"run": "r", "scores": {"look": 1.5}}\n{"run": "s", "scores": {}}\n', read_scores),
    "comparisons": ("c.jsonl", b'{"prompt": "p", "a": "x", "b": "y", "outcome": {"look": 1}}\n', prism_data._read_rows),
    "results log": ("log.jsonl", b'{"step": 1, "loss": 0.5}\n{"step": 2}\n', read_log),
    "records": ("records.jsonl", b'{"version": 1, "record": "r", "prompt": "p", "candidates": []}\n', preference_records.read),
    "prompts": ("p.txt", "a fox\n\u96ea\n".encode(), read_prompts),
    "arguments": ("c.toml", b'learning_rate = 1e-5\nname = "x"\nlist = [1, 2]\nflag = true\n', config_file._arguments),
    "latents": ("l.safetensors", latents_shard(), read_latents),
    "ComfyUI's latents": ("l.latent", comfy_latent(), read_latents),
    "tensors": ("l.pt", torch_file(), read_latents),
    "embeddings": ("e.safetensors", embeddings(), read_embeddings),
    "weights": ("w.safetensors", described(), read_weight),
    "index": ("m.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', weight_files.read_index),
    "geometry": ("g.npz", geometry_file(), read_geometry),
}  # fmt: skip


def test_at_least_ten_thousand_files_are_read():
    assert len(READERS) * EXAMPLES >= 10_000


@pytest.mark.parametrize("name", READERS)
def test_a_reader_gives_usable_data_or_says_what_is_wrong(tmp_path, name):
    file, good, read = READERS[name]
    path = tmp_path / file
    path.write_bytes(good)
    if name != "records":
        read(path)
    count = 0

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(st.integers(0, 2**32).map(lambda seed: damaged(good, seed)), st.binary(max_size=200)))
    def check(data):
        nonlocal count
        count += 1
        path.write_bytes(data)
        found = None
        try:
            read(path)
        except (ValueError, OSError) as e:
            found = e
        # A JSONDecodeError or a UnicodeDecodeError is a ValueError as well, and names no file.
        assert found is None or file in str(found), f"{type(found).__name__}: {found}"

    check()
    assert count >= EXAMPLES
