"""`python -m trainers.shell_lcc fit`, eval and info, through main() as a user runs them, on synthetic sheet clips."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.sheets import sheet_clips
from trainers.kernels.files import header as formats
from trainers.kernels.latent_space import WAN21, WAN22
from trainers.kernels.shell_lcc import fit_predictor
from trainers.kernels.shell_lcc.diagnostics import add_noise, blur, half_blur, high_frequency_share
from trainers.kernels.shell_lcc.manifold import load
from trainers.kernels.shell_lcc.predictor import Predictor
from trainers.running import checkpoint
from trainers.running.loop import CheckpointOptions
from trainers.shell_lcc import cli as shell_lcc
from trainers.shell_lcc import fit as fit_command
from trainers.shell_lcc import train_predictor

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--coder", "predictor", "--num_bases", "32", "--hidden_dim", "16", "--lcc_steps", "12", "--shell_steps", "8"]
SMALL += ["--train_batch_size", "256", "--validation_steps", "0", "--device", "cpu"]


def write_shard(path, clips, space=WAN21, entries=None):
    config = {"state": "normalised", "clips": entries or {}, "videos": {}}
    formats.write(path, clips, formats.Header("latents", space, config, {}, {}))
    return str(path)


def sheets(count, shape, seed=5):
    return {f"clip{i:02d}": z for i, z in enumerate(sheet_clips(count, shape, seed=seed))}


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A folder with two shards of twelve clips in all."""
    folder = tmp_path_factory.mktemp("latents")
    clips = sheets(12, (3, 16, 24))
    write_shard(folder / "a.safetensors", {k: clips[k] for k in list(clips)[:7]})
    write_shard(folder / "b.safetensors", {k: clips[k] for k in list(clips)[7:]})
    return str(folder)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Four small clips, for what only needs to run."""
    return write_shard(tmp_path_factory.mktemp("few") / "few.safetensors", sheets(4, (3, 16, 16)))


def tensors_of(path):
    return formats.read(path, "shell_lcc")[0]


def assert_same_tensors(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def checkpoints(folder):
    return [p.name for p in checkpoint.list_checkpoints(Path(folder))]


FITS = {
    "anchors": [],
    "predictor": ["--coder", "predictor", "--num_bases", "256", "--hidden_dim", "128", "--lcc_steps", "250",
                  "--shell_steps", "120", "--train_batch_size", "1024", "--validation_steps", "185"],
}  # fmt: skip


@pytest.fixture(scope="session", params=FITS)
def fitted(request, latents, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param) / "sheet.safetensors"
    torch.set_num_threads(1)
    arguments = ["fit", "--latents", latents, "--output", str(output), "--held_out", "0.25", "--seed", "1", "--device", "cpu"]
    assert shell_lcc.main([*arguments, *FITS[request.param]]) == 0
    return output


def test_acceptance_on_held_out_clips(fitted, record_property):
    """Over-smoothing lies inside the shell and noise outside it, and only projection repairs the first."""
    manifold = load(fitted)
    held = manifold.provenance["held_out_clips"]
    clips = sheets(12, (3, 16, 24))
    assert len(held) == 3
    for name in held:
        clip = clips[name]
        soft, noisy = half_blur(clip), add_noise(clip, seed=3)
        d = [float(manifold.distance(z[None]).mean()) for z in (blur(clip), clip, noisy)]
        assert d[0] < d[1] < d[2]
        share = {n: high_frequency_share(z) for n, z in (("soft", soft), ("noisy", noisy))}
        moved = {
            (n, m): high_frequency_share(manifold.pull(z[None], m)[0])
            for n, z in (("soft", soft), ("noisy", noisy)) for m in ("project", "minimise")
        }  # fmt: skip
        record_property(name, json.dumps({"distance": d, **share, **{"-".join(k): v for k, v in moved.items()}}))
        assert moved["soft", "project"] > share["soft"]
        assert moved["noisy", "project"] < share["noisy"]
        assert moved["soft", "minimise"] < share["soft"]
        assert moved["noisy", "minimise"] < share["noisy"]
    metrics = manifold.metrics
    assert metrics["ordered"] == 1.0
    assert metrics["auroc_clean_over_blurred"] > 0.85
    assert metrics["auroc_noisy_over_clean"] > 0.8
    assert metrics["reconstruction"]["relative"] < 0.15
    assert metrics["codebook"]["dead"] < 0.15 * metrics["codebook"]["bases"]
    assert metrics["outside_band"] == pytest.approx(0.1, abs=0.01)


def test_header_says_where_the_manifold_comes_from(fitted, latents):
    manifold = load(fitted)
    facts = manifold.provenance
    assert facts["created_by"].startswith("intrinsic-reward ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", facts["created"])
    assert (facts["seed"], facts["clips"], facts["fitted_clips"], facts["tokens"]) == (1, 12, 9, 9 * 3 * 16 * 24)
    assert facts["resolutions"] == ["192x128"]
    assert facts["latent_space"] == "wan21"
    assert facts["command"].startswith("python -m trainers.shell_lcc fit --latents ")
    assert str(Path(latents).parent) not in json.dumps(facts)
    assert manifold.metrics["tokens"] == facts["held_out_tokens"] == 3 * 3 * 16 * 24
    assert manifold.calibration.token_quantile(0.5) == pytest.approx(manifold.metrics["distance"]["median"])
    assert manifold.metrics["distance"]["p25"] < manifold.radius < manifold.metrics["distance"]["p95"]


def test_fewer_bases_when_tokens_are_few(fitted):
    bases = load(fitted).coder.config()["num_bases"]
    assert bases % 16 == 0
    assert bases * 39 <= 9 * 3 * 16 * 24


def test_eval_writes_exactly_the_promised_keys(fitted, latents, tmp_path, capsys):
    out = tmp_path / "sub" / "figures.json"
    assert shell_lcc.main(["eval", "--manifold", str(fitted), "--latents", latents, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert set(report) == {"mean", "median", "p05", "p95", "tokens", "outside_band", "clips"}
    assert [c["id"] for c in report["clips"]] == sorted(sheets(12, (3, 16, 24)))
    assert report["tokens"] == sum(c["tokens"] for c in report["clips"]) == 12 * 3 * 16 * 24
    assert report["mean"] == pytest.approx(sum(c["mean"] for c in report["clips"]) / 12)
    assert report["p05"] < report["median"] < report["p95"]
    assert [p.name for p in out.parent.iterdir()] == ["figures.json"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 14
    assert printed[-1].split()[0] == "all"
    assert len({len(line) for line in printed}) == 1


def test_info_is_readable(fitted, capsys):
    assert shell_lcc.main(["info", str(fitted)]) == 0
    text = capsys.readouterr().out
    for part in ("wan21", "Calibration", "radius", "AUROC noisy over clean", "held out clips", "intrinsic-reward", "bases"):
        assert part in text
    assert text.isascii()


def test_anchors_are_the_same_from_the_same_seed(few, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        output = str(tmp_path / f"{name}.safetensors")
        assert shell_lcc.main(["fit", "--latents", few, "--output", output, "--seed", seed]) == 0
    assert_same_tensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(AssertionError):
        assert_same_tensors(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


@pytest.fixture(scope="session")
def unbroken(few, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run.safetensors"
    assert shell_lcc.main(["fit", "--latents", few, "--output", str(output), *SMALL, "--checkpointing_steps", "6"]) == 0
    return output


def test_predictor_is_the_same_from_the_same_seed(few, tmp_path, unbroken):
    output = tmp_path / "again.safetensors"
    assert shell_lcc.main(["fit", "--latents", few, "--output", str(output), *SMALL]) == 0
    assert_same_tensors(unbroken, output)


def test_checkpoints_are_rotated(unbroken):
    assert checkpoints(unbroken.with_suffix(".checkpoints")) == ["checkpoint-18", "checkpoint-20"]


def test_checkpoints_keep_their_tensor_names(unbroken):
    """Names in the file are its format: a renamed prefix would make earlier checkpoints unreadable."""
    state = load_file(unbroken.with_suffix(".checkpoints") / "checkpoint-20" / "state.safetensors")
    trained = [f"surface_head.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    moments = {f"adam.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in trained}
    assert state.keys() == {f"coder.{name}" for name in Predictor(16, 32, 16).state_dict()} | moments


@pytest.mark.parametrize("at", [5, 12, 15, 20])
def test_interrupted_and_resumed_equals_unbroken(few, tmp_path, unbroken, monkeypatch, capsys, at):
    """At 5 in the first stage, 12 between the stages, 15 in the second, 20 after the last step."""
    output = tmp_path / "run.safetensors"
    command = ["fit", "--latents", few, "--output", str(output), *SMALL]
    with monkeypatch.context() as patch:

        def interrupt(self, step, stage, losses):
            if step == at:
                raise KeyboardInterrupt

        patch.setattr(fit_command._Log, "step", interrupt)
        assert shell_lcc.main(command) == 130
    assert not output.exists()
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run.checkpoints") == [f"checkpoint-{at}"]
    assert shell_lcc.main([*command, "--resume_from_checkpoint", "latest"]) == 0
    assert_same_tensors(unbroken, output)


def test_a_real_signal_ends_after_a_whole_step(few, tmp_path, unbroken, monkeypatch):
    output = tmp_path / "run.safetensors"
    command = ["fit", "--latents", few, "--output", str(output), *SMALL]
    with monkeypatch.context() as patch:
        honest = fit_predictor.lcc_loss

        def interrupted(*args):
            if not (tmp_path / "sent").exists():
                (tmp_path / "sent").touch()
                signal.raise_signal(signal.SIGINT)
            return honest(*args)

        patch.setattr(fit_predictor, "lcc_loss", interrupted)
        assert shell_lcc.main(command) == 130
    assert checkpoints(tmp_path / "run.checkpoints") == ["checkpoint-1"]
    folder = str(tmp_path / "run.checkpoints" / "checkpoint-1")
    assert shell_lcc.main([*command, "--resume_from_checkpoint", folder]) == 0
    assert_same_tensors(unbroken, output)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_refuses_other_settings(few, tmp_path, unbroken, capsys):
    folder = str(unbroken.with_suffix(".checkpoints") / "checkpoint-18")
    command = ["fit", "--latents", few, "--output", str(tmp_path / "x.safetensors"), *SMALL]
    assert shell_lcc.main([*command, "--seed", "9", "--learning_rate", "0.5", "--resume_from_checkpoint", folder]) == 2
    message = capsys.readouterr().err
    assert "seed 0 against 9" in message
    assert "learning_rate 0.001 against 0.5" in message


def test_damaged_checkpoint_is_named(few, tmp_path, capsys):
    broken = tmp_path / "checkpoint-3"
    broken.mkdir()
    (broken / "state.safetensors").write_bytes(b"rubbish")
    command = ["fit", "--latents", few, "--output", str(tmp_path / "x.safetensors"), *SMALL]
    assert shell_lcc.main([*command, "--resume_from_checkpoint", str(broken)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_fresh_run_does_not_mix_with_old_checkpoints(few, tmp_path, capsys):
    output = tmp_path / "run.safetensors"
    command = ["fit", "--latents", few, "--output", str(output), *SMALL]
    assert shell_lcc.main(command) == 0
    output.unlink()
    assert shell_lcc.main(command) == 2
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert shell_lcc.main([*command, "--overwrite", "--shell_steps", "5"]) == 0
    assert checkpoints(tmp_path / "run.checkpoints") == ["checkpoint-17"]


def test_latest_without_checkpoints_begins(few, tmp_path, unbroken, capsys):
    output = tmp_path / "run.safetensors"
    command = ["fit", "--latents", few, "--output", str(output), *SMALL, "--resume_from_checkpoint", "latest"]
    assert shell_lcc.main(command) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert_same_tensors(unbroken, output)


def poison(monkeypatch, bad_calls):
    """The first stage's loss becomes NaN on the calls with these numbers."""
    honest, calls = fit_predictor.lcc_loss, [0]

    def sometimes(*args):
        calls[0] += 1
        loss = honest(*args)
        return loss._replace(total=loss.total * float("nan")) if calls[0] in bad_calls else loss

    monkeypatch.setattr(fit_predictor, "lcc_loss", sometimes)


