"""trainers.dpo: the cache of pairs, training on a tiny transformer, resume, processes, crashes, and refusals."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from trainers.dpo import cache, evaluate, objective, train
from trainers.dpo import cli as dpo
from trainers.dpo import data as dpo_data
from trainers.dpo.draws import Draws
from trainers.kernels.files.latents import write_latents
from trainers.kernels.latent_space import WAN21, WAN22
from trainers.kernels.tuning.noise_levels import NoiseLevels
from trainers.kernels.tuning.preference_loss import PreferenceLoss
from trainers.running import checkpoint, loop, results_log
from trainers.tuning import lora_files, optimisers
from trainers.wan.dit_keys import of_text_to_video
from trainers.wan.prompts import text_id, write_embeddings

from .launcher import launch
from .preference_material import append_record
from .test_wan_dit import CONFIG

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [f"a thing number {i}" for i in range(8)]
SHAPE = (16, 3, 4, 4)
TINY = CONFIG | {"num_layers": 2}
DEVICE = ("--device", "cpu")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny random transformer as ComfyUI's single file."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**TINY)
    path = tmp_path_factory.mktemp("backbone") / "wan.safetensors"
    names = of_text_to_video(2)
    save_file({names[k]: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.safetensors"
    g = torch.Generator().manual_seed(5)
    prompts = {text_id(p): p for p in [*PROMPTS, ""]}
    write_embeddings(path, {k: torch.randn(3, 24, generator=g) for k in prompts}, WAN21, {}, prompts)
    return path


def clip(path, z, space=WAN21):
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"source": path.name, "video": path.stem, "frames": 9}
    write_latents(path, {path.stem: z}, space, {path.stem: entry})
    return path


def make_pairs(folder, prompts=PROMPTS, shape=SHAPE):
    """A manifest as `pairs build` writes it: winners have a positive first channel, losers a negative one."""
    g, lines = torch.Generator().manual_seed(1), []
    for i, prompt in enumerate(prompts):
        names = []
        for side, sign in (("w", 1.0), ("l", -1.0)):
            z = torch.randn(shape, generator=g)
            z[0] += sign
            names.append(clip(folder / f"clips/{i}-{side}.safetensors", z).relative_to(folder).as_posix())
        scores = {"scores_a": {"look": 0.5 + i}, "scores_b": {"look": 0.25}}
        lines.append(json.dumps({"prompt": prompt, "a": names[0], "b": names[1], "preference": "a"} | scores))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_cache(pairs, output, embeddings, *more):
    argv = ["cache", "--pairs", pairs, "--output", output, "--embeddings", embeddings, *DEVICE, *more]
    return dpo.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, embeddings):
    root = tmp_path_factory.mktemp("data")
    assert run_cache(make_pairs(root / "pairs"), root / "dpo", embeddings) == 0
    return root / "dpo"


def arguments(folder, backbone, out, *more, steps=4):
    argv = ["train", "--data", folder, "--backbone", backbone, "--output", out, "--rank", 4, "--lora_alpha", 4,
            "--max_train_steps", steps, "--gradient_accumulation_steps", 2, "--learning_rate", 3e-3, "--lr_warmup_steps", 2,
            "--held_out", 0.25, "--eval_levels", 2, "--max_winner_rise", 0, "--save_dtype", "fp32", *DEVICE]  # fmt: skip
    return [str(a) for a in (*argv, *more)]


def run_train(folder, backbone, out, *more, steps=4):
    return dpo.main(arguments(folder, backbone, out, *more, steps=steps))


def log_of(out):
    return results_log.read(out.with_suffix(".checkpoints") / "log.jsonl")


class TestCache:
    def test_a_manifest_becomes_a_folder(self, folder, tmp_path):
        data = dpo_data.load(folder)
        assert len(data.rows) == len(PROMPTS)
        assert data.rows[0].shape == SHAPE
        assert data.rows[1].margin == pytest.approx(1.25)
        assert data.prompts[text_id(PROMPTS[0])] == PROMPTS[0]
        for row in data.rows:
            assert data.latents(row.winner)[0].mean() > 0.5 > -0.5 > data.latents(row.loser)[0].mean()
        assert data.latents(data.rows[0].winner, 1, 2).shape == (16, 2, 4, 4)

    def test_records_by_their_preference_and_by_a_score(self, tmp_path, embeddings):
        g = torch.Generator().manual_seed(2)
        records = tmp_path / "records"
        for i in range(3):
            z = torch.randn(4, *SHAPE, generator=g)
            append_record(
                records, PROMPTS[i], z, WAN21, scores={"look": [0.1, 0.9, 0.4, 0.2]}, preference=(3, 0) if i < 2 else None
            )
        assert run_cache(records, tmp_path / "by_choice", embeddings) == 0
        chosen = dpo_data.load(tmp_path / "by_choice")
        assert len(chosen.rows) == 2
        assert run_cache(records, tmp_path / "by_score", embeddings, "--by", "look") == 0
        scored = dpo_data.load(tmp_path / "by_score")
        assert [r.margin for r in scored.rows] == pytest.approx([0.8] * 3)
        more = ("--by", "look", "--pairs_per_group", 9, "--min_margin", 0.15)
        assert run_cache(records, tmp_path / "all", embeddings, *more) == 0
        assert len(dpo_data.load(tmp_path / "all").rows) == 3 * 5

    def test_equal_clips_are_stored_once_and_nothing_is_read_twice(self, tmp_path, embeddings, monkeypatch):
        root = make_pairs(tmp_path / "pairs", PROMPTS[:3])
        shutil.copy(root / "clips/0-l.safetensors", root / "clips/copy.safetensors")
        row = {"prompt": PROMPTS[0], "a": "clips/copy.safetensors", "b": "clips/0-w.safetensors", "preference": "b"}
        line = json.dumps(row)
        with open(root / "pairs.jsonl", "a") as f:
            f.write(line + "\n")
        assert run_cache(root, tmp_path / "out", embeddings) == 0
        data = dpo_data.load(tmp_path / "out")
        assert len(data.rows) == 3
        assert len(data.clips) == 6
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("latents-*")}
        monkeypatch.setattr(cache._Store, "_read", lambda *a: pytest.fail("a clip that is there was read again"))
        assert run_cache(root, tmp_path / "out", embeddings) == 0
        assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("latents-*")} == before

    def test_a_copy_of_a_file_is_not_read_again(self, tmp_path, embeddings, monkeypatch):
        """Neither under another name in one run, nor with another time in a later one."""
        folder = make_pairs(tmp_path / "pairs")
        shutil.copy(folder / "clips/0-l.safetensors", folder / "clips/copy.safetensors")
        row = {"prompt": PROMPTS[0], "a": "clips/1-w.safetensors", "b": "clips/copy.safetensors", "preference": "a"}
        with open(folder / "pairs.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        read, original = [], cache._Store._read
        monkeypatch.setattr(cache._Store, "_read", lambda self, p: read.append(p.name) or original(self, p))
        assert run_cache(folder, tmp_path / "dpo", embeddings) == 0
        assert len(read) == 2 * len(PROMPTS)
        for file in folder.rglob("*.safetensors"):
            os.utime(file, ns=(1, 1))
        assert run_cache(folder, tmp_path / "dpo", embeddings) == 0
        assert len(read) == 2 * len(PROMPTS)
        groups = [{r.prompt for r in side} for side in dpo_data.split(dpo_data.load(tmp_path / "dpo"), 0.25, 0)]
        assert groups[0].isdisjoint(groups[1])

    def test_an_interrupted_cache_continues(self, tmp_path, embeddings, monkeypatch):
        root, read, done = make_pairs(tmp_path / "pairs", PROMPTS[:4]), cache._Store._read, []

        def stop(self, path):
            if len(done) == 5:
                raise KeyboardInterrupt
            done.append(path)
            return read(self, path)

        monkeypatch.setattr(cache._Store, "_read", stop)
        assert run_cache(root, tmp_path / "out", embeddings) == 130
        monkeypatch.setattr(cache._Store, "_read", lambda self, path: (done.append(path), read(self, path))[1])
        assert run_cache(root, tmp_path / "out", embeddings) == 0
        assert len(done) == 8
        assert len(dpo_data.load(tmp_path / "out").rows) == 4

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda f: (f / "clips/1-l.safetensors").unlink(), "is missing"),
            (lambda f: clip(f / "clips/1-l.safetensors", torch.randn(48, 3, 4, 4), WAN22), "'wan22' latents"),
            (lambda f: shutil.copy(f / "clips/1-w.safetensors", f / "clips/1-l.safetensors"), "the same content"),
            (lambda f: clip(f / "clips/1-l.safetensors", torch.randn(16, 3, 4, 6)), "must have one size"),
            (lambda f: clip(f / "clips/1-l.safetensors", torch.full(SHAPE, math.nan)), "contains NaN"),
            (lambda f: (f / "clips/1-l.safetensors").write_bytes(b"nonsense"), "safetensors"),
        ],
        ids=["missing", "space", "equal", "size", "nan", "damaged"],
    )
    def test_bad_pairs_in_one_sentence(self, tmp_path, embeddings, spoil, said, capsys):
        root = make_pairs(tmp_path / "pairs", PROMPTS[:3])
        spoil(root)
        assert run_cache(root, tmp_path / "out", embeddings) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
        assert "1-l.safetensors" in error
        assert run_cache(root, tmp_path / "out", embeddings, "--skip_bad") == 0
        assert len(dpo_data.load(tmp_path / "out").rows) == 2
        assert said in json.loads((tmp_path / "out" / "report.json").read_text())["left_out"][0]

    def test_bad_arguments(self, tmp_path, embeddings, capsys):
        root = make_pairs(tmp_path / "pairs", ["an unknown prompt", *PROMPTS[:2]])
        assert run_cache(root, tmp_path / "out", embeddings) == 2
        assert "lacks 1 prompts, such as 'an unknown prompt'" in capsys.readouterr().err
        assert run_cache(root, root, embeddings) == 2
        assert "another --output" in capsys.readouterr().err
        assert run_cache(tmp_path, tmp_path / "out", embeddings) == 2
        assert "neither pairs.jsonl" in capsys.readouterr().err
        assert run_cache(root, tmp_path / "out", embeddings, "--min_margin", 99) == 2
        assert "--min_margin" in capsys.readouterr().err
        (root / "clips/v.mp4").write_bytes(b"")
        row = {"prompt": PROMPTS[0], "a": "clips/v.mp4", "b": "clips/0-l.safetensors", "preference": "a"}
        (root / "pairs.jsonl").write_text(json.dumps(row) + "\n")
        assert run_cache(root, tmp_path / "out", embeddings) == 2
        assert "--vae is needed" in capsys.readouterr().err


class TestDraws:
    def draws(self, folder, **more):
        rows = dpo_data.load(folder).rows
        return Draws(rows, NoiseLevels("uniform"), 0, **{"count": 4} | more)

    def test_every_pair_is_seen_once_an_epoch(self, folder):
        draws = self.draws(folder)
        seen = [d.row.key for step in range(2) for d in draws.of_step(step)]
        assert len(set(seen)) == len(PROMPTS)
        again = [d.row.key for step in range(2, 4) for d in draws.of_step(step)]
        assert set(again) == set(seen)
        assert again != seen
        sigmas = [d.sigma for step in range(4) for d in draws.of_step(step)]
        assert len(set(sigmas)) == 16

    def test_crops(self, folder):
        starts = {d.start for step in range(20) for d in self.draws(folder, crop=2).of_step(step)}
        assert starts == {0, 1}
        assert all(d.shape == (16, 2, 4, 4) for d in self.draws(folder, crop=2).of_step(0))
        assert {d.start for d in self.draws(folder, crop=2, from_start=True).of_step(0)} == {0}
        assert self.draws(folder, crop=9).of_step(0)[0].frames == 3

    def test_a_table_comes_back(self, folder):
        draws = self.draws(folder, slots=2)
        epochs = [{(d.row.key, d.slot): (d.sigma, d.seed) for s in (e, e + 1) for d in draws.of_step(s)} for e in (0, 2, 4)]
        assert epochs[0] == epochs[2]
        assert not epochs[0].keys() & epochs[1].keys()
        assert len(draws.entries(6)) == 2 * len(PROMPTS)
        assert len(draws.entries(1)) == 4


class TestTraining:
    def test_the_loss_falls_and_the_file_says_how(self, folder, backbone, tmp_path):
        out = tmp_path / "lora.safetensors"
        more = ("--beta", 50, "--learning_rate", 1e-2, "--lr_scheduler", "constant", "--lr_warmup_steps", 0,
                "--gradient_accumulation_steps", 6, "--eval_steps", 6)  # fmt: skip
        assert run_train(folder, backbone, out, *more, steps=12) == 0
        log = log_of(out)
        assert [r["step"] for r in log] == list(range(1, 13))
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert log[0]["gradient_factor"] == 0.5
        assert log[0]["winner_error"] == log[0]["loser_error"] == 0
        assert sum(r["loss"] for r in log[-3:]) / 3 < 0.9 * math.log(2)
        assert log[-1]["rewards/accuracies"] > 0.8
        assert log[-1]["winner_error"] < log[-1]["loser_error"]
        assert log[-1]["change_norm"] > log[0]["change_norm"] > 0
        assert 0.5 < log[-1]["dynamics"] < 2
        assert log[5]["held_out/accuracy"] is not None
        record = json.loads(lora_files.read_modules(out)[1][lora_files.RECORD])
        assert record["steps"] == 12
        assert record["metrics"]["prompts"] == 2
        assert record["command"].startswith("python -m trainers.dpo train")
        keys = set(load_file(out))
        assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in keys
        assert "diffusion_model.blocks.1.cross_attn.o.alpha" in keys
        assert len(keys) == 2 * 2 * 4 * 3
        page = (out.with_suffix(".checkpoints") / "index.html").read_text()
        assert "Errors against the reference" in page
        assert len(checkpoint.list_checkpoints(out.with_suffix(".checkpoints"))) == 1

    def test_eval_gives_the_trainers_figures(self, folder, backbone, tmp_path, capsys):
        out = tmp_path / "lora.safetensors"
        assert run_train(folder, backbone, out, steps=2) == 0
        record = json.loads(lora_files.read_modules(out)[1][lora_files.RECORD])
        argv = ["eval", "--data", folder, "--backbone", backbone, "--lora", out, "--eval_levels", 2, "--json",
                tmp_path / "e.json", *DEVICE]  # fmt: skip
        assert dpo.main([str(a) for a in argv]) == 0
        found, said = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr().out
        assert found["accuracy"] == record["metrics"]["accuracy"]
        assert found["winner"]["mean"] == pytest.approx(record["metrics"]["winner"]["mean"], rel=1e-4)
        assert "implicit accuracy" in said
        assert dpo.main([str(a) for a in (*argv, "--all", "--strength", 0)]) == 0
        found = json.loads((tmp_path / "e.json").read_text())
        assert found["pairs"] == len(PROMPTS)
        assert found["winner"]["mean"] == found["loser"]["mean"] == 0
        assert found["accuracy"]["mean"] == 0.5

    @pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "torch.optim.SGD", "torch.optim.Adagrad", "torch.optim.NAdam"])
    def test_a_resumed_run_ends_with_the_unbroken_runs_tensors(self, folder, backbone, tmp_path, optimizer):
        more = ("--optimizer", optimizer, "--lora_dropout", 0.2, "--checkpointing_steps", 3, "--crop_frames", 2)
        whole = tmp_path / "whole.safetensors"
        assert run_train(folder, backbone, whole, *more, steps=7) == 0
        wanted, log = load_file(whole), log_of(whole)
        work = whole.with_suffix(".checkpoints")
        assert [p.name for p in checkpoint.list_checkpoints(work)] == ["checkpoint-6", "checkpoint-7"]
        shutil.rmtree(work / "checkpoint-7")
        assert run_train(folder, backbone, whole, *more, "--resume_from_checkpoint", "latest", "--overwrite", steps=7) == 0
        found = load_file(whole)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
        assert log_of(whole) == log

    def test_ctrl_c_saves(self, folder, backbone, tmp_path, monkeypatch, capsys):
        whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
        assert run_train(folder, backbone, whole, steps=4) == 0
        finish = objective.DpoObjective.finish

        def interrupt(self, step, sums, applied):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return finish(self, step, sums, applied)

        monkeypatch.setattr(objective.DpoObjective, "finish", interrupt)
        assert run_train(folder, backbone, parts, steps=4) == 130
        assert "saved step 3 of 4" in capsys.readouterr().err
        monkeypatch.setattr(objective.DpoObjective, "finish", finish)
        assert run_train(folder, backbone, parts, steps=4) == 2
        assert "--resume_from_checkpoint latest" in capsys.readouterr().err
        assert run_train(folder, backbone, parts, "--resume_from_checkpoint", "latest", steps=4) == 0
        for name, value in load_file(whole).items():
            assert torch.equal(load_file(parts)[name], value), name

    def test_another_runs_checkpoint_is_refused(self, folder, backbone, tmp_path, capsys):
        out = tmp_path / "lora.safetensors"
        assert run_train(folder, backbone, out, steps=2) == 0
        for more, said in ((("--beta", 7), "beta auto against 7"), (("--rank", 8), "rank 4 against 8")):
            again = ("--resume_from_checkpoint", "latest", "--overwrite")
            assert run_train(folder, backbone, out, *more, *again, steps=2) == 2
            assert said in capsys.readouterr().err

    def test_stored_reference_errors_are_those_of_the_reference(self, folder, backbone, tmp_path, monkeypatch):
        plain, cached = tmp_path / "plain.safetensors", tmp_path / "cached.safetensors"
        more = ("--cache_size", 2, "--static_penalty", 0.5)
        assert run_train(folder, backbone, plain, *more, steps=5) == 0
        assert run_train(folder, backbone, cached, *more, "--cached_reference", steps=5) == 0
        for a, b in zip(log_of(plain), log_of(cached), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        for name, value in load_file(plain).items():
            torch.testing.assert_close(load_file(cached)[name], value, rtol=1e-4, atol=1e-6)
        # A second run with another beta finds the errors and needs no reference.
        tables = sorted(cached.with_suffix(".checkpoints").glob("reference-*.jsonl"))
        assert len(tables) == 1
        shutil.rmtree(cached.with_suffix(".checkpoints") / "checkpoint-5")
        monkeypatch.setattr("trainers.dpo.reference_table.measure_reference", lambda *a: pytest.fail("computed again"))
        again = (*more, "--cached_reference", "--beta", 300, "--overwrite")
        assert run_train(folder, backbone, cached, *again, steps=5) == 0

    def test_all_parameters(self, folder, backbone, tmp_path):
        out = tmp_path / "model.safetensors"
        assert run_train(folder, backbone, out, "--full", "--learning_rate", 1e-4, "--beta", 500, steps=6) == 0
        tuned, base = load_file(out), load_file(backbone)
        assert tuned.keys() == base.keys()
        assert sum(not torch.equal(tuned[k], base[k].float()) for k in base) > 40
        log = log_of(out)
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert log[-1]["change_norm"] > log[0]["change_norm"] > 0
        assert json.loads((out.with_suffix(".checkpoints") / "report.json").read_text())["held_out"]["pairs"] == 2

    def test_losses_and_terms_run(self, folder, backbone, tmp_path):
        cases = (
            ("--loss", "ipo", "--beta", 100), ("--loss", "linear"), ("--loss", "sft"),
            ("--reference_anchor", 1, "--sft_weight", 0.1, "--label_smoothing", 0.1),
            ("--mask_first_frame", "--sigmas", 0.5, 0.9, "--train_batch_size", 2),
            ("--base_dtype", "bf16", "--no-gradient_checkpointing"),
        )  # fmt: skip
        for i, more in enumerate(cases):
            out = tmp_path / f"{i}.safetensors"
            assert run_train(folder, backbone, out, *map(str, more), steps=2) == 0
            assert all(math.isfinite(r["loss"]) for r in log_of(out))

    def test_computing_in_bf16(self, folder, backbone, tmp_path):
        from accelerate.state import AcceleratorState

        # accelerate keeps the precision of a process's first Accelerator.
        AcceleratorState._reset_state()
        try:
            assert run_train(folder, backbone, tmp_path / "lora.safetensors", "--mixed_precision", "bf16", steps=2) == 0
        finally:
            AcceleratorState._reset_state()
        assert all(v.dtype == torch.float32 for v in load_file(tmp_path / "lora.safetensors").values())

    def test_no_graph_of_the_checkpointing_changes_the_result(self, folder, backbone, tmp_path):
        for name, flag in (("a", "--gradient_checkpointing"), ("b", "--no-gradient_checkpointing")):
            assert run_train(folder, backbone, tmp_path / f"{name}.safetensors", flag, "--lora_dropout", 0.3, steps=2) == 0
        a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-7)

    def test_arguments_from_a_file(self, folder, backbone, tmp_path, capsys):
        if sys.version_info < (3, 11):
            pytest.skip("tomllib is of Python 3.11")
        config = tmp_path / "run.toml"
        config.write_text('beta = 77\nrank = 8\ntargets = ["q", "v"]\ngradient_checkpointing = false\nheld_out = 0\n')
        out = tmp_path / "lora.safetensors"
        argv = ["train", "--config", config, "--data", folder, "--backbone", backbone, "--output", out, "--rank", 2,
                "--max_train_steps", 1, *DEVICE]  # fmt: skip
        assert dpo.main([str(a) for a in argv]) == 0
        tensors = load_file(out)
        assert tensors["diffusion_model.blocks.0.self_attn.q.lora_A.weight"].shape[0] == 2
        assert not any(".k." in k for k in tensors)
        assert log_of(out)[0]["beta"] == 77
        config.write_text("beta = [")
        assert dpo.main([str(a) for a in argv]) == 2
        assert "run.toml: not a TOML file" in capsys.readouterr().err
        assert dpo.main(["train", "--config", str(tmp_path / "none.toml")]) == 2


class TestHealth:
    def test_a_rising_winners_error_ends_the_run_with_the_last_healthy_lora(self, folder, backbone, tmp_path, capsys):
        """The published failure: no anchor, a large learning rate, both errors grow."""
        out = tmp_path / "lora.safetensors"
        more = ("--max_winner_rise", 0.02, "--learning_rate", 0.1, "--winner_anchor", 0, "--beta", 2000,
                "--lr_warmup_steps", 30, "--max_grad_norm", 0)  # fmt: skip
        assert run_train(folder, backbone, out, *more, steps=60) == 0
        said = capsys.readouterr().out
        assert "stopped at step" in said
        assert "--max_winner_rise" in said
        report = json.loads((out.with_suffix(".checkpoints") / "report.json").read_text())
        outcome = report["outcome"]
        assert 0 < outcome["healthy_step"] < outcome["steps"] < 60
        assert f"of step {outcome['healthy_step']}" in said
        # What was written is the healthy step's, not the ruined one.
        assert report["held_out"]["winner_relative"] < 0.5 * log_of(out)[-1]["winner_error_relative"]
        assert "Warning" in (out.with_suffix(".checkpoints") / "index.html").read_text()

    def test_losses_that_are_not_finite_are_skipped_and_counted(self, folder, backbone, tmp_path, monkeypatch):
        out, sums = tmp_path / "lora.safetensors", objective._sums

        def spoil(figures, beta):
            found = sums(figures, beta)
            spoil.calls += 1
            return found | ({"loss": math.nan} if 5 <= spoil.calls <= 6 else {})

        spoil.calls = 0
        monkeypatch.setattr(objective, "_sums", spoil)
        assert run_train(folder, backbone, out, steps=5) == 0
        log = log_of(out)
        assert [r["skipped"] for r in log] == [0, 0, 1, 1, 1]
        assert log[2]["loss"] is None
        assert log[2]["change_norm"] == log[1]["change_norm"] != log[3]["change_norm"]
        assert json.loads((out.with_suffix(".checkpoints") / "report.json").read_text())["outcome"]["skipped"] == 1

    def test_too_many_of_them_end_the_run(self, folder, backbone, tmp_path, monkeypatch, capsys):
        sums = objective._sums
        monkeypatch.setattr(objective, "_sums", lambda figures, beta: sums(figures, beta) | {"loss": math.nan})
        monkeypatch.setattr("trainers.tuning.loop.MAX_NONFINITE_STEPS", 3)
        assert run_train(folder, backbone, tmp_path / "lora.safetensors", steps=9) == 2
        error = capsys.readouterr().err
        assert "3 steps in a row up to step 3" in error
        assert "--learning_rate" in error
        assert loop.MAX_NONFINITE_STEPS == 20

    def test_a_full_disk_leaves_the_previous_checkpoint(self, folder, backbone, tmp_path, monkeypatch, capsys):
        out, save = tmp_path / "lora.safetensors", checkpoint.save_file

        def full(tensors, path, metadata=None):
            if json.loads(metadata["state"])["step"] == 4:
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            save(tensors, path, metadata=metadata)

        monkeypatch.setattr(checkpoint, "save_file", full)
        assert run_train(folder, backbone, out, "--checkpointing_steps", 2, steps=6) == 2
        error = capsys.readouterr().err.strip()
        assert "No space left on device" in error
        assert "checkpoint-2 is kept" in error
        assert "\n" not in error
        work = out.with_suffix(".checkpoints")
        assert [p.name for p in work.glob("*checkpoint*")] == ["checkpoint-2"]
        monkeypatch.setattr(checkpoint, "save_file", save)
        again = ("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
        assert run_train(folder, backbone, out, *again, steps=6) == 0


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")


def test_kill_9_loses_nothing_before_the_last_checkpoint(folder, backbone, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    more = ("--checkpointing_steps", 2)
    steps = 400
    command = [sys.executable, "-m", "trainers.dpo", *arguments(folder, backbone, out, *more, steps=steps)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    work = out.with_suffix(".checkpoints")
    end = time.monotonic() + 120
    while time.monotonic() < end and len(log_of(out) if work.is_dir() else []) < 5 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()[-2000:]
    kept = checkpoint.list_checkpoints(work)
    assert 1 <= len(kept) <= 3
    reached = int(kept[-1].name.rpartition("-")[2])
    done = [r["step"] for r in log_of(out)]
    assert done == list(range(1, len(done) + 1))
    assert reached >= (done[-1] - 1) // 2 * 2 - 2
    # A half-written folder of the killed process is removed, and the log goes on after the checkpoint.
    (work / ".checkpoint-x.partial").mkdir()
    state = checkpoint.load(kept[-1], {})
    settings = json.loads(json.dumps(_described(kept[-1])))
    assert state.step == reached
    assert settings["steps"] == steps
    shutil.copytree(work, whole.with_suffix(".checkpoints"))
    figures = []

    def stop(step, found):
        figures.append(found["loss"])
        if step == reached + 2:
            raise KeyboardInterrupt

    original = train.loop.train
    try:
        train.loop.train = lambda *a: original(*a[:6], lambda s, f: (a[6](s, f), stop(s, f)), a[7])
        assert run_train(folder, backbone, out, *more, "--resume_from_checkpoint", "latest", steps=steps) == 130
    finally:
        train.loop.train = original
    assert not (work / ".checkpoint-x.partial").exists()
    log = log_of(out)
    assert [r["step"] for r in log] == list(range(1, reached + 3))
    assert figures == [r["loss"] for r in log[-2:]]


def _described(folder):
    from safetensors import safe_open

    with safe_open(folder / checkpoint.FILE, framework="pt") as f:
        return json.loads(f.metadata()["state"])["settings"]


def test_two_processes_equal_one(folder, backbone, tmp_path):
    """The same pairs a step, shared by two processes: the same LoRA to 1e-5, written once."""
    more = ("--beta", 100, "--lr_warmup_steps", 0, "--learning_rate", 3e-4, "--eval_steps", 2)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert run_train(folder, backbone, one, *more, "--gradient_accumulation_steps", 4, steps=3) == 0
    argv = arguments(folder, backbone, two, *more, "--report_to", "tensorboard", steps=3)
    done = launch("trainers.dpo.cli", argv, tmp_path / "said")
    assert done.codes == [0, 0], done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    a, b = load_file(one), load_file(two)
    for name, value in a.items():
        assert (b[name] - value).norm() <= 1e-5 * max(1.0, value.norm()), name
    for x, y in zip(log_of(one), log_of(two), strict=True):
        for key in ("loss", "winner_error", "loser_error", "rewards/accuracies", "held_out/accuracy"):
            assert (x.get(key) is None) == (y.get(key) is None)
            if x.get(key) is not None:
                assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), key
    assert list((two.with_suffix(".checkpoints") / "dpo").glob("events*")) or list(
        two.with_suffix(".checkpoints").rglob("events*")
    )


def test_a_signal_stops_all_processes_at_one_step(folder, backbone, tmp_path):
    out = tmp_path / "two.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "trainers.dpo"]
    command = [*launcher, *arguments(folder, backbone, out, steps=5000)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    work = out.with_suffix(".checkpoints")
    end = time.monotonic() + 120
    while time.monotonic() < end and len(log_of(out) if work.is_dir() else []) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    reached = len(log_of(out))
    assert f"saved step {reached} of 5000" in error, error[-2000:]
    assert [p.name for p in checkpoint.list_checkpoints(work)] == [f"checkpoint-{reached}"]


class TestValidation:
    def test_clips_at_three_strengths_with_scores(self, folder, backbone, tmp_path):
        out = tmp_path / "lora.safetensors"
        prompts = tmp_path / "prompts.txt"
        prompts.write_text(PROMPTS[0] + "\n" + PROMPTS[1] + "\n")
        more = ("--validation_steps", 2, "--validation_prompts", prompts, "--validation_seeds", 3, 4,
                "--validation_sampling_steps", 2, "--validation_cfg", 1, "--validation_rewards", "flow_residual",
                "--validation_size", 32, 32, 5)  # fmt: skip
        assert run_train(folder, backbone, out, *more, steps=2) == 0
        work = out.with_suffix(".checkpoints")
        base = sorted((work / "validation" / "step-0").glob("*.safetensors"))
        tuned = sorted((work / "validation" / "step-2").glob("*.safetensors"))
        assert [p.stem for p in base] == ["000-3-at-0", "000-4-at-0", "001-3-at-0", "001-4-at-0"]
        assert len(tuned) == 8
        read = {p.stem: load_file(p)[p.stem] for p in (*base, *tuned)}
        assert all(z.shape == (16, 2, 4, 4) for z in read.values())
        distance = [float((read[f"000-3-at-{s}"] - read["000-3-at-0"]).norm()) for s in ("0.5", "1")]
        assert 0 < distance[0] < distance[1]
        rows = results_log.read(work / "validation" / "step-2" / "clips.jsonl")
        assert {r["strength"] for r in rows} == {0.5, 1.0}
        assert all(math.isfinite(r["scores"]["flow_residual"]) for r in rows)
        assert "validation/flow_residual at 1" in log_of(out)[-1]
        assert "Validation clips of step 2" in (work / "index.html").read_text()

    def test_what_is_missing_is_named(self, folder, backbone, tmp_path, capsys):
        out = tmp_path / "lora.safetensors"
        base = ("--validation_steps", 1)
        unknown = tmp_path / "unknown.txt"
        unknown.write_text("no such prompt\n")
        for more, said in (
            (("--validation_rewards", "geometry"), "needs --vae"),
            (("--validation_rewards", "shell_lcc"), "needs --manifold"),
            (("--validation_prompts", unknown), "'no such prompt' is not embedded"),
            (("--validation_size", 30, 32, 5), "--validation_size"),
        ):
            assert run_train(folder, backbone, out, *base, *more, steps=1) == 2
            assert said in capsys.readouterr().err


    def test_another_runs_clips_are_not_shown(self, folder, backbone, tmp_path):
        out = tmp_path / "lora.safetensors"
        more = ("--validation_steps", 1, "--validation_sampling_steps", 1, "--validation_cfg", 1, "--overwrite")
        assert run_train(folder, backbone, out, *more, steps=2) == 0
        clips = out.with_suffix(".checkpoints") / "validation"
        before = load_file(next((clips / "step-1").glob("*-at-1.safetensors")))
        assert (clips / "step-2").is_dir()
        assert run_train(folder, backbone, out, *more, "--learning_rate", 1e-2, steps=1) == 0
        after = load_file(next((clips / "step-1").glob("*-at-1.safetensors")))
        assert not (clips / "step-2").exists()
        assert any(not torch.equal(after[k], before[k]) for k in after)


def test_image_to_video(embeddings, folder, backbone, tmp_path, capsys):
    """The image's latent and a mask are given to the model, and the first latent frame does not count."""
    from diffusers import WanTransformer3DModel

    vae = ROOT / "benchmarks" / "toy_world" / "weights" / "toy_wan_vae.safetensors"
    root = make_pairs(tmp_path / "pairs", PROMPTS[:4])
    assert run_cache(root, tmp_path / "dpo", embeddings, "--image_to_video") == 2
    assert "needs --vae" in capsys.readouterr().err
    assert run_cache(root, tmp_path / "dpo", embeddings, "--image_to_video", "--vae", vae) == 0
    data = dpo_data.load(tmp_path / "dpo")
    assert len(data.clips) == 12
    draws = Draws(data.rows, NoiseLevels("uniform"), 0, 2, crop=2, from_start=True).of_step(0)
    condition = objective.image_of(data, draws).channels
    assert condition.shape == (2, 20, 2, 4, 4)
    assert condition[:, :4, 0].min() == 1
    assert condition[:, :4, 1].max() == 0
    grey = condition[:, 4:, 1]
    assert (grey[0] - grey[1]).abs().mean() < 0.3 * (condition[0, 4:, 0] - condition[1, 4:, 0]).abs().mean()
    torch.manual_seed(0)
    WanTransformer3DModel(**TINY | {"in_channels": 36}).save_pretrained(tmp_path / "i2v")
    out = tmp_path / "lora.safetensors"
    assert run_train(tmp_path / "dpo", tmp_path / "i2v", out, "--crop_frames", 2, steps=2) == 0
    assert _described(checkpoint.list_checkpoints(out.with_suffix(".checkpoints"))[-1])["masked_frames"] == 1
    assert run_train(folder, tmp_path / "i2v", tmp_path / "a.safetensors", steps=1) == 2
    assert "--image_to_video" in capsys.readouterr().err
    assert run_train(tmp_path / "dpo", backbone, tmp_path / "b.safetensors", steps=1) == 2
    assert "takes no image" in capsys.readouterr().err


