"""Scores of candidates by geometry, by a PRISM head and by a Shell-LCC manifold, each kept on disk as soon as it is known.

OUTPUT/candidates.jsonl has a line for each candidate and scorer:

  {"candidate", "scorer", "settings": digest, "files": [[bytes, time of change], ...], "value": number, "record": {...}}

or "skipped": reason instead of "value". Values are higher is better:

  geometry   minus the logarithm of the record's error; none for an undetermined clip that has no error
  prism      mean over --levels and --prism_dimensions of the head's scores, of the same noise for all clips of a group
  shell_lcc  minus the difference between the root mean square distance of the clip's tokens and the shell's radius
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.geometry import tracks
from ..kernels.geometry.record import VERSIONS, GeometryRecord
from ..kernels.latent_space import LatentSpaceError
from ..kernels.prism import files as head_files
from ..kernels.prism.backbone import BackboneError
from ..kernels.shell_lcc import evaluation, manifold
from ..preferences import clips as pair_latents
from ..preferences.clips import BAD_CLIP, Encoding
from ..preferences.groups import Candidate, Group
from ..prism.data import ClipAtSigma
from ..running import device as shell_lcc_device
from ..running import results_log as geometry_log
from ..running.device import DTYPES
from ..running.identity import digest_of, file_digest, identity
from ..running.progress import Bar
from ..scorers import geometry as geometry_score
from ..scorers.prism_network import LEVELS, Scorer
from ..wan import dit as wan_dit
from ..wan import prompts as prism_texts
from ..wan import vae as wan_vae
from ..wan.vae import WanVae

GEOMETRY, PRISM, SHELL_LCC, STORED = "geometry", "prism", "shell_lcc", "stored:"
CANDIDATES = "candidates.jsonl"
# Finished clips are scored at low noise: the lowest levels that the head was trained on.
LOW_LEVELS = 3
TINY = 1e-9


class PairScoringError(ValueError):
    """Candidates cannot be scored as asked; the message says what is missing."""


@dataclass
class Scores:
    """values, skipped: {scorer: {candidate: value or reason}}; records: {candidate: its geometry record}."""

    values: dict[str, dict[str, float]]
    skipped: dict[str, dict[str, str]]
    records: dict[str, GeometryRecord]


def value_of(record: GeometryRecord) -> float | None:
    """The geometry scorer's value: ratios of errors become differences, so that one broken clip does not hide the rest."""
    return None if math.isinf(record.error) else -math.log(max(record.error, TINY))


def usable_records(group: Group) -> bool:
    """Whether all candidates of a group came with geometry records that can be compared with each other."""
    found = {(c.geometry.scorer, c.geometry.version) if c.geometry else None for c in group.candidates}
    return len(found) == 1 and None not in found and all(VERSIONS.get(s) == v for s, v in found)


def score(groups: Sequence[Group], scorers: Iterable[str], args) -> Scores:
    """Scores every candidate by these scorers; what OUTPUT has already is taken from there. Raises PairScoringError, and
    what loading a model raises; a clip that cannot be read is skipped."""
    result = Scores({}, {}, {})
    path = args.output / CANDIDATES
    known = {(r["candidate"], r["scorer"]): r for r in geometry_log.read(path) if "candidate" in r and "scorer" in r}
    vae = cache(lambda: vae_of(args))
    with geometry_log.Log(path) as log:
        kept = _Cache(known, log)
        for scorer in scorers:
            if scorer.startswith(STORED):
                _stored(scorer, groups, result)
                continue
            work = {GEOMETRY: _geometry, PRISM: _prism, SHELL_LCC: _shell_lcc}[scorer]
            result.values[scorer], result.skipped[scorer] = {}, {}
            with closing(work(groups, args, vae, kept)) as rows:
                for row in rows:
                    _take(row, result)
            _require_some(scorer, result)
    # Records that came with the clips are of use to the filters, whatever the scorers are.
    for group in groups:
        if usable_records(group):
            for c in group.candidates:
                result.records.setdefault(c.name, c.geometry)
    return result


