"""Reading videos: which frames, in which colours, at which size and way up; and what is refused."""

import gc
from collections import Counter

import numpy as np
import pytest
import torch

from trainers.kernels.video import tone_mapping
from trainers.kernels.video.clips import DecodeOptions, SourceReport, VideoError, resample, to_rgb
from trainers.kernels.video.sizes import BUCKETS, cover_crop, nearest_bucket, nearest_lengths
from trainers.running.inputs import InputError, describe, expand
from trainers.video.read import decode_clips, open_video

from .video_clips import counting, moving, real_clip, set_display_matrix, write_clip

pytest.importorskip("av")


def decode(path, **options):
    options.setdefault("size", lambda w, h: (64, 48))
    source = SourceReport(path.name)
    return list(decode_clips(path, DecodeOptions(**options), source)), source


def levels(window):
    """The index that each frame of a `counting` clip carries as its grey level."""
    grey = window.frames.float().mean((1, 2, 3))
    assert torch.equal(grey, grey.round())
    return ((grey - 8) / 4).tolist()


# Time


def test_same_rate_takes_every_frame_once(tmp_path):
    found, source = decode(write_clip(tmp_path / "a.mkv", counting(17)), frames=17)
    assert levels(found[0]) == list(range(17))
    assert found[0].fps == 16
    assert source.notes == []


def test_faster_source_gives_the_nearest_frames_in_time(tmp_path):
    found, _ = decode(write_clip(tmp_path / "a.mkv", counting(50), fps=25), fps=10.0, frames=17)
    # Instants 0, 100, 200, ... ms among frames every 40 ms; on a tie (100 between 80 and 120) the earlier one.
    assert levels(found[0])[:6] == [0, 2, 5, 7, 10, 12]


def test_slower_source_keeps_its_rate_and_says_so(tmp_path):
    found, source = decode(write_clip(tmp_path / "a.mkv", counting(9), fps=8), frames=9)
    assert levels(found[0]) == list(range(9))
    assert found[0].fps == 8
    assert "own 8 frames per second, below the 16" in source.notes[0]


def test_variable_rate_is_read_by_timestamps(tmp_path):
    times = [0, 62, 90, 125, 188, 230, 250]
    found, source = decode(write_clip(tmp_path / "a.mkv", counting(7), times_ms=times), frames=5)
    assert levels(found[0]) == [0, 1, 3, 4, 6]
    assert source.notes == []


def test_few_repeats_are_noted_and_many_left_out(tmp_path):
    few = write_clip(tmp_path / "few.mkv", counting(8), times_ms=[0, 62, 125, 188, 250, 313, 438, 500])
    found, source = decode(few, frames=9)
    assert found[0].frames.shape[0] == 9
    assert source.notes == ["1 of 9 frames from 0.0 s on repeat their neighbour"]
    still = write_clip(tmp_path / "still.mkv", counting(3), times_ms=[0, 62, 1000])
    with pytest.raises(VideoError, match=r"still\.mkv: no usable clip .* repeat their neighbour: left out"):
        decode(still, frames=9)


def test_windows_follow_each_other_and_the_last_is_shortened(tmp_path):
    path = write_clip(tmp_path / "a.mkv", counting(28))
    found, _ = decode(path, frames=9, max_clips=0)
    assert [levels(w) for w in found] == [list(range(9)), list(range(9, 18)), list(range(18, 27))]
    assert [(w.index, w.start_frame, w.start_s) for w in found] == [(0, 0, 0.0), (1, 9, 9 / 16), (2, 18, 18 / 16)]
    found, _ = decode(path, frames=13, max_clips=0, min_frames=1)
    assert [w.frames.shape[0] for w in found] == [13, 13, 1]
    found, _ = decode(path, frames=13, max_clips=0)
    assert [w.frames.shape[0] for w in found] == [13, 13]
    assert len(decode(path, frames=9)[0]) == 1


def test_short_video_uses_the_largest_length(tmp_path):
    found, _ = decode(write_clip(tmp_path / "a.mkv", counting(12)))
    assert levels(found[0]) == list(range(9))


def test_resample_of_one_frame_and_of_late_first_frame():
    assert list(resample(iter([(3.0, "a")]), 16)) == [(3.0, "a")]
    assert list(resample(iter([(3.0, "a"), (3.1, "b"), (3.2, "c")]), 10)) == [(3.0, "a"), (3.1, "b"), (3.2, "c")]


# Geometry


@pytest.mark.parametrize("size", BUCKETS)
def test_buckets_are_multiples_of_16_of_nearly_one_area(size):
    areas = [w * h for w, h in BUCKETS[size]]
    assert all(w % 16 == 0 and h % 16 == 0 for w, h in BUCKETS[size])
    assert max(areas) / min(areas) < 1.13


