"""Folder of latent shards: reading which clips it holds, and writing further shards.

A shard is a file of kind "latents": one tensor per clip, [C, T, h, w], normalised. Its header's config holds

  state     "normalised"
  settings  all that determines the latents: size, fps, frames, hdr, dtype, vae_dtype, tiling, vae (digest of its weights)
  clips     {clip id: {source, content, video, window, start_frame, start_s, fps, frames, width, height, holds, digest}};
            source: relative file name; content: digest of the file
  videos    {video id: {source, clips, max_clips}} for each video whose last clip is in this shard

A video id is a digest of the file's content and of the settings, so a copy is the same video whatever its name and times, and
a changed file is another one. Earlier versions took file name, size and modification time instead of the content: an id of
theirs that a folder has stays valid for its file. A video may span shards; it is complete only when its id is in `videos`.
"window" is the clip's index in its video. A shard gets the first number that no file has when it is complete, so several
processes may write into one folder.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from torch import Tensor

from ..kernels.files import header as file_header
from ..kernels.files.latents import write_unused_latents
from ..kernels.latent_space import LatentSpace
from ..running.identity import content_digest

PATTERN = re.compile(r"latents-(\d+)of(\d+)-(\d+)\.safetensors")


class ShardError(ValueError):
    """The output folder's shards were made with other settings; the message names them."""


@dataclass
class ShardContents:
    """What a folder's shards hold. clips: {id: entry}; videos: {id: entry} of complete videos."""

    clips: dict[str, dict] = field(default_factory=dict)
    videos: dict[str, dict] = field(default_factory=dict)
    _windows: dict[str, dict[int, dict]] = field(default_factory=dict)
    _sources: dict[str, set[str]] = field(default_factory=dict)
    _earlier: dict[str, str] = field(default_factory=dict)

    def add(self, clip: str, entry: dict) -> None:
        """Notes a clip and its entry in a header."""
        self.clips[clip] = entry
        self._windows.setdefault(entry["video"], {})[entry.get("window", 0)] = entry
        self._sources.setdefault(entry["source"], set()).add(entry["video"])

    def recognise(self, copies: Iterable[tuple[str, Path]], settings: dict) -> None:
        """Lets `id_of` give copies of a video of an earlier version that version's id. copies: (name, file) of all that have
        copies, originals among them. Raises OSError."""
        for name, path in copies:
            earlier = earlier_video_id(name, path, settings)
            if self.has_any(earlier):
                self._earlier[content_digest(path)] = earlier

    def id_of(self, name: str, path: Path, settings: dict, variant: str = "") -> str:
        """The id of a file's video: `video_id`, or that of an earlier version where the folder has it. Raises OSError."""
        earlier = earlier_video_id(name, path, settings)
        if self.has_any(earlier):
            return earlier
        content = content_digest(path)
        return self._earlier.get(content) or video_id(content, settings, variant)

    def has_any(self, video: str) -> bool:
        """Whether a video is complete or has a clip."""
        return video in self.videos or video in self._windows

    def has_window(self, video: str, index: int) -> bool:
        """Whether the clip `index` of a video is present."""
        return index in self._windows.get(video, {})

    def clip_of(self, video: str) -> dict:
        """The entry of one of a video's clips; empty where there is none."""
        return next(iter(self._windows.get(video, {}).values()), {})

    def earlier_of(self, name: str, video: str) -> bool:
        """Whether there are clips of another video whose file had this name."""
        return bool(self._sources.get(name, set()) - {video})

    def has_video(self, video: str, max_clips: int) -> bool:
        """Whether all wanted clips of this video are present; max_clips 0 means all that the video has."""
        entry = self.videos.get(video)
        if entry is None:
            return False
        whole = entry["max_clips"] == 0 or entry["clips"] < entry["max_clips"]
        return whole or 0 < max_clips <= entry["max_clips"]


def video_id(content: str, settings: dict, variant: str = "") -> str:
    """16 hexadecimal digits that change with a file's content (`identity.content_digest`), the settings, and `variant`: what
    else is made of the file."""
    return hashlib.sha256(json.dumps([content, settings, variant], sort_keys=True).encode()).hexdigest()[:16]


def earlier_video_id(name: str, path: Path, settings: dict) -> str:
    """The id that earlier versions gave a video, by the file's name, size and modification time."""
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
        present.videos.update(config["videos"])
        for clip, entry in config["clips"].items():
            present.add(clip, entry)
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
        described = {"settings": self.settings, "videos": self.videos, "provenance": provenance}
        write_unused_latents(self._names(), self.tensors, self.space, self.clips, **described)
        self.tensors, self.clips, self.videos = {}, {}, {}

    def _names(self) -> Iterator[Path]:
        """Paths of this process's shards, numbered from the first number above those in the folder."""
        found = (PATTERN.fullmatch(p.name) for p in self.folder.glob("latents-*"))
        first = max((int(m[3]) for m in found if m and int(m[1]) == self.index), default=-1) + 1
        numbers = itertools.count(first)
        return (self.folder / f"latents-{self.index:03d}of{self.count:03d}-{number:05d}.safetensors" for number in numbers)
