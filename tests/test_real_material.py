"""Real latents, videos, labels and embeddings through the commands, from end to end; skipped where they are not at hand.

They are not part of the repository: a generation of Wan2.1 and a decoded clip (TAEHV, MIT), three labelled pairs (VideoAlign,
MIT), and embeddings of UMT5-XXL (HY-Video-PRFL, Apache-2.0).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")

from benchmarks import real_latents
from trainers.geometry import cli as geometry
from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism import files as head_files
from trainers.latents.read import list_clips, read_clip
from trainers.preferences import tables
from trainers.prism import cli as prism
from trainers.prism import data as prism_data
from trainers.shell_lcc import cli as shell_lcc
from trainers.wan.prompts import text_id, write_embeddings

from .test_encode import vae_file  # noqa: F401 (a fixture)
from .test_wan_dit import CONFIG

VERDICTS = ("consistent", "inconsistent", "undetermined")
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
LATENTS, TABLE = REAL / "test_latents_wan.pth", REAL / "videoalign" / "example.csv"

pytestmark = pytest.mark.skipif(not LATENTS.is_file(), reason="needs real latents, videos and embeddings")


def run(command, *argv) -> None:
    assert command.main([str(a) for a in argv]) == 0


@pytest.fixture(scope="module")
def clip():
    (ref,) = list_clips([LATENTS], WAN21)
    return read_clip(ref)


def test_a_manifold_is_fitted_on_a_real_generation_and_tells_what_was_done_to_it(clip, tmp_path):
    for i, tile in enumerate(real_latents.tiles_of(clip)):
        torch.save(tile.clone(), tmp_path / f"tile-{i}.pt")
    tiles, output = [tmp_path / f"tile-{i}.pt" for i in range(8)], tmp_path / "real.safetensors"
    run(shell_lcc, "fit", "--latents", *tiles[:7], "--output", output, "--num_bases", 256, "--pt_axes", "cthw")
    outside = {}
    for name, damage in real_latents.VARIANTS.items():
        torch.save(damage(real_latents.tiles_of(clip)[7]).clone(), tmp_path / f"{name}.pt")
        report = tmp_path / f"{name}.json"
        file = tmp_path / f"{name}.pt"
        run(shell_lcc, "eval", "--manifold", output, "--latents", file, "--json", report, "--pt_axes", "cthw")
        outside[name] = json.loads(report.read_text())
    assert outside["half blurred"]["median"] < outside["clean"]["median"] < outside["noisy"]["median"]
    assert outside["clean"]["outside_band"] < 0.15 < outside["noisy"]["outside_band"]


def test_corrections_repair_noise_in_real_latents_and_no_blur(clip):
    """The signs of benchmarks/results/real_latents.md, on one tile."""
    tiles = real_latents.tiles_of(clip)
    found = real_latents.figures(real_latents.unlike(tiles, 2)["same content"], tiles[2])
    assert found["noisy/project"] < found["noisy/band"] < 1 < found["noisy/random push"]
    assert found["half blurred/project"] > 1
    assert found["clean/band"] < found["clean/project"] < found["clean/minimise"]


def test_labelled_pairs_are_cached_and_train_a_head(vae_file, tmp_path, capsys):  # noqa: F811
    """VideoAlign's own table and videos, with embeddings of UMT5-XXL's width."""
    from diffusers import WanTransformer3DModel

    words = torch.from_numpy(np.load(REAL / "umt5_uncond.npy", allow_pickle=False))[0]
    prompts = sorted({p.prompt for p in tables.read(TABLE)})
    texts = {text_id(p): words[: 40 * (i + 1)] for i, p in enumerate(prompts)}
    write_embeddings(tmp_path / "texts.safetensors", texts, WAN21, {}, {text_id(p): p for p in prompts})
    torch.manual_seed(0)
    WanTransformer3DModel(**(CONFIG | {"text_dim": 4096})).save_pretrained(tmp_path / "dit")
    data, head = tmp_path / "data", tmp_path / "head.safetensors"
    run(prism, "cache", "--pairs", TABLE, "--vae", vae_file, "--texts", tmp_path / "texts.safetensors", "--output", data,
        "--width", 64, "--height", 48, "--frames", 17, "--device", "cpu")  # fmt: skip
    printed = capsys.readouterr().out
    for counted in ("VQ: 8 decided, 4 ties", "MQ: 4 decided, 8 ties", "TA: 8 decided, 4 ties"):
        assert counted in printed
    found = prism_data.load(data)
    assert len(found.runs) == 6
    assert {r.prompt for r in found.rows} == set(texts)
    assert all(found.state(run, None).shape == (16, 5, 6, 8) for run in found.runs)
    common = ("--data", data, "--backbone", tmp_path / "dit", "--levels", 0.9, "--device", "cpu")
    run(prism, "train", *common, "--output", head, "--taps", 0, "--dim", 16, "--heads", 2, "--layers", 1,
        "--max_train_steps", 2, "--train_batch_size", 2, "--held_out", 0.34)  # fmt: skip
    assert head_files.load(head).head.config.dimensions == ("MQ", "TA", "VQ")
    run(prism, "eval", *common, "--head", head)
    assert "VQ" in capsys.readouterr().out


def test_real_videos_have_a_geometry_score(tmp_path):
    """Of a clip of Wan2.1 and of two other generators': a finite error, or the reason why there is none."""
    videos = [REAL / "decoded_taew2_1.mp4", *sorted((REAL / "videoalign" / "videos").glob("example_1_*.mp4"))]
    run(geometry, "score", "--videos", *videos, "--output", tmp_path, "--frames", 33, "--size", "272p")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().split("\n") if line]
    assert sorted(r["video"] for r in rows) == sorted(p.name for p in videos)
    for row in rows:
        assert row["record"]["verdict"] in VERDICTS
        assert 0 <= row["record"]["score"] <= 1
