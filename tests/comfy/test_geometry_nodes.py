"""The geometry nodes inside ComfyUI: they say what the kernels say of the same clip, and name what is wrong with an input."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch

from trainers.kernels.files import preference_records
from trainers.kernels.geometry import dense, view_files
from trainers.kernels.geometry.heat_map import full_error, heat_map
from trainers.kernels.geometry.record import CONSISTENT, INCONSISTENT, TRACKS, UNDETERMINED, GeometryRecord, score_of
from trainers.kernels.latent_space import WAN21

from .geometry_material import FRAMES, HEIGHT, WIDTH, clip, da3, images, scored, views
from .random_da3 import MONO_NAME, NAME, write_model

pytestmark = pytest.mark.thorough

DA3 = {"views": 10, "resolution": 504, "pose_method": "cam_dec", "perceptual": "none", "vgg": "none"}
RECORD = {
    "prompt": "a room", "negative": "", "model": "wan", "name": "of_tests", "latent_space": "auto", "score_name": "geometry",
    "winner": -1, "loser": -1,
}  # fmt: skip
DRIFT = 0.3


def node(name):
    return f"IntrinsicReward_{name}"


def plain(record):
    """A record's JSON as an object; NaN is null there, and so equal to itself."""
    return json.loads(record if isinstance(record, str) else record.dumps())


def brightest_in(pictures, mask):
    """Share of the pictures whose brightest pixel lies in the mask [T, H, W]."""
    at = pictures.sum(dim=-1).flatten(1).argmax(dim=1)
    return float(mask.flatten(1)[torch.arange(len(at)), at].float().mean())


@pytest.fixture(scope="module")
def model(comfy, models_dir):
    """Depth Anything 3 of random weights, loaded by core's node."""
    write_model(models_dir / "geometry_estimation" / NAME)
    return comfy.run("LoadDA3Model", model_name=NAME, weight_dtype="default")[0]


@pytest.fixture(scope="module")
def saved(comfy, base_dir):
    """save(name, views) -> what Load Geometry lists it as."""

    def save(name, found):
        view_files.save_views(base_dir / "input" / "geometry" / f"{name}.safetensors", found)
        return f"geometry/{name}.safetensors [input]"

    return save


def da3_score(comfy, **inputs):
    return comfy.run(node("GeometryDA3"), **{**DA3, **inputs})


def test_true_geometry_from_a_file_scores_as_the_kernel_says(comfy, base_dir, saved):
    made = clip(drift=DRIFT)
    file = saved("drift", views(made))
    geometry, shown = comfy.run(node("LoadGeometry"), file=file)
    score, verdict, errors, heat, drawn, record, text, passed = da3_score(comfy, da3_geometry=geometry)
    loaded = view_files.load_views(base_dir / "input" / "geometry" / "drift.safetensors")
    expected = dense.score_views(loaded)
    assert plain(record) == plain(expected.record)
    assert (score, verdict, errors) == (expected.record.score, expected.record.verdict, expected.record.frame_errors)
    assert json.loads(record)["frame_indices"] == [0, 2, 4, 6, 8]
    assert json.loads(record)["frames"] == FRAMES
    assert torch.equal(drawn, expected.preview)
    assert torch.equal(shown, loaded.images)
    full = full_error([expected.error_map], expected.record.scorer)
    assert torch.equal(heat, heat_map(loaded.images, expected.error_map, list(range(5)), full))
    assert passed is geometry
    assert text == expected.record.text()
    assert text in comfy.ui["text"][0]
    assert len(comfy.ui["images"]) == 5


