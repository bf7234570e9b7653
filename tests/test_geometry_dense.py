"""The dense geometry scorer against its plain formulas, and on rendered clips whose depth and cameras are true."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from benchmarks.geometry import dense_noise, room
from benchmarks.toy_world import renderer
from benchmarks.toy_world.clips import Labelled
from benchmarks.toy_world.corruptions import corrupt
from trainers.kernels.geometry import cameras, dense, depth_error, naive, refine
from trainers.kernels.geometry.lpips import STAGES, WIDTHS, from_state, load_lpips
from trainers.kernels.geometry.photometric import (
    MOST_GRAIN,
    SIGMA,
    SMOOTHED_NOISE,
    WINDOW,
    dssim,
    grain,
    luminance,
    smoothed,
    squared_error,
)
from trainers.kernels.geometry.record import CONSISTENT, INCONSISTENT, UNDETERMINED, UNITS, GeometryError
from trainers.kernels.geometry.splat import splat, subpixel_positions
from trainers.kernels.geometry.views import Views, doubtful_pixels, sample_indices, take, usable_pixels


def random_views(s=3, h=13, w=17, seed=0, dtype=torch.float64, shift=0.4):
    """Noise pictures of a bumpy surface from cameras that step aside and turn a little."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(s, h, w, 3, generator=g).to(dtype)
    depth = (2 + torch.rand(s, h, w, generator=g)).to(dtype)
    K = torch.tensor([[0.9 * w, 0, (w - 1) / 2], [0, 0.9 * w, (h - 1) / 2], [0, 0, 1.0]], dtype=dtype).repeat(s, 1, 1)
    poses = torch.eye(4, dtype=dtype).repeat(s, 1, 1)
    for i in range(s):
        turn = torch.tensor(0.03 * i)
        poses[i, 0, 0], poses[i, 0, 2], poses[i, 2, 0], poses[i, 2, 2] = turn.cos(), turn.sin(), -turn.sin(), turn.cos()
        poses[i, :3, 3] = torch.tensor([shift * i, 0.03 * i, -0.05 * i])
    return Views(images, depth, K, poses, None, list(range(s)), s)


def toy_views(frames, scene, count=10):
    """Rendered frames [T, 3, 64, 64] with the true depth and cameras of `scene`."""
    true, n = renderer.truth(scene), len(frames)
    K = true.K.clone()
    # The renderer's first pixel centre lies at 0.5, ours at 0.
    K[:2, 2] -= 0.5
    images = frames.permute(0, 2, 3, 1).float() / 255
    views = Views(images, true.depth, K.repeat(n, 1, 1), true.world_to_camera, None, list(range(n)), n)
    return take(views, sample_indices(n, count))


def toy_clip(seed, move="orbit", speed="slow"):
    scene, _ = renderer.random_clip(torch.Generator().manual_seed(seed))
    scene = replace(scene, attributes=replace(scene.attributes, move=move, speed=None if move == "still" else speed))
    return Labelled(renderer.render(scene), scene, "")


def planes(views):
    return views.images.permute(3, 0, 1, 2).contiguous()