def vae_of(args) -> WanVae:
    """The VAE of the arguments. Raises VaeError or FileNotFoundError."""
    device = shell_lcc_device.pick_device(args.device)
    name = args.vae_dtype if args.vae_dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    vae = wan_vae.load(args.vae, DTYPES[name], device)
    if args.tiling:
        vae.model.enable_tiling()
    return vae


def require_possible(groups: Sequence[Group], scorers: Iterable[str], args) -> None:
    """Raises PairScoringError, before any long work, where an argument is missing that some clip needs."""
    scorers = set(scorers)
    wanted = {PRISM: ("head", "backbone"), SHELL_LCC: ("manifold",)}
    for scorer in sorted(scorers & wanted.keys()):
        missing = [f"--{name}" for name in wanted[scorer] if getattr(args, name) is None]
        if missing:
            raise PairScoringError(f"--by {scorer} needs {' and '.join(missing)}")
    if PRISM in scorers and args.texts is None and args.text_encoder is None:
        raise PairScoringError("--by prism needs the prompts: --text_encoder, or --texts made by `trainers.prism embed`")
    if args.vae is not None:
        return
    encoded = [c for g in groups for c in g.candidates if c.latents is None]
    if encoded and scorers & {PRISM, SHELL_LCC}:
        raise PairScoringError(
            f"{encoded[0].video}: a video; --by prism and shell_lcc read latents, so give --vae to encode it"
        )
    measured = [c for g in groups if not usable_records(g) for c in g.candidates if c.video is None]
    if measured and GEOMETRY in scorers:
        raise PairScoringError(
            f"{measured[0].latents}: latents without a geometry record that compares with its group's; give --vae to decode "
            "them, or put a video of the same name beside them"
        )


@dataclass
class _Cache:
    """What is known of candidates, by (candidate, scorer)."""

    known: dict[tuple[str, str], dict]
    log: geometry_log.Log

    def find(self, candidate: Candidate, scorer: str, settings: str) -> dict | None:
        row = self.known.get((candidate.name, scorer))
        if row is None or "skipped" in row or row.get("settings") != settings or row.get("files") != _files(candidate):
            return None
        return row

    def add(self, candidate: Candidate, scorer: str, settings: str, found: dict) -> dict:
        row = {"candidate": candidate.name, "scorer": scorer, "settings": settings, "files": _files(candidate)} | found
        self.log.add(row)
        self.known[candidate.name, scorer] = row
        return row


def _take(row: dict, result: Scores) -> None:
    name, scorer = row["candidate"], row["scorer"]
    if "record" in row:
        result.records[name] = GeometryRecord.from_json(row["record"])
    if "skipped" in row:
        result.skipped[scorer][name] = row["skipped"]
    elif row["value"] is None:
        result.skipped[scorer][name] = f"undetermined: {result.records[name].reason}"
    else:
        result.values[scorer][name] = row["value"]


def _require_some(scorer: str, result: Scores) -> None:
    # Geometry may well be undetermined everywhere; models fail on every clip for one cause, which is the arguments' fault.
    if scorer != GEOMETRY and not result.values[scorer]:
        first = next(iter(result.skipped[scorer].values()))
        raise PairScoringError(
            f"--by {scorer}: none of {len(result.skipped[scorer])} clips could be scored; the first: {first}"
        )


def _stored(scorer: str, groups: Sequence[Group], result: Scores) -> None:
    key = scorer.removeprefix(STORED)
    candidates = [c for g in groups for c in g.candidates]
    result.values[scorer] = {c.name: c.stored[key] for c in candidates if key in c.stored}
    result.skipped[scorer] = {c.name: f"no score '{key}' came with it" for c in candidates if key not in c.stored}
    if not result.values[scorer]:
        held = ", ".join(sorted({k for c in candidates for k in c.stored})) or "none at all"
        raise PairScoringError(f"--by {scorer}: no candidate came with a score '{key}'; stored scores: {held}")