def test_the_heat_map_lights_up_where_the_renderer_put_the_defect(comfy, saved):
    made = clip(drift=DRIFT)
    geometry, _ = comfy.run(node("LoadGeometry"), file=saved("every", views(made, count=FRAMES)))
    by_depth = da3_score(comfy, da3_geometry=geometry)[3]
    by_tracks = comfy.run(node("GeometryTracks"), images=images(made), clips=1, backend="torch")[3]
    # Tracks lie up to ten pixels apart at this size.
    side = 17
    near = torch.nn.functional.max_pool2d(made.object_mask[:, None].float(), side, 1, side // 2)[:, 0] > 0
    for heat, mask in ((by_depth, made.object_mask), (by_tracks, near)):
        assert brightest_in(heat, mask) >= 0.7
        # And so do most pixels that glow fully.
        glowing = heat.sum(dim=-1) > 0.99 * heat.sum(dim=-1).max()
        assert float(mask[glowing].float().mean()) > 0.7
    assert made.object_mask.float().mean() < 0.15


def test_rigid_beats_corrupted_with_true_geometry(comfy, saved):
    scores = {}
    for name, made in {"rigid": clip(), "drift": clip(drift=DRIFT), "breathing": clip(breathing=0.3)}.items():
        geometry, _ = comfy.run(node("LoadGeometry"), file=saved(name, views(made)))
        scores[name] = da3_score(comfy, da3_geometry=geometry)[0]
    assert scores["rigid"] > max(scores["drift"], scores["breathing"])


def test_geometry_of_cores_own_node_is_scored_with_its_intrinsics_rescaled(comfy):
    score, *_, record, _, _ = da3_score(comfy, da3_geometry=da3(clip()))
    expected = dense.score_views(views(clip())).record
    assert score == pytest.approx(expected.score, abs=0.02)
    assert "intrinsics rescaled from 96x80 to 192x160 pixels" in json.loads(record)["notes"]


def test_clips_are_ranked_by_depth_and_cameras_as_a_reward(comfy, model):
    clips = [images(clip()), images(clip(breathing=0.3))]
    settings = {"views": 4, "resolution": 140}
    (reward,) = comfy.run(node("GeometryReward"), backend="auto", da3_model=model, **settings)
    lists = {"images": clips, "clips": [1], "backend": ["torch"], "reward": [reward]}
    *_, scores, _, _, text = comfy.run(node("GeometryBestOfN"), lists=lists)
    wanted = [da3_score(comfy, images=frames, da3_model=model, **settings)[0] for frames in clips]
    assert scores == pytest.approx(wanted, abs=1e-6)
    assert "consistency with one rigid scene by depth and cameras" in text.splitlines()[0]


def test_images_and_a_model_are_what_cores_node_and_the_kernel_make_of_them(comfy, model):
    frames = images(clip())
    settings = {"views": 4, "resolution": 140}
    score, verdict, errors, heat, drawn, record, _, geometry = da3_score(comfy, images=frames, da3_model=model, **settings)
    mode = {"mode": "multiview", "ref_view_strategy": "saddle_balanced", "pose_method": "cam_dec"}
    expected = comfy.node("DA3Inference").execute(model, frames[[0, 2, 5, 8]], 140, "upper_bound_resize", mode).args[0]
    for key in ("depth", "extrinsics", "intrinsics", "image"):
        assert torch.equal(geometry[key], expected[key]), key
    assert json.loads(record)["frame_indices"] == [0, 2, 5, 8]
    assert (len(errors), heat.shape, drawn.shape) == (4, frames.shape, (4, HEIGHT, WIDTH, 3))
    assert torch.isfinite(heat).all()
    assert da3_score(comfy, da3_geometry=geometry)[0] == score
    # Random rays have their principal point anywhere.
    with pytest.raises(ValueError, match="input 'images': principal point"):
        da3_score(comfy, images=frames, da3_model=model, **settings, pose_method="ray_pose")


def test_saved_geometry_comes_back(comfy, model, base_dir):
    made = images(clip())
    geometry = da3_score(comfy, images=made, da3_model=model, views=3, resolution=140)[7]
    (file,) = comfy.run(node("SaveGeometry"), da3_geometry=geometry, filename_prefix="geometry/back")
    (second,) = comfy.run(node("SaveGeometry"), da3_geometry=geometry, filename_prefix="geometry/back")
    assert (file, second) == ("geometry/back_00001_.safetensors", "geometry/back_00002_.safetensors")
    back, frames = comfy.run(node("LoadGeometry"), file=f"{file} [output]")
    for key in ("depth", "extrinsics", "confidence"):
        assert torch.equal(back[key], geometry[key]), key
    assert (back["frame_indices"], back["frames"]) == ([0, 4, 8], FRAMES)
    assert float((frames - geometry["image"]).abs().max()) <= 0.5 / 255 + 1e-6
    # What core makes of geometry, it makes of this.
    (points,) = comfy.run(
        "DA3GeometryToMesh", da3_geometry=back, batch_index=0, decimation=4, discontinuity_threshold=0.0,
        confidence_threshold=0.0, use_sky_mask=False, texture=False,
    )  # fmt: skip
    assert points.vertices.shape[1] > 100
    assert comfy.node(node("LoadGeometry")).validate_inputs(f"{file} [output]") is True
    with pytest.raises(Exception, match="outside the output folder"):
        comfy.run(node("SaveGeometry"), da3_geometry=geometry, filename_prefix="../../geometry")


def test_lpips_adds_the_published_figure(comfy, models_dir, saved):
    generator, state = torch.Generator().manual_seed(0), {}
    fan_in = 3
    stages = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    for stage, (positions, width) in enumerate(zip(stages, (64, 128, 256, 512, 512), strict=True)):
        for i in positions:
            state[f"features.{i}.weight"] = torch.randn(width, fan_in, 3, 3, generator=generator) * (4.5 * fan_in) ** -0.5
            state[f"features.{i}.bias"] = torch.zeros(width)
            fan_in = width
        state[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator) / width
    folder = models_dir / "lpips"
    folder.mkdir(exist_ok=True)
    torch.save({k: v.half() for k, v in state.items() if k.startswith("lin")}, folder / "heads.pth")
    torch.save({k: v.half() for k, v in state.items() if k.startswith("features")}, folder / "vgg16.pth")
    geometry, _ = comfy.run(node("LoadGeometry"), file=saved("rigid", views(clip(), count=2)))
    record = json.loads(da3_score(comfy, da3_geometry=geometry, perceptual="heads.pth", vgg="vgg16.pth")[5])
    measured = record["measurements"]
    assert measured["3dcs"] > measured["lpips"] > 0
    without = json.loads(da3_score(comfy, da3_geometry=geometry)[5])
    assert "3dcs" not in without["measurements"]
    assert without["score"] == record["score"]
    with pytest.raises(ValueError, match=r"heads\.pth: lacks VGG16's convolutions"):
        da3_score(comfy, da3_geometry=geometry, perceptual="heads.pth")
    with pytest.raises(ValueError, match="input 'vgg': VGG16 alone is not LPIPS"):
        da3_score(comfy, da3_geometry=geometry, vgg="vgg16.pth")


def identity(geometry):
    return {**geometry, "extrinsics": torch.eye(4).expand(1, 5, 4, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {**g, "mode": "mono"}, "mode 'mono'.*set mode to 'multiview'"),
        (lambda g: {k: v for k, v in g.items() if k != "extrinsics"}, "no extrinsics in it"),
        (identity, "all 5 camera poses are the identity"),
        (lambda g: {**g, "depth": torch.full_like(g["depth"], torch.nan)}, "finite depth above zero in 0 of 5"),
        (lambda g: {**g, "depth": torch.zeros_like(g["depth"])}, "finite depth above zero in 0 of 5"),
        (lambda g: {**g, "image": g["image"] * torch.nan}, "images from nan to nan"),
        (lambda g: {**g, "depth": g["depth"][:3]}, r"does not match depth of shape \(3, 160, 192\).*same frames"),
        (lambda g: {**g, "intrinsics": g["intrinsics"] * torch.tensor([[0.0], [1], [1]])}, "principal points"),
        (lambda g: {**g, "intrinsics": g["intrinsics"] * torch.tensor([0.0, 1, 1])}, "is singular"),
        (lambda g: {k: v[:, :1] if k[:2] in ("ex", "in") else v[:1] if k != "mode" else v for k, v in g.items()}, "1 view"),
    ],
)
def test_bad_geometry_is_named(comfy, change, message):
    with pytest.raises(ValueError, match=rf"Geometry Consistency \(DA3\), input 'da3_geometry': .*{message}"):
        da3_score(comfy, da3_geometry=change(da3(clip())))


