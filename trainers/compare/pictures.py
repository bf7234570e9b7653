"""Pictures of a comparison's clips: figures of each, its change against the first side's, and why pairs are left out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.video.clips import SourceReport
from ..preferences.clips import BAD_CLIP, ClipReader
from ..preferences.groups import Candidate, Group
from ..running.identity import digest_of, weights_identity
from ..running.progress import Bar
from ..scorers.cache import ScoreCache, file_identities, skipped
from ..video import detail
from ..video.frames import read_frames

PICTURES = "pictures"
# Increment when the figures change for the same clips.
VERSION = 1
# Frame rates that differ by more than this share make dynamics and geometry incomparable.
RATE_TOLERANCE = 0.02


@dataclass
class Pictures:
    """usable: groups to be compared; figures: {candidate: {name of detail.FIGURES: value}}; change: {candidate of a later
    side: relative change}, both only where there are pictures; left_out: {group: reason}; notes: on frame rates."""

    usable: list[Group] = field(default_factory=list)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def has_pictures(candidate: Candidate, reader: ClipReader) -> bool:
    """Whether a clip is a video, or latents that a VAE can decode."""
    return candidate.video is not None or reader.options.vae is not None


def frames_of(candidate: Candidate, reader: ClipReader, most: int) -> tuple[Tensor, float]:
    """(uint8 [T, H, W, 3] with T at most `most`, frames per second). Raises some of BAD_CLIP, or VaeError."""
    if candidate.video is None:
        # A VAE that cannot be loaded concerns all clips.
        _ = reader.vae
        return reader.frames(candidate.latents)[:most], reader.options.fps
    source = SourceReport(str(candidate.video))
    return read_frames(candidate.video, source, most), source.fps or reader.options.fps


def measure(groups: Sequence[Group], reader: ClipReader, cache: ScoreCache) -> Pictures:
    """Reads every pair once; a pair that cannot be read, or whose clips differ in size or length, is left out with the reason.

    Raises VaeError where the VAE cannot be loaded.
    """
    found, rates = Pictures(), []
    with Bar("pictures", len(groups), "pair") as bar:
        for group in groups:
            rows = _rows(group, reader, cache)
            reason = next((row["skipped"] for row in rows if "skipped" in row), None) or _unlike(group, rows)
            if reason is not None:
                found.left_out[group.name] = reason
            else:
                found.usable.append(group)
                for row in rows:
                    if "figures" in row:
                        found.figures[row["candidate"]] = row["figures"]
                    if "change" in row:
                        found.change[row["candidate"]] = row["change"]
                rates.append([row.get("fps") for row in rows])
            bar.add()
    found.notes = _rate_notes(found.usable, rates)
    return found


def _rows(group: Group, reader: ClipReader, cache: ScoreCache) -> list[dict]:
    o = reader.options
    # The change is against the first clip, so that a clip's row depends on its group.
    settings = digest_of({
        "version": VERSION, "frames": o.frames, "vae": [weights_identity(o.vae), o.vae_dtype, o.tiling, o.fps],
        "group": [(c.name, file_identities(c) if _exists(c) else None) for c in group.candidates],
    })  # fmt: skip
    if all(map(_exists, group.candidates)):
        known = [cache.find(c, PICTURES, settings) for c in group.candidates]
        if None not in known:
            return known
    rows, base = [], None
    for candidate in group.candidates:
        try:
            part, frames = _measured(candidate, reader, base)
            base = frames if base is None else base
        except BAD_CLIP as e:
            if not _exists(candidate):
                rows.append({"candidate": candidate.name, **skipped(candidate, e)})
                continue
            part = skipped(candidate, e)
        rows.append(cache.add(candidate, PICTURES, settings, part))
    return rows


def _measured(candidate: Candidate, reader: ClipReader, base: Tensor | None) -> tuple[dict, Tensor | None]:
    """(the part of a row, the frames)."""
    if not has_pictures(candidate, reader):
        z, _ = reader.latents(candidate)
        return {"shape": list(z.shape[1:])}, None
    frames, fps = frames_of(candidate, reader, reader.options.frames)
    part = {"shape": list(frames.shape[:3]), "fps": fps, "figures": detail.figures(frames)}
    if base is not None and base.shape == frames.shape:
        part["change"] = detail.relative_change(frames, base)
    return part, frames


def _unlike(group: Group, rows: Sequence[dict]) -> str | None:
    """The reason where a group's clips have different sizes or lengths."""
    first = rows[0]["shape"]
    for row in rows[1:]:
        a, b = ({"frames": r["shape"][0], "size": f"{r['shape'][2]}x{r['shape'][1]}"} for r in (rows[0], row))
        if a["size"] != b["size"]:
            return f"{group.name}: different sizes, {a['size']} against {b['size']}"
        if row["shape"] != first:
            return f"{group.name}: different lengths, {a['frames']} against {b['frames']} frames; --frames takes the first N"
    return None


def _rate_notes(groups: Sequence[Group], rates: Sequence[Sequence[float | None]]) -> list[str]:
    unlike = [
        (g.name, r) for g, r in zip(groups, rates, strict=True)
        if None not in r and max(r) > min(r) * (1 + RATE_TOLERANCE)
    ]  # fmt: skip
    if not unlike:
        return []
    name, found = unlike[0]
    shown = " against ".join(f"{rate:g}" for rate in found)
    return [
        f"{len(unlike)} pairs have different frame rates, such as {name} ({shown} frames per second): their clips are "
        "compared frame by frame, so motion and geometry are not of the same stretch of time"
    ]


def _exists(candidate: Candidate) -> bool:
    return all(p is None or p.is_file() for p in (candidate.video, candidate.latents))
