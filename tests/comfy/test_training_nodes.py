"""The training nodes in a real ComfyUI, on a tiny Wan model and records that Record Preference wrote."""

import json
import logging
import shlex

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .comfyui_in_process import LogLines
from .prism_material import node
from .race_material import difference
from .tiny_wan import I2V_NAME, UMT5_NAME, wan_dit

pytestmark = pytest.mark.thorough

MODEL = "training_nodes.safetensors"
PROMPTS = ("a cat walks on grass", "a slow dolly shot", "bright sunny day")
LORA = {
    "folder": "training", "decided_by": "", "name": "lora", "steps": 4, "rank": 4, "learning_rate": 1e-3, "beta": 0.0,
    "pairs_per_step": 2, "seed": 5, "save_every": 2, "resume": True, "noise_levels": "shifted", "shift": 3.0, "sigma_low": 0.0,
    "sigma_high": 1.0, "winner_anchor": 1.0, "sft_weight": 0.0, "static_penalty": 0.1, "max_winner_rise": 0.0,
    "warmup_steps": 1, "lora_dtype": "fp32", "checkpointing": True, "offloading": False,
}  # fmt: skip
LAYERS = 2 * 2 * 4
HEAD = {
    "folder": "training", "decided_by": "", "name": "head", "taps": "1", "steps": 4, "learning_rate": 3e-3,
    "pairs_per_step": 2, "seed": 5, "held_out": 0.3, "save_every": 2, "resume": True, "dim": 16, "heads": 2,
    "layers": 2, "queries": 1,
    "sigma_low": 0.0, "sigma_high": 1.0, "weight_decay": 0.01, "eta": 5.0, "warmup_steps": 1,
}  # fmt: skip


def candidates(seed, frames=2, size=4, channels=16):
    """LATENT of two clips: a smooth one that hardly moves, and noise."""
    from trainers.kernels import latent_space

    g = torch.Generator().manual_seed(seed)
    rough = torch.randn(1, channels, frames, size, size, generator=g)
    smooth = torch.randn(1, channels, 1, 1, 1, generator=g) + 0.1 * rough
    space = latent_space.WAN21 if channels == 16 else latent_space.WAN22
    return {"samples": space.denormalise(torch.cat([smooth, rough]))}


def record(comfy, name, prompt, latent, chosen=(0, 1), scores=None):
    """Adds one record through the node and returns its folder."""
    _, folder = comfy.run(
        node("RecordPreference"), latent=latent, prompt=prompt, negative="", model="tiny", name=name, latent_space="auto",
        score_name="steady", winner=chosen[0], loser=chosen[1], lists={"scores": scores} if scores else None,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def records(comfy):
    """The folder of three records, whose scores say the opposite of the preferences."""
    for seed, prompt in enumerate(PROMPTS):
        folder = record(comfy, "training", prompt, candidates(seed), scores=[0.1, 0.9])
    return folder


@pytest.fixture(scope="module")
def model(comfy, models_dir):
    save_file(wan_dit(layers=2, seed=3), models_dir / "diffusion_models" / MODEL)
    (found,) = comfy.run("UNETLoader", unet_name=MODEL, weight_dtype="default")
    return found


@pytest.fixture(scope="module")
def clip(comfy):
    (found,) = comfy.run("CLIPLoader", clip_name=UMT5_NAME, type="wan", device="default")
    return found


@pytest.fixture
def train(comfy, model, clip, records):
    """Runs Train Preference LoRA with LORA's inputs and the changes."""

    def run(**changes):
        return comfy.run(node("TrainPreferenceLora"), **{"model": model, "clip": clip, **LORA, **changes})

    return run


@pytest.fixture
def train_head(comfy, model, clip, records):
    """Runs Train PRISM Head with HEAD's inputs and the changes."""

    def run(**changes):
        return comfy.run(node("TrainPrismHead"), **{"model": model, "clip": clip, **HEAD, **changes})

    return run


def lora_file(comfy, name):
    return comfy.base / "output" / "loras" / f"{name}.safetensors"


def head_file(comfy, name):
    return comfy.base / "models" / "prism" / f"{name}.safetensors"


def state_file(comfy, name):
    return comfy.base / "output" / "intrinsic_reward_training" / name / "state.safetensors"


def weights(model):
    return {k: v.clone() for k, v in model.model.state_dict().items()}


def velocity(model):
    """Of a ComfyUI MODEL with its patches, for fixed inputs."""
    import comfy.model_management as memory

    g = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=g), 0.1 * torch.randn(1, 512, 4096, generator=g)
    memory.load_models_gpu([model], force_full_load=True)
    with torch.inference_mode():
        return x - model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=text, transformer_options={}).float()