@pytest.mark.parametrize(("count", "measured"), [(10, 10), (81, 10), (3, 3)])
def test_memory_is_reserved_for_the_views_that_are_measured(comfy, monkeypatch, count, measured):
    import comfy.model_management as management

    reserved = []
    monkeypatch.setattr(management, "free_memory", lambda size, device: reserved.append(size))
    h, w = 24, 32
    found = comfy.module("kernels.geometry.views").Views(
        images=torch.rand(count, h, w, 3), depth=torch.ones(count, h, w), K=torch.eye(3).repeat(count, 1, 1),
        world_to_camera=torch.eye(4).repeat(count, 1, 1), confidence=torch.ones(count, h, w),
        frame_indices=list(range(count)), frames=count, notes=["kept"],
    )  # fmt: skip
    placed = comfy.module("nodes.geometry_da3").to_compute_device(found)
    # Colours, depth and confidence in fp32 of every view; 200 bytes of work per measured pixel.
    assert reserved == [(20 * count + 200 * measured) * h * w + (512 << 20)]
    assert torch.equal(placed.images, found.images)
    assert torch.equal(placed.confidence, found.confidence)
    assert (placed.frame_indices, placed.frames, placed.notes) == (found.frame_indices, count, ["kept"])


def test_a_camera_that_stands_still_is_undetermined(comfy):
    geometry = da3(clip("static"))
    score, verdict, *_ = da3_score(comfy, da3_geometry=geometry)
    assert (score, verdict) == (0.0, UNDETERMINED)
    one = images(clip())[:1]
    for still in (images(clip("static")), one.repeat(6, 1, 1, 1)):
        score, verdicts, errors, heat, _, _, _, scores = comfy.run(
            node("GeometryTracks"), images=still, clips=1, backend="torch"
        )
        assert (score, verdicts, scores) == (0.0, [UNDETERMINED], [0.0])
        assert heat.shape == still.shape