def test_non_finite_steps_are_skipped_and_counted(few, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 7})
    output = tmp_path / "run.safetensors"
    assert shell_lcc.main(["fit", "--latents", few, "--output", str(output), *SMALL]) == 0
    manifold = load(output)
    assert manifold.metrics["fit"]["skipped_steps"] == 3
    assert manifold.coder.predictor[1].num_batches_tracked == 9


def test_too_many_non_finite_steps_abort(few, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(3, 10**6))
    monkeypatch.setattr(train_predictor, "MAX_NONFINITE_STEPS", 4)
    output = tmp_path / "run.safetensors"
    assert shell_lcc.main(["fit", "--latents", few, "--output", str(output), *SMALL]) == 2
    message = capsys.readouterr().err
    assert "4 steps in a row" in message
    assert "--learning_rate" in message
    assert not output.exists()


def test_held_out_figures_are_printed_and_logged(few, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    output = tmp_path / "run.safetensors"
    command = ["fit", "--latents", few, "--output", str(output), *SMALL, "--validation_steps", "10"]
    assert shell_lcc.main([*command, "--report_to", "tensorboard", "--gradient_accumulation_steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "step 10 (lcc): held-out reconstruction" in printed
    assert re.search(r"step 20 \(shell\): .* AUROC clean over blurred 0\.\d+", printed)
    assert list((tmp_path / "run.checkpoints").rglob("events*"))


def test_mixed_precision_is_for_the_network_alone(few, tmp_path, monkeypatch):
    """The losses are differences of large numbers: in bf16 they would be noise."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    weights, loss, seen = Predictor.weights, fit_predictor.lcc_loss, set()

    def network(self, z):
        seen.add(("network", torch.is_autocast_enabled("cpu")))
        return weights(self, z)

    def losses(coder, z, w, *rest):
        seen.add(("loss", torch.is_autocast_enabled("cpu") or w.dtype != torch.float32))
        return loss(coder, z, w, *rest)

    monkeypatch.setattr(Predictor, "weights", network)
    monkeypatch.setattr(fit_predictor, "lcc_loss", losses)
    output = tmp_path / "run.safetensors"
    try:
        assert shell_lcc.main(["fit", "--latents", few, "--output", str(output), *SMALL, "--mixed_precision", "bf16"]) == 0
    finally:
        AcceleratorState._reset_state(True)
    assert ("network", True) in seen
    assert ("loss", False) in seen
    assert ("loss", True) not in seen
    kept = {k: t.dtype for k, t in tensors_of(output).items() if k not in ("radius", "predictor.1.num_batches_tracked")}
    assert set(kept.values()) == {torch.float32}
    assert load(output).metrics["distance"]["median"] > 0


def test_epochs_go_through_every_token_once():
    settings = make_settings(batch=5, processes=2)
    ranks = [train_predictor.Batches(100, settings, "lcc", rank) for rank in (0, 1)]
    seen = torch.cat([ranks[i % 2][i // 2] for i in range(20)])
    assert sorted(seen.tolist()) == list(range(100))
    assert not torch.equal(ranks[0][0], ranks[0][10])
    assert torch.equal(train_predictor.Batches(100, settings, "lcc", 1)[13], ranks[1][13])


def make_settings(**changes):
    values = {"num_bases": 24, "hidden_dim": 12, "lcc_steps": 0, "shell_steps": 6, "batch": 64, "processes": 1}
    values |= {"accumulation": 1, "learning_rate": 1e-3, "lr_scheduler": "linear", "locality_weight": 0.02}
    values |= {"usage_weight": 0.1, "basis_weight": 0.1, "max_grad_norm": 1.0, "random_start": False, "precision": "no"}
    return train_predictor.FitSettings(**values | {"seed": 0} | changes)


def train_once(folder, accelerator, **changes):
    """The coder after a few steps from a fixed start on fixed tokens."""
    torch.manual_seed(0)
    coder = Predictor(16, 24, 12)
    tokens = torch.randn(640, 16, generator=torch.Generator().manual_seed(1))
    train_predictor.train(accelerator, coder, tokens, make_settings(**changes), CheckpointOptions(folder))
    return {k: v.detach().clone() for k, v in coder.state_dict().items()}


def test_accumulation_equals_one_large_batch(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, device_placement=False)
    once = train_once(tmp_path / "a", accelerator, batch=64)
    parts = train_once(tmp_path / "b", accelerator, batch=32, accumulation=2)
    for name in once:
        torch.testing.assert_close(once[name], parts[name], rtol=1e-4, atol=1e-5)


WORKER = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from accelerate import Accelerator
import test_shell_lcc_fit as t

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True, device_placement=False)
rank = accelerator.process_index
assert accelerator.num_processes == 2
shell = t.train_once(Path({out!r}) / "shell", accelerator, batch=32, processes=2)
both = t.train_once(Path({out!r}) / "both", accelerator, batch=32, processes=2, lcc_steps=6)
torch.save({{"shell": shell, "both": both}}, Path({out!r}) / f"rank{{rank}}.pt")
accelerator.end_training()
"""


def launch(*command):
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment
    )


def test_gradients_are_shared_between_processes(tmp_path):
    """Two processes with half a batch each take the very steps of one process with the whole batch."""
    from accelerate import Accelerator

    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path)))
    done = launch("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1)]
    statistics = ("running_mean", "running_var")
    for name, value in ranks[0]["both"].items():
        if not name.endswith(statistics):
            assert torch.equal(value, ranks[1]["both"][name]), name
    assert checkpoints(tmp_path / "both") == ["checkpoint-12"]
    alone = train_once(tmp_path / "alone", Accelerator(cpu=True, device_placement=False), batch=64)
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0]["shell"][name], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ranks[0]["shell"]["surface_head.2.bias"], train_start()["surface_head.2.bias"])