class TestRefusals:
    def test_bad_arguments(self, folder, backbone, tmp_path, capsys):
        out = tmp_path / "lora.safetensors"
        for more, said in (
            (("--beta", "often"), "--beta often"),
            (("--beta", 0), "--beta 0"),
            (("--loss", "ipo"), "--loss ipo needs a number"),
            (("--beta_min", 9, "--beta_max", 1), "--beta_min"),
            (("--label_smoothing", 0.5), "label smoothing"),
            (("--cached_reference", "--reference_anchor", 1), "--cached_reference stores"),
            (("--sigma_range", 0.5, 0.2), "--sigma_range"),
            (("--optimizer", "AdamW"), "dotted name"),
            (("--optimizer", "torch.optim.Nothing"), "cannot be imported"),
            (("--optimizer", "torch.nn.Module"), "not a subclass"),
            (("--optimizer_args", "momentum=1"), "refuses its arguments"),
            (("--optimizer_args", "weight_decay"), "KEY=VALUE"),
            (("--rank", 0), "--rank"),
            (("--targets", "w"), "--targets w"),
            (("--held_out", 1), "--held_out"),
            (("--memory_limit_gb", 1e-6), "GiB"),
            (("--report_to", "nothing"), "--report_to nothing"),
        ):
            assert run_train(folder, backbone, out, *more, steps=1) == 2, more
            error = capsys.readouterr().err.strip()
            assert said in error, (more, error)
            assert "\n" not in error
        assert not out.exists()

    def test_a_dry_run_writes_nothing(self, folder, backbone, tmp_path, capsys):
        assert run_train(folder, backbone, tmp_path / "sub" / "lora.safetensors", "--dry_run") == 0
        said = capsys.readouterr().out
        assert "optimiser" in said
        assert "together" in said
        assert not (tmp_path / "sub").exists()

    def test_folders_that_do_not_fit(self, folder, backbone, tmp_path, capsys):
        out = tmp_path / "lora.safetensors"

        def spoiled(name, spoil):
            copy = shutil.copytree(folder, tmp_path / name)
            spoil(copy)
            assert run_train(copy, backbone, out, steps=1) == 2
            return capsys.readouterr().err

        assert "no preferences.jsonl" in spoiled("a", lambda f: (f / "preferences.jsonl").unlink())
        assert "no latents-" in spoiled("b", lambda f: [p.unlink() for p in f.glob("latents-*")])
        assert "line 1" in spoiled("c", lambda f: (f / "preferences.jsonl").write_text('{"prompt": 1}\n'))
        assert "contains no pair" in spoiled("d", lambda f: (f / "preferences.jsonl").write_text(""))
        row = {"prompt": text_id(PROMPTS[0]), "winner": "x", "loser": "y", "shape": SHAPE}
        assert "clip x are missing" in spoiled("e", lambda f: (f / "preferences.jsonl").write_text(json.dumps(row) + "\n"))

    def test_another_latent_space_than_the_models(self, backbone, tmp_path, capsys):
        g, root = torch.Generator().manual_seed(0), tmp_path / "pairs"
        for name in "wl":
            clip(root / f"{name}.safetensors", torch.randn(48, 3, 4, 4, generator=g), WAN22)
        row = {"prompt": PROMPTS[0], "a": "w.safetensors", "b": "l.safetensors", "preference": "a"}
        (root / "pairs.jsonl").write_text(json.dumps(row) + "\n")
        texts = tmp_path / "texts.safetensors"
        prompts = {text_id(PROMPTS[0]): PROMPTS[0]}
        write_embeddings(texts, {k: torch.randn(3, 24) for k in prompts}, WAN22, {}, prompts)
        assert run_cache(root, tmp_path / "dpo", texts) == 0
        assert run_train(tmp_path / "dpo", backbone, tmp_path / "out.safetensors", "--held_out", 0, steps=1) == 2
        assert "holds 'wan22' latents of 48 channels" in capsys.readouterr().err

    def test_all_parameters_of_a_quantised_base(self, folder, backbone, tmp_path, capsys):
        state = load_file(backbone)
        for name in list(state):
            if name.startswith("blocks.") and name.endswith("self_attn.q.weight"):
                state[name] = state[name].to(torch.float8_e4m3fn)
                state[name.replace(".weight", ".scale_weight")] = torch.ones(())
        state["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
        save_file(state, tmp_path / "fp8.safetensors")
        assert run_train(folder, tmp_path / "fp8.safetensors", tmp_path / "m.safetensors", "--full", steps=1) == 2
        assert "is stored in fp8" in capsys.readouterr().err
        assert run_train(folder, tmp_path / "fp8.safetensors", tmp_path / "l.safetensors", steps=1) == 0


def test_an_optimisers_state_survives_as_tensors_and_json(tmp_path):
    p = torch.nn.Parameter(torch.randn(3, 2).bfloat16())
    made = optimisers.make("torch.optim.AdamW", {"betas": (0.8, 0.9), "amsgrad": True}, [p], 1e-2)
    for _ in range(3):
        p.grad = torch.randn(3, 2).bfloat16()
        made.step()
    made.state[p]["exp_avg"] = made.state[p]["exp_avg"].float() + 1e-4
    tensors, note = optimisers.pack(made)
    note = json.loads(json.dumps(note))
    other = optimisers.make("torch.optim.AdamW", {}, [p], 1.0)
    optimisers.unpack(other, {k: v.clone() for k, v in tensors.items()}, note)
    assert other.param_groups[0]["betas"] == (0.8, 0.9)
    for key, value in made.state[p].items():
        assert torch.equal(other.state[p][key], value), key
        assert other.state[p][key].dtype == value.dtype
    made.state[p]["odd"] = object()
    with pytest.raises(checkpoint.CheckpointError, match="AdamW keeps a object"):
        optimisers.pack(made)
    assert optimisers.parse_arguments(["betas=(0.9, 0.95)", "fused=False", "name=x-y"]) == {
        "betas": (0.9, 0.95), "fused": False, "name": "x-y",
    }  # fmt: skip


def test_accuracy_is_over_prompts():
    """Ten right pairs of one prompt count as much as one wrong pair of another."""
    common = {"winner": 0.3, "loser": 0.4, "reference_winner": 0.31, "reference_loser": 0.39, "motion": 1.0,
              "reference_motion": 2.0, "sigma": 0.5}  # fmt: skip
    rows = [common | {"pair": f"a{i}", "prompt": "a", "d": 0.1} for i in range(10)] + [
        common | {"pair": "b", "prompt": "b", "d": -0.1}
    ]
    found = evaluate.figures_of(rows)
    assert found["accuracy"].mean == 0.5
    assert found["accuracy"].n == 2
    assert found["accuracy"].low < 0.15
    assert found["winner"].mean == pytest.approx(-0.01)
    assert found["dynamics"] == 0.5
    assert isinstance(PreferenceLoss().unit(2.0), float)