def test_wrong_connections_and_bad_frames_are_named(comfy, model, models_dir):
    frames = images(clip())
    broken = frames.clone()
    broken[3, 5, 5] = torch.nan
    write_model(models_dir / "geometry_estimation" / MONO_NAME, poses=False)
    (mono,) = comfy.run("LoadDA3Model", model_name=MONO_NAME, weight_dtype="default")
    for inputs, message in (
        ({}, "nothing is connected to da3_geometry"),
        ({"images": frames}, "nothing is connected to da3_model"),
        ({"da3_model": model}, "nothing is connected to images"),
        ({"da3_geometry": da3(clip()), "images": frames}, "connect either da3_geometry, or"),
        ({"images": frames[:1], "da3_model": model}, "input 'images': 1 frame"),
        ({"images": broken, "da3_model": model}, "input 'images': found NaN"),
        ({"images": frames, "da3_model": mono}, "requires Small or Base"),
    ):
        with pytest.raises(ValueError, match=message):
            da3_score(comfy, **{"resolution": 140, **inputs})
    for bad, clips, message in (
        (frames[:1], 1, "clip 1 of 1: 1 frames: geometry needs at least 3"),
        (frames[:2], 1, "clip 1 of 1: 2 frames: geometry needs at least 3"),
        (broken, 1, "clip 1 of 1: .*NaN"),
        (frames, 2, "9 frames are not 2 clips of equal length"),
        (torch.cat([frames, broken]), 2, "clip 2 of 2: .*NaN"),
    ):
        with pytest.raises(ValueError, match=rf"\(no model\), input 'images'.*{message}"):
            comfy.run(node("GeometryTracks"), images=bad, clips=clips, backend="torch")


