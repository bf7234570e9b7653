"""PRISM's data folder and trainer: a head learns what a small backbone's features tell of noisy latents."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.scorers.prism_network import Scorer, some_tokens
from trainers.wan.prompts import write_embeddings

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from trainers.kernels.files import header as formats
from trainers.kernels.latent_space import WAN21
from trainers.kernels.prism import files
from trainers.prism import cli as prism
from trainers.prism import data as prism_data
from trainers.prism import train_loop
from trainers.prism.accuracy_by_sigma import differences
from trainers.prism.data import MISSING, PrismDataError, Row
from trainers.prism.train import held_out_halves
from trainers.wan import dit as wan_dit
from trainers.wan.dit_keys import of_text_to_video
from trainers.wan.text_padding import fold_padding

from .launcher import launch
from .test_wan_dit import CONFIG

PROMPTS, SEEDS = 12, 4
LEVELS = (0.9, 0.3)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny random transformer as ComfyUI's single file."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**CONFIG)
    path = tmp_path_factory.mktemp("backbone") / "wan.safetensors"
    names = of_text_to_video(4)
    save_file({names[k]: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    return path


def _comparisons(folder):
    return folder / prism_data.COMPARISONS


def make_folder(folder, caught=LEVELS, shape=(16, 2, 4, 4), seed=0):
    """Runs whose first channel's mean is their quality; ties where two are close. caught: noise levels, or none: clean."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    tensors, clips, rows, texts = {}, {}, [], {}
    for p in range(PROMPTS):
        texts[f"p{p}"] = torch.randn(3 + p % 4, 24, generator=g)
        quality = torch.randn(SEEDS, generator=g)
        for s in range(SEEDS):
            z = torch.randn(shape, generator=g)
            z[0] += 2 * quality[s]
            noise = torch.randn(shape, generator=g)
            for sigma in caught or (None,):
                name = f"p{p}-s{s}" + ("" if sigma is None else f"@{sigma}")
                tensors[name] = z if sigma is None else sigma * noise + (1 - sigma) * z
                clips[name] = {"run": f"p{p}-s{s}", "prompt": f"p{p}", "sigma": sigma, "source": name, "video": name}
        for a in range(SEEDS):
            for b in range(a):
                gap = float(quality[a] - quality[b])
                outcome = {"look": 0 if abs(gap) < 0.15 else (1 if gap > 0 else -1)}
                if (a + b) % 2:
                    outcome["other"] = 1 if gap < 0 else -1
                rows.append(Row(f"p{p}", f"p{p}-s{a}", f"p{p}-s{b}", outcome))
    header = formats.Header("latents", WAN21, {"state": "normalised", "settings": {}, "clips": clips, "videos": {}}, {}, {})
    formats.write(folder / "latents-0.safetensors", tensors, header)
    write_embeddings(folder / prism_data.TEXTS, texts, WAN21, {})
    prism_data.write_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "prefs")


def train(folder, backbone, out, *more, steps=120):
    argv = ["train", "--data", folder, "--backbone", backbone, "--output", out, "--taps", 2, "--dim", 32, "--heads", 4,
            "--layers", 2, "--max_train_steps", steps, "--learning_rate", 3e-3, "--lr_warmup_steps", 5, "--held_out", 0.4,
            "--validation_steps", 0, "--device", "cpu"]  # fmt: skip
    return prism.main([str(a) for a in (*argv, *more)])


def test_a_head_for_a_part_of_the_schedule(folder, backbone, tmp_path):
    """One of two experts owns the noise levels above a boundary."""
    assert train(folder, backbone, tmp_path / "high.safetensors", "--sigma_range", 0.875, 1, steps=2) == 0
    loaded = files.load(tmp_path / "high.safetensors")
    assert loaded.sigmas == (0.9, 0.9)
    assert {row["sigma"] for row in loaded.metrics["accuracy"]} == {0.9}
    clean = make_folder(tmp_path / "clean", caught=None)
    data = prism_data.load(clean)
    drawn = [prism_data.draw(data, data.rows[:1], None, torch.Generator().manual_seed(i), (0.2, 0.4)).sigma for i in range(30)]
    assert 0.2 <= float(torch.stack(drawn).min()) < 0.25 < 0.35 < float(torch.stack(drawn).max()) <= 0.4
    assert train(clean, backbone, tmp_path / "low.safetensors", "--sigma_range", 0, 0.875, steps=1) == 0
    assert files.load(tmp_path / "low.safetensors").sigmas == (0.0, 0.875)