@pytest.mark.parametrize(
    ("source", "wanted"),
    [((1920, 1080), (832, 480)), ((1080, 1920), (480, 832)), ((640, 480), (704, 544)), ((500, 500), (624, 624)),
     ((2560, 1080), (832, 480))],
)  # fmt: skip
def test_nearest_bucket_by_aspect(source, wanted):
    assert nearest_bucket("480p", *source) == wanted


@pytest.mark.parametrize(
    ("frames", "near"), [(80, (77, 81)), (82, (81, 85)), (84, (81, 85)), (2, (1, 5)), (0, (1, 5)), (-3, (1, 5))]
)
def test_nearest_lengths(frames, near):
    assert nearest_lengths(frames) == near


def test_cover_crop_keeps_the_centre_and_the_proportions():
    image = torch.zeros(1, 60, 160)
    image[:, 20:40, 70:90] = 1.0
    out = cover_crop(image, 64, 48)[0]
    rows, columns = (out > 0.5).nonzero().T
    # Scaled by 48/60: the square of 20 becomes one of 16 in the middle.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 31, 24, 39)
    assert out.shape == (48, 64)


def test_cover_crop_averages_when_it_shrinks():
    noise = torch.rand(1, 128, 256, generator=torch.Generator().manual_seed(0))
    assert cover_crop(noise, 32, 16).std() < 0.2 * noise.std()


def test_cover_crop_of_the_right_size_changes_nothing():
    image = torch.rand(3, 48, 64)
    assert torch.equal(cover_crop(image, 64, 48), image)


def test_wide_pixels_are_widened():
    image = torch.zeros(1, 48, 64)
    image[:, 16:32, 26:38] = 1.0
    rows, columns = (cover_crop(image, 80, 48, pixel_aspect=4 / 3)[0] > 0.5).nonzero().T
    assert rows.max() - rows.min() + 1 == 16
    assert columns.max() - columns.min() + 1 in (15, 16)  # 12 of them before; a third pixel ends in the middle of one


def test_pixel_aspect_of_a_file_decides_the_bucket(tmp_path):
    frames = [f[:54] for f in moving(9, 56, 48)]
    path = write_clip(tmp_path / "a.mp4", frames, codec="libx264", pixel_format="yuv420p", pixel_aspect="2/1")
    found, _ = decode(path, size=lambda w, h: nearest_bucket("144p", w, h))
    assert found[0].frames.shape[2:] == (144, 256)