def test_a_training_learns_and_core_takes_its_outputs(comfy, models_dir, model, train):
    """Also: the saved file has no key that core's loader does not know, and the model is left as it was."""
    before, own = weights(model), velocity(model)
    lora, losses, steps, report = train(name="learns", steps=12, learning_rate=3e-3, save_every=0)
    assert steps == 12
    assert losses["loss"][0] == pytest.approx(0.6931, abs=1e-3)
    assert sum(losses["loss"][-3:]) / 3 < 0.6
    assert "implicit accuracy 1.00" in report
    assert "Error against the base model: winners" in report
    assert comfy.ui["text"] == [report]

    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    assert torch.equal(velocity(model), own)

    (patched,) = comfy.run("LoraModelLoader", model=model, lora=lora, strength_model=1.0, bypass=False)
    assert len(patched.patches) == LAYERS
    changed = velocity(patched)
    assert difference(changed, own) > 1e-3
    comfy.run("LossGraphNode", loss=losses, filename_prefix="loss")
    comfy.run("SaveLoRA", lora=lora, prefix="loras/again", steps=steps)
    (again,) = (comfy.base / "output" / "loras").glob("again_12_steps*.safetensors")

    (models_dir / "loras").mkdir(exist_ok=True)
    for number, path in enumerate((lora_file(comfy, "learns"), again)):
        (models_dir / "loras" / f"from_node_{number}.safetensors").write_bytes(path.read_bytes())
        log = LogLines()
        logging.getLogger().addHandler(log)
        try:
            (loaded,) = comfy.run(
                "LoraLoaderModelOnly", model=model, lora_name=f"from_node_{number}.safetensors", strength_model=1.0
            )
        finally:
            logging.getLogger().removeHandler(log)
        assert log.lines == []
        assert len(loaded.patches) == LAYERS
        assert difference(velocity(loaded), changed) < 1e-5


def test_the_bypassed_adapter_is_the_merged_one(comfy, model, train):
    """What was trained through hooks is what a loader adds to the weights."""
    lora, *_ = train(name="bypass", learning_rate=3e-2)
    merged, hooked = (
        comfy.run("LoraModelLoader", model=model, lora=lora, strength_model=1.0, bypass=bypass)[0] for bypass in (False, True)
    )
    own = velocity(merged)
    assert difference(velocity(hooked), own) < 1e-5


def test_a_resumed_training_equals_an_unbroken_one(comfy, train, monkeypatch):
    whole, losses, _, report = train(name="whole")
    saved = interrupted(comfy, train, monkeypatch, 3, name="broken")
    assert saved == 3
    part = load_file(lora_file(comfy, "broken"))
    assert part.keys() == whole.keys()
    assert any((part[k] != whole[k]).any() for k in part)
    resumed, same_losses, steps, _ = train(name="broken")
    assert steps == 4
    assert same_losses == losses
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    assert all(torch.equal(v, whole[k]) for k, v in load_file(lora_file(comfy, "broken")).items())

    # A finished one is not trained again.
    monkeypatch.setattr(comfy.module("nodes.train_preference_lora"), "LoraTraining", None)
    again, _, _, text = train(name="whole")
    assert text == report
    assert all(torch.equal(again[k], whole[k]) for k in whole)


def interrupted(comfy, train, monkeypatch, step, objective=None, **changes):
    """Interrupts a training in the step after `step`; returns the step that was saved."""
    import comfy.model_management as memory

    objective = objective or comfy.module("nodes.preference_objective").PreferenceObjective
    plain = objective.accumulate

    def accumulate(self, number):
        if number == step:
            # Noticed by the next forward.
            memory.interrupt_current_processing(True)
        return plain(self, number)

    with monkeypatch.context() as m:
        m.setattr(objective, "accumulate", accumulate)
        with pytest.raises(memory.InterruptProcessingException):
            train(**changes)
    assert not memory.in_training
    with safe_open(state_file(comfy, changes["name"]), framework="pt") as f:
        return json.loads(f.metadata()["state"])["step"]