def test_a_pair_keeps_the_same_tokens_of_every_tap():
    place = torch.arange(10.0).view(1, 10, 1).expand(6, 10, 3)
    first, second = some_tokens([place, 100 + place], 0.5, torch.Generator().manual_seed(0))
    assert first.shape == (6, 5, 3)
    assert torch.equal(first[:3], first[3:])
    assert torch.equal(second, first + 100)
    assert not torch.equal(first[0], first[1])
    assert all(len(set(row[:, 0].tolist())) == 5 for row in first)


def test_tokens_that_are_dropped_are_the_same_after_a_resume(folder, backbone, tmp_path):
    more = ("--token_dropout", 0.5, "--checkpointing_steps", 3)
    assert train(folder, backbone, tmp_path / "whole.safetensors", *more, steps=6) == 0
    plain = load_file(tmp_path / "whole.safetensors")
    for path in (tmp_path / "whole.checkpoints").iterdir():
        if path.is_dir() and path.name.endswith("6"):
            shutil.rmtree(path)
    again = (*more, "--resume_from_checkpoint", "latest", "--overwrite")
    assert train(folder, backbone, tmp_path / "whole.safetensors", *again, steps=6) == 0
    assert all(torch.equal(v, plain[k]) for k, v in load_file(tmp_path / "whole.safetensors").items())
    assert train(folder, backbone, tmp_path / "other.safetensors", steps=6) == 0
    assert any(not torch.equal(v, plain[k]) for k, v in load_file(tmp_path / "other.safetensors").items())
    assert train(folder, backbone, tmp_path / "bad.safetensors", "--token_dropout", 1, steps=1) == 2


def test_the_learning_rate_rises_and_falls():
    def of(schedule, step):
        settings = train_loop.TrainSettings(100, 4, 1, 2.0, 0, 10, 1, 5, "no", 0, schedule=schedule)
        return train_loop.learning_rate(settings, step)

    assert of("constant", 0) == of("cosine", 0) == pytest.approx(0.2)
    assert of("constant", 50) == of("constant", 99) == 2.0
    assert of("cosine", 50) == pytest.approx(1.0)
    assert of("cosine", 99) < 0.01


