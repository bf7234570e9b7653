"""The geometry score without weights: its parts against plain formulas and known motions, its verdicts on rendered clips."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.geometry import room
from trainers.kernels.geometry import bundle, corners, fundamental, lucas_kanade, rotation, tracks
from trainers.kernels.geometry.cuts import find_cuts, longest_shot
from trainers.kernels.geometry.drawing import map_size
from trainers.kernels.geometry.grey import grey_levels
from trainers.kernels.geometry.point_tracks import TorchTracker, follow, returns, trackable, widened
from trainers.kernels.geometry.record import (
    CONSISTENT,
    INCONSISTENT,
    UNDETERMINED,
    UNITS,
    GeometryError,
    GeometryRecord,
    score_of,
)

SIZE = {"frames": 17, "width": 256, "height": 144}


def rendered(move="truck", seed=1, **changes):
    return room.render(replace(room.draw_scene(seed, move, **SIZE), reach=1.2, **changes))


@pytest.fixture(scope="module")
def rigid():
    return rendered()


@pytest.fixture(scope="module")
def rigid_scored(rigid):
    return tracks.score_clip(rigid.frames, "torch")


def grey_of(frames):
    return torch.stack([grey_levels(f, frames.shape[1:3]) for f in frames])


def texture(height=96, width=128, seed=0):
    noise = torch.rand(1, 1, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0, 0] * 200).clamp(0, 255)


def test_corner_strength_is_the_smaller_eigenvalue():
    image = texture()
    found = corners.corner_strength(image[None, None])[0, 0]
    x, y = corners.gradients(image[None, None])
    for row, column in ((20, 30), (50, 77), (90, 5)):
        tensor = torch.zeros(2, 2)
        for v in range(row - 3, row + 4):
            for u in range(column - 3, column + 4):
                g = torch.stack([x[0, 0, v, u], y[0, 0, v, u]]) if v < 96 and u < 128 else torch.zeros(2)
                tensor += torch.outer(g, g) / 49
        assert math.isclose(float(found[row, column]), float(torch.linalg.eigvalsh(tensor)[0]), rel_tol=1e-3, abs_tol=1e-2)


@pytest.mark.parametrize("lines", [corners.STRIP - 1, corners.STRIP, corners.STRIP + 1, 3 * corners.STRIP + 5])
def test_strips_give_the_strength_of_the_whole_picture(lines):
    image = texture(4 * -(-lines // 4), 96)[None, None, :lines]
    assert torch.equal(corners.corner_strength(image), corners._strength(image))


def test_gradients_of_a_slope_are_its_steepness():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    along_x, along_y = corners.gradients((3 * x - 2 * y)[None, None])
    assert torch.allclose(along_x[..., 1:-1, 1:-1], torch.tensor(3.0))
    assert torch.allclose(along_y[..., 1:-1, 1:-1], torch.tensor(-2.0))


def test_one_corner_a_cell_none_where_taken_and_none_on_plain_ground():
    image = texture()
    allowed = trackable(image.shape, None)
    found = corners.find_corners(image, 16, allowed)
    cells = {tuple(c) for c in (found / 16).floor().long().tolist()}
    assert len(cells) == len(found) > 20
    assert (found.min(0).values >= 8).all()
    assert (found.max(0).values < torch.tensor([120, 88])).all()
    again = corners.find_corners(image, 16, allowed, taken=found)
    assert len(again) == 0
    assert len(corners.find_corners(torch.full((96, 128), 80.0), 16, allowed)) == 0


@pytest.mark.parametrize("shift", [(0.4, -0.3), (7.3, 4.6), (-11.0, 2.5)])
def test_lucas_kanade_finds_a_known_shift(shift):
    big = texture(160, 192)
    y, x = torch.meshgrid(torch.arange(96.0) + 32, torch.arange(128.0) + 32, indexing="ij")

    def cut(dx, dy):
        at = torch.stack([(x - dx) * (2 / 191) - 1, (y - dy) * (2 / 159) - 1], dim=-1)[None]
        return torch.nn.functional.grid_sample(big[None, None], at, mode="bicubic", align_corners=True)

    first, second = lucas_kanade.pyramid(cut(0, 0)), lucas_kanade.pyramid(cut(*shift))
    inner = torch.zeros(96, 128, dtype=torch.bool)
    inner[20:-20, 20:-20] = True
    points = corners.find_corners(first[0][0, 0], 16, inner)
    found, left = lucas_kanade.track(first, second, points)
    error = (found - points - torch.tensor(shift)).norm(dim=1)
    assert error.median() < 0.05
    assert error.quantile(0.9) < 0.3
    assert left.median() < 2.0


def test_lucas_kanade_agrees_with_opencv(rigid):
    pytest.importorskip("cv2")
    from trainers.kernels.geometry.opencv_tracker import OpenCVTracker

    grey = grey_of(rigid.frames[:3])
    points = corners.find_corners(grey[0], 10, trackable(grey.shape[1:], None))
    ours, theirs = (t(grey)(0, 1, points, points, 4) for t in (TorchTracker, OpenCVTracker))
    assert (ours[0] - theirs[0]).norm(dim=1).quantile(0.9) < 0.02
    assert OpenCVTracker(grey)(0, 1, points[:0], points[:0], 4)[0].shape == (0, 2)


def test_a_point_that_opencv_does_not_find_is_lost(rigid):
    """OpenCV leaves its difference unwritten, so a track was kept or lost by what the memory held before."""
    pytest.importorskip("cv2")
    from trainers.kernels.geometry.opencv_tracker import OpenCVTracker

    grey = grey_of(rigid.frames[:2])
    flat = torch.full_like(grey, 90.0)
    points = torch.tensor([[40.0, 40.0], [60.0, 50.0]])
    for _ in range(5):
        # Memory that numpy may hand out again, full of small differences.
        _used = [np.full((2, 1), 1e-3, dtype=np.float32) for _ in range(50)]
        del _used
        assert OpenCVTracker(flat)(0, 1, points, points, 4)[1].isinf().all()
    assert (
        OpenCVTracker(grey)(0, 1, *2 * (corners.find_corners(grey[0], 10, trackable(grey.shape[1:], None)),), 4)[1]
        .isfinite()
        .any()
    )


def two_views(count=60, seed=0, noise=0.0):
    """Pixels of random points in two cameras, and the second's rotation and direction."""
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=g, dtype=torch.float64) * torch.tensor([4.0, 3.0, 4.0]) - torch.tensor(
        [2.0, 1.5, -3.0]
    )
    R = bundle.rotation_of(torch.tensor([0.03, -0.08, 0.02], dtype=torch.float64))
    t = torch.tensor([0.5, 0.1, 0.2], dtype=torch.float64)
    moved = points @ R.T + t
    a, b = (500 * p[:, :2] / p[:, 2:] for p in (points, moved))
    return a + noise * torch.randn(a.shape, generator=g), b + noise * torch.randn(b.shape, generator=g)


