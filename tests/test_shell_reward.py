"""trainers.shell_reward: training on a tiny transformer, early stopping, the alarm, resume, bands per sigma, and refusals."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("faiss")

from trainers.kernels.files.latents import write_latents
from trainers.kernels.latent_space import WAN21, WAN22
from trainers.kernels.shell_lcc import manifold as manifolds
from trainers.kernels.shell_lcc.calibration import calibrate
from trainers.kernels.shell_lcc.fit_anchors import fit_anchors
from trainers.kernels.shell_lcc.manifold import ShellManifold
from trainers.kernels.tuning import shell_objective as shell
from trainers.kernels.tuning.noise_levels import UNIFORM, NoiseLevels
from trainers.running import loop as running_loop
from trainers.running import results_log
from trainers.shell_reward import arguments, held_out, objective
from trainers.shell_reward import cli as shell_reward
from trainers.shell_reward.best import BestParameters
from trainers.shell_reward.draws import Draws, start_of, table_of
from trainers.tuning import lora_files
from trainers.wan.dit_keys import of_text_to_video
from trainers.wan.prompts import text_id, write_embeddings

from .test_wan_dit import CONFIG

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [f"a thing number {i}" for i in range(8)]
TINY = CONFIG | {"num_layers": 2}
# Latents [16, 2, 4, 4].
SIZE = ("--size", 32, 32, "--frames", 5)


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


@pytest.fixture(scope="module")
def manifold(tmp_path_factory):
    """Of a curved sheet with thin noise, which the random transformer's predictions are far from."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(3, 16, generator=g)

    def clips(count):
        u = torch.randn(count, 2, 4, 4, 3, generator=g)
        z = torch.tanh(u @ mix) + 0.05 * torch.randn(count, 2, 4, 4, 16, generator=g)
        return z.movedim(-1, 1)

    fitted = clips(40)
    made = ShellManifold(fit_anchors(fitted.movedim(1, -1).reshape(-1, 16), 48, 8), WAN21)
    made.calibration = calibrate(list(made.distance(clips(12))))
    path = tmp_path_factory.mktemp("manifold") / "sheet.safetensors"
    manifolds.save(made, path)
    return path


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Clips with captions."""
    path = tmp_path_factory.mktemp("latents") / "shard.safetensors"
    g = torch.Generator().manual_seed(7)
    clips = {f"clip{i}": torch.randn(16, 2, 4, 4, generator=g) for i in range(8)}
    entries = {k: {"source": k, "video": k, "frames": 5, "caption": PROMPTS[i]} for i, k in enumerate(clips)}
    write_latents(path, clips, WAN21, entries)
    return path


@pytest.fixture
def argv(backbone, embeddings, manifold):
    def made(out, *more, steps=4):
        values = ["train", "--backbone", backbone, "--manifold", manifold, "--embeddings", embeddings, "--output", out, *SIZE,
                  "--rank", 4, "--lora_alpha", 4, "--max_train_steps", steps, "--train_batch_size", 2,
                  "--gradient_accumulation_steps", 2, "--learning_rate", 3e-3, "--held_out", 0.25, "--validation_steps", 2,
                  "--validation_sampling_steps", 2, "--checkpointing_steps", 2, "--save_dtype", "fp32", "--alarm", "off",
                  "--device", "cpu"]  # fmt: skip
        return [str(v) for v in (*values, *more)]

    return made


def log_of(out):
    return results_log.read(out.with_suffix(".checkpoints") / "log.jsonl")


def report_of(out):
    return json.loads((out.with_suffix(".checkpoints") / "report.json").read_text())


class TestTraining:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory, backbone, embeddings, manifold):
        out = tmp_path_factory.mktemp("run") / "lora.safetensors"
        values = ["train", "--backbone", backbone, "--manifold", manifold, "--embeddings", embeddings, "--output", out, *SIZE,
                  "--rank", 4, "--lora_alpha", 4, "--max_train_steps", 24, "--train_batch_size", 4,
                  "--gradient_accumulation_steps", 1, "--learning_rate", 1e-2, "--validation_steps", 6, "--device", "cpu",
                  "--validation_sampling_steps", 2, "--alarm", "warn"]  # fmt: skip
        assert shell_reward.main([str(v) for v in values]) == 0
        return out

    def test_the_loss_and_the_held_out_violation_fall(self, run):
        log = log_of(run)
        assert len(log) == 24
        assert sum(r["loss"] for r in log[-4:]) < 0.95 * sum(r["loss"] for r in log[:4])
        rows = report_of(run)["held_out_over_steps"]
        assert [r["step"] for r in rows] == [0, 6, 12, 18, 24]
        assert rows[-1]["violation"] < 0.95 * rows[0]["violation"]
        assert log[5]["held_out/violation"] == pytest.approx(rows[1]["violation"])
        for row in log:
            assert row["above"] + row["below"] <= 1
            assert 0.7 <= row["sigma"] <= 1

    def test_the_best_step_is_written_with_the_keys_of_comfyui(self, run):
        found = report_of(run)
        best = min(found["held_out_over_steps"], key=lambda r: r["violation"])
        assert found["written_step"] == best["step"] > 0
        tensors = load_file(run)
        kinds = {k.split("blocks.")[1].split(".", 1)[1] for k in tensors if k.startswith("diffusion_model.blocks.")}
        attentions = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"]
        assert kinds == {f"{m}.{s}" for m in attentions for s in ("lora_A.weight", "lora_B.weight", "alpha")}
        assert len(tensors) == 2 * 8 * 3
        record = json.loads(lora_files.read_modules(run)[1][lora_files.RECORD])
        assert record["trainer"] == "shell_reward"
        assert record["steps"] == best["step"]
        assert record["metrics"]["base"]["step"] == 0
        assert str(run.parent) not in json.dumps(record)

    def test_a_page_and_clips_of_the_base_and_the_best_step(self, run):
        work = run.with_suffix(".checkpoints")
        page = (work / "index.html").read_text()
        assert "Held-out violation of the band" in page
        assert "http" not in page.split("<body>")[1]
        step = report_of(run)["written_step"]
        strengths = {c["strength"] for c in report_of(run)["clips"] if c["step"] == step}
        assert strengths == {0.5, 1.0}
        assert (work / "validation" / "step-0").is_dir()

    def test_eval_finds_the_gain_again(self, run, backbone, manifold, embeddings, tmp_path, capsys):
        values = ["eval", "--backbone", backbone, "--manifold", manifold, "--embeddings", embeddings, "--lora", run, *SIZE,
                  "--validation_sampling_steps", 2, "--eval_levels", 2, "--eval_noises", 2, "--json", tmp_path / "e.json",
                  "--validation_seeds", 0, 1, 2, "--device", "cpu"]  # fmt: skip
        assert shell_reward.main([str(v) for v in values]) == 0
        assert "held-out clips, base -> LoRA" in capsys.readouterr().out
        found = json.loads((tmp_path / "e.json").read_text())
        assert found["change"]["violation"]["mean"] < 0
        assert found["change"]["violation"]["n"] == found["clips"] == 3
        for row in found["predictions"]:
            assert row["tuned"]["distance"] != row["base"]["distance"]
        zero = [*values, "--strength", 0]
        assert shell_reward.main([str(v) for v in zero]) == 0
        assert json.loads((tmp_path / "e.json").read_text())["change"]["violation"]["mean"] == 0

    def test_merge_writes_a_checkpoint(self, run, backbone, tmp_path):
        values = ["merge", "--backbone", backbone, "--lora", run, "--output", tmp_path / "merged.safetensors"]
        assert shell_reward.main([str(v) for v in values]) == 0
        a, b = load_file(backbone), load_file(tmp_path / "merged.safetensors")
        assert sum(not torch.equal(a[k], b[k]) for k in a) == 16


@pytest.mark.parametrize("kind", ["distance", "mean_tau"])
def test_published_objectives_train(argv, tmp_path, kind):
    out = tmp_path / "lora.safetensors"
    assert shell_reward.main(argv(out, "--objective", kind, "--validation_steps", 0, steps=8)) == 0
    log = log_of(out)
    assert log[-1]["loss"] < log[0]["loss"]


def test_the_anchor_holds_predictions_near_the_base(argv, tmp_path):
    changes = []
    for weight in (0, 1000):
        out = tmp_path / f"{weight}.safetensors"
        more = ("--anchor_weight", weight, "--anchor_margin", 0, "--validation_steps", 0)
        assert shell_reward.main(argv(out, *more, steps=8)) == 0
        changes.append(log_of(out)[-1]["change_norm"])
    assert "anchor" in log_of(out)[-1]
    assert changes[1] < changes[0]


@pytest.mark.parametrize("criterion", ["samples", "predictions"])
def test_resume_ends_with_the_tensors_of_an_unbroken_run(argv, tmp_path, monkeypatch, criterion):
    whole, more = tmp_path / "whole.safetensors", ("--lora_dropout", 0.1, "--criterion", criterion)
    assert shell_reward.main(argv(whole, *more, steps=6)) == 0
    broken = tmp_path / "broken.safetensors"
    real = objective.ShellObjective.accumulate

    def stop(self, step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(objective.ShellObjective, "accumulate", stop)
        assert shell_reward.main(argv(broken, *more, steps=6)) == 130
    assert not broken.exists()
    assert shell_reward.main(argv(broken, *more, "--resume_from_checkpoint", "latest", steps=6)) == 0
    a, b = load_file(whole), load_file(broken)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert log_of(whole) == log_of(broken)
    assert report_of(whole)["held_out_over_steps"] == report_of(broken)["held_out_over_steps"]
    names = {p.name for p in broken.with_suffix(".checkpoints").glob("checkpoint-*")}
    assert names == {"checkpoint-5", "checkpoint-6"}


def test_a_killed_run_goes_on_and_writes_the_same(argv, tmp_path):
    """kill -9 in the middle, the best step before it."""
    whole = tmp_path / "whole.safetensors"
    assert shell_reward.main(argv(whole, steps=6)) == 0
    out = tmp_path / "killed.safetensors"
    code = (
        "import os, signal, sys\nfrom trainers.shell_reward import cli, objective\n"
        "real = objective.ShellObjective.accumulate\n"
        "def stop(self, step):\n    if step == 5: os.kill(os.getpid(), signal.SIGKILL)\n    return real(self, step)\n"
        "objective.ShellObjective.accumulate = stop; cli.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv(out, steps=6)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert shell_reward.main(argv(out, "--resume_from_checkpoint", "latest", steps=6)) == 0
    a, b = load_file(whole), load_file(out)
    assert all(torch.equal(a[k], b[k]) for k in a)


class TestStopping:
    def rows(self, violation, laplacian=1.0, high_frequency=0.5):
        row = {"violation": violation, "outside": 0.1, "below": 0.0, "distance": 1.0, "rms": 1.0, "motion": 1.0}
        return [row | {"name": str(i), "laplacian": laplacian, "high_frequency": high_frequency} for i in range(2)]

    def objective(self, measured, **stopping):
        """Of measurements {step: rows}; `kept` lists the steps that were kept."""
        kept = []
        made = objective.ShellObjective(
            None, objective.ShellSettings(), None, None, measure=measured.get, base=self.rows(1.0),
            stopping=objective.Stopping(**{"every": 1, "last": 99} | stopping), keep=kept.append,
        )  # fmt: skip
        return made, kept

    def test_it_stops_after_measurements_without_gain_and_keeps_the_best(self):
        measured = {i: self.rows(v) for i, v in enumerate([0.8, 0.6, 0.7, 0.65, 0.61, 0.1], 1)}
        made, kept = self.objective(measured, patience=3)
        for step in range(1, 6):
            assert made.stop_reason() is None
            made._judge(step, held_out.summary(measured[step], made.base))
        assert kept == [1, 2]
        assert made.best.step == 2
        assert "0.6100" in made.stop_reason()
        assert "step 2 in 3 measurements" in made.stop_reason()

    def test_noise_stops_it_at_once_and_is_never_the_best(self):
        made, kept = self.objective({}, patience=9)
        made._judge(1, held_out.summary(self.rows(0.8), made.base))
        made._judge(2, held_out.summary(self.rows(0.1, laplacian=1.0, high_frequency=0.9), made.base))
        assert kept == [1]
        assert "over-optimised" in made.stop_reason()
        assert "1.8 times the base's" in made.stop_reason()
        assert made.alarms[0]["step"] == 2

    @pytest.mark.parametrize(("alarm", "count"), [("warn", 1), ("off", 0)])
    def test_the_alarm_can_be_ignored(self, alarm, count):
        made, kept = self.objective({}, patience=9, alarm=alarm)
        made._judge(1, held_out.summary(self.rows(0.1, high_frequency=0.9), made.base))
        assert made.stop_reason() is None
        assert len(made.alarms) == count
        assert kept == [1]

    def test_its_state_survives_a_checkpoint(self):
        made, _ = self.objective({}, patience=3)
        made._judge(1, held_out.summary(self.rows(0.8), made.base))
        made._judge(2, held_out.summary(self.rows(0.9), made.base))
        again, _ = self.objective({}, patience=3)
        again.load_state_dict(json.loads(json.dumps(made.state_dict())))
        assert again.best == made.best

    def test_a_run_stops_and_writes_its_best_step(self, argv, tmp_path, monkeypatch, capsys):
        """The violation is made to rise after step 4."""
        real = held_out.figures_of
        calls = []

        def rising(name, z, manifold, target):
            calls.append(name)
            step = (len(calls) - 1) // 2 * 2
            return real(name, z, manifold, target) | {"violation": abs(step - 4) + 1.0}

        monkeypatch.setattr(held_out, "figures_of", rising)
        out = tmp_path / "lora.safetensors"
        assert shell_reward.main(argv(out, "--patience", 2, steps=20)) == 0
        said = capsys.readouterr().out
        assert "stopped at step 8" in said
        assert "of step 4" in said
        found = report_of(out)
        assert found["written_step"] == 4
        best = load_file(out.with_suffix(".checkpoints") / "best-4.safetensors")
        written = lora_files.load(out).tensors
        for k, v in best.items():
            torch.testing.assert_close(v, written[k])

    def test_nothing_is_written_where_nothing_is_better(self, argv, tmp_path, monkeypatch, capsys):
        real, calls = held_out.figures_of, []

        def worse(*given):
            calls.append(1)
            return real(*given) | {"violation": float(len(calls))}

        monkeypatch.setattr(held_out, "figures_of", worse)
        out = tmp_path / "lora.safetensors"
        assert shell_reward.main(argv(out)) == 1
        assert "no measured step was better than the base" in capsys.readouterr().out
        assert not out.exists()

    def test_files_of_the_best_are_kept_for_each_checkpoint(self, tmp_path):
        weight = torch.nn.Parameter(torch.zeros(2))
        best = BestParameters(tmp_path, {"w": weight})
        for step in (2, 4, 6, 8):
            with torch.no_grad():
                weight.fill_(step)
            best.keep(step)
            if step in (4, 6):
                (tmp_path / f"checkpoint-{step + 1}").mkdir()
                (tmp_path / f"checkpoint-{step + 1}" / "state.safetensors").touch()
        assert {p.name for p in tmp_path.glob("best-*")} == {f"best-{s}.safetensors" for s in (4, 6, 8)}
        again = BestParameters(tmp_path, {"w": weight})
        again.remove_after(7)
        again.restore(6)
        assert weight.tolist() == [6, 6]
        assert not (tmp_path / "best-8.safetensors").exists()


class TestStarts:
    def test_noise_is_pure_and_noised_is_between(self):
        draws = Draws([("p", None), ("q", None)], NoiseLevels(UNIFORM, low=0.7, high=1.0), 3, 4)
        x, sigma = start_of(draws.of_step(0), (2, 1, 8, 8), None)
        assert float(x.std()) == pytest.approx(1, abs=0.1)
        assert bool(((sigma >= 0.7) & (sigma <= 1)).all())
        z = torch.full((2, 1, 8, 8), 10.0)
        noised = Draws([("p", "a")], NoiseLevels(UNIFORM, low=0.5, high=0.51), 3, 2)
        x, sigma = start_of(noised.of_step(0), z.shape, {"a": z}.get)
        assert float(x.mean()) == pytest.approx(5, abs=0.3)

    def test_all_prompts_come_before_one_comes_again_and_steps_differ(self):
        draws = Draws([(str(i), None) for i in range(6)], NoiseLevels(UNIFORM, low=0.7, high=1.0), 0, 3)
        seen = [d.prompt for step in range(2) for d in draws.of_step(step)]
        assert sorted(seen) == [str(i) for i in range(6)]
        assert len({d.seed for step in range(4) for d in draws.of_step(step)}) == 12
        assert draws.of_step(2) == draws.of_step(2)
        table = table_of([("p", None)], (0.7, 1.0), 3, 0, "x")
        assert [d.sigma for d in table] == [0.7] * 3 + [1.0] * 3
        assert len({d.seed for d in table}) == 6

    def test_noised_clips_train_with_their_captions(self, argv, latents, tmp_path):
        out = tmp_path / "lora.safetensors"
        assert shell_reward.main(argv(out, "--start", "noised", "--latents", latents, "--criterion", "predictions")) in (0, 1)
        assert report_of(out)["held_out_over_steps"][0]["clips"] == 24
        assert report_of(out)["record"]["start"] == "noised"


class TestRadius:
    def test_a_band_per_sigma_is_the_base_s_own(self, argv, tmp_path, manifold):
        out = tmp_path / "lora.safetensors"
        more = ("--radius", "per_sigma", "--radius_bins", 3, "--radius_predictions", 8, "--criterion", "predictions")
        assert shell_reward.main(argv(out, *more)) in (0, 1)
        table = json.loads((out.with_suffix(".checkpoints") / "radius.json").read_text())["table"]
        found = shell.SigmaTargets.from_json(table)
        assert found.sigmas == pytest.approx((0.75, 0.85, 0.95))
        file = manifolds.load(manifold).radius
        # A random transformer's predictions are far from the sheet, so its own radius is another one.
        assert min(c.radius for c in found.calibrations) > 2 * file
        # By its own band the base violates little: 10 % of the tokens are outside by definition.
        first = report_of(out)["held_out_over_steps"][0]
        assert first["outside"] < 0.35
        assert log_of(out)[0]["above"] < 0.35
        plain = tmp_path / "file.safetensors"
        assert shell_reward.main(argv(plain, "--criterion", "predictions")) in (0, 1)
        assert report_of(plain)["held_out_over_steps"][0]["outside"] > 0.9

    def test_it_is_measured_once(self, argv, tmp_path, monkeypatch):
        out = tmp_path / "lora.safetensors"
        more = ("--radius", "per_sigma", "--radius_bins", 2, "--radius_predictions", 2, "--validation_steps", 0)
        assert shell_reward.main(argv(out, *more)) == 0
        monkeypatch.setattr(shell.SigmaTargets, "measured", lambda *a: pytest.fail("measured again"))
        assert shell_reward.main(argv(out, *more, "--overwrite")) == 0


def test_all_parameters_can_be_trained(argv, tmp_path, backbone):
    out = tmp_path / "model.safetensors"
    assert shell_reward.main(argv(out, "--full", "--learning_rate", 1e-4)) in (0, 1)
    assert report_of(out)["record"]["trainer"] == "shell_reward"
    if out.exists():
        assert load_file(out).keys() == load_file(backbone).keys()


def test_a_dry_run_prints_the_plan_and_writes_nothing(argv, tmp_path, capsys):
    out = tmp_path / "lora.safetensors"
    assert shell_reward.main(argv(out, "--dry_run")) == 0
    said = capsys.readouterr().out
    assert "manifold" in said
    assert "together" in said
    assert list(tmp_path.iterdir()) == []


def test_nan_steps_are_skipped_and_end_the_run(argv, tmp_path, monkeypatch, capsys):
    out = tmp_path / "lora.safetensors"
    real = shell.shell_loss
    calls = []

    def broken(*given):
        calls.append(1)
        loss, d = real(*given)
        return (loss * math.nan if len(calls) in (3, 4) else loss), d

    monkeypatch.setattr(shell, "shell_loss", broken)
    assert shell_reward.main(argv(out)) == 0
    assert "1 steps were skipped" in capsys.readouterr().out
    monkeypatch.setattr(shell, "shell_loss", lambda *given: (real(*given)[0] * math.nan, real(*given)[1]))
    steps = running_loop.MAX_NONFINITE_STEPS + 1
    assert shell_reward.main(argv(tmp_path / "b.safetensors", "--validation_steps", 0, steps=steps)) == 2
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_other_layouts(argv, tmp_path, format):
    out = tmp_path / "lora.safetensors"
    assert shell_reward.main(argv(out, "--format", format, "--validation_steps", 0, steps=1)) == 0
    prefix = {"kohya": "lora_unet_blocks_", "peft": "transformer.blocks."}[format]
    assert all(k.startswith(prefix) for k in load_file(out))


class TestRefusals:
    def refused(self, capsys, values, *words):
        assert shell_reward.main([str(v) for v in values]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ")
        assert "\n" not in said
        for word in words:
            assert word in said, said

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (("--size", 30, 32), ["--size 30 32", "multiples of 16"]),
            (("--frames", 6), ["--frames 6", "4n+1"]),
            (("--sigma_range", 0, 1), ["--sigma_range"]),
            (("--sigma_range", 0.9, 0.8), ["--sigma_range"]),
            (("--start", "noised"), ["--latents"]),
            (("--latents", "x"), ["--start noised"]),
            (("--patience", -1), ["--patience must be 0 or more"]),
            (("--held_out", 1), ["--held_out"]),
            (("--full", "--anchor_weight", 1), ["--anchor_weight", "--full"]),
            (("--full", "--format", "kohya"), ["--format kohya"]),
            (("--optimizer", "torch.optim.Nothing"), ["torch.optim.Nothing"]),
            (("--manifold", "missing.safetensors"), ["missing.safetensors"]),
            (("--backbone", "missing.safetensors"), ["missing.safetensors"]),
            (("--validation_cfg", 0.5), ["--validation_cfg"]),
        ],
    )
    def test_of_arguments(self, argv, tmp_path, capsys, more, words):
        self.refused(capsys, argv(tmp_path / "lora.safetensors", *more), *words)

    def test_of_a_manifold_of_another_space(self, argv, tmp_path, capsys):
        path = tmp_path / "other.safetensors"
        made = ShellManifold(fit_anchors(torch.randn(60, 48), 8, 4), WAN22)
        made.calibration = calibrate(list(made.distance(torch.randn(2, 48, 2, 4, 4))))
        manifolds.save(made, path)
        more = ("--manifold", path)
        self.refused(capsys, argv(tmp_path / "lora.safetensors", *more), "other.safetensors", "48 channels", "wan")

    def test_of_a_manifold_without_calibration(self, argv, tmp_path, capsys):
        path = tmp_path / "raw.safetensors"
        manifolds.save(ShellManifold(fit_anchors(torch.randn(60, 16), 8, 4), WAN21), path)
        out = tmp_path / "lora.safetensors"
        self.refused(capsys, argv(out, "--manifold", path), "raw", "no calibration")
        more = ("--manifold", path, "--objective", "distance", "--validation_steps", 0)
        assert shell_reward.main(argv(out, *more, steps=1)) == 0

    def test_of_missing_prompts(self, argv, tmp_path, capsys):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("something else\n")
        out = tmp_path / "lora.safetensors"
        self.refused(capsys, argv(out, "--prompts", prompts), "lacks 1 prompts", "'something else'")
        prompts.write_text(PROMPTS[0] + "\n")
        self.refused(capsys, argv(out, "--prompts", prompts), "needs two prompts")

    def test_of_other_settings_and_of_an_earlier_run(self, argv, tmp_path, capsys):
        out = tmp_path / "lora.safetensors"
        assert shell_reward.main(argv(out, "--validation_steps", 0)) == 0
        out.unlink()
        self.refused(capsys, argv(out, "--validation_steps", 0), "checkpoints of an earlier run")
        more = ("--resume_from_checkpoint", "latest", "--validation_steps", 0, "--objective", "distance")
        self.refused(capsys, argv(out, *more), "objective band against distance")

    def test_of_clips_without_captions(self, argv, tmp_path, capsys):
        path = tmp_path / "shard.safetensors"
        write_latents(path, {"a": torch.randn(16, 2, 4, 4)}, WAN21, {"a": {"source": "a", "video": "a", "frames": 5}})
        self.refused(capsys, argv(tmp_path / "o.safetensors", "--start", "noised", "--latents", path), "has no caption")

    def test_of_too_little_memory(self, argv, tmp_path, capsys):
        self.refused(capsys, argv(tmp_path / "o.safetensors", "--memory_limit_gb", 1e-6), "GiB are free")


def test_an_expert_has_its_own_range():
    class Args:
        sigma_range, expert = None, "high_noise"

    assert (arguments.levels_of(Args).low, arguments.levels_of(Args).high) == (0.875, 1.0)
    Args.expert = None
    assert (arguments.levels_of(Args).low, arguments.levels_of(Args).high) == (0.7, 1.0)


def test_validation_prompts_are_measured_and_not_trained_on(argv, tmp_path, monkeypatch):
    prompts = tmp_path / "measured.txt"
    prompts.write_text(f"{PROMPTS[0]}\n{PROMPTS[3]}\n")
    seen = set()
    real = objective.ShellObjective._backward
    monkeypatch.setattr(objective.ShellObjective, "_backward", lambda s, g: seen.update(d.prompt for d in g) or real(s, g))
    out = tmp_path / "lora.safetensors"
    more = ("--validation_prompts", prompts, "--held_out", 0, "--validation_seeds", 1, 2)
    assert shell_reward.main(argv(out, *more)) in (0, 1)
    assert seen == {text_id(p) for p in PROMPTS} - {text_id(PROMPTS[0]), text_id(PROMPTS[3])}
    assert report_of(out)["held_out_over_steps"][0]["clips"] == 4
    assert {c["prompt"] for c in report_of(out)["clips"]} == {PROMPTS[0], PROMPTS[3]}


def test_a_config_file_and_an_unknown_logger(argv, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text('report_to = "nothing"\nvalidation_steps = 0\n')
    assert shell_reward.main(argv(tmp_path / "o.safetensors", "--config", config)) == 2
    assert "--report_to nothing" in capsys.readouterr().err