def test_errors_are_those_of_the_model_under_the_encoded_prompt(comfy, model, clip, records, train):
    """The base's error of a step, against a plain forward with what CLIP Text Encode gives."""
    import comfy.model_management as memory

    objectives, pairs = comfy.module("nodes.preference_objective"), comfy.module("nodes.recorded_pairs")
    levels = comfy.module("kernels.tuning.noise_levels").NoiseLevels("shifted", 3.0)
    train(name="errors", steps=1, pairs_per_step=1)
    objective = objectives.PreferenceObjective(
        pairs.read(pairs.folder_of(records, ""), ""), None, None, levels, None, None, 1, LORA["seed"], 0.0,
        torch.device("cpu"), None,
    )  # fmt: skip
    recorded, pair = objective._draw(0)
    (positive,) = comfy.run("CLIPTextEncode", clip=clip, text=recorded.prompt)
    memory.load_models_gpu([model], force_full_load=True)
    with torch.inference_mode():
        x = pair.noisy("winner")
        x0 = model.model.apply_model(x, pair.sigma, c_crossattn=positive[0][0], transformer_options={})
        error = ((x - x0.float()) / pair.sigma - pair.target("winner")).square().mean()
    found = load_file(state_file(comfy, "errors"))["history"][0]
    assert float(found[objectives.BASE_WINNER]) == pytest.approx(float(error), rel=1e-4)
    assert found[objectives.BASE_WINNER] == found[objectives.WINNER]


def test_a_lora_on_the_model_belongs_to_the_base(comfy, model, train):
    """So that a second training goes on from the first: merged in; in bypass mode, whose hooks stay on the model's layers."""
    first, *_ = train(name="first", learning_rate=3e-2)
    plain, *_ = train(name="on_plain", steps=1)
    for bypass in (False, True):
        (patched,) = comfy.run("LoraModelLoader", model=model, lora=first, strength_model=1.0, bypass=bypass)
        own = velocity(patched)
        second, *_ = train(model=patched, name=f"second_{bypass}", steps=1)
        assert any((second[k] != plain[k]).any() for k in plain) == (not bypass)
        assert torch.equal(velocity(patched), own)


def test_checkpointing_and_offloading_change_nothing_but_memory(train):
    a, *_ = train(name="with")
    b, *_ = train(name="without", checkpointing=False)
    c, *_ = train(name="offloaded", offloading=True)
    assert all(difference(other[k], a[k]) < 1e-5 for k in a for other in (b, c))


def test_the_scores_can_decide(train):
    """By these the winners are the other clips, so the same steps move the other way."""
    preferred, *_ = train(name="preferred", static_penalty=0.0, winner_anchor=0.0, steps=1)
    scored, _, _, report = train(name="scored", decided_by="steady", static_penalty=0.0, winner_anchor=0.0, steps=1)
    key = next(k for k in preferred if "lora_B" in k)
    assert difference(scored[key], -preferred[key]) < 0.2
    assert "--by steady" in report


def test_a_ruined_model_stops_the_training(comfy, train, caplog):
    with pytest.raises(ValueError, match=r"Stopped at step \d.*winners' error is .* above the base.*no step was healthy"):
        train(name="ruined", learning_rate=3.0, winner_anchor=0.0, max_winner_rise=0.05, save_every=0, steps=8)
    assert not lora_file(comfy, "ruined").exists()


def test_the_last_healthy_lora_is_kept(comfy, train, monkeypatch):
    objective = comfy.module("nodes.preference_objective").PreferenceObjective
    monkeypatch.setattr(objective, "stop_reason", lambda self: "Stopped at step 4: too much" if self.step == 4 else None)
    lora, losses, steps, report = train(name="healthy", steps=6)
    assert steps == 2
    assert report.startswith("Stopped at step 4: too much")
    assert len(losses["loss"]) == 4
    monkeypatch.undo()
    two = load_file(state_file(comfy, "healthy"))
    assert all(torch.equal(lora[f"diffusion_model.{k}"], two[f"parameters.{k}"]) for k in (
        "blocks.0.self_attn.q.lora_A.weight", "blocks.1.cross_attn.o.lora_B.weight"
    ))  # fmt: skip


def test_steps_that_are_not_finite_are_skipped_and_end_the_training(comfy, train, monkeypatch):
    loop, objective = comfy.module("nodes.training_loop"), comfy.module("nodes.preference_objective").PreferenceObjective
    plain = objective.accumulate
    monkeypatch.setattr(objective, "accumulate", lambda self, step: [float("nan"), *plain(self, step)[1:]])
    monkeypatch.setattr(loop, "MOST_SKIPPED", 2)
    with pytest.raises(ValueError, match="2 steps in a row up to step 2 had a loss or gradient that is not finite; lower"):
        train(name="nan")


