"""Collected runs are ordinary runs, caught on their way; labels make pairs of them."""

import json
from itertools import combinations

import pytest
import torch

pytest.importorskip("diffusers")

from trainers.kernels.files import header as formats
from trainers.kernels.latent_space import WAN21
from trainers.prism import cli as prism
from trainers.prism import data as prism_data
from trainers.prism.collect import first_seed, steps_of
from trainers.prism.label import rows_of
from trainers.wan import dit as wan_dit
from trainers.wan import sampling as wan_sampling

from .test_prism_train import backbone, train  # noqa: F401 (a fixture)

SIZE = ("--width", 64, "--height", 32, "--frames", 5, "--steps", 6, "--shift", 3, "--cfg", 3)


@pytest.fixture
def texts(tmp_path):
    g = torch.Generator().manual_seed(0)
    found = {name: torch.randn(n, 24, generator=g) for name, n in (("cat", 3), ("dog", 5), ("bad", 2))}
    formats.write(tmp_path / "t.safetensors", found, formats.Header("texts", WAN21))
    return tmp_path / "t.safetensors"


def collect(backbone, texts, out, *more):  # noqa: F811
    argv = ["collect", "--backbone", backbone, "--texts", texts, "--output", out, "--negative", "bad", "--seeds", 3,
            "--seed", 5, "--levels", 0.95, 0.8, "--device", "cpu", *SIZE, *more]  # fmt: skip
    return prism.main([str(a) for a in argv])


def runs_of_seed(seed):
    first = {p: first_seed(p, seed) for p in ("cat", "dog")}
    return {p: [f"{p}-{first[p] + i}" for i in range(3)] for p in first}


def test_a_run_is_the_plain_run_of_its_seed(backbone, texts, tmp_path):  # noqa: F811
    assert collect(backbone, texts, tmp_path / "runs", "--batch", 2) == 0
    names = runs_of_seed(5)
    assert prism_data.runs_of(tmp_path / "runs") == names
    seeds = [int(name.split("-")[1]) for run in names.values() for name in run]
    assert len(set(seeds)) == 6
    words, _ = formats.read(texts, "texts")
    dit = wan_dit.load(backbone)
    path = wan_sampling.sigmas(6, 3.0).tolist()
    denoiser = wan_sampling.Denoiser(dit.model, [words["dog"]], words["bad"], 3.0)
    seen = []
    z = wan_sampling.euler(
        denoiser,
        wan_sampling.noise((16, 2, 4, 8), [int(names["dog"][1].split("-")[1])]),
        path,
        watch=lambda x, s, i: seen.append(x),
    )
    prism_data.write_rows(tmp_path / "runs", [prism_data.Row("dog", names["dog"][1], names["dog"][0], {"look": 1})])
    data = prism_data.load(tmp_path / "runs")
    kept = steps_of(path, (0.95, 0.8))
    assert data.sigmas() == pytest.approx(sorted(kept.values(), reverse=True), abs=1e-5)
    torch.testing.assert_close(data.state(names["dog"][1], None), z[0], rtol=2e-3, atol=2e-3)
    for step, sigma in kept.items():
        torch.testing.assert_close(data.state(names["dog"][1], round(sigma, 6)), seen[step][0], rtol=2e-3, atol=2e-3)


def test_a_cut_off_collection_goes_on(backbone, texts, tmp_path):  # noqa: F811
    out = tmp_path / "runs"
    assert collect(backbone, texts, out) == 0
    shards = sorted(out.glob("latents-*"))
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    assert collect(backbone, texts, out) == 0
    assert sorted(out.glob("latents-*")) == shards
    assert shards[0].stat().st_mtime_ns == kept


def test_finished_runs_are_scored_by_the_model_itself(backbone, texts, tmp_path):  # noqa: F811
    from trainers.kernels.rewards.prompt_gap import PromptGap
    from trainers.scorers.latent_view import ConditionalNetwork, LatentView

    out = tmp_path / "runs"
    options = ("--score", "prompt_gap", "flow_residual")
    assert collect(backbone, texts, out, *options) == 0
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    runs = prism_data.runs_of(out)
    assert {r["run"] for r in rows} == {name for names in runs.values() for name in names}
    dit = wan_dit.load(backbone).model
    words, _ = formats.read(texts, "texts")
    for shard in sorted(out.glob("latents-*.safetensors")):
        tensors, header = formats.read(shard, "latents")
        for key, entry in header.config["clips"].items():
            if entry["sigma"] is not None:
                continue
            (row,) = [r for r in rows if r["run"] == entry["run"]]
            assert set(row["scores"]) == {"prompt_gap", "flow_residual"}
            network = ConditionalNetwork(dit, words[entry["prompt"]], words["bad"])
            view = LatentView(network, tensors[key][None].float())
            # The file keeps latents in fp16.
            assert row["scores"]["prompt_gap"] == pytest.approx(float(PromptGap().measure(view)), abs=2e-3)
    before = (out / "scores.jsonl").read_bytes()
    assert collect(backbone, texts, out, *options) == 0
    assert (out / "scores.jsonl").read_bytes() == before
    assert prism.main(["label", "--data", str(out), "--scores", str(out / "scores.jsonl")]) == 0


