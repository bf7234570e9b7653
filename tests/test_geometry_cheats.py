"""What a clip can do to please or to upset the score without weights: cheats, no depth, light, overlays, subjects."""

from importlib.util import find_spec

import pytest
import torch

from benchmarks.geometry import cheats
from trainers.kernels.geometry import tracks
from trainers.kernels.geometry.record import CONSISTENT, INCONSISTENT, UNDETERMINED
from trainers.kernels.geometry.track_verdict import MOST_MOVING

SEED, SIZE = 5, {"frames": 33, "width": 384, "height": 216}
BACKEND = "opencv" if find_spec("cv2") else "torch"
# What a rigid scene is called under light, overlays and a subject; of these errors, no more than this share above its own.
HARMLESS = {"flicker 15": 0.2, "fade 20": 0.2, "logo": 0.5, "letterbox": 0.5}
FLAT = ("still slides 20", "still slides and zooms", "still tilts", "static", "slow", "pan", "zoom", "turn 2.7")
NEVER_CONSISTENT = (
    "warp 2",
    "morph 0.1",
    "swap",
    "cut",
    "garbage between keys",
    "garbage in 3 frames",
    "melt 60",
    "freeze half",
)


@pytest.fixture(scope="module")
def records():
    """Kind -> record, of one scene."""
    wanted = {"rigid", "person 20", "person 20, warp 2", "box grows 0.3", "warp 1", *HARMLESS, *FLAT, *NEVER_CONSISTENT}
    return {
        kind: tracks.score_clip(clip.frames, BACKEND, pictures=False).record
        for kind, clip in cheats.clips(SEED, wanted, **SIZE)
    }


def test_the_rigid_clip_is_consistent(records):
    assert records["rigid"].verdict == CONSISTENT
    assert records["rigid"].measurements["moving"] < 0.02


@pytest.mark.parametrize("kind", FLAT)
def test_without_parallax_there_is_no_verdict(records, kind):
    """A homography explains a turn of any focal length, a zoom, and everything that can be done with a still picture."""
    assert records[kind].verdict == UNDETERMINED
    assert records[kind].score == 0


@pytest.mark.parametrize("kind", NEVER_CONSISTENT)
def test_what_is_no_rigid_scene_is_not_called_one(records, kind):
    assert records[kind].verdict != CONSISTENT


def test_frames_between_key_frames_are_looked_at_and_named(records):
    honest, garbage = records["rigid"], records["garbage between keys"]
    assert honest.frame_indices == garbage.frame_indices == list(range(0, 33, 2))
    assert honest.between_indices == list(range(1, 33, 2))
    assert max(honest.between_errors) < 1 < min(garbage.between_errors)
    assert garbage.verdict == INCONSISTENT
    assert "frames 1, 3, 5" in garbage.reason
    # The key frames alone say nothing.
    assert garbage.measurements["residual"] == pytest.approx(honest.measurements["residual"], abs=0.01)


@pytest.mark.parametrize("kind", HARMLESS)
def test_light_and_overlays_are_no_geometry(records, kind):
    assert records[kind].verdict != INCONSISTENT
    if records[kind].verdict == CONSISTENT:
        assert records[kind].error < (1 + HARMLESS[kind]) * records["rigid"].error


def test_bars_and_logos_are_named(records):
    assert any(note.startswith("bars left out: top 40, bottom 40 pixels") for note in records["letterbox"].notes)
    assert any("static overlay" in note for note in records["logo"].notes)


def test_a_walking_person_is_told_from_the_scene(records):
    alone, warped = records["person 20"], records["person 20, warp 2"]
    assert alone.verdict == CONSISTENT
    assert 0.1 < alone.measurements["moving"] < MOST_MOVING
    assert "moves by itself" in alone.reason
    assert alone.error < warped.error
    assert warped.verdict != CONSISTENT


def test_errors_rank_a_scene_before_its_corruptions(records):
    for kind in ("warp 1", "warp 2", "morph 0.1", "box grows 0.3", "person 20"):
        assert records["rigid"].error < records[kind].error, kind


def test_a_region_of_texture_that_dissolves_and_one_that_boils_are_seen():
    clips = dict(cheats.clips(8, {"rigid", "dissolve", "boil 20"}, **SIZE))
    found = {k: tracks.score_clip(c.frames, BACKEND, pictures=False).record for k, c in clips.items()}
    assert found["rigid"].measurements["exchanged"] < 0.2 < found["dissolve"].measurements["exchanged"]
    assert found["rigid"].error < min(found["dissolve"].error, found["boil 20"].error)


@pytest.mark.parametrize("focal", [0.55, 1.12, 1.6])
def test_any_focal_length_fits(focal):
    from dataclasses import replace

    from benchmarks.geometry import room

    clip = room.render(replace(room.draw_scene(1, "truck", frames=17, width=256, height=144), reach=1.2, focal=focal))
    assert tracks.score_clip(clip.frames, BACKEND, pictures=False).record.measurements["residual"] < 0.3


def test_fewer_than_a_third_of_the_points_can_be_lost():
    clip = dict(cheats.clips(SEED, {"rigid"}, **SIZE))["rigid"].frames
    # Every frame is another part of a noise picture: nothing can be followed.
    noise = torch.randint(0, 255, clip.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    record = tracks.score_clip(noise, BACKEND, pictures=False).record
    assert record.verdict == UNDETERMINED
    assert record.score == 0