def test_the_command_line_is_one_that_the_trainer_reads(train, records):
    pytest.importorskip("diffusers")
    import argparse

    from trainers.dpo import arguments, cache, evaluate
    from trainers.dpo import train as command

    *_, report = train(name="command", steps=1, beta=700.0, sft_weight=0.5, decided_by="steady")
    first, second = report.splitlines()[-1].split(" && ")
    found = {}
    for text, module in ((first, cache), (second, command)):
        words = shlex.split(text)
        assert words[:3] == ["python", "-m", "trainers.dpo"]
        parser = argparse.ArgumentParser(allow_abbrev=False)
        module.add_arguments(parser)
        found |= vars(parser.parse_args(words[4:]))
    assert found["pairs"] == [records]
    assert (found["by"], found["backbone"], found["beta"]) == ("steady", MODEL, "700")
    assert (found["rank"], found["lora_alpha"], found["learning_rate"], found["max_train_steps"]) == (4, 4.0, 1e-3, 1)
    arguments.check(argparse.Namespace(**found))
    assert evaluate.levels_of(argparse.Namespace(**found)).shift == 3.0


def test_the_file_says_what_it_is(comfy, train):
    train(name="header", lora_dtype="bf16", steps=2)
    with safe_open(lora_file(comfy, "header"), framework="pt") as f:
        header = f.metadata()
        assert f.get_tensor("diffusion_model.blocks.0.self_attn.q.lora_A.weight").dtype == torch.bfloat16
    assert header["modelspec.architecture"] == "wan2.1/lora"
    entry = json.loads(header["intrinsic_reward.training"])
    assert (entry["steps"], entry["rank"], entry["backbone"]) == (2, 4, MODEL)
    assert not any(str(comfy.base) in value for value in header.values())


def test_the_trainers_read_the_file(comfy, train):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from trainers.tuning import lora_files

    train(name="read", steps=1)
    found = lora_files.load(lora_file(comfy, "read"))
    assert (found.rank, found.alpha) == (4, 4.0)
    assert len(found.tensors) == 2 * LAYERS


def test_bad_records_are_named_in_one_sentence(comfy, train, clip):
    for name, latent, message in (
        ("undecided", candidates(0), "none of its 1 records has a preference; record winner and loser, or name the score"),
        ("equal", {"samples": candidates(0)["samples"][:1].repeat(2, 1, 1, 1, 1)}, "have the same content"),
        ("other_space", candidates(0, channels=48), r"holds 'wan22' latents, model WAN21 works in 'wan21'; train the model"),
    ):
        record(comfy, name, "a cat", latent, (-1, -1) if name == "undecided" else (0, 1), scores=[0.5, 0.5])
        with pytest.raises(ValueError, match=message):
            train(folder=name, name=name)
    record(comfy, "mixed", "a cat", candidates(0))
    record(comfy, "mixed", "a cat", candidates(1, frames=3))
    with pytest.raises(ValueError, match=r"is \[16, 3, 4, 4\] and .* is \[16, 2, 4, 4\].*one size and length"):
        train(folder="mixed", name="mixed")
    with pytest.raises(ValueError, match=r"no record has two candidates with different scores 'steady'; scores found: steady"):
        train(folder="undecided", name="undecided", decided_by="steady")
    empty = comfy.base / "output" / "intrinsic_reward_preferences" / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="there are no records in .*empty; record candidates with Record Preference"):
        train(folder="empty", name="empty")
    (empty / "records.jsonl").touch()
    with pytest.raises(ValueError, match="contains no record; record candidates"):
        train(folder="empty", name="empty")
    for folder in ("../elsewhere", "/etc", str(comfy.base / "models")):
        with pytest.raises(ValueError, match="expected the name of a folder in output"):
            train(folder=folder, name="elsewhere")
    assert not any(state_file(comfy, n).exists() for n in ("undecided", "equal", "other_space", "mixed", "empty", "elsewhere"))