def test_two_share_the_work(backbone, texts, tmp_path):  # noqa: F811
    assert collect(backbone, texts, tmp_path / "whole") == 0
    for part in ("1/2", "2/2"):
        assert collect(backbone, texts, tmp_path / "parts", "--part", part) == 0
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "parts").iterdir())
    for name in names:
        kind = "texts" if name.startswith("texts") else "latents"
        one, other = (formats.read(tmp_path / folder / name, kind)[0] for folder in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_bad_parts(backbone, texts, tmp_path, part):  # noqa: F811
    with pytest.raises(SystemExit):
        collect(backbone, texts, tmp_path / "runs", "--part", part)


def test_a_backbone_in_half_precision(backbone, texts, tmp_path):  # noqa: F811
    assert collect(backbone, texts, tmp_path / "half", "--backbone_dtype", "bfloat16", "--seeds", 1) == 0
    assert collect(backbone, texts, tmp_path / "whole", "--seeds", 1) == 0
    for path in (tmp_path / "half").glob("latents-*"):
        half, whole = (formats.read(f / path.name, "latents")[0] for f in (path.parent, tmp_path / "whole"))
        for name, z in whole.items():
            assert (half[name].float() - z.float()).norm() < 0.1 * z.float().norm()


def test_other_settings_are_refused(backbone, texts, tmp_path, capsys):  # noqa: F811
    assert collect(backbone, texts, tmp_path / "runs") == 0
    assert collect(backbone, texts, tmp_path / "runs", "--cfg", 5) == 2
    assert "made with another cfg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--frames", 6), "4n+1"),
        (("--seeds", 0), "--seeds"),
        (("--negative", "no"), "no text with the key 'no'"),
        (("--shift", 0), "--shift"),
    ],
)
def test_bad_arguments(backbone, texts, tmp_path, capsys, more, message):  # noqa: F811
    assert collect(backbone, texts, tmp_path / "runs", *more) == 2
    assert message in capsys.readouterr().err


def test_scores_become_pairs_and_a_head_is_trained_on_them(backbone, texts, tmp_path):  # noqa: F811
    out = tmp_path / "runs"
    assert collect(backbone, texts, out) == 0
    names = runs_of_seed(5)
    scores = {r: {"look": 0.1 * i + (p == "cat"), "calm": 1.0} for p in names for i, r in enumerate(names[p])}
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"run": r, "scores": v}) + "\n" for r, v in scores.items()))
    argv = ["label", "--data", str(out), "--scores", str(tmp_path / "s.jsonl"), "--tie", "0.15"]
    assert prism.main(argv) == 0
    rows = prism_data.load(out).rows
    assert len(rows) == 6
    assert {(r.a, r.b): r.outcome["look"] for r in rows if r.prompt == "cat"} == dict(
        zip(combinations(names["cat"], 2), (0, -1, 0), strict=True)
    )
    assert all(r.outcome["calm"] == 0 for r in rows)
    prism_data.write_rows(out, [prism_data.Row(r.prompt, r.a, r.b, {"look": r.outcome["look"]}) for r in rows])
    assert train(out, backbone, tmp_path / "head.safetensors", steps=2) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"run": "x", "scores": {"l": 1}}', "1 runs, such as 'x', are not in"), ('{"run": "x"}', "line 1: KeyError"),
     ('{"run": "cat", "scores": {"l": "nan"}}', "a score is NaN"), ('{"run": "CAT", "scores": {"l": 1}}', "no two runs")],
)  # fmt: skip
def test_bad_scores_are_named(backbone, texts, tmp_path, capsys, text, message):  # noqa: F811
    assert collect(backbone, texts, tmp_path / "runs") == 0
    (tmp_path / "s.jsonl").write_text(text.replace("CAT", runs_of_seed(5)["cat"][0]) + "\n")
    assert prism.main(["label", "--data", str(tmp_path / "runs"), "--scores", str(tmp_path / "s.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_a_dimension_may_have_a_tie_of_its_own(backbone, texts, tmp_path, capsys):  # noqa: F811
    out, path = tmp_path / "runs", tmp_path / "s.jsonl"
    assert collect(backbone, texts, out) == 0
    names = runs_of_seed(5)["cat"]
    path.write_text("".join(json.dumps({"run": r, "scores": {"a": i, "b": i}}) + "\n" for i, r in enumerate(names)))
    assert prism.main(["label", "--data", str(out), "--scores", str(path), "--tie", "0.5", "b=1"]) == 0
    outcomes = {(r.a, r.b): r.outcome for r in prism_data.load(out).rows}
    (near, far, after) = combinations(names, 2)
    assert outcomes == {near: {"a": -1, "b": 0}, far: {"a": -1, "b": -1}, after: {"a": -1, "b": 0}}
    no_such = "has no dimension 'c'; it has a, b"
    for bad, message in (("c=1", no_such), ("-1", "--tie -1"), ("=1", "--tie =1"), ("a=x", "--tie a=x")):
        assert prism.main(["label", "--data", str(out), "--scores", str(path), "--tie", bad]) == 2
        assert message in capsys.readouterr().err


def test_rows_need_a_common_dimension():
    assert rows_of({"a": "p", "b": "p"}, {"a": {"x": 1.0}, "b": {"y": 1.0}}, 0.0) == []