def test_every_clip_is_scored_once_however_many_pairs_it_is_in(folder):
    data = prism_data.load(folder)
    seen = []

    def scorer(x, sigma, words):
        seen.append(len(x))
        return x.mean(dim=(1, 2, 3, 4))[:, None]

    for level in (0.9, 0.5):
        seen.clear()
        if level == 0.5:
            data = prism_data.load(make_folder(folder.parent / "clean_once", caught=None))
        found = differences(scorer, data, data.rows, level, 7)
        assert sum(seen) == PROMPTS * SEEDS
        for row, d in zip(data.rows[:8], found[:8], strict=True):
            batch = prism_data.draw(data, [row], level, torch.Generator().manual_seed(0))
            a, b = batch.x.mean(dim=(1, 2, 3, 4))
            torch.testing.assert_close(d[0], a - b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_head_is_trained_on_a_backbone_in_half_precision(folder, backbone, tmp_path, dtype):
    out = tmp_path / "head.safetensors"
    assert train(folder, backbone, out, "--backbone_dtype", dtype, steps=3) == 0
    assert all(p.dtype == torch.float32 for p in files.load(out).head.parameters())


@pytest.mark.parametrize("part", [("0.5", "0.2"), ("-1", "1"), ("0.91", "0.95")])
def test_bad_parts_of_the_schedule(folder, backbone, tmp_path, part, capsys):
    assert train(folder, backbone, tmp_path / "head.safetensors", "--sigma_range", *part, steps=1) == 2
    assert "--sigma_range" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(folder, backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("head") / "head.safetensors"
    assert train(folder, backbone, out) == 0
    return out


class TestData:
    def test_a_folder_comes_back_as_it_went(self, folder):
        data = prism_data.load(folder)
        assert len(data.runs) == PROMPTS * SEEDS
        assert data.sigmas() == list(LEVELS)
        assert data.dimensions == ("look", "other")
        assert len(data.rows) == PROMPTS * 6
        outcome = data.outcomes(data.rows)
        assert set(outcome[:, 0].tolist()) == {-1, 0, 1}
        assert set(outcome[:, 1].tolist()) == {-1, 1, MISSING}

    def test_a_pair_shares_its_noise_and_its_level(self, tmp_path):
        data = prism_data.load(make_folder(tmp_path / "clean", caught=None))
        row = data.rows[0]
        batch = prism_data.draw(data, [row], 0.75, torch.Generator().manual_seed(3))
        a, b = (data.state(r, None) for r in (row.a, row.b))
        torch.testing.assert_close(batch.x[0] - batch.x[1], 0.25 * (a - b), atol=1e-5, rtol=1e-4)
        noise = (batch.x[0] - 0.25 * a) / 0.75
        assert abs(noise.std() - 1) < 0.15
        drawn = [prism_data.draw(data, [row], None, torch.Generator().manual_seed(i)).sigma for i in range(40)]
        assert all(float(s[0]) == float(s[1]) for s in drawn)
        assert 0.3 < torch.stack(drawn).mean() < 0.7

    def test_caught_states_are_taken_as_they_are(self, folder):
        data = prism_data.load(folder)
        row = data.rows[0]
        batch = prism_data.draw(data, [row], 0.9, torch.Generator().manual_seed(3))
        torch.testing.assert_close(batch.x[0], data.state(row.a, 0.9))
        with pytest.raises(PrismDataError, match="no latents at sigma 0.5"):
            prism_data.draw(data, [row], 0.5, torch.Generator())

    def test_splits_share_no_prompt(self, folder):
        data = prism_data.load(folder)
        parts = held_out_halves(data, 0.4, 0)
        prompts = [{r.prompt for r in part} for part in parts]
        assert sum(map(len, parts)) == len(data.rows)
        assert all(not (prompts[i] & prompts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda f: (f / "texts.safetensors").unlink(), "no texts.safetensors in it"),
            (lambda f: (f / "latents-0.safetensors").unlink(), "no latents-"),
            (
                lambda f: _comparisons(f).write_text('{"prompt": "p0", "a": "x", "b": "p0-s1", "outcome": {"look": 1}}'),
                "'x'",
            ),
            (lambda f: _comparisons(f).write_text('{"prompt": "q", "a": "p0-s0", "b": "p0-s1", "outcome": {}}'), "'q'"),
            (
                lambda f: _comparisons(f).write_text('{"prompt": "p0", "a": "p0-s0", "b": "p0-s1", "outcome": {"l": 2}}'),
                "line 1",
            ),
            (lambda f: _comparisons(f).write_text("nonsense"), "line 1"),
            (lambda f: _comparisons(f).write_text(""), "contains no pair"),
        ],
    )
    def test_broken_folders_are_named(self, tmp_path, spoil, message):
        folder = make_folder(tmp_path / "prefs")
        spoil(folder)
        with pytest.raises(PrismDataError, match=message):
            prism_data.load(folder)

    def test_latents_of_two_sizes_make_no_pair(self, tmp_path):
        folder = make_folder(tmp_path / "prefs")
        state = load_file(folder / "latents-0.safetensors")
        state["p0-s0@0.9"] = torch.randn(16, 2, 4, 6)
        formats.write(
            folder / "latents-0.safetensors", state, formats.read_header(folder / "latents-0.safetensors", "latents")
        )
        data = prism_data.load(folder)
        row = next(r for r in data.rows if "p0-s0" in (r.a, r.b))
        with pytest.raises(PrismDataError, match="encode both at one size"):
            prism_data.draw(data, [row], 0.9, torch.Generator())


class TestTraining:
    def test_a_head_learns_and_its_file_says_how_well(self, trained):
        loaded = files.load(trained)
        found = {(r["dimension"], r["sigma"]): r for r in loaded.metrics["accuracy"]}
        assert found["look", 0.3]["without_ties"] > 0.85
        assert found["other", 0.3]["without_ties"] > 0.85
        # There is less to see in noise.
        assert found["look", 0.9]["without_ties"] < found["look", 0.3]["without_ties"] + 0.05
        assert loaded.sigmas == (0.3, 0.9)
        assert loaded.threshold["look"] >= 0
        assert loaded.backbone.depth == 4
        assert loaded.provenance["command"].startswith("python -m trainers.prism train")

    def test_eval_gives_the_trainers_figures(self, trained, folder, backbone, tmp_path):
        argv = [
            "eval",
            "--head",
            trained,
            "--data",
            folder,
            "--backbone",
            backbone,
            "--json",
            tmp_path / "e.json",
            "--device",
            "cpu",
        ]
        assert prism.main([str(a) for a in argv]) == 0
        found = json.loads((tmp_path / "e.json").read_text())
        assert found["pairs"] == PROMPTS * 6
        assert {r["sigma"] for r in found["table"]} == set(LEVELS)
        assert all(r["without_ties"] > 0.6 for r in found["table"] if r["sigma"] == 0.3)
        assert found["thresholds"] == files.load(trained).threshold

    def test_a_score_depends_neither_on_the_batch_nor_on_its_neighbours(self, trained, folder, backbone):
        loaded, data = files.load(trained), prism_data.load(folder)
        scorer = Scorer(wan_dit.load(backbone, 2), loaded.head)
        one, many = (differences(scorer, data, data.rows[:9], 0.3, batch) for batch in (1, 4))
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)

    def test_folded_padding_is_padding_to_512(self, folder, backbone):
        data, dit = prism_data.load(folder), wan_dit.load(backbone, 2)
        words = [data.texts["p0"], data.texts["p3"]]
        text, bias, mask = fold_padding(words)
        whole = torch.zeros(2, 512, 24)
        for i, w in enumerate(words):
            whole[i, : len(w)] = w
        x, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.2, 0.8])
        folded, embedded = dit.features(x, sigma, text, (2,), bias)
        plain, all_embedded = dit.features(x, sigma, whole, (2,))
        torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(embedded[0][mask[0]], all_embedded[0, : len(words[0])])

    def test_resuming_ends_with_the_unbroken_runs_tensors(self, folder, backbone, tmp_path):
        assert train(folder, backbone, tmp_path / "whole.safetensors", steps=12) == 0
        out = tmp_path / "parts.safetensors"
        work = ("--output_dir", tmp_path / "work", "--checkpointing_steps", 5)
        calls = []

        def stop(step, figures):
            calls.append(step)
            if step == 7:
                raise KeyboardInterrupt

        original = train_loop.train
        try:
            train_loop.train = lambda *a, **k: original(*a[:7], stop)
            assert train(folder, backbone, out, *work, steps=12) == 130
        finally:
            train_loop.train = original
        assert not out.exists()
        assert train(folder, backbone, out, *work, "--resume_from_checkpoint", "latest", steps=12) == 0
        whole, parts = load_file(tmp_path / "whole.safetensors"), load_file(out)
        assert whole.keys() == parts.keys()
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=0, msg=name)

    def test_the_backbone_gets_no_gradient_and_does_not_change(self, folder, backbone):
        data, dit = prism_data.load(folder), wan_dit.load(backbone, 2)
        head = files.PrismHead(files.HeadConfig(128, dim=32, heads=4, taps=(2,), dimensions=data.dimensions))
        batch = prism_data.draw(data, data.rows[:3], None, torch.Generator().manual_seed(0))
        scorer = Scorer(dit, head)
        train_loop.loss_of(scorer(batch.x, batch.sigma, batch.words), batch.outcome, 5.0).backward()
        assert all(p.grad is None for p in dit.model.parameters())
        assert all(p.grad is not None for p in head.parameters())
        assert not any(name.startswith("dit") for name, _ in scorer.named_parameters())

    def test_missing_outcomes_do_not_count(self):
        scores = torch.randn(4, 2, requires_grad=True)
        outcome = torch.tensor([[1, MISSING], [MISSING, MISSING]])
        (g,) = torch.autograd.grad(train_loop.loss_of(scores, outcome, 5.0), scores)
        assert (g != 0).nonzero().tolist() == [[0, 0], [2, 0]]

    def test_batches_follow_from_seed_step_and_process(self, folder):
        data = prism_data.load(folder)
        groups = prism_data.by_shape(data, data.rows)
        settings = train_loop.TrainSettings(1, 4, 1, 1e-3, 0, 0, 1, 5, "no", 0)
        first, again, other = (
            train_loop.batch_of(data, groups, settings, train_loop.generator_of(settings, *at))
            for at in ((3, 0), (3, 0), (3, 1))
        )
        assert torch.equal(first.x, again.x)
        assert not torch.equal(first.x, other.x)