def test_bad_settings_are_named_in_one_sentence(comfy, train, clip):
    (image,) = comfy.run("UNETLoader", unet_name=I2V_NAME, weight_dtype="default")
    with pytest.raises(ValueError, match="input 'model': WAN21 is an image-to-video model, and records do not keep the image"):
        train(model=image, name="image")
    with pytest.raises(ValueError, match="the range 0.9 to 0.1"):
        train(sigma_low=0.9, sigma_high=0.1, name="range")
    with pytest.raises(ValueError, match="input 'name': found '../x', expected the name of one file"):
        train(name="../x")
    assert "expected the name of one file" in comfy.node(node("TrainPreferenceLora")).validate_inputs("../x")
    train(name="settings", steps=2)
    with pytest.raises(ValueError, match=r"other settings \(rank 4 against 8\); give them again, give another 'name'"):
        train(name="settings", steps=2, rank=8)
    (other,) = comfy.run("UNETLoader", unet_name="tiny_wan_t2v.safetensors", weight_dtype="default")
    with pytest.raises(ValueError, match=r"other settings \(model wan, 2 blocks .* weights \w{8} against wan, 6 blocks"):
        train(model=other, name="settings", steps=2)
    *_, report = train(name="settings", steps=2, rank=8, resume=False)
    assert "LoRA of rank 8" in report
    lora_file(comfy, "foreign").write_bytes(b"")
    with pytest.raises(FileExistsError, match="foreign.safetensors: exists, and no training of this name.*another 'name'"):
        train(name="foreign")


def test_a_model_whose_weights_cannot_be_read_again_is_named(comfy, model, train):
    other = model.clone()
    other.cached_patcher_init = None
    with pytest.raises(ValueError, match="input 'model': its weights cannot be read again.*use Load Diffusion Model"):
        train(model=other, name="unknown")


def test_a_full_disk_leaves_the_previous_save(comfy, train, monkeypatch):
    train(name="disk", steps=2)
    before = state_file(comfy, "disk").read_bytes()
    state = comfy.module("nodes.training_state")

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match="state.safetensors: could not be written .*No space left.*free some space"):
        train(name="disk", steps=3, resume=False)
    assert state_file(comfy, "disk").read_bytes() == before


def test_a_core_without_training_nodes_is_named(comfy, train, monkeypatch):
    from comfy_extras import nodes_train

    monkeypatch.delattr(nodes_train, "TrainGuider")
    with pytest.raises(ImportError, match="Train Preference LoRA: ComfyUI's nodes_train.py has no TrainGuider; update"):
        train(name="old")


def test_new_records_make_the_node_run_again(comfy, records):
    cls = comfy.node(node("TrainPreferenceLora"))
    before = cls.fingerprint_inputs(folder="training", steps=3)
    assert cls.fingerprint_inputs(folder=records, steps=3) == before
    record(comfy, "more", "a cat", candidates(0))
    one = cls.fingerprint_inputs(folder="more")
    record(comfy, "more", "a cat", candidates(1))
    assert cls.fingerprint_inputs(folder="more") != one
    assert "no records" in cls.fingerprint_inputs(folder="nowhere")


def test_a_head_learns_and_scores_unseen_prompts(comfy, model, clip, train_head):
    """Smooth clips win in all records, so the held-out prompt's can be told as well. Also: the model is left as it was."""
    before, own = weights(model), velocity(model)
    head, losses, report = train_head(name="learnt", steps=40, pairs_per_step=4, sigma_high=0.6)
    assert sum(losses["loss"][-5:]) < 0.5 * sum(losses["loss"][:5])
    assert "accuracy 1.00 on training pairs" in report
    assert "Held-out accuracy 1.00 (chance is 0.50), on 1 decided pairs of 1 prompts" in report
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    assert torch.equal(velocity(model), own)

    (loaded,) = comfy.run(node("LoadPrism"), file="learnt.safetensors")
    assert loaded.loaded.backbone == head.loaded.backbone
    assert loaded.loaded.provenance["pairs"] == 2
    assert {row["sigma"] for row in loaded.loaded.metrics["accuracy"]} == {0.5, 0.3, 0.1}
    (positive,) = comfy.run("CLIPTextEncode", clip=clip, text="a dog")
    found = [
        comfy.run(
            node("PrismScore"), model=model, head=h, positive=positive, latent=candidates(9), sigmas="0.3", draws=1, seed=0
        )
        for h in (head, loaded)
    ]
    assert found[0][1] == found[1][1]
    assert found[0][1][0] > found[0][1][1]
    comfy.run("LossGraphNode", loss=losses, filename_prefix="loss")


