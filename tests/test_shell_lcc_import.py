"""Importing a checkpoint in the released layout: the reference's distances, and every refusal by name."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from trainers.kernels.files import header as formats
from trainers.kernels.latent_space import WAN21, WAN22
from trainers.kernels.shell_lcc.manifold import load
from trainers.shell_lcc import cli as shell_lcc


def synthetic_reference(bases, hidden, seed=0):
    """A state dict in the released layout, far enough from its start that every entry matters."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g)

    def linear(name, outputs, inputs):
        return {f"{name}.weight": rand(outputs, inputs, scale=inputs**-0.5), f"{name}.bias": rand(outputs, scale=0.1)}

    return {
        "basis": rand(bases, 16),
        "global_scale": torch.tensor([1.07]),
        "global_bias": rand(1, 16, scale=0.05),
        **linear("predictor.0", hidden, 16),
        "predictor.1.weight": 1 + rand(hidden, scale=0.1),
        "predictor.1.bias": rand(hidden, scale=0.1),
        "predictor.1.running_mean": rand(hidden, scale=0.3),
        "predictor.1.running_var": 0.5 + rand(hidden).square(),
        "predictor.1.num_batches_tracked": torch.tensor(1234),
        **linear("predictor.3", hidden, hidden),
        "predictor.5.weight": rand(bases, hidden, scale=3 * hidden**-0.5),
        "predictor.5.bias": rand(bases, scale=0.1),
        **linear("surface_head.0", hidden, 16),
        **linear("surface_head.2", 16, hidden),
    }


def reference_mean_distance(state, latent):
    """Mean over tokens of || (z - s) / (exp(v) + 1e-6) ||, in fp64; latent [T, 16, H, W].

    w = softmax(predictor(z)), s = (w @ basis) * scale + bias, v = surface_head(s).
    """
    p = {k: v.double() for k, v in state.items()}
    z = latent.double().permute(0, 2, 3, 1).reshape(-1, 16)

    def layer(x, name):
        return torch.nn.functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    h = layer(z, "predictor.0") - p["predictor.1.running_mean"]
    h = h / (p["predictor.1.running_var"] + 1e-5).sqrt() * p["predictor.1.weight"] + p["predictor.1.bias"]
    h = layer(h.clamp_min(0), "predictor.3").clamp_min(0)
    w = layer(h, "predictor.5").softmax(dim=1)
    s = (w @ p["basis"]) * p["global_scale"] + p["global_bias"]
    v = layer(layer(s, "surface_head.0").clamp_min(0), "surface_head.2")
    return float((((z - s) / (v.exp() + 1e-6)) ** 2).sum(dim=1).sqrt().mean())


def write_reference(path, state, prefix="", **extra):
    sizes = {"embedding_dim": 16, "num_bases": state["basis"].shape[0], "hidden_dim": state["predictor.0.weight"].shape[0]}
    torch.save({"model": {prefix + k: v for k, v in state.items()}, "config": sizes} | extra, path)
    return path


def latent(seed=1):
    return torch.randn(3, 16, 12, 14, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("hidden", "bases"), [(256, 300), (512, 117)])
def test_eval_of_an_imported_reference_equals_the_reference(tmp_path, prefix, hidden, bases):
    state = synthetic_reference(bases, hidden)
    source = write_reference(tmp_path / "model.pth", state, prefix, epoch=7, optimizer={"lr": 1e-3, "moments": torch.ones(2)})
    z = latent()
    torch.save(z, tmp_path / "clip.pt")
    manifold, figures = tmp_path / "m.safetensors", tmp_path / "figures.json"
    assert shell_lcc.main(["import", str(source), "--output", str(manifold)]) == 0
    score = ["eval", "--manifold", str(manifold), "--latents", str(tmp_path / "clip.pt"), "--json", str(figures)]
    assert shell_lcc.main([*score, "--device", "cpu"]) == 0
    report = json.loads(figures.read_text())
    assert report["mean"] == pytest.approx(reference_mean_distance(state, z), abs=1e-4)
    assert report["tokens"] == 3 * 12 * 14
    assert report["outside_band"] is None
    read = load(manifold)
    assert read.space == WAN21
    assert read.coder.config() == {"coder": "predictor", "embedding_dim": 16, "num_bases": bases, "hidden_dim": hidden}
    assert read.provenance["source"] == "model.pth"
    assert read.provenance["source_config"]["hidden_dim"] == hidden


def test_import_with_calibration(tmp_path, capsys):
    source = write_reference(tmp_path / "model.pth", synthetic_reference(40, 16))
    for i in range(3):
        torch.save(latent(i), tmp_path / f"clip{i}.pt")
    output = tmp_path / "m.safetensors"
    command = ["import", str(source), "--output", str(output), "--calibrate", str(tmp_path / "clip*.pt"), "--device", "cpu"]
    assert shell_lcc.main(command) == 0
    assert "distance median" in capsys.readouterr().out
    manifold = load(output)
    assert manifold.metrics["clips"] == 3
    assert manifold.metrics["outside_band"] == pytest.approx(0.1, abs=0.01)
    d = manifold.distance(torch.stack([latent(i).movedim(1, 0) for i in range(3)]))
    assert manifold.radius == pytest.approx(float(d.square().mean().sqrt()), rel=1e-3)
    assert shell_lcc.main(["info", str(output)]) == 0
    assert "source config" in capsys.readouterr().out