# Matrix (a, b, c, d) of the file -> where the stored top left quarter is shown: (row, column) of the quarter.
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), (0, 0)),
    "clockwise": ((0, 1, -1, 0), (0, 1)),
    "upside down": ((-1, 0, 0, -1), (1, 1)),
    "anticlockwise": ((0, -1, 1, 0), (1, 0)),
    "mirrored left to right": ((-1, 0, 0, 1), (0, 1)),
    "mirrored top to bottom": ((1, 0, 0, -1), (1, 0)),
    "transposed": ((0, 1, 1, 0), (0, 0)),
    "transposed along the other diagonal": ((0, -1, -1, 0), (1, 1)),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_pictures_are_turned_and_mirrored_as_a_player_shows_them(tmp_path, name):
    """Red in the stored top left quarter, green in the top right one."""
    matrix, place = ORIENTATIONS[name]
    frames = [np.zeros((48, 64, 3), np.uint8) for _ in range(5)]
    for frame in frames:
        frame[:24, :32], frame[:24, 32:] = (250, 10, 10), (10, 250, 10)
    path = set_display_matrix(write_clip(tmp_path / "a.mp4", frames, codec="libx264", pixel_format="yuv420p"), matrix)
    found, source = decode(path, size=lambda w, h: (int(w), int(h)))
    shown = found[0].frames[0].float()
    assert shown.shape == ((3, 64, 48) if matrix[0] == 0 else (3, 48, 64))
    assert source.notes == []
    quarter = [side // 2 for side in shown.shape[1:]]

    def colour(row, column):
        part = shown[:, row * quarter[0] : (row + 1) * quarter[0], column * quarter[1] : (column + 1) * quarter[1]]
        return part[:, 6:-6, 6:-6].mean((1, 2))

    assert colour(*place)[0] > 200
    # The stored right is shown where the matrix carries it.
    right = (place[0] ^ (matrix[1] != 0), place[1] ^ (matrix[0] != 0))
    assert colour(*right)[1] > 200


def test_a_turn_by_another_angle_is_said(tmp_path):
    frames = [np.zeros((48, 64, 3), np.uint8) for _ in range(5)]
    path = write_clip(tmp_path / "a.mp4", frames, codec="libx264", pixel_format="yuv420p")
    set_display_matrix(path, (0.87, 0.5, -0.5, 0.87))
    found, source = decode(path, size=lambda w, h: (int(w), int(h)))
    assert found[0].frames.shape[2:] == (48, 64)
    assert "no multiple of 90 degrees" in source.notes[0]


def test_decoded_frames_do_not_wait_for_garbage_collection(tmp_path):
    """Each of them holds its picture, and threads that converted it. The first one may: its side data refers back to it."""
    import av

    path = write_clip(tmp_path / "a.mkv", counting(33))
    gc.collect()
    gc.disable()
    try:
        decode(path, frames=33)
        left = sum(isinstance(o, av.VideoFrame) for o in gc.get_objects())
    finally:
        gc.enable()
    assert left <= 1


def test_small_source_is_noted_or_refused(tmp_path):
    path = write_clip(tmp_path / "a.mkv", moving(5))
    _, source = decode(path, size=lambda w, h: (256, 192))
    assert source.notes == ["enlarged 4.00 times from 64x48: it has less detail than its size"]
    with pytest.raises(VideoError, match="64x48 is smaller than 256x192"):
        decode(path, size=lambda w, h: (256, 192), enlarge=False)


# Colour

WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def expected_rgb(y, u, v, matrix, full):
    kr, kb = WEIGHTS[matrix]
    luma = y / 255 if full else (y - 16) / 219
    cb, cr = ((c - 128) / (255 if full else 224) for c in (u, v))
    red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
    return [red, (luma - kr * red - kb * blue) / (1 - kr - kb), blue]


def yuv_frame(y, u, v, width=64, height=48, **tags):
    import av

    planes = np.full((height * 3 // 2, width), y, np.uint8)
    planes[height : height + height // 4] = u
    planes[height + height // 4 :] = v
    frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
    for name, value in tags.items():
        setattr(frame, name, value)
    return frame


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5])
def test_matrix_and_range_are_honoured(matrix, full):
    rgb, transfer = to_rgb(yuv_frame(120, 100, 160, colorspace=matrix, color_range=2 if full else 1))
    assert transfer == "bt709"
    assert rgb[:, 20, 20].tolist() == pytest.approx(expected_rgb(120, 100, 160, matrix, full), abs=1.1 / 255)


@pytest.mark.parametrize(("width", "height", "matrix"), [(64, 48, 5), (1280, 720, 1), (640, 580, 1)])
def test_untagged_video_follows_its_size(width, height, matrix):
    rgb, _ = to_rgb(yuv_frame(120, 100, 160, width, height))
    assert rgb[:, 20, 20].tolist() == pytest.approx(expected_rgb(120, 100, 160, matrix, False), abs=1.1 / 255)


def test_unknown_matrix_is_refused():
    with pytest.raises(VideoError, match="colour matrix 14"):
        to_rgb(yuv_frame(120, 128, 128, colorspace=14))


def hdr_clip(path, level, transfer):
    frames = [np.full((72, 64), level, np.uint16) for _ in range(5)]
    for frame in frames:
        frame[48:] = 512
    colour = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    return write_clip(path, frames, pixel_format="yuv420p10le", colour=colour)


def test_pq_file_is_tone_mapped_or_refused(tmp_path):
    """Grey at 100 nits (code 0.508 of PQ), below half the reference white: gamma 2.4 of 100/203."""
    path = hdr_clip(tmp_path / "pq.mkv", round(64 + 876 * 0.5081), 16)
    found, source = decode(path)
    assert source.notes == ["HDR (PQ) tone-mapped"]
    assert found[0].frames.float().mean() / 255 == pytest.approx((100 / 203) ** (1 / 2.4), abs=0.01)
    with pytest.raises(VideoError, match=r"pq\.mkv: HDR video \(PQ\), refused"):
        decode(path, hdr="refuse")


def test_hlg_file_is_recognised(tmp_path):
    _, source = decode(hdr_clip(tmp_path / "hlg.mkv", 500, 18))
    assert source.notes == ["HDR (HLG) tone-mapped"]


def test_pq_against_published_values():
    codes = tone_mapping.nits_to_pq(torch.tensor([0.1, 100.0, 203.0, 1000.0, 10000.0], dtype=torch.float64))
    assert codes.tolist() == pytest.approx([0.0623, 0.5081, 0.5807, 0.7518, 1.0], abs=2e-4)
    assert torch.allclose(tone_mapping.pq_to_nits(codes), torch.tensor([0.1, 100, 203, 1000, 10000], dtype=torch.float64))


def test_hlg_against_published_values():
    """BT.2408: HLG 75% is reference white, 203 nits on a display of 1000; 100% is the peak."""
    grey = torch.tensor([0.75, 1.0, 0.0]).expand(3, 3)
    assert tone_mapping.hlg_to_nits(grey)[0].tolist() == pytest.approx([203.0, 1000.0, 0.0], abs=1.0)


def test_tone_curve_is_monotone_keeps_shadows_and_lands_on_white():
    nits = torch.linspace(0.5, 1000, 2000).expand(3, -1)
    out = tone_mapping.compress(nits)[0]
    assert (out.diff() > -1e-3).all()
    assert (out[:1000].diff() > 0).all()
    assert out[-1] == pytest.approx(203.0, rel=1e-3)
    low = nits[0] < 90
    assert torch.allclose(out[low], nits[0][low], rtol=1e-3)
    assert tone_mapping.compress(torch.full((3, 1), 4000.0)).max() == pytest.approx(203.0, rel=1e-3)


def test_gamut_matrix_keeps_white_and_clips_what_is_outside():
    assert torch.allclose(tone_mapping.bt2020_to_bt709(torch.ones(3, 1)), torch.ones(3, 1), atol=1e-4)
    green = tone_mapping.to_bt709(torch.tensor([0.0, 1.0, 0.0])[:, None], "sdr")
    assert green.flatten().tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)


# What cannot be read


def test_bad_files_are_named_with_a_reason(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video " * 50)
    one = write_clip(tmp_path / "one.mkv", counting(1))
    for name, reason in (("empty.mp4", "damaged or not a video"), ("text.mp4", "damaged or not a video")):
        with pytest.raises(VideoError, match=rf"^{name}: {reason}"):
            decode(tmp_path / name)
    with pytest.raises(VideoError, match=r"^one\.mkv: 1 frame at 16 frames per second, at least 5 needed"):
        decode(one)


def test_sound_without_pictures_is_refused(tmp_path):
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as f:
        f.setparams((1, 2, 8000, 0, "NONE", ""))
        f.writeframes(bytes(1600))
    with pytest.raises(VideoError, match=r"a\.wav: no video stream"):
        decode(tmp_path / "a.wav")


def test_damage_in_the_middle_is_seen(tmp_path):
    data = bytearray(real_clip("bikes.mp4").read_bytes())
    rng = np.random.default_rng(0)
    for position in rng.integers(len(data) // 4, len(data) // 2, 400):
        data[position] = rng.integers(256)
    path = tmp_path / "hurt.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"hurt\.mp4: damaged"):
        decode(path, max_clips=0, frames=33)


def test_errors_inside_open_video_carry_the_name(tmp_path):
    with pytest.raises(VideoError, match=r"^gone\.mp4: "), open_video(tmp_path / "gone.mp4", "gone.mp4"):
        pass


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bigbuckbunny.mp4", (33, 3, 144, 256)),
        ("bikes.mp4", (33, 3, 144, 256)),
        ("carphone_pristine.mp4", (33, 3, 160, 208)),
    ],
)
def test_real_clips(name, shape):
    found, _ = decode(real_clip(name), size=lambda w, h: nearest_bucket("144p", w, h), frames=33)
    assert found[0].frames.shape == shape
    assert found[0].fps == 16
    assert 60 < found[0].frames.float().mean() < 160
    assert (found[0].frames[0] != found[0].frames[-1]).any()


# Which files


def test_expand_folders_patterns_and_files(tmp_path):
    for name in ("b/2.mp4", "a/1.MP4", "a/notes.txt", "a/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(expand([tmp_path], (".mp4",), "videos")) == ["a/1.MP4", "b/2.mp4"]
    assert list(expand([f"{tmp_path}/*/*.mp4", tmp_path / "b" / "2.mp4"], (".mp4",), "videos")) == ["b/2.mp4"]
    assert list(expand([f"{tmp_path}/**/*.txt"], (".mp4",), "videos")) == ["a/notes.txt"]


def test_expand_follows_links_once_and_counts_what_it_leaves_out(tmp_path):
    for name in ("videos/a.mp4", "videos/a.txt", "elsewhere/b.mp4", "elsewhere/b.webp", "elsewhere/1.png", "elsewhere/2.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "videos")
    left_out = Counter()
    assert list(expand([tmp_path / "videos"], (".mp4",), "videos", left_out)) == ["a.mp4", "linked/b.mp4"]
    assert left_out == {".txt": 1, ".webp": 1, ".png": 2}
    said = describe(left_out, "videos")
    assert said == (
        "left out, no videos by their names: 2 .png, 1 .txt, 1 .webp; a sequence of pictures has to be made a video first"
    )
    assert describe(Counter(), "videos") is None


def test_expand_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no videos in this folder"):
        expand([tmp_path], (".mp4",), "videos")
    with pytest.raises(InputError, match=r"\*\.mp4: this pattern matches no file"):
        expand([tmp_path / "*.mp4"], (".mp4",), "videos")
    with pytest.raises(InputError, match=r"gone\.mp4: no such file or folder"):
        expand([tmp_path / "gone.mp4"], (".mp4",), "videos")
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match=r"have the same name 'x\.mp4'"):
        expand([tmp_path / "a", tmp_path / "b"], (".mp4",), "videos")
