"""Splits into training and held-out parts: no video, copy or equal latent is on both sides, in any command."""

from argparse import Namespace

import pytest
import torch

from trainers.dpo import data as dpo_data
from trainers.kernels import held_out
from trainers.kernels.files import header as formats
from trainers.kernels.files.latents import write_latents
from trainers.kernels.latent_space import NORMALISED, WAN21
from trainers.prism import data as prism_data
from trainers.prism.train import held_out_halves
from trainers.shell_lcc.data import load_fit_data
from trainers.shell_reward import material
from trainers.wan.prompts import text_id, write_embeddings

SEEDS = range(12)


def normal(seed, shape=(16, 2, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Groups


def test_items_are_linked_over_others():
    assert held_out.linked(["ab", "c", "bd", "e", "dc"]) == [0, 0, 0, 3, 0]
    assert held_out.linked([[], [], []]) == [0, 1, 2]
    assert held_out.linked_names(["q", "p", "q", "z"], [[], [1], [1], []]) == ["p", "p", "p", "z"]


def test_some_groups_are_drawn_and_never_all():
    for share in (0.0, 0.3, 1.0):
        drawn = held_out.draw("aabbccdd", share, seed=1)
        assert drawn == held_out.draw("dcba", share, seed=1)
        assert 1 <= len(drawn) <= 3


# shell_lcc fit


def sides(folder, seed, share=0.3):
    """(held-out clip ids, notes)."""
    args = Namespace(
        latents=[str(folder)], latent_space=None, held_out=share, seed=seed, max_tokens=10**6, max_held_out_tokens=10**6,
        pt_state=NORMALISED, trust_state=True, pt_axes="auto",
    )  # fmt: skip
    data = load_fit_data(args)
    return set(data.facts["held_out_clips"]), data.notes


def earlier_shard(path, clips, entries):
    """As versions before digests wrote it."""
    config = {"state": "normalised", "clips": entries, "settings": {}, "videos": {}}
    formats.write(path, clips, formats.Header("latents", WAN21, config))


def test_copies_of_a_video_in_folders_of_earlier_versions_are_on_one_side(tmp_path):
    """The same source encoded twice, because its time had changed."""
    clips = {f"{name}-{v}": normal(10 * i + v) for i, name in enumerate("abc") for v in range(2)}
    entries = {key: {"source": f"{key[0]}.mp4", "video": key} for key in clips}
    earlier_shard(tmp_path / "x.safetensors", clips, entries)
    for seed in SEEDS:
        held, _ = sides(tmp_path, seed)
        assert {f"{k[0]}-0" in held for k in held} == {f"{k[0]}-1" in held for k in held} == {True}


@pytest.mark.parametrize("write", [earlier_shard, lambda p, c, e: write_latents(p, c, WAN21, e)])
def test_equal_latents_under_two_ids_are_on_one_side(tmp_path, write):
    for i in range(4):
        # The second time in another precision, file and folder.
        write(tmp_path / f"{i}.safetensors", {f"{i}": normal(i).half()}, {f"{i}": {"source": f"{i}.mp4", "video": f"v{i}"}})
        (tmp_path / "copies").mkdir(exist_ok=True)
        torch.save(normal(i).half().float(), tmp_path / "copies" / f"{i}.pt")
    for seed in SEEDS:
        held, _ = sides(tmp_path, seed)
        numbers = [k.rsplit("/", 1)[-1].removesuffix(".pt") for k in held]
        assert len(held) < 8
        assert all(numbers.count(n) == 2 for n in numbers)


def test_windows_under_other_settings_are_on_the_side_of_their_video(tmp_path):
    for size in ("480p", "720p"):
        clips = {f"{v}-{size}": normal(v + len(size) * ord(size[0])) for v in range(4)}
        entries = {k: {"source": "x", "content": f"c{k[0]}", "video": f"{k[0]} at {size}"} for k in clips}
        (tmp_path / size).mkdir()
        for key, z in clips.items():
            (tmp_path / size / key).mkdir()
            write_latents(tmp_path / size / key / "l.safetensors", {key: z}, WAN21, {key: entries[key]})
    for seed in SEEDS:
        held, _ = sides(tmp_path, seed)
        assert {k[0] for k in held if k.endswith("480p")} == {k[0] for k in held if k.endswith("720p")}


def test_equal_latents_only_are_one_clip(tmp_path):
    write_latents(tmp_path / "x.safetensors", {k: normal(0, (16, 3, 4, 4)) for k in "ab"}, WAN21, {k: {} for k in "ab"})
    held, notes = sides(tmp_path, 0)
    assert held == {"a"}
    assert any("its last third" in note for note in notes)


def test_what_a_folder_leaves_out_is_noted_in_the_file(tmp_path):
    write_latents(tmp_path / "x.safetensors", {k: normal(ord(k)) for k in "abc"}, WAN21, {k: {"video": k} for k in "abc"})
    formats.write(tmp_path / "texts.safetensors", {"x": torch.zeros(2)}, formats.Header("texts", WAN21))
    _, notes = sides(tmp_path, 0)
    assert notes == ["left out, no clips: 1 embedded prompts"]


# prism train


def prism_folder(folder, shared):
    """Six prompts with a pair of runs each, of which prompts 0 and 3 share a clip's content, if `shared`."""
    folder.mkdir()
    tensors, clips, rows = {}, {}, []
    for p in range(6):
        for s in range(2):
            name = f"p{p}-{s}"
            tensors[name] = normal(0 if shared and s == 0 and p in (0, 3) else 10 * p + s)
            clips[name] = {"run": name, "prompt": f"p{p}", "sigma": None, "source": name, "video": name}
        rows.append(prism_data.Row(f"p{p}", f"p{p}-0", f"p{p}-1", {"look": 1}))
    earlier_shard(folder / "latents-0.safetensors", tensors, clips)
    write_embeddings(folder / prism_data.TEXTS, {f"p{p}": torch.ones(2, 4) for p in range(6)}, WAN21, {})
    prism_data.write_rows(folder, rows)
    return prism_data.load(folder)


def test_prompts_of_one_clip_are_on_one_side_for_a_head(tmp_path):
    data = prism_folder(tmp_path / "shared", True)
    for seed in SEEDS:
        for parts in (prism_data.split(data, 0.4, seed), held_out_halves(data, 0.7, seed)):
            assert sum({"p0", "p3"} & {r.prompt for r in part} != set() for part in parts) == 1


def test_prompts_without_shared_clips_are_split_as_before(tmp_path):
    data = prism_folder(tmp_path / "apart", False)
    for seed in SEEDS:
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
        assert {r.prompt for r in prism_data.split(data, 0.34, seed)[1]} == {f"p{i}" for i in order[:2]}


# dpo train


def test_prompts_of_one_clip_are_on_one_side_for_pairs():
    rows = [dpo_data.PairRow(f"p{i}", f"w{i}", "w0" if i == 3 else f"l{i}", (16, 2, 4, 4)) for i in range(6)]
    data = dpo_data.PairData(WAN21, {}, {}, {}, rows)
    for seed in SEEDS:
        parts = dpo_data.split(data, 0.34, seed)
        assert sum(bool({"p0", "p3"} & {r.prompt for r in part}) for part in parts) == 1
    with pytest.raises(dpo_data.DpoDataError, match="found 2 that share clips"):
        dpo_data.split(dpo_data.PairData(WAN21, {}, {}, {}, [rows[0], rows[3]]), 0.5, 0)


# shell_reward train


def test_captions_of_one_video_are_on_one_side(tmp_path):
    """Windows of one video, each with a caption of its own."""
    captions = [f"scene {i}" for i in range(6)]
    ids = [text_id(c) for c in captions]
    clips = {f"c{i}": normal(i) for i in range(6)}
    entries = {f"c{i}": {"source": f"{i}", "video": f"v{i % 3}", "caption": captions[i]} for i in range(6)}
    write_latents(tmp_path / "l.safetensors", clips, WAN21, entries)
    write_embeddings(
        tmp_path / "t.safetensors", {k: torch.ones(2, 4) for k in ids}, WAN21, {}, dict(zip(ids, captions, strict=True))
    )
    args = Namespace(
        latents=[str(tmp_path / "l.safetensors")], start="noised", prompts=None, embeddings=str(tmp_path / "t.safetensors"),
        validation_prompts=None, negative_prompt="", validation_cfg=1, text_encoder=None, argv=[],
    )  # fmt: skip
    for seed in SEEDS:
        found = material.load(args, WAN21, tmp_path, Namespace(world_size=1), 0.3, seed)
        assert {ids.index(p) % 3 for p in found.held_out}.isdisjoint(ids.index(p) % 3 for p in found.fit)
    (tmp_path / "v.txt").write_text(captions[1] + "\n")
    args.validation_prompts = tmp_path / "v.txt"
    assert ids[4] not in material.load(args, WAN21, tmp_path, Namespace(world_size=1), 0.0, 0).fit