def test_eight_points_give_the_epipolar_geometry():
    a, b = two_views()
    F = fundamental.fit(a, b, torch.ones(len(a), dtype=torch.float64))
    assert fundamental.sampson(F, a, b).max() < 1e-6
    assert abs(float(torch.linalg.det(F))) < 1e-9


def test_sampson_is_its_formula():
    a, b = two_views(12, noise=2.0)
    F = fundamental.fit(a, b, torch.ones(12, dtype=torch.float64))
    for p, q, found in zip(a, b, fundamental.sampson(F, a, b), strict=True):
        p, q = (torch.cat([v, v.new_ones(1)]) for v in (p, q))
        Fp, Fq = F @ p, F.T @ q
        expected = abs(q @ Fp) / (Fp[0] ** 2 + Fp[1] ** 2 + Fq[0] ** 2 + Fq[1] ** 2).sqrt()
        assert torch.isclose(found, expected)


def test_ransac_survives_a_third_of_outliers_pair_by_pair():
    pairs = [two_views(80, seed, 0.2) for seed in range(3)]
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))
    wrong = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:26]
    b[:, wrong] += torch.randn(3, 26, 2, generator=torch.Generator().manual_seed(2)) * 40
    valid = torch.ones(3, 80, dtype=torch.bool)
    valid[2, 70:] = False
    F, cut = fundamental.ransac(a, b, valid, 3.0, torch.Generator().manual_seed(0), tries=200)
    right = torch.ones(80, dtype=torch.bool)
    right[wrong] = False
    for pair in range(3):
        assert cut[pair, right & valid[pair]].mean() < 0.4
        assert fundamental.sampson(F[pair], a[pair], b[pair])[right & valid[pair]].median() < 0.4
    assert (cut[2, 70:] == 0).all()
    assert cut[:, wrong[:20]].mean() > 1.0


