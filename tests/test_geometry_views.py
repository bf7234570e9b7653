"""Views: what can be scored, what is refused and how that is said, DA3_GEOMETRY, and files."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from trainers.kernels.geometry import view_files
from trainers.kernels.geometry.dense import score_views
from trainers.kernels.geometry.record import GeometryError
from trainers.kernels.geometry.view_files import load_views, save_views
from trainers.kernels.geometry.views import (
    Views,
    from_da3,
    model_size,
    require_usable,
    rescale_K,
    sample_indices,
    square_poses,
    take,
    usable_pixels,
    with_frames,
)


def make_views(s=3, h=20, w=30):
    """A wall, seen by cameras that step aside."""
    g = torch.Generator().manual_seed(0)
    K = torch.tensor([[25.0, 0, w / 2], [0, 25, h / 2], [0, 0, 1]]).repeat(s, 1, 1)
    poses = torch.eye(4).repeat(s, 1, 1)
    poses[:, 0, 3] = 0.1 * torch.arange(s)
    images = torch.rand(s, h, w, 3, generator=g)
    return Views(images, torch.full((s, h, w), 4.0), K, poses, None, [2 * i for i in range(s)], 2 * s)


def changed(name, at, value):
    """Views with one part spoilt."""
    views = make_views()
    part = getattr(views, name).clone()
    part[at] = value
    return replace(views, **{name: part})


def da3(views, size_of_K=(504, 336)):
    """What ComfyUI's DA3Inference gives in multi-view mode: K in the pixels the model ran at, poses [1, S, 3, 4]."""
    h, w = views.depth.shape[1:]
    return {
        "depth": views.depth,
        "image": views.images,
        "mode": "multiview",
        "extrinsics": views.world_to_camera[None, :, :3],
        "intrinsics": rescale_K(views.K, (w, h), size_of_K)[None],
    }


def test_sample_indices_run_from_first_to_last():
    assert sample_indices(81, 10) == [0, 8, 17, 26, 35, 44, 53, 62, 71, 80]
    assert sample_indices(3, 10) == [0, 1, 2]
    assert sample_indices(5, 1) == [0]
    assert sample_indices(17, 2) == [0, 16]


def test_good_views_pass_and_so_does_isolated_bad_depth():
    require_usable(make_views(), "clip")
    views = changed("depth", (0, slice(0, 5)), torch.nan)
    views.depth[1, 3, 3] = 0
    require_usable(views, "clip")
    assert int((~usable_pixels(views)).sum()) == 5 * 30 + 1
    doubted = replace(views, confidence=torch.ones(3, 20, 30))
    doubted.confidence[2, 0, 0] = torch.nan
    assert int((~usable_pixels(doubted)).sum()) == 5 * 30 + 2


