"""Geometry score of candidates: minus the logarithm of the error of their geometry record; records that came with them count.

A group whose candidates all came with comparable records is not measured again. Others are measured by point tracks: videos
in several processes, latents after decoding.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from ..kernels.geometry import tracks
from ..kernels.geometry.record import VERSIONS, GeometryRecord
from ..preferences.clips import BAD_CLIP, ClipReader
from ..preferences.groups import Candidate, Group
from ..running.identity import digest_of, weights_identity
from ..running.progress import Bar
from .cache import ScoreCache, skipped
from .geometry_files import GeometrySettings, Task, results

GEOMETRY = "geometry"
SMALLEST_ERROR = 1e-9


@dataclass(frozen=True)
class GeometryOptions:
    """frames: at most, from the start of each clip; backend: of the tracker; jobs: processes, 0 for as many as cores."""

    frames: int = 81
    backend: str = "auto"
    jobs: int = 0


def score(groups: Sequence[Group], options: GeometryOptions, reader: ClipReader, cache: ScoreCache) -> Iterator[dict]:
    """Rows of the cache for every candidate, each with its record; "value" is None for an undetermined clip without an error.

    Raises ScoringError, and VaeError where the VAE cannot be loaded; a clip that cannot be read gives a row with "skipped".
    """
    settings = GeometrySettings(options.frames, None, options.backend)
    vae = reader.options
    digest = digest_of(settings.described() | {"vae": [weights_identity(vae.vae), vae.vae_dtype, vae.tiling]})
    todo: list[Candidate] = []
    for group in groups:
        for candidate in group.candidates:
            if usable_records(group):
                yield {"candidate": candidate.name, "scorer": GEOMETRY} | _of_record(candidate.geometry)
            elif row := cache.find(candidate, GEOMETRY, digest):
                yield row
            else:
                todo.append(candidate)
    videos = {c.name: c for c in todo if c.video is not None}
    tasks = [Task(name, c.video, settings) for name, c in videos.items()]
    with Bar("geometry", len(todo), "clip", cache.shown) as bar:
        with closing(results(tasks, options.jobs)) as rows:
            for row in rows:
                scored = "skipped" not in row
                found = _of_record(GeometryRecord.from_json(row["record"])) if scored else {"skipped": row["skipped"]}
                yield cache.add(videos[row["video"]], GEOMETRY, digest, found)
                bar.add()
        for candidate in (c for c in todo if c.video is None):
            # A VAE that cannot be loaded concerns all clips.
            _ = reader.vae
            try:
                frames = reader.frames(candidate.latents)[: options.frames]
                found = _of_record(tracks.score_clip(frames, options.backend, pictures=False).record)
            except BAD_CLIP as e:
                found = skipped(candidate, e)
            yield cache.add(candidate, GEOMETRY, digest, found)
            bar.add()


def value_of(record: GeometryRecord) -> float | None:
    """-log(error), so that ratios of errors become differences and one broken clip does not hide the rest; None for an
    infinite error."""
    return None if math.isinf(record.error) else -math.log(max(record.error, SMALLEST_ERROR))


def usable_records(group: Group) -> bool:
    """Whether all candidates of a group came with geometry records that can be compared with each other."""
    found = {(c.geometry.scorer, c.geometry.version) if c.geometry else None for c in group.candidates}
    return len(found) == 1 and None not in found and all(VERSIONS.get(s) == v for s, v in found)


def _of_record(record: GeometryRecord) -> dict:
    return {"value": value_of(record), "record": record.to_json()}