def test_frames_alone_score_as_the_kernel_says(comfy):
    clips, expected = [clip(), clip(breathing=0.3)], [scored(), scored(breathing=0.3)]
    batch = torch.cat([images(c) for c in clips])
    score, verdicts, errors, heat, drawn, records, text, scores = comfy.run(
        node("GeometryTracks"), images=batch, clips=2, backend="torch"
    )
    assert [plain(r) for r in records] == [plain(e.record) for e in expected]
    assert scores == [e.record.score for e in expected]
    assert score == pytest.approx(sum(scores) / 2)
    assert scores[0] > scores[1]
    assert verdicts == [e.record.verdict for e in expected]
    assert errors == [v for e in expected for v in e.record.frame_errors]
    assert torch.equal(drawn, torch.cat([e.preview for e in expected]))
    full = full_error([e.error_map for e in expected], TRACKS)
    maps = [heat_map(images(c), e.error_map, e.record.frame_indices, full) for c, e in zip(clips, expected, strict=True)]
    assert torch.equal(heat, torch.cat(maps))
    assert text.startswith("Clip 1: ")
    assert "Clip 2: " in text
    with_alpha = torch.cat([batch[:FRAMES], torch.ones(FRAMES, HEIGHT, WIDTH, 1)], dim=-1)
    assert comfy.run(node("GeometryTracks"), images=with_alpha, clips=1, backend="torch")[0] == scores[0]


def test_scores_reach_the_metadata_of_what_is_saved(comfy):
    extra = {"extra_pnginfo": {"workflow": {}}}
    score = comfy.run(node("GeometryDA3"), extra, **DA3, da3_geometry=da3(clip()))[0]
    (noted,) = extra["extra_pnginfo"]["intrinsic_reward"].values()
    assert noted["scores"] == [score]
    assert json.loads(json.dumps(noted))["clips"][0]["measurements"]["coverage"] > 0.5


def test_scoring_can_be_interrupted(comfy):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        comfy.run(node("GeometryTracks"), images=images(clip()), clips=1, backend="torch")
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        da3_score(comfy, da3_geometry=da3(clip()))
    management.interrupt_current_processing(False)


def best_of(comfy, pictures, clips, latent=None):
    lists = {"images": pictures} | ({} if latent is None else {"latent": latent})
    return comfy.run(node("GeometryBestOfN"), lists=lists, clips=clips, backend="torch")


def test_the_most_consistent_clip_wins(comfy):
    made = [clip("static"), clip(morph=0.3), clip()]
    latent = {"samples": torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 16, 3, 4, 4), "batch_index": [4, 5, 6]}
    batch = torch.cat([images(c) for c in made])
    inputs = {"images": batch, "clips": 3, "backend": "torch", "latent": latent}
    frames, picked, index, verdict, scores, records, heat, text = comfy.run(node("GeometryBestOfN"), **inputs)
    expected = [s.record for s in (scored("static"), scored(morph=0.3), scored())]
    assert [plain(r) for r in records] == [plain(e) for e in expected]
    assert scores == [e.score for e in expected]
    assert (index, verdict) == (2, expected[2].verdict)
    assert torch.equal(frames, images(made[2]))
    assert picked["samples"][:, 0, 0, 0, 0].tolist() == [2.0]
    assert picked["batch_index"] == [6]
    assert heat.shape == frames.shape
    assert text.startswith(f"Best of 3: clip 3, {verdict}. Scores, higher is better: consistency with one rigid scene")
    assert [line.split(":")[0] for line in text.splitlines()[1:]] == ["  clip 3", "  clip 2", "  clip 1"]


