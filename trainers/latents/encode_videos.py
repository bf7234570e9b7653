"""Encoding of video files to shards of normalised latents, one clip at a time, and the report on every video."""

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ..kernels.files.atomic import write_atomic
from ..kernels.video.clips import DecodeOptions, SourceReport, VideoError
from ..running.device import DTYPES
from ..running.identity import content_digest
from ..video.read import decode_clips
from ..wan.vae import VaeError, WanVae
from . import shards

# damaged: the clips before the damage are in the shards.
STATUSES = ("encoded", "already encoded", "damaged", "skipped")


@dataclass
class VideoOutcome:
    """The result for one video. status: one of STATUSES; clips, seconds: encoded; reason: what is wrong with it; copy_of: the
    file that was encoded in its place, because it has the same content."""

    status: str = "encoded"
    clips: int = 0
    seconds: float = 0.0
    fps: float | None = None
    reason: str | None = None
    copy_of: str | None = None
    notes: list[str] = field(default_factory=list)


def encode_video(
    path: Path,
    report: SourceReport,
    options: DecodeOptions,
    vae: WanVae,
    writer: shards.Writer,
    present: shards.ShardContents,
    entry: dict | None = None,
    variant: str = "",
) -> VideoOutcome:
    """Encodes one video's clips into `writer`, except those that are `present`, and adds them there. An unusable video gets
    status "skipped", one that is damaged after its first clips "damaged", a copy of an encoded one "already encoded".

    entry: further values for each clip's entry in the shard's header; variant: a file's clips are stored once for each.
    Raises OSError where the video or the folder cannot be read or a shard cannot be written.
    """
    outcome = VideoOutcome(notes=report.notes)
    video = present.id_of(report.name, path, writer.settings, variant)
    outcome.copy_of = copied_from(present, video, report.name)
    if present.has_video(video, options.max_clips):
        outcome.status = "already encoded"
        return outcome
    content = content_digest(path)
    if present.earlier_of(report.name, video):
        report.note("the file changed since it was encoded: its old clips are still in the folder; --overwrite starts afresh")
    count = 0
    try:
        for clip in decode_clips(path, options, report):
            if not present.has_window(video, clip.index):
                clip_id = shards.clip_id(report.name, video, clip.index)
                z = vae.encode(clip.frames).to(DTYPES[writer.settings["dtype"]])
                length, _, height, width = clip.frames.shape
                described = {"source": report.name, "content": content, "video": video, "window": clip.index}
                described["start_frame"] = clip.start_frame
                described |= {"start_s": round(clip.start_s, 6), "fps": round(clip.fps, 6)}
                described |= {"frames": length, "width": width, "height": height} | (entry or {})
                present.add(clip_id, described)
                writer.add(clip_id, z, described)
            count += 1
            outcome.clips, outcome.fps = count, clip.fps
            outcome.seconds += clip.frames.shape[0] / clip.fps
    except (VideoError, VaeError) as e:
        message = str(e)
        reason = message if message.startswith(report.name) else f"{report.name}: {message}"
        kept = f"; clips before the damage are kept: {count}" if count else ""
        outcome.status, outcome.reason = "damaged" if count else "skipped", reason + kept
        return outcome
    present.videos[video] = {"source": report.name, "clips": count, "max_clips": options.max_clips}
    writer.finish_video(video, present.videos[video])
    return outcome


def copied_from(present: shards.ShardContents, video: str, name: str) -> str | None:
    """The name of the file that a video was encoded from, if that is another one than `name`."""
    source = present.clip_of(video).get("source") or present.videos.get(video, {}).get("source")
    return source if source != name else None


def summary(outcomes: dict[str, VideoOutcome], pending: int) -> str:
    """The closing text of a run: totals, then why videos were skipped, then notes. pending: videos not reached."""
    groups = {s: [o for o in outcomes.values() if o.status == s] for s in STATUSES}
    fresh = groups["encoded"]
    clips, seconds = sum(o.clips for o in fresh), sum(o.seconds for o in fresh)
    lines = [f"{len(group):6d}  {status}" for status, group in groups.items()]
    lines[0] += f": {clips} clips, {seconds:.1f} s of video"
    if pending:
        lines.append(f"{pending:6d}  not reached")
    lines += [f"        {o.reason}" for o in (*groups["damaged"], *groups["skipped"])]
    lines += [f"        {name}: a copy of {o.copy_of}, which is encoded" for name, o in outcomes.items() if o.copy_of]
    lines += [f"        {name}: {note}" for name, o in outcomes.items() if o.status == "encoded" for note in o.notes]
    return "\n".join(lines)


def write_report(path: Path, outcomes: dict[str, VideoOutcome], settings: dict, pending: int) -> None:
    """Writes report.json: per video its status, clips, reason, notes and what it is a copy of; then totals.

    pending: videos not reached. Raises OSError.
    """
    statuses = [o.status for o in outcomes.values()]
    report = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "totals": {s: statuses.count(s) for s in STATUSES} | {"not reached": pending},
        "videos": {name: vars(o) for name, o in outcomes.items()},
    }
    text = json.dumps(report, indent=1, sort_keys=False)
    write_atomic(path, lambda partial: Path(partial).write_text(text + "\n", encoding="utf-8"))