class TestRefusals:
    def refused(self, capsys, *argv):
        assert prism.main([str(a) for a in argv]) == 2
        return capsys.readouterr().err

    def test_bad_arguments(self, folder, backbone, tmp_path, capsys):
        out = tmp_path / "head.safetensors"
        base = ("train", "--data", folder, "--backbone", backbone, "--output", out)
        assert "block 11 cannot be tapped" in self.refused(capsys, *base)
        assert "--learning_rate" in self.refused(capsys, *base, "--learning_rate", 0)
        assert "noise levels" in self.refused(capsys, *base, "--levels", 999)
        assert "do not divide" in self.refused(capsys, *base, "--taps", 2, "--dim", 30, "--heads", 4)
        assert "no comparisons.jsonl" in self.refused(capsys, "train", "--data", tmp_path, *base[3:]).replace(
            "no texts.safetensors", "no comparisons.jsonl"
        )
        assert not out.exists()

    def test_a_dimension_of_ties_alone(self, backbone, tmp_path, capsys):
        folder = make_folder(tmp_path / "prefs")
        rows = prism_data.load(folder).rows
        prism_data.write_rows(folder, [Row(r.prompt, r.a, r.b, {"look": 0}) for r in rows])
        out = tmp_path / "head.safetensors"
        said = self.refused(capsys, "train", "--data", folder, "--backbone", backbone, "--output", out, "--taps", 2)
        assert "'look' every training pair is a tie" in said

    def test_other_weights_and_other_architectures(self, trained, folder, tmp_path, capsys):
        from diffusers import WanTransformer3DModel

        torch.manual_seed(9)
        other = WanTransformer3DModel(**CONFIG)
        other.save_pretrained(tmp_path / "same")
        said = self.refused(
            capsys, "eval", "--head", trained, "--data", folder, "--backbone", tmp_path / "same", "--device", "cpu"
        )
        assert "other weights than" in said
        WanTransformer3DModel(**CONFIG | {"num_layers": 5}).save_pretrained(tmp_path / "deeper")
        said = self.refused(
            capsys, "eval", "--head", trained, "--data", folder, "--backbone", tmp_path / "deeper", "--device", "cpu"
        )
        assert "was trained on wan, 4 blocks" in said
        assert "5 blocks" in said