def test_clips_may_come_as_a_list_of_any_lengths(comfy):
    pictures = [images(clip("static"))[:4], images(clip())[:, :, :160]]
    latents = [{"samples": torch.full((1, 16, 2, 4, 4), float(n))} for n in (1, 2)]
    frames, picked, index, *_ = best_of(comfy, pictures, 1, latents)
    assert index == 1
    assert torch.equal(frames, pictures[1])
    assert picked["samples"].flatten().unique().tolist() == [2.0]
    with pytest.raises(ValueError, match="input 'latent': 1 latents for 2 clips"):
        best_of(comfy, pictures, 1, latents[:1])


def test_where_nothing_can_be_judged_the_first_goes_on_and_is_said_to(comfy):
    still = torch.cat([images(clip("static"))[:4], images(clip("static"))[:1].repeat(4, 1, 1, 1)])
    frames, _, index, verdict, scores, *_, text = best_of(comfy, [still], 2)
    assert (index, verdict, scores) == (0, UNDETERMINED, [0.0, 0.0])
    assert torch.equal(frames, still[:4])
    assert text.startswith("None of 2 clips can be judged, so the first is returned.")


def test_ranks(comfy):
    rank = comfy.module("nodes.geometry_best_of_n").rank

    def record(verdict, error):
        return GeometryRecord(TRACKS, 1, score_of(verdict, error, 0.25), verdict, "", {"error": error}, 9, [], [])

    board = [
        record(UNDETERMINED, 0.0), record(CONSISTENT, 0.2), record(INCONSISTENT, 0.1), record(CONSISTENT, 0.1),
        record(INCONSISTENT, 0.3), record(UNDETERMINED, float("nan")),
    ]  # fmt: skip
    assert rank(board) == [3, 1, 2, 4, 0, 5]
    assert rank([record(CONSISTENT, 0.2)] * 3) == [0, 1, 2]
    assert rank([board[5], board[0]]) == [0, 1]


@pytest.fixture(scope="module")
def candidates():
    """Three raw latents."""
    z = torch.randn(3, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"samples": WAN21.denormalise(z)}


def record(comfy, latent, **changes):
    return comfy.run(node("RecordPreference"), **{"latent": latent, **RECORD, **changes})


def test_recorded_candidates_are_what_the_trainers_read(comfy, base_dir, candidates):
    from trainers.latents import read as latent_data

    found = [s.record for s in (scored(), scored("static"), scored(breathing=0.3))]
    each = {"seeds": [1, 2, 3], "scores": [r.score for r in found], "geometry": [r.dumps() for r in found]}
    name, folder = record(comfy, candidates, lists=each, winner=0, loser=2)
    assert folder == str(base_dir / "output" / "intrinsic_reward_preferences" / "of_tests")
    group = preference_records.read(folder)[-1]
    assert (group.id, group.prompt, group.model, group.preference) == (name, "a room", "wan", (0, 2))
    assert [c.seed for c in group.candidates] == [1, 2, 3]
    assert [c.scores for c in group.candidates] == [{"geometry": r.score} for r in found]
    assert [c.geometry.to_json() for c in group.candidates] == [r.to_json() for r in found]
    for item, candidate in zip(candidates["samples"], group.candidates, strict=True):
        (ref,) = latent_data.list_clips([candidate.latent])
        assert torch.equal(latent_data.read_clip(ref), WAN21.normalise(item, dim=0))


def test_records_are_added_and_need_nothing_but_latents(comfy, candidates):
    (_, folder) = record(comfy, candidates, name="plain")
    record(comfy, candidates, name="plain")
    first, second = preference_records.read(folder)
    assert first.id < second.id
    assert [(c.seed, c.scores, c.geometry) for c in second.candidates] == [(None, {}, None)] * 3
    assert comfy.ui["text"][0].startswith("Recorded 3 candidates as")


