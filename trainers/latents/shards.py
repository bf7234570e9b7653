"""Folder of latent shards: reading which clips it holds, and writing further shards.

A shard is a file of kind "latents": one tensor per clip, [C, T, h, w], normalised. Its header's config holds

  state     "normalised"
  settings  all that determines the latents: size, fps, frames, hdr, dtype, vae_dtype, tiling, vae (digest of its weights)
  clips     {clip id: {source, video, window, start_frame, start_s, fps, frames, width, height}}; source: relative file name
  videos    {video id: {source, clips, max_clips}} for each video whose last clip is in this shard

A video id is a digest of file name, size, modification time and settings, so a changed file is another video. A video
may span shards; it is complete only when its id is in `videos`. "window" is the clip's index in its video.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from torch import Tensor

from ..kernels.files import header as file_header
from ..kernels.files.latents import write_latents
from ..kernels.latent_space import LatentSpace

PATTERN = re.compile(r"latents-(\d+)of(\d+)-(\d+)\.safetensors")


class ShardError(ValueError):
    """The output folder's shards were made with other settings; the message names them."""


@dataclass
class ShardContents:
    """What a folder's shards hold. clips: ids; videos: {id: entry} of complete videos; sources: {file name: video ids}."""

    clips: set[str] = field(default_factory=set)
    videos: dict[str, dict] = field(default_factory=dict)
    sources: dict[str, set[str]] = field(default_factory=dict)

    def has_video(self, video_id: str, max_clips: int) -> bool:
        """Whether all wanted clips of this video are present; max_clips 0 means all that the video has."""
        entry = self.videos.get(video_id)
        if entry is None:
            return False
        whole = entry["max_clips"] == 0 or entry["clips"] < entry["max_clips"]
        return whole or 0 < max_clips <= entry["max_clips"]


def video_id(name: str, path: Path, settings: dict) -> str:
    """16 hexadecimal digits that change with the file's name, size and modification time, and with the settings."""
    stat = path.stat()
    text = json.dumps([name, stat.st_size, stat.st_mtime_ns, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def clip_id(name: str, video: str, index: int) -> str:
    """A readable id: the file's name without suffix, the video's id, the clip's index in the video."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).with_suffix("").as_posix(), flags=re.ASCII)
    return f"{stem}-{video}-{index:04d}"


def scan(folder: Path, settings: dict) -> ShardContents:
    """Reads the headers of the folder's shards.

    Raises ShardError when they were made with other settings, FormatError for a damaged shard.
    """
    present = ShardContents()
    for path in sorted(p for p in folder.glob("latents-*.safetensors") if PATTERN.fullmatch(p.name)):
        config = file_header.read_header(path, "latents").config
        other = config.get("settings", {})
        differing = [f"{k} {other.get(k)} against {v}" for k, v in settings.items() if other.get(k) != v]
        if differing:
            raise ShardError(
                f"{path}: made with other settings ({', '.join(differing)}); "
                "give another --output, or --overwrite to start again"
            )
        present.clips.update(config["clips"])
        present.videos.update(config["videos"])
        for clip in config["clips"].values():
            present.sources.setdefault(clip["source"], set()).add(clip["video"])
    return present


def remove(folder: Path, index: int, count: int) -> None:
    """Deletes this process's share of the folder's shards: processes 0 to count - 1 together delete all of them."""
    for path in sorted(folder.glob("latents-*.safetensors")):
        found = PATTERN.fullmatch(path.name)
        if found and int(found[1]) % count == index:
            path.unlink()


@dataclass
class Writer:
    """Collects clips and writes a shard whenever it has `size` of them. index, count: this process among processes."""

    folder: Path
    space: LatentSpace
    settings: dict
    provenance: dict
    index: int = 0
    count: int = 1
    size: int = 32
    tensors: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, dict] = field(default_factory=dict)
    videos: dict[str, dict] = field(default_factory=dict)

    def add(self, clip: str, z: Tensor, entry: dict) -> None:
        """Adds a clip's latents [C, T, h, w], normalised, and its entry in the header. Raises OSError."""
        self.tensors[clip], self.clips[clip] = z, entry
        if len(self.tensors) >= self.size:
            self.flush()

    def finish_video(self, video: str, entry: dict) -> None:
        """Marks a video as complete in the next shard to be written."""
        self.videos[video] = entry

    def flush(self) -> None:
        """Writes a shard of what was collected, if anything. Raises OSError."""
        if not self.tensors and not self.videos:
            return
        provenance = self.provenance | {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "clips": len(self.clips),
        }
        with self._reserved() as path:
            write_latents(
                path, self.tensors, self.space, self.clips, settings=self.settings, videos=self.videos, provenance=provenance
            )
        self.tensors, self.clips, self.videos = {}, {}, {}

    @contextmanager
    def _reserved(self) -> Iterator[Path]:
        """A path that no other process writes to meanwhile: its number is reserved by a hidden file, which a crash leaves
        behind, so that the number is not used again."""
        found = (PATTERN.fullmatch(p.name) for p in self.folder.glob("latents-*"))
        number = max((int(m[3]) for m in found if m and int(m[1]) == self.index), default=-1) + 1
        while True:
            path = self.folder / f"latents-{self.index:03d}of{self.count:03d}-{number:05d}.safetensors"
            reservation = path.with_name(f".{path.name}.reserved")
            number += 1
            try:
                os.close(os.open(reservation, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            # Another process may have written this shard and given up its reservation since the folder was listed.
            if not path.exists():
                break
            reservation.unlink()
        try:
            yield path
        finally:
            reservation.unlink(missing_ok=True)