def test_rotation_vectors_are_matrix_exponentials():
    omega = torch.tensor([[0.3, -0.2, 0.9], [0.0, 0.0, 0.0], [1e-6, 0.0, 2e-6]], dtype=torch.float64)
    x, y, z = omega.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(3, 3, 3)
    assert torch.allclose(bundle.rotation_of(omega), torch.linalg.matrix_exp(cross), atol=1e-12)
    both = rotation.compose(omega[:1], torch.tensor([[0.1, 0.4, -0.2]], dtype=torch.float64))
    expected = bundle.rotation_of(omega[:1]) @ bundle.rotation_of(torch.tensor([[0.1, 0.4, -0.2]], dtype=torch.float64))
    assert torch.allclose(bundle.rotation_of(both), expected)


def test_turning_and_zooming_leaves_nothing_of_a_pan_and_something_of_a_step():
    a, b = two_views(100)
    focal = torch.tensor(500.0, dtype=torch.float64)
    omega = torch.tensor([[0.05, -0.2, 0.1]], dtype=torch.float64)
    zoom = torch.tensor([0.3], dtype=torch.float64)
    turned = rotation.rotate_and_zoom(a[None], omega, zoom, focal)
    valid = torch.ones(1, 100, dtype=torch.bool)
    valid[0, 90:] = False
    found, zoomed, left = rotation.fit_rotation_and_zoom(a[None], turned, valid, focal, 2.0)
    assert torch.allclose(found, omega, atol=1e-4)
    assert torch.allclose(zoomed, zoom, atol=1e-4)
    assert left.max() < 0.02
    _, _, left = rotation.fit_rotation_and_zoom(a[None], b[None], valid, focal, 2.0)
    assert left[valid].mean() > 5
    assert (left[~valid] == 0).all()


def moving_scene(frames=6, count=40, noise=0.0):
    g = torch.Generator().manual_seed(3)
    double = {"generator": g, "dtype": torch.float64}
    points = torch.cat([torch.rand(count, 2, **double) - 0.5, 0.4 + torch.rand(count, 1, **double)], 1)
    omega = 0.05 * torch.randn(frames, 3, **double)
    translation = torch.linspace(-0.4, 0.4, frames, dtype=torch.float64)[:, None] * torch.tensor(
        [1.0, 0.1, 0.3]
    ) + 0.02 * torch.randn(frames, 3, **double)
    reference = frames // 2
    omega[reference], translation[reference] = 0, 0
    scene = bundle.Scene(bundle.rotation_of(omega), translation, points, torch.tensor(600.0, dtype=torch.float64))
    visible = torch.rand(frames, count, generator=g) > 0.15
    seen = bundle.project(scene) + noise * torch.randn(frames, count, 2, **double)
    return scene, torch.where(visible[..., None], seen, 0.0), visible, reference


