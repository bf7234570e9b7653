"""Video files to shards of normalised latents, one window at a time, and the report of what became of each video."""

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from ..running.device import DTYPES
from ..video.read import Reading, Source, VideoError, read_windows
from ..wan.vae import VaeError
from . import shards


@dataclass
class VideoOutcome:
    """What became of one video. status: "encoded", "already encoded", or "skipped" (then `reason` says why)."""

    status: str = "encoded"
    clips: int = 0
    seconds: float = 0.0
    fps: float | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)


def encode_video(
    path: Path, source: Source, reading: Reading, vae, writer: shards.Writer, done: shards.Done, notes: dict | None = None
) -> VideoOutcome:
    """Encodes one video's windows into `writer`, except clips that `done` has. A bad video gives status "skipped".

    notes: what else the shard is to say of each of its clips.
    """
    outcome = VideoOutcome(notes=source.notes)
    video = shards.video_id(source.name, path, writer.settings)
    if done.has(video, reading.max_windows):
        outcome.status = "already encoded"
        return outcome
    if done.sources.get(source.name, set()) - {video}:
        source.note("the file changed since it was encoded: its old clips are still in the folder; --overwrite starts afresh")
    count = 0
    try:
        for window in read_windows(path, reading, source):
            count += 1
            clip = shards.clip_id(source.name, video, window.index)
            outcome.clips, outcome.fps = count, window.fps
            outcome.seconds += window.frames.shape[0] / window.fps
            if clip in done.clips:
                continue
            z = vae.encode(window.frames).to(DTYPES[writer.settings["dtype"]])
            length, _, height, width = window.frames.shape
            entry = {"source": source.name, "video": video, "window": window.index, "start_frame": window.start_frame}
            entry |= {"start_s": round(window.start_s, 6), "fps": round(window.fps, 6)}
            writer.add(clip, z, entry | {"frames": length, "width": width, "height": height} | (notes or {}))
    except (VideoError, VaeError) as e:
        message = str(e)
        outcome.status, outcome.reason = "skipped", message if message.startswith(source.name) else f"{source.name}: {message}"
        return outcome
    writer.finish_video(video, {"source": source.name, "clips": count, "max_clips": reading.max_windows})
    return outcome


def write_report(path: Path, outcomes: dict[str, VideoOutcome], settings: dict, pending: int) -> None:
    """report.json: per video its status, clips, reason and notes; then totals. `pending`: videos not reached."""
    statuses = [o.status for o in outcomes.values()]
    report = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "totals": {s: statuses.count(s) for s in ("encoded", "already encoded", "skipped")} | {"not reached": pending},
        "videos": {name: vars(o) for name, o in outcomes.items()},
    }
    text = json.dumps(report, indent=1, sort_keys=False)
    write_atomic(path, lambda partial: Path(partial).write_text(text + "\n", encoding="utf-8"))