def test_bare_state_dict_and_scalar_scale(tmp_path):
    state = synthetic_reference(10, 8)
    state["global_scale"] = state["global_scale"].reshape(())
    state["global_bias"] = state["global_bias"].reshape(16)
    del state["predictor.1.num_batches_tracked"]
    torch.save(state, tmp_path / "bare.pth")
    assert shell_lcc.main(["import", str(tmp_path / "bare.pth"), "--output", str(tmp_path / "m.safetensors")]) == 0
    assert load(tmp_path / "m.safetensors").coder.global_scale.shape == (1,)


def test_half_precision_becomes_single(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in synthetic_reference(10, 8).items()}
    source = write_reference(tmp_path / "h.pth", state)
    assert shell_lcc.main(["import", str(source), "--output", str(tmp_path / "m.safetensors")]) == 0
    assert load(tmp_path / "m.safetensors").coder.basis.dtype == torch.float32


def refuse(capsys, tmp_path, source, *more):
    output = tmp_path / "out" / "m.safetensors"
    assert shell_lcc.main(["import", str(source), "--output", str(output), *map(str, more)]) == 2
    assert not output.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


class Trap:
    """Creates a file when a loader runs its code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_code_is_refused_and_not_run(tmp_path, capsys):
    mark = tmp_path / "ran"
    torch.save({"model": synthetic_reference(10, 8), "config": Trap(str(mark))}, tmp_path / "evil.pth")
    assert "was not executed" in refuse(capsys, tmp_path, tmp_path / "evil.pth")
    assert not mark.exists()
    torch.save({"model": synthetic_reference(10, 8), "config": argparse.Namespace(a=1)}, tmp_path / "odd.pth")
    assert "was not executed" in refuse(capsys, tmp_path, tmp_path / "odd.pth")


def test_wrong_entries_are_named(tmp_path, capsys):
    def refused(change, **extra):
        state = synthetic_reference(10, 8)
        change(state)
        return refuse(capsys, tmp_path, write_reference(tmp_path / "bad.pth", state, **extra))

    assert "missing surface_head.2.bias" in refused(lambda s: s.pop("surface_head.2.bias"))
    assert "unexpected decoder.weight" in refused(lambda s: s.update({"decoder.weight": torch.ones(2)}))
    message = refused(lambda s: s.update({"predictor.5.bias": torch.ones(9)}))
    assert "predictor.5.bias [9] instead of [10]" in message
    assert "NaN" in refused(lambda s: s["basis"].fill_(float("nan")))
    assert "'wan21'" in refused(lambda s: s.update({"basis": torch.ones(10, 48)}))
    message = refused(lambda s: None, config={"num_bases": 4096, "hidden_dim": 8})
    assert "num_bases 4096 against 10" in message
    assert "expected a tensor" in refused(lambda s: s.update({"global_scale": 1.0}))


def test_other_files_are_named(tmp_path, capsys):
    assert "no such file" in refuse(capsys, tmp_path, tmp_path / "none.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    assert "holds a Tensor" in refuse(capsys, tmp_path, tmp_path / "tensor.pth")
    (tmp_path / "rubbish.pth").write_bytes(b"rubbish")
    assert "rubbish.pth" in refuse(capsys, tmp_path, tmp_path / "rubbish.pth")
    (tmp_path / "cut.pth").write_bytes(write_reference(tmp_path / "ok.pth", synthetic_reference(10, 8)).read_bytes()[:3000])
    assert "damaged" in refuse(capsys, tmp_path, tmp_path / "cut.pth")
    (tmp_path / "x.safetensors").touch()
    assert "already a safetensors file" in refuse(capsys, tmp_path, tmp_path / "x.safetensors")


def test_calibration_latents_of_another_space(tmp_path, capsys):
    source = write_reference(tmp_path / "model.pth", synthetic_reference(10, 8))
    header = formats.Header("latents", WAN22, {"state": "normalised", "clips": {}}, {}, {})
    formats.write(tmp_path / "w.safetensors", {"w": torch.randn(48, 2, 8, 8)}, header)
    message = refuse(capsys, tmp_path, source, "--calibrate", tmp_path / "w.safetensors")
    assert "wan21" in message
    assert "wan22" in message


def test_existing_output_is_kept(tmp_path, capsys):
    source = write_reference(tmp_path / "model.pth", synthetic_reference(10, 8))
    (tmp_path / "m.safetensors").write_text("mine")
    assert shell_lcc.main(["import", str(source), "--output", str(tmp_path / "m.safetensors")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "m.safetensors").read_text() == "mine"
    assert shell_lcc.main(["import", str(source), "--output", str(tmp_path / "m.safetensors"), "--overwrite"]) == 0
