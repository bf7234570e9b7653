"""Clips and pictures as bytes for a page: H.264 in MP4 where libx264 is there, otherwise VP9 or VP8 in WebM, otherwise an
animated WebP. All of them play in current browsers."""

import io
import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

# (encoder, container, MIME type, quality's option, its values from good to small)
ENCODERS = (
    ("libx264", "mp4", "video/mp4", {"preset": "veryfast"}, (21, 27, 33)),
    ("libvpx-vp9", "webm", "video/webm", {"b": "0", "deadline": "realtime", "cpu-used": "6"}, (31, 40, 50)),
    ("libvpx", "webm", "video/webm", {"b": "0", "deadline": "realtime", "cpu-used": "6"}, (10, 25, 45)),
)
SMALLEST_SIDE = 96
# libav's numbers: BT.709 as matrix, primaries and transfer; limited range.
BT709, LIMITED = 1, 1


@dataclass(frozen=True)
class Media:
    """An encoded clip or picture. mime: its type, such as "video/mp4"; width, height: in pixels."""

    data: bytes
    mime: str
    width: int
    height: int

    @property
    def is_video(self) -> bool:
        return self.mime.startswith("video/")

    @property
    def suffix(self) -> str:
        """For a file of its own, such as ".mp4"."""
        return "." + self.mime.partition("/")[2].replace("jpeg", "jpg")


def video(frames: Tensor, fps: float, max_side: int = 480, max_bytes: int | None = 2 << 20) -> Media:
    """Encodes frames, uint8 [T, H, W, 3] in RGB.

    They are scaled down until the longer side is at most max_side; quality, then size are lowered until the data is within
    max_bytes (None: no limit) or a side of 96 pixels is reached. Raises ValueError for other frames, or a frame rate that is
    not above 0.
    """
    if frames.dim() != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not frames.numel():
        raise ValueError(f"a clip to be embedded must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"a clip's frame rate must be above 0, got {fps}")
    side = min(max_side, max(frames.shape[1:3]))
    while True:
        scaled = _scaled(frames, side)
        for quality in range(3):
            found = _encode(scaled, fps, quality)
            if max_bytes is None or len(found.data) <= max_bytes:
                return found
        if side <= SMALLEST_SIDE:
            return found
        side = max(SMALLEST_SIDE, round(side / 1.5))


def picture(image: Image.Image, photo: bool = False) -> Media:
    """A Pillow image as PNG, or as JPEG for photographs."""
    stream = io.BytesIO()
    if photo:
        image.convert("RGB").save(stream, format="JPEG", quality=88)
    else:
        image.save(stream, format="PNG", optimize=True)
    return Media(stream.getvalue(), "image/jpeg" if photo else "image/png", *image.size)


def encoder() -> tuple | None:
    """The first entry of ENCODERS that PyAV has here, None without one or without PyAV."""
    try:
        import av
    except ImportError:
        return None
    return next((e for e in ENCODERS if e[0] in av.codecs_available), None)


def _encode(frames: Tensor, fps: float, quality: int) -> Media:
    """quality: 0, 1, 2 from good to small; the sides of frames are even."""
    chosen = encoder()
    if chosen is None:
        return _animated(frames, fps, quality)
    import av

    name, container, mime, options, levels = chosen
    stream = io.BytesIO()
    height, width = frames.shape[1:3]
    with av.open(stream, "w", format=container) as output:
        track = output.add_stream(name, rate=_rate(fps), options=options | {"crf": str(levels[quality])})
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        context = track.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = BT709, BT709, BT709, LIMITED
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
            output.mux(track.encode(rgb.reformat(format="yuv420p", dst_colorspace="ITU709")))
        output.mux(track.encode())
    return Media(stream.getvalue(), mime, width, height)


def _animated(frames: Tensor, fps: float, quality: int) -> Media:
    images = [Image.fromarray(f.contiguous().numpy()) for f in frames]
    stream = io.BytesIO()
    images[0].save(
        stream, format="WEBP", save_all=True, append_images=images[1:], duration=max(1, round(1000 / fps)), loop=0,
        quality=(80, 60, 35)[quality], method=2,
    )  # fmt: skip
    return Media(stream.getvalue(), "image/webp", *images[0].size)


def _scaled(frames: Tensor, side: int) -> Tensor:
    """With the longer side at `side` at most and both sides even, as 4:2:0 colour needs."""
    height, width = frames.shape[1:3]
    factor = min(1.0, side / max(height, width))
    size = tuple(max(2, 2 * round(n * factor / 2)) for n in (width, height))
    if size == (width, height):
        return frames
    images = [Image.fromarray(f.contiguous().numpy()).resize(size, Image.Resampling.BICUBIC) for f in frames]
    return torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(size[1], size[0], 3) for i in images])


def _rate(fps: float):
    from fractions import Fraction

    return Fraction(fps).limit_denominator(1001)