def _geometry(groups: Sequence[Group], args, vae: Callable[[], WanVae], kept: _Cache) -> Iterator[dict]:
    settings = geometry_score.GeometrySettings(args.frames, None, args.backend)
    digest = digest_of(settings.described() | {"vae": [_file_mark(args.vae), args.vae_dtype, args.tiling]})
    todo: list[Candidate] = []
    for group in groups:
        for c in group.candidates:
            if usable_records(group):
                yield {"candidate": c.name, "scorer": GEOMETRY, "value": value_of(c.geometry), "record": c.geometry.to_json()}
            elif row := kept.find(c, GEOMETRY, digest):
                yield row
            else:
                todo.append(c)
    by_name = {c.name: c for c in todo if c.video is not None}
    tasks = [geometry_score.Task(name, c.video, settings) for name, c in by_name.items()]
    with Bar("geometry", len(todo), "clip") as bar:
        with closing(geometry_score.results(tasks, args.jobs)) as rows:
            for row in rows:
                found = (
                    {"skipped": row["skipped"]} if "skipped" in row else _of_record(GeometryRecord.from_json(row["record"]))
                )
                yield kept.add(by_name[row["video"]], GEOMETRY, digest, found)
                bar.add()
        for c in (c for c in todo if c.video is None):
            decoder = vae()
            try:
                frames = pair_latents.frames_of(c.latents, decoder)[: args.frames]
                found = _of_record(tracks.score_clip(frames, args.backend, pictures=False).record)
            except BAD_CLIP as e:
                found = _skipped(c, e)
            yield kept.add(c, GEOMETRY, digest, found)
            bar.add()


def _shell_lcc(groups: Sequence[Group], args, vae: Callable[[], WanVae], kept: _Cache) -> Iterator[dict]:
    path = Path(args.manifold)
    shell = manifold.load(path, shell_lcc_device.pick_device(args.device))
    digest = _digest({"manifold": file_digest(path)}, groups, args)

    def measure(z: Tensor, space) -> float:
        if not space.same_as(shell.space):
            raise LatentSpaceError(f"{path}: a manifold of '{shell.space.id}' latents, the clip has '{space.id}' latents")
        return -abs(float(evaluation.score(shell, z).double().square().mean().sqrt()) - shell.radius)

    with Bar("Shell-LCC", sum(len(g.candidates) for g in groups), "clip") as bar:
        for c in (c for g in groups for c in g.candidates):
            row = kept.find(c, SHELL_LCC, digest)
            if row is None:
                encoder = _encoder(c, vae)
                try:
                    found = {"value": measure(*pair_latents.latents_of(c, encoder, _encoding(args)))}
                except BAD_CLIP as e:
                    found = _skipped(c, e)
                row = kept.add(c, SHELL_LCC, digest, found)
            yield row
            bar.add()


def _prism(groups: Sequence[Group], args, vae: Callable[[], WanVae], kept: _Cache) -> Iterator[dict]:
    head = head_files.load(args.head)
    dimensions = args.prism_dimensions or head.head.config.dimensions
    unknown = [d for d in dimensions if d not in head.head.config.dimensions]
    if unknown:
        raise PairScoringError(f"{args.head}: scores {', '.join(head.head.config.dimensions)}, not '{unknown[0]}'")
    low, high = head.sigmas
    levels = args.levels or [s for s in LEVELS if low <= s <= high][-LOW_LEVELS:] or [low]
    made = {"head": file_digest(Path(args.head)), "backbone": _file_mark(args.backbone), "dtype": args.backbone_dtype}
    made |= {"levels": levels, "dimensions": list(dimensions), "seed": args.seed}
    # Clips of one prompt share their noise and their length, so a clip's score is its group's as well.
    digests = {g.name: _digest(made | {"group": [(c.name, _files(c)) for c in g.candidates]}, groups, args) for g in groups}
    todo = []
    for group in groups:
        rows = [kept.find(c, PRISM, digests[group.name]) for c in group.candidates]
        if None in rows:
            todo.append(group)
        else:
            yield from rows
    if not todo:
        return
    texts = _texts(sorted({g.prompt for g in todo}), args)
    scorer = _prism_scorer(head, args)
    columns = [head.head.config.dimensions.index(d) for d in dimensions]
    with Bar("PRISM", sum(len(g.candidates) for g in todo), "clip") as bar:
        for group in todo:
            rows = _prism_group(group, scorer, head.space, texts, levels, args, vae)
            for c in group.candidates:
                found = {"value": float(rows[c.name][columns].mean())} if not isinstance(rows[c.name], dict) else rows[c.name]
                yield kept.add(c, PRISM, digests[group.name], found)
                bar.add()