def train_start():
    torch.manual_seed(0)
    return Predictor(16, 24, 12).state_dict()


def test_accelerate_launch(few, tmp_path):
    """The command of the documentation; the first process alone writes and prints, and a later run resumes."""
    output = tmp_path / "two.safetensors"
    fit = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "-m", "trainers.shell_lcc", "fit"]
    done = launch(*fit, "--latents", few, "--output", output, *SMALL, "--checkpointing_steps", 10)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    manifold = load(output)
    assert manifold.metrics["fit"]["steps"] == 20
    assert checkpoints(tmp_path / "two.checkpoints") == ["checkpoint-10", "checkpoint-20"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.checkpoints", "two.safetensors"]


def test_one_clip_holds_out_its_last_frames(tmp_path, capsys):
    shard = write_shard(tmp_path / "one.safetensors", sheets(1, (6, 16, 16)))
    output = tmp_path / "m.safetensors"
    assert shell_lcc.main(["fit", "--latents", shard, "--output", str(output)]) == 0
    assert "one clip only" in capsys.readouterr().out
    facts = load(output).provenance
    assert (facts["tokens"], facts["held_out_tokens"]) == (4 * 256, 2 * 256)


def test_windows_of_a_video_are_held_out_together(tmp_path):
    clips = sheets(6, (2, 16, 16))
    shard = write_shard(tmp_path / "v.safetensors", clips, entries={k: {"video": f"v{i // 2}"} for i, k in enumerate(clips)})
    assert shell_lcc.main(["fit", "--latents", shard, "--output", str(tmp_path / "m.safetensors"), "--held_out", "0.3"]) == 0
    held = load(tmp_path / "m.safetensors").provenance["held_out_clips"]
    assert [int(name[4:]) // 2 for name in held] == [int(held[0][4:]) // 2] * 2


def test_max_tokens_is_a_cap(few, tmp_path):
    output = tmp_path / "m.safetensors"
    command = ["fit", "--latents", few, "--output", str(output), "--max_tokens", "1500", "--max_held_out_tokens", "300"]
    assert shell_lcc.main(command) == 0
    facts = load(output).provenance
    assert (facts["tokens"], facts["tokens_available"], facts["held_out_tokens"]) == (1500, 3 * 768, 256)


def refuse(capsys, *command):
    """The one line on stderr of a command that must be refused."""
    assert shell_lcc.main([str(c) for c in command]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "m.safetensors"


def test_missing_and_empty_inputs(tmp_path, out, capsys):
    (tmp_path / "empty").mkdir()
    assert "no such file" in refuse(capsys, "fit", "--latents", tmp_path / "none", "--output", out)
    assert "no latents in this folder" in refuse(capsys, "fit", "--latents", tmp_path / "empty", "--output", out)
    assert "no such file" in refuse(capsys, "eval", "--manifold", tmp_path / "none.safetensors", "--latents", tmp_path)
    assert "no such file" in refuse(capsys, "info", tmp_path / "none.safetensors")


@pytest.mark.parametrize("coder", ["anchors", "predictor"])
def test_too_few_tokens(tmp_path, out, capsys, coder):
    shard = write_shard(tmp_path / "s.safetensors", sheets(2, (2, 4, 4)))
    message = refuse(capsys, "fit", "--latents", shard, "--output", out, "--coder", coder, "--device", "cpu")
    assert "too few tokens: 32" in message
    single = write_shard(tmp_path / "t.safetensors", sheets(1, (1, 16, 16)))
    assert "single latent frame" in refuse(capsys, "fit", "--latents", single, "--output", out, "--coder", coder)


def test_mixed_spaces_and_nan(tmp_path, few, out, capsys):
    other = write_shard(tmp_path / "w.safetensors", {"w": torch.randn(48, 2, 8, 8)}, WAN22)
    message = refuse(capsys, "fit", "--latents", few, other, "--output", out)
    assert "wan21" in message
    assert "wan22" in message
    bad = sheets(3, (2, 16, 16))
    bad["clip01"][3, 1, 2, 2] = float("nan")
    bad = write_shard(tmp_path / "n.safetensors", bad)
    assert "NaN" in refuse(capsys, "fit", "--latents", bad, "--output", out, "--held_out", "0.4")


def test_foreign_files(tmp_path, few, out, capsys, fitted):
    assert "found a shard of encoded latents, expected a Shell-LCC manifold" in refuse(capsys, "info", few)
    assert "expected a Shell-LCC" in refuse(capsys, "eval", "--manifold", few, "--latents", few)
    assert "found a Shell-LCC manifold" in refuse(capsys, "fit", "--latents", fitted, "--output", out)
    (tmp_path / "x.safetensors").write_bytes(b"PK rubbish")
    assert "zip archive" in refuse(capsys, "info", tmp_path / "x.safetensors")


def test_latents_of_another_space(tmp_path, fitted, capsys):
    other = write_shard(tmp_path / "w.safetensors", {"w": torch.randn(48, 2, 8, 8)}, WAN22)
    message = refuse(capsys, "eval", "--manifold", fitted, "--latents", other)
    assert "a manifold of 'wan21' latents" in message
    assert "'wan22'" in message


def test_outputs_that_cannot_be_written(tmp_path, few, fitted, capsys):
    before = fitted.read_bytes()
    assert "exists already" in refuse(capsys, "fit", "--latents", few, "--output", fitted)
    assert fitted.read_bytes() == before
    (tmp_path / "file").touch()
    assert "cannot be written" in refuse(capsys, "fit", "--latents", few, "--output", tmp_path / "file" / "m.safetensors")
    assert "must end in .safetensors" in refuse(capsys, "fit", "--latents", few, "--output", tmp_path / "m.pth")
    (tmp_path / "d.safetensors").mkdir()
    assert "is a folder" in refuse(capsys, "fit", "--latents", few, "--output", tmp_path / "d.safetensors")
    into = ("--json", tmp_path / "file" / "x.json")
    assert "cannot be written" in refuse(capsys, "eval", "--manifold", fitted, "--latents", few, *into)


def test_overwrite_replaces(tmp_path, few):
    output = tmp_path / "m.safetensors"
    output.write_text("old")
    assert shell_lcc.main(["fit", "--latents", few, "--output", str(output), "--overwrite"]) == 0
    assert load(output).metrics


@pytest.mark.parametrize(
    "bad",
    [("--held_out", "1"), ("--num_bases", "0"), ("--learning_rate", "0"), ("--neighbours", "17", "--num_bases", "16"),
     ("--device", "cuda:77"), ("--latent_space", "sd15"), ("--resume_from_checkpoint", "latest"), ("--seed", "-1")],
    ids=lambda b: b[0],
)  # fmt: skip
def test_bad_values(few, out, capsys, bad):
    message = refuse(capsys, "fit", "--latents", few, "--output", out, *bad)
    assert bad[0] in message or bad[1] in message
    assert not out.exists()


def test_ctrl_c_during_an_anchor_fit(few, out, monkeypatch, capsys):
    def stop(self, done):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_command.Bar, "reach", stop)
    assert shell_lcc.main(["fit", "--latents", few, "--output", str(out)]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(out.parent.iterdir())