def test_a_resumed_head_equals_an_unbroken_one(comfy, train_head, monkeypatch):
    whole, losses, report = train_head(name="head_whole")
    objective = comfy.module("nodes.prism_objective").PrismObjective
    assert interrupted(comfy, train_head, monkeypatch, 3, objective, name="head_broken") == 3
    assert not head_file(comfy, "head_broken").exists()
    resumed, same, _ = train_head(name="head_broken")
    assert same == losses
    then, now = (dict(h.loaded.head.named_parameters()) for h in (whole, resumed))
    assert all(torch.equal(now[k], then[k]) for k in then)
    *_, text = train_head(name="head_whole")
    assert text == report


def test_all_pairs_by_a_score_with_ties(comfy, train_head):
    for seed in (0, 1, 2):
        latent = {"samples": torch.cat([candidates(seed)["samples"], candidates(seed + 5)["samples"][:1]])}
        record(comfy, "ties", f"prompt {seed}", latent, (-1, -1), scores=[0.5, 0.1, 0.5])
    head, _, report = train_head(folder="ties", decided_by="steady", name="ties", steps=1)
    assert "on 6 pairs of 2 prompts" in report
    assert head.loaded.head.config.dimensions == ("steady",)
    assert head.loaded.metrics["accuracy"][0] | {"calibration": 0, "without_ties": 0, "with_ties": 0} == {
        "dimension": "steady", "sigma": 0.99, "pairs": 3, "decided": 2, "without_ties": 0, "with_ties": 0, "calibration": 0,
    }  # fmt: skip


def test_the_heads_command_line_is_one_that_the_trainer_reads(train_head, records):
    pytest.importorskip("diffusers")
    import argparse

    from trainers.preferences import tables
    from trainers.prism import cache
    from trainers.prism import train as command

    for decided_by, count in (("", 3), ("steady", 3)):
        *_, report = train_head(name=f"command_{decided_by}", steps=1, decided_by=decided_by)
        first, second = report.splitlines()[-1].split(" && ")
        found = {}
        for text, module in ((first, cache), (second, command)):
            words = shlex.split(text)
            assert words[:3] == ["python", "-m", "trainers.prism"]
            parser = argparse.ArgumentParser(allow_abbrev=False)
            module.add_arguments(parser)
            found |= vars(parser.parse_args(words[4:]))
        assert len(tables.read(found["pairs"], None, found["dimensions"])) == count
        assert (found["taps"], found["dim"], found["learning_rate"], found["max_train_steps"]) == ([1], 16, 3e-3, 1)
        command._check(argparse.Namespace(**found))


def test_bad_inputs_of_the_head_are_named_in_one_sentence(comfy, train_head, clip):
    record(comfy, "one_prompt", "a cat", candidates(0))
    record(comfy, "two_sizes", "a cat", candidates(0))
    record(comfy, "two_sizes", "a dog", candidates(1, frames=3))
    record(comfy, "head_space", "a cat", candidates(0, channels=48))
    (image,) = comfy.run("UNETLoader", unet_name=I2V_NAME, weight_dtype="default")
    for changes, message in (
        ({"taps": "two"}, "input 'taps': found 'two', expected numbers of blocks"),
        ({"taps": "2"}, "input 'taps': found '2', expected ascending numbers of blocks from 0 to 1"),
        ({"taps": "1, 0"}, "input 'taps': found '1, 0', expected ascending"),
        ({"heads": 3}, "heads 3 do not divide dim 16"),
        ({"sigma_low": 1.0}, "sigma_low 1 and sigma_high 1; give the lower first"),
        ({"folder": "one_prompt"}, "the records have one prompt only; record candidates of at least two"),
        ({"folder": "two_sizes"}, r"is \[16, 3, 4, 4\] and .* is \[16, 2, 4, 4\].*one size and length"),
        ({"folder": "head_space"}, "holds 'wan22' latents, model WAN21 works in 'wan21'"),
        ({"folder": "nowhere"}, "there are no records in .*nowhere; record candidates"),
        ({"decided_by": "fun"}, "no record has two candidates with different scores 'fun'; scores found: steady"),
        ({"model": image}, "is an image-to-video model, and records do not keep the image"),
        ({"name": "../x"}, "input 'name': found '../x', expected the name of one file"),
    ):
        with pytest.raises(ValueError, match=message):
            train_head(**{"name": "bad_head"} | changes)
    assert not state_file(comfy, "bad_head").exists()
    assert not head_file(comfy, "bad_head").exists()
    head_file(comfy, "foreign_head").write_bytes(b"")
    with pytest.raises(FileExistsError, match="foreign_head.safetensors: exists"):
        train_head(name="foreign_head")
    head_file(comfy, "foreign_head").unlink()