@torch.no_grad()
def _prism_group(
    group: Group, scorer: Scorer, space, texts, levels, args, vae: Callable[[], WanVae]
) -> dict[str, Tensor | dict]:
    """{candidate: scores [dimensions], mean over levels, or what says that it was skipped}."""
    held, rows = _Held({}), {}
    for c in group.candidates:
        encoder = _encoder(c, vae)
        try:
            z, found = pair_latents.latents_of(c, encoder, _encoding(args))
            if not found.same_as(space):
                raise LatentSpaceError(f"{args.head}: reads '{space.id}' latents, the clip has '{found.id}' latents")
            held.latents[c.name] = z
        except BAD_CLIP as e:
            rows[c.name] = _skipped(c, e)
    if not held.latents:
        return rows
    length = min(z.shape[1] for z in held.latents.values())
    words = texts[prism_texts.text_id(group.prompt)].float()
    for name, z in held.latents.items():
        side = ClipAtSigma(name, prism_texts.text_id(group.prompt), (z.shape[0], length, *z.shape[2:]), False)
        at = [scorer(side.state(held, s, args.seed)[None], torch.tensor([s]), [words])[0].float().cpu() for s in levels]
        rows[name] = torch.stack(at).mean(dim=0)
    return rows


@dataclass
class _Held:
    """Latents in memory, asked for as prism_data.PreferenceData's are."""

    latents: dict[str, Tensor]

    def state(self, run: str, sigma: float | None) -> Tensor:
        return self.latents[run]


def _prism_scorer(head: head_files.LoadedHead, args) -> Scorer:
    device = shell_lcc_device.pick_device(args.device)
    dit = wan_dit.load(args.backbone, max(head.head.config.taps), DTYPES[args.backbone_dtype], device)
    head.backbone.require_architecture(dit.backbone, head.name)
    if not head.backbone.same_weights(dit.backbone) and not args.other_weights:
        raise BackboneError(f"{args.backbone}: other weights than {args.head} was trained on; --other_weights scores anyway")
    return Scorer(dit, head.head.to(device))


def _texts(prompts: Sequence[str], args) -> dict[str, Tensor]:
    known = prism_texts.read_embeddings(args.texts) if args.texts is not None else {}
    missing = [p for p in prompts if prism_texts.text_id(p) not in known]
    if missing and args.text_encoder is None:
        raise PairScoringError(f"{args.texts}: lacks {len(missing)} prompts, such as '{missing[0][:60]}'; give --text_encoder")
    return known | (prism_texts.embed(missing, args) if missing else {})


def _encoder(candidate: Candidate, vae: Callable[[], WanVae]) -> WanVae | None:
    return vae() if candidate.latents is None else None


def _encoding(args) -> Encoding:
    return Encoding(args.size, args.fps, args.frames)


def _of_record(record: GeometryRecord) -> dict:
    return {"value": value_of(record), "record": record.to_json()}


def _skipped(candidate: Candidate, e: Exception) -> dict:
    text = " ".join(str(e).split())
    return {"skipped": text if text.startswith(candidate.name) else f"{candidate.name}: {text}"}


def _files(candidate: Candidate) -> list[list[int] | None]:
    return [identity(p) if p is not None else None for p in (candidate.video, candidate.latents)]


def _digest(made: dict, groups: Sequence[Group], args) -> str:
    encoded = any(c.latents is None for g in groups for c in g.candidates)
    how = {"vae": _file_mark(args.vae), "vae_dtype": args.vae_dtype, "tiling": args.tiling, "size": args.size, "fps": args.fps}
    return digest_of(made | ({**how, "frames": args.frames} if encoded else {}))


def _file_mark(path: str | None) -> list | None:
    """What tells files and folders of weights apart without reading them."""
    if path is None:
        return None
    files = sorted(Path(path).rglob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    return [[f.name, *identity(f)] for f in files]
