"""Video files: which names they have, and their clips."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..kernels.video.clips import Clip, DecodeOptions, SourceReport, VideoError, clips_of, video_stream

VIDEO_SUFFIXES = (
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".ts", ".webm", ".wmv", ".y4m",
)  # fmt: skip


def decode_clips(path: str | Path, options: DecodeOptions, report: SourceReport) -> Iterator[Clip]:
    """`clips_of` a file. Raises VideoError also when it is damaged or not a video."""
    with open_video(path, report.name) as (container, stream):
        yield from clips_of(container, stream, options, report)


@contextmanager
def open_video(path: str | Path, name: str):
    """Context manager: (container, video stream) of a file. Raises VideoError, also for libav's errors in the block."""
    try:
        import av
    except ImportError as e:
        raise ImportError('reading videos needs PyAV: pip install "intrinsic-reward[train]"') from e
    try:
        # Tags may be in any encoding; a list of addresses must not be followed.
        with av.open(str(path), metadata_errors="replace", options={"protocol_whitelist": "file"}) as container:
            yield container, video_stream(container, name)
    except av.FFmpegError as e:
        raise VideoError(f"{name}: damaged or not a video ({e.strerror or e})") from e