def test_a_full_disk_is_named_and_leaves_nothing(comfy, base_dir, candidates, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(comfy.module("nodes.preference_folder").os, "write", full)
    with pytest.raises(OSError, match=r"full.records\.jsonl: the record could not be written .*No space left"):
        record(comfy, candidates, name="full")
    monkeypatch.undo()
    folder = base_dir / "output" / "intrinsic_reward_preferences" / "full"
    assert list((folder / "latents").iterdir()) == []
    assert preference_records.read(folder) == []


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a\\b", "/etc", "", ".hidden", "a/../../b", "C:x", "x.", "a\0b"])
def test_only_plain_folder_names_are_taken(comfy, base_dir, candidates, name):
    before = sorted(base_dir.rglob("records.jsonl"))
    with pytest.raises(ValueError, match="input 'name': found .*expected the name of one folder"):
        record(comfy, candidates, name=name)
    assert sorted(base_dir.rglob("records.jsonl")) == before
    assert "expected the name of one folder" in comfy.node(node("RecordPreference")).validate_inputs([name])


def test_bad_records_are_named(comfy, base_dir, candidates):
    short = {"samples": torch.zeros(1, 16, 2, 8, 8)}
    for changes, message in (
        ({"seeds": [1]}, "input 'seeds': found 1 for 3 latents; items of a KSampler batch have no"),
        ({"scores": [1.0, 2.0]}, "input 'scores': found 2 for 3"),
        ({"scores": [1.0, 2.0, float("nan")]}, "scores 'geometry'.*finite"),
        ({"geometry": ["{}"] * 3}, "input 'geometry', clip 1: found '{}'"),
        ({"geometry": ["no"] * 3}, "input 'geometry', clip 1: found 'no'"),
        ({"winner": [1]}, "winner 1 and loser -1; give both"),
        ({"winner": [1], "loser": [1]}, "two different candidates"),
        ({"latent": [candidates, short]}, "input 'latent': found latents of .*one size"),
        ({"latent": [{"samples": torch.zeros(1, 4, 8, 8)}]}, "input 'latent': found 4 channels"),
        ({"latent": [{"samples": candidates["samples"] * torch.nan}]}, "input 'latent': found NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            record(comfy, candidates, lists=changes, name="bad")
    assert not (base_dir / "output" / "intrinsic_reward_preferences" / "bad").exists()


def test_files_that_are_no_geometry_are_named(comfy, base_dir, saved):
    load = comfy.node(node("LoadGeometry"))
    (base_dir / "input" / "geometry").mkdir(exist_ok=True)
    (base_dir / "input" / "geometry" / "damaged.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"damaged\.safetensors: not a safetensors file"):
        comfy.run(node("LoadGeometry"), file="geometry/damaged.safetensors [input]")
    bare = saved("bare", replace(views(clip()), images=None))
    with pytest.raises(ValueError, match=r"bare\.safetensors holds geometry without images"):
        comfy.run(node("LoadGeometry"), file=bare)
    for name in ("geometry/gone.safetensors [input]", "../secret.safetensors [input]", "geometry/../../x.safetensors"):
        assert "there is no '" in load.validate_inputs(name)
        with pytest.raises(ValueError, match="Load Geometry, input 'file': there is no"):
            comfy.run(node("LoadGeometry"), file=name)
    nothing = comfy.module("nodes.geometry_files").NO_FILES
    assert "save some with the node Save Geometry" in load.validate_inputs(nothing)


@pytest.mark.parametrize("width", [16, 90, 427])
def test_a_heat_map_in_the_preview_has_a_legend_below(comfy, width):
    module = comfy.module("nodes.legend")
    pictures = torch.rand(2, 30, width, 3)
    shown = module.with_legend(pictures, 3.0, "tracks")
    assert shown.shape == (2, 30 + module.HEIGHT, width, 3)
    assert torch.equal(shown[:, :30], pictures)
    strip = shown[0, 30:]
    assert 0 <= float(strip.min()) < float(strip.max()) <= 1
    # A wide one has the colours from dark to yellow.
    assert (float((strip[..., 0] - strip[..., 2]).max()) > 0.4) == (width > 300)