def test_unproject_and_project_are_inverse_and_equal_the_plain_formula():
    v = random_views()
    points = cameras.unproject(v.depth, v.K, v.world_to_camera)
    torch.testing.assert_close(points.permute(1, 2, 3, 0), naive.unproject(v.depth, v.K, v.world_to_camera))
    x, y, z = cameras.project(points[:, 2], v.K[2], v.world_to_camera[2])
    rows, columns = torch.meshgrid(torch.arange(13.0), torch.arange(17.0), indexing="ij")
    torch.testing.assert_close(x, columns.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(y, rows.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(z, v.depth[2])


def test_camera_motion_has_the_scene_s_units_cancelled():
    v = random_views(4, shift=0.4)
    one = cameras.motion(v.world_to_camera, v.K, 2.5, 17)
    larger = v.world_to_camera.clone()
    larger[:, :3, 3] *= 100
    assert cameras.motion(larger, v.K, 250.0, 17)["translation"] == pytest.approx(one["translation"])
    assert one["translation"] == pytest.approx(1.22 / 2.5, rel=0.1)
    assert one["rotation"] == pytest.approx(math.degrees(0.03), rel=1e-5)
    assert one["field_of_view_change"] == 0
    zoomed = v.K.clone()
    zoomed[-1, 0, 0] *= 2
    narrow, wide = (2 * math.degrees(math.atan(17 / 2 / f)) for f in (2 * 0.9 * 17, 0.9 * 17))
    assert cameras.motion(larger, zoomed, 1.0, 17)["field_of_view_change"] == pytest.approx(wide - narrow)
    centres = cameras.camera_centres(v.world_to_camera)
    torch.testing.assert_close((v.world_to_camera[:, :3, :3] @ centres[:, :, None])[:, :, 0], -v.world_to_camera[:, :3, 3])


@pytest.mark.parametrize("shape", [(2, 13, 17), (3, 8, 5), (4, 1, 9), (3, 24, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_splat_equals_painters_order(shape, dtype):
    v = random_views(*shape, dtype=dtype)
    wanted = naive.reproject(v.images, v.depth, v.K, v.world_to_camera)
    cut = (planes(v) * 255).clamp(0, 255).floor() / 255
    for t in range(shape[0]):
        seen = splat(v.depth, v.K, v.world_to_camera, t, range(shape[0]))
        torch.testing.assert_close(seen.gather(cut, 0.0).permute(1, 2, 0), wanted[t], atol=1e-6, rtol=0)
        assert seen.covered.any()
        assert (seen.covered == (seen.winner >= 0)).all()
        assert (seen.covered == seen.depth.isfinite()).all()


def test_splat_sees_what_stands_in_front_and_breaks_ties_by_number():
    v = random_views(3, 6, 6, shift=0.0)
    same = v.world_to_camera[:1].repeat(3, 1, 1)
    depth = torch.full((3, 6, 6), 2.0)
    depth[2, 3] = 1.5
    seen = splat(depth, v.K, same, 0, [0, 1, 2])
    view = seen.winner // 36
    assert (view[3] == 2).all()
    assert (view[[0, 1, 2, 4, 5]] == 0).all()
    # Reversing the order of drawing changes nothing.
    again = splat(depth, v.K, same, 0, [2, 1, 0])
    assert torch.equal(seen.winner, again.winner)


def test_splat_leaves_out_bad_depth_and_what_is_behind_the_camera():
    v = random_views(2, 9, 9)
    depth = v.depth.clone()
    depth[1, :3], depth[1, 3], depth[1, 4] = torch.nan, 0, torch.inf
    seen = splat(depth, v.K, v.world_to_camera, 0, [1])
    rows = (seen.winner[seen.covered] - 81) // 9
    assert seen.covered.any()
    assert (rows >= 5).all()
    away = v.world_to_camera.clone()
    # Half a turn about y: everything the other view saw lies behind this one.
    away[0, :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    assert not splat(v.depth, v.K, away, 0, [1]).covered.any()


def test_splat_is_the_same_to_the_bit_whatever_the_threads():
    v = random_views(4, 150, 171, dtype=torch.float32, shift=0.05)
    first = splat(v.depth, v.K, v.world_to_camera, 1, range(4))
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            again = splat(v.depth, v.K, v.world_to_camera, 1, range(4))
            assert torch.equal(first.winner, again.winner)
            assert torch.equal(first.depth, again.depth)
    finally:
        torch.set_num_threads(1)


def test_splat_takes_views_of_any_layout():
    v = random_views(3, 12, 10)
    flipped = v.depth.flip(1).transpose(1, 2).contiguous().transpose(1, 2).flip(1)
    strided = torch.stack([v.depth, v.depth], dim=-1)[..., 0]
    wanted = splat(v.depth, v.K, v.world_to_camera, 0, [1, 2])
    for depth in (flipped, strided):
        assert not depth.is_contiguous() or depth.data_ptr() != v.depth.data_ptr()
        assert torch.equal(wanted.winner, splat(depth, v.K, v.world_to_camera, 0, [1, 2]).winner)


def test_landing_is_where_the_point_was_before_rounding():
    v = random_views(3)
    seen = splat(v.depth, v.K, v.world_to_camera, 0, [1, 2])
    points = naive.unproject(v.depth, v.K, v.world_to_camera)
    u, w = subpixel_positions(points.permute(3, 0, 1, 2), v.K[0], v.world_to_camera[0], seen)
    row, column = (int(i) for i in seen.covered.nonzero()[7])
    x, y, z = naive.project(points.reshape(-1, 3)[seen.winner[row, column]][None], v.K[0], v.world_to_camera[0])
    assert (float(u[row, column]), float(w[row, column])) == pytest.approx((float(x), float(y)))
    assert (round(float(x)), round(float(y))) == (column, row)
    assert float(seen.depth[row, column]) == pytest.approx(float(z))
    row, column = (int(i) for i in (~seen.covered).nonzero()[0])
    assert (float(u[row, column]), float(w[row, column])) == (column, row)


def distance_for_tests(a, b):
    """Stands in for LPIPS: any function of two batches that sees all pixels."""
    return (a - b).abs().mean(dim=(1, 2, 3)).sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_3dcs_equals_the_published_formula(dtype):
    v = random_views(3, 21, 18, seed=4, dtype=dtype)
    wanted, mse = naive.score_3dcs(v.images, v.depth, v.K, v.world_to_camera, distance_for_tests)
    figures = dense.published(planes(v), v.depth, v, distance_for_tests)
    assert figures["3dcs"] == pytest.approx(wanted, abs=1e-5)
    assert figures["3dcs"] - figures["lpips"] == pytest.approx(mse, abs=1e-5)
    assert mse > 0.01
    scored = dense.score_views(v, lpips=distance_for_tests)
    assert scored.record.measurements["3dcs"] == pytest.approx(wanted, abs=1e-5)


def test_mvcs_equals_the_published_formula():
    v = random_views(3, 21, 18, seed=5)
    wanted = naive.mvcs(v.depth, v.K, v.world_to_camera)
    assert 0.1 < wanted < 0.95
    assert depth_error.mvcs(v.depth, v.K, v.world_to_camera) == pytest.approx(wanted, abs=1e-6)
    assert dense.published(planes(v), v.depth, v, distance_for_tests)["mvcs"] == pytest.approx(wanted, abs=1e-6)
    holed = v.depth.clone()
    holed[0, 3, 4] = torch.nan
    assert "mvcs" not in dense.published(planes(v), holed, v, distance_for_tests)


def plane_views(z=4.0, step=0.3, s=3, h=20, w=30):
    """A wall across the z axis, seen by cameras that step aside."""
    v = random_views(s, h, w)
    poses = torch.eye(4, dtype=torch.float64).repeat(s, 1, 1)
    poses[:, 0, 3] = step * torch.arange(s)
    return replace(v, depth=torch.full((s, h, w), z, dtype=torch.float64), world_to_camera=poses)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_depth_error_of_a_wall_is_what_was_put_there(step):
    v = plane_views()
    assert float(depth_error.neighbour_errors(v.depth, v.K, v.world_to_camera, step).nan_to_num().max()) < 1e-6
    depth = v.depth.clone()
    depth[1] *= 0.9
    onto = depth_error.relative_error(depth, v.K, v.world_to_camera, 0, 1, step)
    # From view 0 the wall lies 11% behind what view 1 sees: hidden. From view 1 it stands in front of view 0's.
    assert onto.isnan().all()
    back = depth_error.relative_error(depth, v.K, v.world_to_camera, 1, 0, step)
    assert back.shape == (-(-20 // step), -(-30 // step))
    assert back[back.isfinite()].tolist() == pytest.approx([1 / 9] * int(back.isfinite().sum()))
    assert back.isfinite().any()
    assert back.isnan().any()
    depth[1] *= 0.2
    far = depth_error.relative_error(depth, v.K, v.world_to_camera, 1, 0, step)
    assert float(far.nan_to_num().max()) == pytest.approx(depth_error.TRUNCATION)


def test_relative_error_equals_a_loop():
    v = random_views(2, 9, 11, seed=2)
    found = depth_error.relative_error(v.depth, v.K, v.world_to_camera, 0, 1)
    points = naive.unproject(v.depth, v.K, v.world_to_camera)[0].reshape(-1, 3)
    u, w, z = (t.tolist() for t in naive.project(points, v.K[1], v.world_to_camera[1]))
    counted = 0
    for i, (x, y, ahead) in enumerate(zip(u, w, z, strict=True)):
        value = float(found[i // 11, i % 11])
        if not (0 <= x <= 10 and 0 <= y <= 8):
            assert math.isnan(value)
            continue
        left, top = min(int(x), 9), min(int(y), 7)
        corner = v.depth[1, top : top + 2, left : left + 2]
        there = float(
            torch.tensor([1 - (y - top), y - top]).double() @ corner @ torch.tensor([1 - (x - left), x - left]).double()
        )
        if ahead > there * 1.05:
            assert math.isnan(value)
        else:
            counted += 1
            assert value == pytest.approx(min(abs(there - ahead) / ahead, 0.2), abs=1e-5)
    assert counted > 10


def naive_dssim(a, b):
    """(1 - SSIM) / 2 of two pictures [H, W], window by window."""
    h, w = a.shape
    reach = WINDOW // 2
    out = torch.zeros(h, w, dtype=a.dtype)
    for row in range(h):
        for column in range(w):
            rows = torch.arange(max(0, row - reach), min(h, row + reach + 1))
            columns = torch.arange(max(0, column - reach), min(w, column + reach + 1))
            distance = (rows - row).square()[:, None] + (columns - column).square()[None]
            weight = (-distance.to(a.dtype) / (2 * SIGMA**2)).exp()
            weight = weight / weight.sum()
            x, y = (p[rows][:, columns] for p in (a, b))
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
            cov = (weight * (x - mx) * (y - my)).sum()
            ssim = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
            out[row, column] = (1 - ssim) / 2
    return out


@pytest.mark.parametrize("shape", [(14, 17), (3, 20), (1, 1), (11, 2)], ids=str)
def test_dssim_equals_its_formula(shape):
    g = torch.Generator().manual_seed(1)
    a = torch.rand(2, *shape, generator=g, dtype=torch.float64)
    b = (a + 0.3 * torch.rand(2, *shape, generator=g)).clamp(0, 1)
    wanted = torch.stack([naive_dssim(p, q) for p, q in zip(a, b, strict=True)])
    torch.testing.assert_close(dssim(a, b), wanted, atol=1e-9, rtol=0)
    torch.testing.assert_close(dssim(a.float(), b.float()), wanted.float(), atol=2e-4, rtol=0)
    assert float(dssim(a, a).max()) < 1e-9


def test_squared_error_and_luminance():
    a, b = torch.tensor([0.5, 0.0, 1.0]).view(3, 1), torch.tensor([0.0, 0.0, 0.5]).view(3, 1)
    assert float(squared_error(a, b)) == pytest.approx(0.5 / 3)
    assert float(luminance(a)) == pytest.approx(0.5 * 0.299 + 0.114)


def lpips_state(seed=0):
    """Random weights in the lpips package's layout."""
    g = torch.Generator().manual_seed(seed)
    state, fan_in = {}, 3
    for i, (stage, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
        for position in stage:
            name = f"net.slice{i + 1}.{position}"
            state[f"{name}.weight"] = torch.randn(width, fan_in, 3, 3, generator=g) * (2 / (9 * fan_in)) ** 0.5
            state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=g)
            fan_in = width
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=g)
    return state


def as_torchvision(state):
    """The same trunk under torchvision's names."""
    return {"features." + k.split(".", 2)[2] if k.startswith("net.") else k: v for k, v in state.items()}


def plain_lpips(state, a, b):
    """LPIPS of two pictures [H, W, 3] in [0, 1], layer by layer."""

    def features(picture):
        x = (2 * picture - 1).permute(2, 0, 1)
        x = torch.stack([(c - m) / s for c, m, s in zip(x, (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450), strict=True)])[
            None
        ]
        found, layer = [], iter([k[:-7] for k in state if k.startswith("net.") and k.endswith(".weight")])
        for block in (2, 2, 3, 3, 3):
            if found:
                h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
                x = x[:, :, :h, :w].reshape(1, x.shape[1], h // 2, 2, w // 2, 2).amax(dim=(3, 5))
            for _ in range(block):
                name = next(layer)
                patches = F.unfold(x, 3, padding=1)[0]
                y = state[f"{name}.weight"].flatten(1) @ patches + state[f"{name}.bias"][:, None]
                x = y.clamp(min=0).view(1, -1, *x.shape[2:])
            found.append(x[0])
        return found

    total = 0.0
    for i, (x, y) in enumerate(zip(features(a), features(b), strict=True)):
        x, y = (f / (f.norm(dim=0, keepdim=True) + 1e-10) for f in (x, y))
        weight = state[f"lin{i}.model.1.weight"].view(-1, 1, 1)
        total += float((weight * (x - y) ** 2).sum(dim=0).mean())
    return total


def test_lpips_equals_its_formula_in_both_layouts():
    state = lpips_state()
    g = torch.Generator().manual_seed(3)
    a, b = torch.rand(2, 35, 34, 3, generator=g), torch.rand(2, 35, 34, 3, generator=g)
    wanted = [plain_lpips(state, x, y) for x, y in zip(a, b, strict=True)]
    for layout in (state, as_torchvision(state)):
        assert from_state(layout, "test")(a, b).tolist() == pytest.approx(wanted, rel=1e-4)
    assert from_state(state, "test")(a, a).tolist() == [0, 0]


def test_lpips_files_in_every_layout_and_what_is_missing(tmp_path):
    state = lpips_state()
    a = torch.rand(1, 20, 20, 3, generator=torch.Generator().manual_seed(1))
    wanted = from_state(state, "test")(a, 1 - a)
    heads = {k: v for k, v in state.items() if k.startswith("lin")}
    trunk = {k: v for k, v in as_torchvision(state).items() if k.startswith("features")}
    save_file(state, tmp_path / "one.safetensors")
    save_file(trunk, tmp_path / "trunk.safetensors")
    torch.save(heads, tmp_path / "heads.pth")
    assert torch.equal(load_lpips(tmp_path / "one.safetensors")(a, 1 - a), wanted)
    assert torch.equal(load_lpips(tmp_path / "trunk.safetensors", tmp_path / "heads.pth")(a, 1 - a), wanted)
    with pytest.raises(GeometryError, match=r"trunk.safetensors: lacks LPIPS's linear heads \(lin0.model.1.weight"):
        load_lpips(tmp_path / "trunk.safetensors")
    with pytest.raises(GeometryError, match=r"heads.pth: lacks VGG16's convolutions \(features.0.weight.*and 22 more"):
        load_lpips(tmp_path / "heads.pth")
    with pytest.raises(GeometryError, match="features.0.weight has shape"):
        from_state({**trunk, **heads, "features.0.weight": torch.zeros(64, 3, 11, 11)}, "alex")
    with pytest.raises(GeometryError, match="at least 16x16"):
        load_lpips(tmp_path / "one.safetensors")(a[:, :8], a[:, :8])
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_lpips(tmp_path / "nothing.pth")


class Planted:
    """What a harmful file would smuggle in."""


def test_lpips_files_are_read_without_running_them(tmp_path):
    torch.save({"lin0.model.1.weight": Planted()}, tmp_path / "harmful.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("harmful.pth", "text.pth", "text.safetensors", "list.pth"):
        with pytest.raises(GeometryError, match=name):
            load_lpips(tmp_path / name)


DEFECTS = [("rubber_sheet", 0.25), ("breathing_walls", 0.25), ("texture_morph", 0.25), ("drifting_object", 0.25)]


@pytest.mark.parametrize(("seed", "move", "speed"), [(0, "orbit", "slow"), (1, "forward", "fast")], ids=["orbit", "dolly"])
def test_a_rigid_clip_beats_its_corrupted_twins_and_none_of_the_still(seed, move, speed):
    clip = toy_clip(seed, move, speed)
    rigid = dense.score_views(toy_views(clip.frames, clip.scene, 6)).record
    assert rigid.verdict == CONSISTENT
    assert rigid.score > 0.5
    assert set(rigid.measurements) <= set(UNITS)
    for defect, strength in DEFECTS:
        twin = corrupt(clip, defect, strength, seed)
        scored = dense.score_views(toy_views(twin.frames, clip.scene, 6)).record
        assert scored.error > 1.2 * rigid.error, defect
        assert scored.score < rigid.score
    worst = corrupt(clip, "drifting_object", 1.0, seed)
    assert dense.score_views(toy_views(worst.frames, clip.scene, 6)).record.verdict == INCONSISTENT


@pytest.mark.parametrize(("move", "reason"), [("still", "frames hardly differ"), ("left", "static, slow, zoom or pan")])
def test_a_clip_without_parallax_is_undetermined(move, reason):
    clip = toy_clip(3, move, "fast")
    record = dense.score_views(toy_views(clip.frames, clip.scene, 5)).record
    assert record.verdict == UNDETERMINED
    assert record.score == 0
    assert reason in record.reason
    assert math.isinf(record.error)
    assert record.to_json()["measurements"]["error"] is None


def test_jitter_of_estimated_cameras_does_not_make_a_still_clip_move():
    clip = toy_clip(3, "still")
    frames = clip.frames + torch.randint(0, 3, clip.frames.shape, generator=torch.Generator().manual_seed(1))
    views = toy_views(frames.clamp(max=255), clip.scene, 6)
    poses = views.world_to_camera.clone()
    poses[:, :3, 3] += 0.1 * torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    record = dense.score_views(replace(views, world_to_camera=poses)).record
    assert record.measurements["translation"] > dense.MIN_TRANSLATION
    assert record.verdict == UNDETERMINED


def test_a_slower_path_through_the_same_scene_is_no_better(monkeypatch):
    clip = toy_clip(2, "forward", "fast")
    fast = dense.score_views(toy_views(clip.frames, clip.scene, 5)).record
    monkeypatch.setitem(renderer.AMOUNT, "forward", {"fast": 0.25 * renderer.AMOUNT["forward"]["fast"]})
    slow = dense.score_views(toy_views(renderer.render(clip.scene), clip.scene, 5)).record
    assert slow.verdict != UNDETERMINED
    assert slow.frame_errors[0] < fast.frame_errors[0]
    assert slow.error > fast.error


def test_the_error_map_lights_up_where_a_frame_was_spoilt():
    clip = toy_clip(4)
    views = toy_views(clip.frames, clip.scene, 5)
    images = views.images.clone()
    images[2, 20:30, 34:46] = 1 - images[2, 20:30, 34:46]
    scored = dense.score_views(replace(views, images=images))
    errors = scored.error_map[2].nan_to_num()
    row, column = divmod(int(errors.argmax()), 64)
    assert 20 <= row < 30
    assert 34 <= column < 46
    assert int(torch.tensor(scored.record.frame_errors).argmax()) == 2


def test_what_shows_through_a_nearer_surface_is_drawn_but_not_measured():
    v = plane_views(s=2, step=0.05)
    depth = v.depth.clone()
    # A box that the other view never saw: its points of the wall lie behind it.
    depth[0, 5:12, 8:20] = 2.0
    scored = dense.score_views(replace(v, depth=depth))
    assert scored.error_map[0, 5:12, 8:20].isnan().all()
    assert scored.error_map[0, 14:, :20].isfinite().all()
    assert (scored.preview[0, 5:12, 8:20] != 0.5).any()


def test_pictures_and_numbers_of_a_score_agree():
    clip = toy_clip(5, "forward")
    views = toy_views(clip.frames, clip.scene, 5)
    shares = []
    scored = dense.score_views(views, progress=shares.append)
    record = scored.record
    assert scored.error_map.shape == (5, 64, 64)
    assert scored.preview.shape == (5, 64, 64, 3)
    assert scored.preview.dtype == scored.error_map.dtype == torch.float32
    assert [float(e.nanmean()) for e in scored.error_map] == pytest.approx(record.frame_errors)
    assert record.measurements["mse"] + record.measurements["dssim"] == pytest.approx(sum(record.frame_errors) / 5)
    assert record.measurements["kept"] == pytest.approx(float(scored.error_map.isfinite().float().mean()))
    assert record.measurements["kept"] < record.measurements["coverage"]
    # Nothing lands at the border of the last frame of a dolly out of the first one's picture: mid grey, not measured.
    empty = scored.error_map[0].isnan()
    assert bool(((scored.preview[0] == 0.5).all(dim=-1) <= empty).all())
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert record.frame_indices == [0, 4, 8, 12, 16]
    assert record.frames == 17


def test_half_precision_geometry_is_computed_in_float32():
    clip = toy_clip(6)
    views = toy_views(clip.frames, clip.scene, 4)
    half = dense.score_views(replace(views, depth=views.depth.half(), images=views.images.half())).record
    wanted = dense.score_views(views).record.measurements
    # Corrections of true geometry are nearly none, and rounding makes a large share of them.
    assert half.measurements.pop("noise") == pytest.approx(wanted.pop("noise"), abs=0.1)
    assert half.measurements == pytest.approx(wanted, rel=0.1)


def test_scores_are_the_same_to_the_bit_and_whatever_the_layout():
    clip = toy_clip(6)
    views = toy_views(clip.frames, clip.scene, 4)
    first = dense.score_views(views)
    other = replace(views, images=views.images.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0))
    for again in (dense.score_views(views), dense.score_views(other)):
        assert again.record == first.record
        assert torch.equal(again.error_map.nan_to_num(-1), first.error_map.nan_to_num(-1))
        assert torch.equal(again.preview, first.preview)


def test_the_unit_of_the_geometry_does_not_matter():
    clip = toy_clip(7)
    views = toy_views(clip.frames, clip.scene, 4)
    poses = views.world_to_camera.clone()
    poses[:, :3, 3] *= 16
    large = dense.score_views(replace(views, depth=views.depth * 16, world_to_camera=poses)).record
    assert large.measurements == pytest.approx(dense.score_views(views).record.measurements, rel=1e-3)


def test_a_stop_asked_for_by_progress_is_passed_on():
    class Stopped(Exception):
        pass

    def stop(share):
        raise Stopped

    with pytest.raises(Stopped):
        dense.score_views(random_views(), progress=stop)


def test_many_views_are_thinned_out_and_sky_is_left_out():
    clip = toy_clip(8)
    views = toy_views(clip.frames, clip.scene, 17)
    depth = views.depth.clone()
    depth[:, :8] = torch.nan
    depth[:, 8] = 0
    record = dense.score_views(replace(views, depth=depth)).record
    assert record.frame_indices == sample_indices(17, 10)
    assert any("10 of 17 views" in n for n in record.notes)
    assert any("14.1% of the pixels" in n for n in record.notes)
    assert record.verdict == CONSISTENT


def test_views_that_share_nothing_are_undetermined():
    v = random_views(3, 16, 16)
    poses = v.world_to_camera.clone()
    poses[:, 0, 3] = torch.tensor([0.0, 100.0, 200.0])
    record = dense.score_views(replace(v, world_to_camera=poses)).record
    assert record.verdict == UNDETERMINED
    assert "reach only 0%" in record.reason
    assert math.isinf(record.error)


@cache
def room_views(kind="rigid"):
    """Five views with true geometry of a clip of the ray-cast room, "rigid" or warped by 2 pixels at 480 lines."""
    clip = room.render(room.draw_scene(4, "truck", frames=9, width=312, height=180))
    if kind != "rigid":
        clip = dense_noise.warped(clip, 2.0, 4)
    at = sample_indices(9, 5)
    return Views(clip.frames[at].float() / 255, clip.depth[at], clip.K[at], clip.world_to_camera[at], None, at, 9)


@cache
def room_record(kind="rigid"):
    return dense.score_views(room_views(kind)).record


NETWORK = dense_noise.Condition(depth=0.01, pose=0.002)
ERRORS = {"depth and pose": NETWORK, "focal": dense_noise.Condition(focal=0.02), "grain": dense_noise.Condition(grain=8)}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_network_errs_and_grain_are_not_the_clip_s_fault(name):
    rigid, twin = (
        dense.score_views(dense_noise.with_errors(room_views(kind), ERRORS[name], seed)).record
        for kind, seed in (("rigid", 1), ("warp", 2))
    )
    assert rigid.verdict == CONSISTENT
    assert twin.error > 2 * rigid.error
    assert twin.verdict != CONSISTENT


def test_without_corrections_the_same_errors_would_make_it_inconsistent(monkeypatch):
    noisy = dense_noise.with_errors(room_views(), NETWORK, 1)
    monkeypatch.setattr(refine, "STRIDES", (6,))
    monkeypatch.setattr(refine, "OBSERVATIONS", 0.0)
    assert dense.score_views(noisy).record.measurements["noise"] == 0
    assert dense.score_views(noisy).record.verdict == INCONSISTENT


def fitted(views):
    return refine.fit(planes(views), views.depth, views.K, views.world_to_camera)


def displacement(views, truth):
    """Mean distance in pixels, over all pairs of views, between where points land by `views` and by the truth."""
    found = []
    for i in range(len(truth.depth)):
        for j in range(len(truth.depth)):
            at = []
            for v in (views, truth):
                x, y, z = cameras.warp(v.depth[i], *cameras.pixel_transform(v.K, v.world_to_camera, i, j))
                at.append(torch.stack([x / z, y / z]))
            found.append(float((at[0] - at[1]).norm(dim=0).mean()))
    return sum(found) / len(found)


def test_the_fit_takes_noisy_geometry_to_the_truth_and_says_how_far():
    truth = room_views()
    noisy = dense_noise.with_errors(truth, replace(NETWORK, focal=0.01), 3)
    found = fitted(noisy)
    depth, K, poses = found.of_geometry(noisy.depth, noisy.K, noisy.world_to_camera)
    before, after = displacement(noisy, truth), displacement(replace(noisy, depth=depth, K=K, world_to_camera=poses), truth)
    assert before > 1
    assert after < 0.35 * before
    # In pixels of 480 lines, over the points that are seen in both views.
    assert found.noise == pytest.approx(before * 480 / 180, rel=0.35)
    assert fitted(truth).noise < 0.1 * found.noise


def test_derivatives_of_the_fit_are_those_of_its_residuals():
    s, h, w = 3, 60, 80
    rows, columns = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing="ij")
    v = random_views(s, h, w, shift=0.05)
    # Slanted planes: their inverse depth is linear, so that interpolation and derivatives are exact.
    depth = torch.stack([1 / (0.25 + (0.001 + 0.0005 * i) * rows + 0.0007 * columns) for i in range(s)])
    images = torch.stack([0.5 + 0.2 * (0.25 * columns + 0.3 * i).sin() + 0.2 * (0.2 * rows - 0.1 * i).cos() for i in range(s)])
    coarse, _ = refine._coarse(images.expand(3, s, h, w), depth, v.K, v.world_to_camera)
    start = 0.003 * torch.randn(s * refine.PER_VIEW + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Derivatives leave out how a point moves within the other view's correction; a constant one has no such part.
    start[:-1].view(s, refine.PER_VIEW)[:, 6:] = 0.01

    def match(value):
        return refine._match(coarse, value, 0, [1], 3)

    m = match(start)
    (_, _, of_grey), (_, _, of_gap) = refine._terms(coarse, start, m)
    gain = float(refine._brightness(m)[1])
    assert int(m.seen.sum()) > 200
    for derivatives, residual in ((of_gap[0], lambda m: m.gap[0]), (of_grey[0], lambda m: gain * m.there[0, 0])):
        parameters = [*range(derivatives.shape[1] - 1), len(start) - 1]
        for column, parameter in enumerate(parameters):
            step = torch.zeros_like(start)
            step[parameter] = 2e-3
            above, below = match(start + step), match(start - step)
            seen = (m.seen & above.seen & below.seen)[0]
            found, wanted = derivatives[seen, column], (residual(above) - residual(below))[seen] / 4e-3
            assert float((found - wanted).norm()) <= 0.15 * float(wanted.norm()) + 1e-3, parameter


def test_corrections_are_bounded_and_do_not_explain_a_warp():
    truth = room_views()
    wrong = truth.depth * torch.tensor([0.8, 1.3, 1.0, 0.7, 1.2])[:, None, None]
    found = fitted(replace(truth, depth=wrong, K=truth.K * torch.tensor([1.3, 1.3, 1.0])[:, None]))
    assert float(found.field.abs().max()) <= 0.05 + 1e-6
    assert abs(math.log(found.focal)) <= 0.05 + 1e-6
    angles = torch.asin(
        ((found.motions[:, :3, :3] - found.motions[:, :3, :3].transpose(1, 2)) / 2).flatten(1).norm(dim=1) / 2**0.5
    )
    assert float(angles.max()) <= math.radians(1) * 3**0.5 + 1e-6
    middle = float(wrong.median())
    assert float(found.motions[:, :3, 3].abs().max()) <= 0.031 * middle
    assert room_record("warp").error > 4 * room_record().error
    assert room_record("warp").verdict == INCONSISTENT


def test_the_fit_is_nothing_where_there_is_nothing_to_fit():
    v = plane_views()
    for depth in (torch.full_like(v.depth, torch.nan), v.depth * 1e-30):
        found = refine.fit(planes(v), depth, v.K, v.world_to_camera)
        assert found.field.isfinite().all()
        assert found.motions.isfinite().all()
    found = refine.fit(planes(v), torch.full_like(v.depth, torch.nan), v.K, v.world_to_camera)
    assert (float(found.field.abs().max()), found.focal, found.noise) == (0, 1, 0)
    torch.testing.assert_close(found.gain, torch.ones(3, 3))


def test_light_is_no_geometry():
    views = room_views()
    gain = torch.tensor([[1.0, 0.8, 0.7, 0.9, 0.75], [1.0, 0.8, 0.8, 0.9, 0.7], [1.0, 0.8, 0.9, 0.9, 0.8]]).T[:, None, None]
    bias = torch.tensor([0.0, 0.05, 0.1, 0.02, 0.08])[:, None, None, None]
    changed = replace(views, images=views.images * gain + bias)
    found = fitted(changed)
    # The fit undoes the change, but for what is common to all views.
    product = found.gain * gain[:, 0, 0].T
    torch.testing.assert_close(product / product.mean(dim=1, keepdim=True), torch.ones(3, 5), atol=0.03, rtol=0)
    record = dense.score_views(changed).record
    assert record.verdict == CONSISTENT
    assert record.error == pytest.approx(room_record().error, rel=0.25)
    faded = dense.score_views(replace(room_views("warp"), images=room_views("warp").images * gain + bias)).record
    assert faded.verdict == INCONSISTENT


def test_grain_is_measured_and_leaves_structure_alone():
    g = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(2, 1, 6, 8, generator=g), (120, 160), mode="bicubic").clamp(0, 1)[:, 0]
    assert float(grain(smooth).sqrt().max()) < 0.3 / 255
    noisy = smooth + torch.tensor([4.0, 12.0])[:, None, None] / 255 * torch.randn(2, 120, 160, generator=g)
    assert (grain(noisy).sqrt() * 255).tolist() == pytest.approx([4, 12], rel=0.2)
    edge = torch.zeros(1, 120, 160)
    edge[:, :, 80:] = 1
    assert float(grain(edge)) == 0
    assert float(grain(torch.rand(1, 64, 64, generator=g)).sqrt()) == pytest.approx(MOST_GRAIN)
    assert grain(torch.rand(3, 2, 9)).tolist() == [0, 0, 0]
    # Two noisy images of one thing are alike once the noise is known.
    a, b = (smoothed(smooth[:1] + 8 / 255 * torch.randn(1, 120, 160, generator=g)) for _ in range(2))
    noise = 2 * SMOOTHED_NOISE * (8 / 255) ** 2
    assert float(dssim(a, b, noise).mean()) < 0.4 * float(dssim(a, b).mean())
    assert float(dssim(a, a, noise).max()) < 1e-6


@pytest.mark.parametrize("shape", [(2, 7, 9), (1, 1, 5), (3, 1)], ids=str)
def test_smoothing_equals_its_kernel(shape):
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = F.pad(x.reshape(-1, 1, *shape[-2:]), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    wanted = F.conv2d(padded, (kernel[:, None] * kernel)[None, None]).reshape(shape)
    torch.testing.assert_close(smoothed(x), wanted)
    constant = torch.full((1, 40, 40), 0.3)
    torch.testing.assert_close(smoothed(constant), constant)


def test_edges_are_jumps_of_the_depth_and_no_slopes():
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    floor = 1 / (0.05 + 0.02 * rows + 0.01 * columns)
    # From pixel to pixel the depth of this plane changes by up to 28%.
    assert not depth_error.edges(floor[None]).any()
    step = torch.full((1, 20, 30), 4.0)
    step[:, :, 12:] = 4.4
    found = depth_error.edges(step)[0]
    assert found.any(dim=0).nonzero().flatten().tolist() == [10, 11, 12, 13]
    assert found[1:-1, 10:14].all()
    step[:, :, 12:] = 4.1
    assert not depth_error.edges(step).any()
    step[0, 5, 5] = torch.nan
    assert depth_error.edges(step)[0, 4:7, 4:7].all()
    assert int(depth_error.edges(step).sum()) < 30
    assert depth_error.edges(torch.ones(2, 1, 1)).shape == (2, 1, 1)


def test_pixels_at_edges_are_not_measured():
    v = plane_views(s=3, h=40, w=60, step=0.1)
    depth = v.depth.clone()
    depth[:, 10:30, 20:40] = 2.0
    scored = dense.score_views(replace(v, depth=depth))
    assert scored.error_map[1, 9:31, 19:21].isnan().all()
    assert scored.error_map[1, 15:25, 25:35].isfinite().any()
    assert scored.record.measurements["kept"] < 1


def test_the_lowest_confidence_is_left_out_as_in_exports_of_the_model():
    views = room_views()
    confidence = 1 + torch.rand(views.depth.shape, generator=torch.Generator().manual_seed(0))
    confidence[:, :60] *= 0.01
    doubted = replace(views, confidence=confidence)
    keep = usable_pixels(doubted)
    doubtful = doubtful_pixels(doubted, keep)
    assert float(doubtful.float().mean()) == pytest.approx(0.4, abs=0.005)
    assert doubtful[:, :60].all()
    scored = dense.score_views(doubted)
    assert any(n.startswith("40.") and "lowest confidence" in n for n in scored.record.notes)
    assert scored.error_map[:, :60].isnan().all()
    assert scored.record.measurements["kept"] < 0.6
    # The same everywhere, or none: nothing is left out.
    for same in (torch.ones_like(confidence), None):
        record = dense.score_views(replace(views, confidence=same)).record
        assert record == room_record()
        assert not any("confidence" in n for n in record.notes)
    # Pixels without depth do not count among the 40%.
    some = keep.clone()
    some[:, :60] = False
    assert float(doubtful_pixels(doubted, some)[:, 60:].float().mean()) == pytest.approx(0.4, abs=0.005)


def test_errors_that_could_be_the_network_s_are_not_held_against_the_clip():
    def verdict(**changes):
        measured = {"error": 1.3 * dense.BORDER, "translation": 0.3, "coverage": 1.0, "kept": 0.9, "noise": 0.1}
        return dense._judge(measured | changes, 1.0)

    assert verdict()[0] == INCONSISTENT
    assert verdict(noise=0.5 * dense.DOUBLING)[0] == CONSISTENT
    assert verdict(noise=0.5 * dense.DOUBLING, error=1.6 * dense.BORDER)[0] == INCONSISTENT
    found, reason = verdict(noise=50.0)
    assert found == UNDETERMINED
    assert "corrected by 50.0 px" in reason
    assert verdict(noise=50.0, error=9 * dense.BORDER)[0] == UNDETERMINED
    assert verdict(noise=50.0, error=0.9 * dense.BORDER)[0] == CONSISTENT
    found, reason = verdict(kept=0.05)
    assert found == UNDETERMINED
    assert "5% of the pixels can be compared" in reason


def test_the_score_is_above_one_half_exactly_where_the_verdict_is_consistent():
    scored = dense.score_views(dense_noise.with_errors(room_views(), NETWORK, 1)).record
    edge = dense.border(scored.measurements["noise"])
    assert edge > 1.1 * dense.BORDER
    assert scored.score == pytest.approx(0.5 + 0.5 * edge / (edge + scored.error))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_score():
    clip = toy_clip(9)
    views = toy_views(clip.frames, clip.scene, 5)
    there = replace(views, images=views.images.cuda(), depth=views.depth.cuda())
    first, again = dense.score_views(there), dense.score_views(there)
    assert torch.equal(first.error_map.nan_to_num(-1), again.error_map.nan_to_num(-1))
    assert first.record.measurements == pytest.approx(dense.score_views(views).record.measurements, rel=1e-2)