@pytest.mark.parametrize("pooling", ["query", "mean"])
def test_autocast_does_not_change_the_head(pooling):
    """Training under --mixed_precision scores as the file is used: in the head's own precision."""
    torch.manual_seed(0)
    head = files.PrismHead(files.HeadConfig(48, 32, 4, 2, (2,), pooling=pooling, time=True))
    visual, text = torch.randn(2, 9, 48), torch.randn(2, 600, 48)
    model = SimpleNamespace(patch_embedding=torch.nn.Linear(1, 1))
    dit = SimpleNamespace(model=model, features=lambda x, sigma, words, taps, bias: ([visual], text[:, : words.shape[1]]))
    scorer, sigma, words = Scorer(dit, head), torch.tensor([0.3, 0.9]), [torch.randn(3, 4), torch.randn(3, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scorer(torch.zeros(2, 1), sigma, words)
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.equal(found, scorer(torch.zeros(2, 1), sigma, words))


def test_processes_share_their_gradients(folder, backbone, tmp_path):
    """Two processes take the step of the mean of their losses, and the first alone writes."""
    out = tmp_path / "two.safetensors"
    argv = ["train", "--data", folder, "--backbone", backbone, "--output", out, "--taps", 2, "--dim", 32, "--heads", 4,
            "--layers", 2, "--max_train_steps", 1, "--learning_rate", 3e-3, "--lr_warmup_steps", 0, "--held_out", 0.4,
            "--validation_steps", 1, "--train_batch_size", 4, "--max_grad_norm", 0, "--device", "cpu",
            "--report_to", "tensorboard", "--token_dropout", 0.25]  # fmt: skip
    done = launch("trainers.prism.cli", argv, tmp_path / "said")
    assert done.codes == [0, 0], done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    assert list((tmp_path / "two.checkpoints").rglob("events*"))

    data = prism_data.load(folder)
    fit, _, _ = held_out_halves(data, 0.4, 0)
    dit = wan_dit.load(backbone, 2)
    torch.manual_seed(0)
    head = files.PrismHead(files.HeadConfig(dit.backbone.width, 32, 4, 2, (2,), 1, data.dimensions))
    settings = train_loop.TrainSettings(1, 4, 2, 3e-3, 0.01, 0, 0, 5, "no", 0, token_dropout=0.25)
    scorer, losses = Scorer(dit, head), []
    for process in (0, 1):
        generator = train_loop.generator_of(settings, 0, process)
        batch = train_loop.batch_of(data, prism_data.by_shape(data, fit), settings, generator)
        scores = scorer(batch.x, batch.sigma, batch.words, 0.75, generator)
        losses.append(train_loop.loss_of(scores, batch.outcome, settings.eta))
    optimiser = train_loop.make_optimiser(head, settings)
    (sum(losses) / 2).backward()
    optimiser.step()
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, head.state_dict()[name], rtol=1e-3, atol=2e-5)