def test_normal_equations_are_those_of_the_weighted_residuals():
    """Against a dense Jacobian by autograd, weights held as they are."""
    scene, seen, visible, reference = moving_scene(4, 7, 1.0)
    start = scene.focal * 1.1
    H, g, W, V, gp = bundle._normal_equations(scene, seen, visible, 1.5, start, reference)
    weight = bundle._linear(scene, seen, visible, 1.5)[2]

    def residuals(change):
        pose, lens, points = change[:24].view(4, 6), change[24], change[25:].view(7, 3)
        moving = torch.ones(4, 1, dtype=torch.float64)
        moving[reference] = 0
        moved = bundle.Scene(
            bundle.rotation_of(pose[:, :3] * moving) @ scene.rotation,
            scene.translation + pose[:, 3:] * moving,
            scene.points + points,
            scene.focal * lens.exp(),
        )
        data = (bundle.project(moved) - seen) * weight[..., None]
        depth = bundle.DEPTH_PRIOR * (moved.points[:, 2] - 1)
        return torch.cat([data.flatten(), depth, ((moved.focal / start).log() / bundle.FOCAL_PRIOR)[None]])

    zero = torch.zeros(25 + 21, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(residuals, zero)
    full, slope = J.T @ J, J.T @ residuals(zero)
    assert torch.allclose(H, full[:25, :25], rtol=1e-6, atol=1e-6)
    assert torch.allclose(g, slope[:25], rtol=1e-6, atol=1e-6)
    assert torch.allclose(W.transpose(1, 2).reshape(25, -1), full[:25, 25:], rtol=1e-6, atol=1e-6)
    assert torch.allclose(torch.block_diag(*V), full[25:, 25:], rtol=1e-6, atol=1e-6)
    assert torch.allclose(gp.flatten(), slope[25:], rtol=1e-6, atol=1e-6)
    # The step solves the damped dense system: eliminating the points changes nothing.
    damping = 1e-2
    damped = full + torch.diag(damping * full.diagonal() + 1e-9)
    expected = torch.linalg.solve(damped, -slope)
    moved = bundle._step(scene, H, g, W, V, gp, damping)
    assert torch.allclose(moved.points - scene.points, expected[25:].view(7, 3), atol=1e-7)
    assert torch.allclose(moved.translation - scene.translation, expected[:24].view(4, 6)[:, 3:], atol=1e-7)


def test_structure_from_motion_explains_a_rigid_scene_and_triangulates_the_rest():
    true, seen, visible, reference = moving_scene(9, 80, 0.1)
    rigid = bundle.start(seen, visible, true.rotation, reference, 700.0)
    first = (bundle.project(rigid) - seen).norm(dim=-1)[visible].mean()
    found = rigid
    for scale in (16.0, 4.0, 1.0):
        found, cost = bundle.refine(found, seen, visible, reference, scale, 20, 1e-6)
    left = (bundle.project(found) - seen).norm(dim=-1)[visible]
    assert left.mean() < 0.15 < 5 < first
    assert cost < 0.05
    assert math.isclose(float(found.focal), 600, rel_tol=0.02)
    others = bundle.triangulate(replace(found, points=found.points[:1]), seen, visible, reference, 1.0, 20)
    left = (bundle.project(others) - seen).norm(dim=-1)[visible]
    assert left.quantile(0.9) < 0.3


def test_a_mirrored_scene_has_near_and_far_exchanged():
    scene = moving_scene(4, 7)[0]
    other = bundle.reverse_depth(scene)
    assert torch.equal(other.points[:, 2].argsort(), scene.points[:, 2].argsort(descending=True))
    assert torch.equal(other.translation, -scene.translation)


def test_cameras_are_found_again_among_points_that_stay():
    true, seen, visible, reference = moving_scene(9, 80, 0.1)
    seen[:, :10] += 40
    moved = replace(true, rotation=true.rotation.roll(1, 0), translation=true.translation.roll(1, 0))
    found = bundle.resect(moved, seen, visible, 1.0, 12)
    assert torch.equal(found.points, true.points)
    left = (bundle.project(found) - seen).norm(dim=-1)[:, 10:][visible[:, 10:]]
    before = (bundle.project(moved) - seen).norm(dim=-1)[:, 10:][visible[:, 10:]]
    assert left.mean() < 0.3 < 3 < before.mean()
    few = visible & (torch.arange(80) < 3)
    assert torch.equal(bundle.resect(moved, seen, few, 1.0).translation, moved.translation)


def test_a_mask_is_widened_in_x_and_in_y():
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[9, 14] = mask[0, 29] = True
    for reach in (1, 3, 8):
        found = widened(mask, reach)
        for y in range(20):
            for x in range(30):
                near = max(abs(y - 9), abs(x - 14)) <= reach or max(y, 29 - x) <= reach
                assert bool(found[y, x]) == near
    assert not widened(torch.zeros(5, 5, dtype=torch.bool), 2).any()


def test_points_that_a_jerk_loses_are_tracked_through_the_frames_between():
    """Every fifth frame is a key frame; from one to the next, the picture slides by more than the pyramid reaches."""
    big = texture(96, 520)
    frames = torch.stack([big[:, 12 * t : 12 * t + 260] for t in range(11)])
    keys, points = frames[::5].contiguous(), torch.tensor([[150.0, 40.0], [170.0, 60.0], [200.0, 30.0]])

    def between(k):
        return TorchTracker(frames[5 * k : 5 * k + 6]), 6

    tracker = TorchTracker(keys)
    there, left = tracker(0, 1, points, points, 4)
    assert not returns(tracker, 0, 1, points, there, left).any()
    alone, bridged = follow(keys, tracker), follow(keys, tracker, between=between)
    assert bridged.visible[1].sum() > 2 * alone.visible[1].sum()
    kept = bridged.visible[0] & bridged.visible[1]
    moved = (bridged.positions[1] - bridged.positions[0])[kept]
    assert (moved - torch.tensor([-60.0, 0.0])).norm(dim=1).median() < 0.3


def test_points_out_of_reach_are_looked_for_by_the_steps_of_their_neighbours():
    class Short:
        """Moves points by (30, 0) per key frame; right of x = 64 it finds them within 8 pixels of the guess only."""

        def __call__(self, i, j, points, guess, levels):
            there = points + torch.tensor([30.0 * (j - i), 0.0])
            found = ((guess - there).norm(dim=1) < 8) | (points[:, 0] < 64) | (j < i)
            return torch.where(found[:, None], there, points), torch.where(found, 0.0, torch.inf)

    found = follow(texture(96, 260)[None].expand(4, -1, -1), Short())
    first = found.visible[0]
    assert (first & (found.positions[0, :, 0] > 80)).sum() > 5
    assert found.visible[1][first & (found.positions[0, :, 0] < 220)].all()
    # The record's share of lost points is that of the first search.
    assert int(found.lost[0]) > 5
    assert not found.ended[0].any()


def test_cuts_are_found_and_flashes_and_pans_are_not(rigid):
    other = rendered("dolly", seed=5)
    cut = torch.cat([rigid.frames[:9], other.frames[9:]])
    assert find_cuts(cut) == find_cuts(cut.float() / 255) == [9]
    assert find_cuts(rigid.frames) == []
    flicker = 1 + 0.3 * (2 * torch.rand(len(rigid.frames), generator=torch.Generator().manual_seed(0)) - 1)
    assert find_cuts((rigid.frames * flicker[:, None, None, None]).clamp(0, 255).to(torch.uint8)) == []
    assert find_cuts((cut * flicker[:, None, None, None]).clamp(0, 255).to(torch.uint8)) == [9]
    flash = rigid.frames.clone()
    flash[8] = 250
    assert find_cuts(flash) == []
    assert find_cuts(rendered("pan").frames) == []
    assert longest_shot([9], 17) == (0, 9)
    assert longest_shot([], 17) == (0, 17)


def test_a_rigid_clip_is_consistent_and_beats_its_twins(rigid, rigid_scored):
    record = rigid_scored.record
    assert record.verdict == CONSISTENT
    assert record.score > 0.5
    assert set(record.measurements) <= set(UNITS)
    assert record.frame_indices == list(range(17))
    assert len(record.frame_errors) == 17
    for twin in (room.warp(rigid, 2.0, 0)[0], rendered(breathing=0.3), rendered(morph=0.3)):
        assert tracks.score_clip(twin.frames, pictures=False).record.error > 1.5 * record.error
    assert tracks.score_clip(room.warp(rigid, 4.0, 0)[0].frames, pictures=False).record.verdict == INCONSISTENT


@pytest.mark.parametrize("move", room.STILL_MOVES)
def test_clips_that_show_no_depth_are_undetermined(move):
    record = tracks.score_clip(rendered(move).frames, pictures=False).record
    assert record.verdict == UNDETERMINED
    assert record.score == 0.0


def test_backends_give_the_same_verdicts(rigid, rigid_scored):
    pytest.importorskip("cv2")
    for frames, ours in (
        (rigid.frames, rigid_scored.record),
        (room.warp(rigid, 4.0, 0)[0].frames, None),
        (rendered("pan").frames, None),
    ):
        ours = ours or tracks.score_clip(frames, "torch", pictures=False).record
        theirs = tracks.score_clip(frames, "opencv", pictures=False).record
        assert ours.verdict == theirs.verdict
        assert math.isclose(ours.measurements["residual"], theirs.measurements["residual"], rel_tol=0.2)


def test_the_same_clip_in_any_form_gives_the_same_record(rigid, rigid_scored):
    record = rigid_scored.record
    assert tracks.score_clip(rigid.frames, "torch").record == record
    floats = (rigid.frames.float() / 255).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not floats.is_contiguous()
    before = floats.clone()
    assert tracks.score_clip(floats, "torch").record == record
    assert torch.equal(floats, before)
    assert GeometryRecord.from_json(record.to_json()) == record


def test_pictures_show_where_the_box_drifts():
    clip = rendered(drift=0.6)
    scored = tracks.score_clip(clip.frames, "torch")
    assert scored.preview.shape == (17, 144, 256, 3)
    assert scored.error_map.shape == (17, *map_size((144, 256)))
    mask = clip.object_mask[scored.record.frame_indices].float()[:, None]
    mask = torch.nn.functional.interpolate(mask, scored.error_map.shape[1:], mode="area")[:, 0] > 0.5
    inside, outside = (scored.error_map[m & torch.isfinite(scored.error_map)].mean() for m in (mask, ~mask))
    assert inside > 3 * outside
    assert 0 <= scored.preview.min() <= scored.preview.max() <= 1


def test_progress_is_told_and_may_stop_the_work(rigid):
    told = []
    tracks.score_clip(rigid.frames, "torch", told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0

    def stop(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracks.score_clip(rigid.frames, "torch", stop)


def test_a_clip_with_a_cut_and_one_without_corners_are_undetermined(rigid):
    cut = torch.cat([rigid.frames[:9], rendered("dolly", seed=5).frames[9:]])
    record = tracks.score_clip(cut, "torch").record
    assert record.verdict == UNDETERMINED
    assert record.cuts == [9]
    assert "cut at frame 9" in record.reason
    plain = tracks.score_clip(torch.full((9, 64, 64, 3), 0.5), "torch")
    assert plain.record.verdict == UNDETERMINED
    assert "corners" in plain.record.reason
    assert plain.error_map.isnan().all()


def test_identical_frames_are_undetermined(rigid):
    record = tracks.score_clip(rigid.frames[:1].expand(9, -1, -1, -1), "torch").record
    assert record.verdict == UNDETERMINED
    assert record.measurements["motion"] == 0


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(1, 64, 64, 3), "1 frames"),
        (torch.zeros(2, 64, 64, 3), "2 frames"),
        (torch.zeros(9, 64, 64), r"\[9, 64, 64\]"),
        (torch.zeros(9, 3, 64, 64), r"\[9, 3, 64, 64\]"),
        (torch.zeros(9, 16, 16, 3), "too small"),
        (torch.full((9, 64, 64, 3), math.nan), "NaN"),
        (torch.full((9, 64, 64, 3), 200.0), "0 to 1"),
    ],
)
def test_what_is_no_clip_is_refused(frames, message):
    with pytest.raises(GeometryError, match=message):
        tracks.score_clip(frames)


def test_an_unknown_backend_is_refused(rigid):
    with pytest.raises(ValueError, match="unknown backend .cuda."):
        tracks.score_clip(rigid.frames, "cuda")


def test_scores_rank_consistent_before_inconsistent_before_undetermined():
    assert score_of(CONSISTENT, 10.0, 0.2) > score_of(INCONSISTENT, 0.001, 0.2) > score_of(UNDETERMINED, 0.0, 0.2) == 0
    assert score_of(CONSISTENT, 0.1, 0.2) > score_of(CONSISTENT, 0.2, 0.2)
    assert score_of(INCONSISTENT, math.inf, 0.2) == 0


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize("textured", [True, False])
def test_the_preview_is_on_the_cpu_and_the_error_map_where_the_frames_are(rigid, device, textured):
    frames = rigid.frames if textured else torch.full((5, 64, 64, 3), 0.5)
    for pictures in (True, False):
        found = tracks.score_clip(frames.to(device), "torch", pictures=pictures)
        assert found.preview.device.type == "cpu"
        assert found.error_map.device.type == device