BAD = {
    "one view": (lambda: take(make_views(), [0]), "1 view; expected at least 2"),
    "NaN depth": (lambda: changed("depth", ..., torch.nan), "finite depth above zero in 0 of 3 views"),
    "zero depth": (lambda: changed("depth", ..., 0.0), "finite depth above zero in 0 of 3 views"),
    "depth in one view": (lambda: changed("depth", slice(1, 3), -1.0), "in 1 of 3 views"),
    "singular K": (lambda: changed("K", (1, 0, 0), 0.0), "intrinsics of view 1"),
    "NaN in K": (lambda: changed("K", (1, 0, 0), torch.nan), "intrinsics of view 1"),
    "transposed K": (lambda: replace(make_views(), K=make_views().K.transpose(1, 2)), "intrinsics of view 0"),
    "K of another size": (
        lambda: replace(make_views(), K=rescale_K(make_views().K, (30, 20), (504, 336))),
        r"pixels of an image of 504x336: rescale",
    ),
    "identity poses": (
        lambda: replace(make_views(), world_to_camera=torch.eye(4).repeat(3, 1, 1)),
        "all 3 camera poses are the identity",
    ),
    "NaN pose": (lambda: changed("world_to_camera", (1, 0, 3), torch.nan), "poses that are not finite"),
    "scaled rotation": (lambda: changed("world_to_camera", (1, 0, 0), 2.0), "rotation of view 1 is not a rotation matrix"),
    "mirrored rotation": (lambda: changed("world_to_camera", (2, 1, 1), -1.0), "rotation of view 2 is not a rotation matrix"),
    "too few poses": (
        lambda: replace(make_views(), world_to_camera=make_views(2).world_to_camera),
        r"world_to_camera of shape \(2, 4, 4\) does not match depth of shape \(3, 20, 30\)",
    ),
    "images of another size": (
        lambda: replace(make_views(), images=make_views(3, 40, 60).images), r"images of shape \(3, 40, 60, 3\)"
    ),
    "confidence of another size": (
        lambda: replace(make_views(), confidence=torch.ones(3, 2, 2)), r"confidence of shape \(3, 2, 2\)"
    ),
    "no images": (lambda: replace(make_views(), images=None), "geometry without images; give the video"),
    "images in 0 to 255": (lambda: changed("images", (0, 0, 0), 255.0), "images from .* to 255; expected finite values"),
    "NaN in images": (lambda: changed("images", (0, 0, 0), torch.nan), "expected finite values from 0 to 1"),
    "uint8 images": (
        lambda: replace(make_views(), images=make_views().images.to(torch.uint8)), "images of torch.uint8; expected floats"
    ),
    "too few indices": (lambda: replace(make_views(), frame_indices=[0]), "1 frame indices for 3 views"),
    "indices beyond the clip": (lambda: replace(make_views(), frames=3), r"frame indices \[0, 2, 4\] in a clip of 3 frames"),
    "flat depth": (lambda: replace(make_views(), depth=torch.ones(3, 600)), r"depth of shape \(3, 600\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_views_are_refused_by_name(name):
    make, message = BAD[name]
    with pytest.raises(GeometryError, match=message) as e:
        require_usable(make(), "clip.npz")
    assert str(e.value).startswith("clip.npz: ")
    with pytest.raises(GeometryError, match=message):
        score_views(make())


def test_rescaled_K_sees_the_same_directions():
    K = make_views().K
    twice = rescale_K(K, (30, 20), (60, 80))
    assert twice[0].tolist() == [[50.0, 0, 30], [0, 100, 40], [0, 0, 1]]
    torch.testing.assert_close(rescale_K(twice, (60, 80), (30, 20)), K)


def test_da3_geometry_has_its_K_brought_to_the_images():
    views = make_views()
    found = from_da3(da3(views), "DA3_GEOMETRY")
    torch.testing.assert_close(found.K, views.K)
    assert found.world_to_camera.shape == (3, 4, 4)
    torch.testing.assert_close(found.world_to_camera, views.world_to_camera)
    assert torch.equal(found.images, views.images)
    assert found.frame_indices == [0, 1, 2]
    assert any("from 504x336 to 30x20 pixels" in n for n in found.notes)
    # Already in the images' pixels: nothing to bring, nothing to say.
    assert from_da3(da3(views, (30, 20)), "x").notes == []


def core_size(size, length, longest):
    """The size at which ComfyUI runs Depth Anything 3: comfy/ldm/depth_anything_3/preprocess.py."""
    scale = length / (max(size) if longest else min(size))
    out = []
    for side in size:
        x = int(round(side * scale))
        down = x // 14 * 14
        out.append(max(1, down + 14 if abs(down + 14 - x) <= abs(x - down) else down))
    return tuple(out)


@pytest.mark.parametrize("size", [(832, 480), (480, 832), (518, 300), (1280, 720), (333, 333)], ids=str)
@pytest.mark.parametrize("length", [140, 504, 518, 1008, 2520])
def test_the_model_s_size_is_found_from_principal_points_that_are_a_little_off(size, length):
    for longest in (True, False):
        width, height = core_size(size, length, longest)
        assert model_size(size, (width / 2, height / 2)) == (width, height)
        # pose_method ray_pose estimates them. Sizes of the model differ by 14 pixels at least.
        assert model_size(size, (width / 2 + 2.5, height / 2 - 2.5)) == (width, height)


def test_a_size_that_the_model_never_runs_at_is_not_made_up():
    assert model_size((192, 160), (48, 40)) is None
    assert model_size((832, 480), (252, 200)) is None


def test_da3_intrinsics_are_rescaled_from_the_size_the_model_ran_at():
    views = make_views(3, 96, 144)
    geometry = da3(views, (504, 336))
    # ray_pose: principal points that are 1% off in all views.
    geometry["intrinsics"][..., 0, 2] *= 1.01
    for size in (None, (504, 336)):
        found = from_da3(geometry, "x", size)
        torch.testing.assert_close(found.K[:, (0, 1), (0, 1)], views.K[:, (0, 1), (0, 1)])
        torch.testing.assert_close(found.K[:, 0, 2], 1.01 * views.K[:, 0, 2])
        assert "intrinsics rescaled from 504x336 to 144x96 pixels" in found.notes
        assert any("assumed from the principal points" in n for n in found.notes) == (size is None)
    # Another tool's size is taken as it is; a given one even where the principal points say otherwise.
    assert "intrinsics rescaled from 288x192 to 144x96 pixels" in from_da3(da3(views, (288, 192)), "x", (288, 192)).notes
    assert "intrinsics rescaled from 57x38 to 144x96 pixels" in from_da3(da3(views, (57, 38)), "x").notes
    near = from_da3(geometry, "x", (518, 350)).K[:, 0, 0]
    torch.testing.assert_close(near, views.K[:, 0, 0] * 504 / 518)


def test_da3_principal_points_of_single_views_stay_where_they_are():
    """pose_method ray_pose estimates them: the picture's size is their median, not each one's own."""
    geometry = da3(make_views())
    geometry["intrinsics"][0, 0, 0, 2] += 16.8
    found = from_da3(geometry, "x")
    assert found.K[:, 0, 2].tolist() == pytest.approx([16.0, 15.0, 15.0])


def test_da3_sky_and_confidence_are_used():
    geometry = da3(make_views())
    geometry["sky"] = torch.zeros(3, 20, 30)
    geometry["sky"][:, :4] = 1
    geometry["confidence"] = torch.ones(3, 20, 30)
    geometry["confidence"][0, 10] = 0
    assert int((~usable_pixels(from_da3(geometry, "x"))).sum()) == 3 * 4 * 30 + 30


BAD_DA3 = {
    "monocular": (lambda g: g | {"mode": "mono"}, "mode 'mono'.*set mode to 'multiview'"),
    "monocular without a mode": (lambda g: {k: g[k] for k in ("depth", "image")}, "mode 'mono'"),
    "without poses": (lambda g: {k: v for k, v in g.items() if k != "extrinsics"} | {"mode": "multiview"}, "no extrinsics"),
    "identity poses": (
        lambda g: g | {"extrinsics": torch.eye(4).expand(1, 3, 4, 4), "intrinsics": torch.eye(3).expand(1, 3, 3, 3)},
        "are the identity, which stands for 'no poses'",
    ),
    "centre at zero": (lambda g: g | {"intrinsics": torch.eye(3).expand(1, 3, 3, 3)}, "principal points at about"),
    "another picture's K": (
        lambda g: g | {"intrinsics": rescale_K(g["intrinsics"], (504, 336), (336, 504))},
        "images are 30x20; expected the same aspect ratio",
    ),
    "one frame": (
        lambda g: {k: v[:, :1] if k in ("extrinsics", "intrinsics") else v[:1] if k != "mode" else v for k, v in g.items()},
        "1 view; expected at least 2",
    ),
    "one view off": (
        lambda g: g | {"intrinsics": g["intrinsics"] + F.one_hot(torch.tensor(2), 27).view(1, 3, 3, 3) * 200.0},
        "principal point of view 0",
    ),
    "fewer images": (lambda g: g | {"image": g["image"][:2]}, r"images of shape \(2, 20, 30, 3\)"),
    "nothing": (lambda g: {}, "no 'depth' in it"),
    "flat poses": (lambda g: g | {"extrinsics": g["extrinsics"].flatten()}, "extrinsics of shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DA3)
def test_bad_da3_geometry_is_refused_by_name(name):
    change, message = BAD_DA3[name]
    with pytest.raises(GeometryError, match=message) as e:
        from_da3(change(da3(make_views())), "Load Geometry")
    assert str(e.value).startswith("Load Geometry: ")


def test_frames_of_the_video_are_picked_and_scaled():
    views = replace(make_views(), images=None)
    video = torch.rand(6, 40, 60, 3, generator=torch.Generator().manual_seed(1))
    found = with_frames(views, video, "clip.mp4")
    assert found.images.shape == (3, 20, 30, 3)
    wanted = F.interpolate(video[[0, 2, 4]].permute(0, 3, 1, 2), (20, 30), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.images, wanted.permute(0, 2, 3, 1))
    require_usable(found, "clip.mp4")
    small = with_frames(views, (video[:, :20, :30] * 255).to(torch.uint8), "clip.mp4").images
    torch.testing.assert_close(small, (video[[0, 2, 4], :20, :30] * 255).floor() / 255)
    with pytest.raises(GeometryError, match="clip.mp4: geometry of a clip of 6 frames, but the video has 5"):
        with_frames(views, video[:5], "clip.mp4")
    with pytest.raises(GeometryError, match="depth maps of 30x20 pixels, but the video is 30x40"):
        with_frames(views, video[:, :, :30], "clip.mp4")


def test_poses_are_made_square_once():
    poses = make_views().world_to_camera
    assert torch.equal(square_poses(poses[:, :3]), poses)
    assert square_poses(poses) is poses


def test_a_file_gives_back_what_was_saved(tmp_path):
    views = replace(make_views(), confidence=torch.rand(3, 20, 30), notes=["from a test"])
    path = tmp_path / "clip.safetensors"
    save_views(path, views, {"video": "clip.mp4"})
    found = load_views(path)
    for name in ("depth", "K", "world_to_camera", "confidence"):
        assert torch.equal(getattr(found, name), getattr(views, name))
    assert (found.images - views.images).abs().max() <= 0.5 / 255 + 1e-6
    assert (found.frame_indices, found.frames, found.notes) == ([0, 2, 4], 6, ["from a test"])
    require_usable(found, str(path))
    with safe_open(path, framework="pt") as f:
        assert f.metadata()["kind"] == "geometry"
        assert f.metadata()["format"] == "intrinsic_reward"
        assert f.get_tensor("images").dtype == torch.uint8
    save_views(path, replace(views, images=None, confidence=None))
    found = load_views(path)
    assert found.images is None
    assert found.confidence is None
    assert [p.name for p in tmp_path.iterdir()] == ["clip.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "clip.safetensors"
    save_views(path, make_views())
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(view_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_views(path, make_views(4))
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_something_else_are_refused(tmp_path):
    views = make_views()
    tensors = {"depth": views.depth, "K": views.K, "world_to_camera": views.world_to_camera}
    header = {"format": "intrinsic_reward", "format_version": "1", "kind": "geometry"}
    bad = {
        "other kind": (tensors, header | {"kind": "latents"}, "a file of kind 'latents'"),
        "no header": (tensors, {}, "without this pack's header"),
        "newer": (tensors, header | {"format_version": "2"}, "written in version 2, this pack reads up to 1"),
        "no version": (tensors, {k: header[k] for k in ("format", "kind")}, "format_version '' is not a number"),
        "no K": ({"depth": views.depth}, header, "no K, no world_to_camera in it"),
        "torn header": (tensors, header | {"frame_indices": "[0,"}, "its header is damaged"),
    }
    for name, (content, metadata, message) in bad.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path, metadata=metadata)
        with pytest.raises(GeometryError, match=f"{name}.safetensors: .*{message}"):
            load_views(path)
    save_file(tensors, tmp_path / "short.safetensors", metadata=header)
    assert load_views(tmp_path / "short.safetensors").frame_indices == [0, 1, 2]
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((tmp_path / "short.safetensors").read_bytes()[:500])
    with pytest.raises(GeometryError, match="torn.safetensors: "):
        load_views(torn)
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        load_views(tmp_path)
