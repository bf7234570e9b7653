"""Encodes the clips and prompts of a preference table once, into a folder that `train` and `eval` read.

The table is a .csv or .jsonl in one of the formats of `trainers.preferences.tables`: pairs of VideoAlign or
VideoGen-RewardBench, rows of scores, a manifest of `trainers.pairs build`, or a folder of preference records. Its clips are
videos, or latents (.safetensors, .latent, .pt, .pth), which are stored as they are. An interrupted run continues where it
stopped. Pairs with a clip that cannot be read are left out; report.json gives the reason. Copies of one clip under several
names are encoded once for each prompt, and stand for one run.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..kernels.latent_space import LatentSpace
from ..kernels.video.clips import DecodeOptions, SourceReport
from ..kernels.video.sizes import MULTIPLE
from ..latents import shards
from ..latents.arguments import add_pt_axes, pt_axes_setting
from ..latents.encode_videos import VideoOutcome, copied_from, encode_video, summary, write_report
from ..latents.read import LATENT_SUFFIXES, LatentDataError, list_clips, read_clip
from ..preferences import tables
from ..preferences.tables import Pair, PairsError
from ..running.device import DTYPES, dtype_for, pick_device
from ..running.identity import content_digest
from ..running.output import provenance, require_output_folder
from ..running.progress import Bar
from ..wan import vae as wan_vae
from ..wan.prompts import add_encoder, embed, encoder_options, read_embeddings, text_id, write_embeddings
from .data import TEXTS, Row, remove_comparisons, require_no_manifest, write_rows


def add_arguments(parser) -> None:
    what = parser.add_argument_group("files")
    what.add_argument("--pairs", required=True, type=Path, metavar="FILE", help="a .csv or .jsonl, or a folder of records")
    what.add_argument("--root", type=Path, metavar="DIR", help="folder of the table's relative paths (default: its own)")
    what.add_argument(
        "--dimensions", nargs="+", metavar="NAME",
        help="dimensions of the table to use (default: of a .csv those with a name of VideoAlign or VideoFeedback, else all)",
    )  # fmt: skip
    what.add_argument("--vae", metavar="FILE_OR_DIR", help="wan_2.1_vae.safetensors, or a diffusers folder; for videos")
    add_encoder(what, required=False)
    what.add_argument("--texts", metavar="FILE", help="instead of --text_encoder: prompts embedded by `embed`")
    what.add_argument("--output", required=True, type=Path, metavar="DIR")
    what.add_argument("--overwrite", action="store_true", help="first delete the files of an earlier run in --output")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--width", type=int, default=832, help="of all clips: scaled to cover, then cropped (default 832)")
    clips.add_argument("--height", type=int, default=480)
    clips.add_argument("--frames", type=int, default=81, help="per clip, 4n+1 (default 81); shorter videos give shorter clips")
    clips.add_argument("--fps", type=float, default=16.0, help="frames per second (default 16); slower videos keep their rate")
    clips.add_argument("--latent_dtype", choices=("float16", "float32"), default="float16", help="as stored (default float16)")
    add_pt_axes(clips)
    compute = parser.add_argument_group("computing")
    compute.add_argument(
        "--vae_dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on a CPU, else bfloat16"
    )
    compute.add_argument("--tiling", action="store_true", help="encode in tiles: less memory, slightly different latents")
    compute.add_argument("--shard_clips", type=int, default=32, help="clips per shard; a crash loses no more (default 32)")
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args) -> int:
    _check(args)
    require_output_folder(args.output)
    notes = tables.TableNotes()
    pairs = tables.read(args.pairs, args.root, args.dimensions, notes)
    pairs = tables.with_files(pairs, str(args.pairs), notes)
    print(*notes.text(), *tables.counts(pairs), sep="\n")
    tables.require_classes(pairs, str(args.pairs))
    require_no_manifest(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        shards.remove(args.output, 0, 1)
        (args.output / TEXTS).unlink(missing_ok=True)
        remove_comparisons(args.output)
    base = tables.base_of(args.pairs, args.root)
    clips = clips_of(pairs, base)
    prompts = {text_id(p.prompt): p.prompt for p in pairs}
    texts = _texts(prompts, args)
    space, outcomes, runs = _encode(clips, args)
    write_embeddings(args.output / TEXTS, texts, space, provenance(args.argv, "trainers.prism"), prompts)
    rows = [_row(p, base) for p in pairs]
    usable = {name for name, o in outcomes.items() if o.status not in ("damaged", "skipped")}
    readable = [r for r in rows if r.a in usable and r.b in usable]
    if not readable:
        raise PairsError(f"{args.pairs}: none of its {len(rows)} pairs has two readable clips; see report.json")
    kept = [replace(r, a=runs[r.a], b=runs[r.b]) for r in readable if runs[r.a] != runs[r.b]]
    if not kept:
        raise PairsError(f"{args.pairs}: in each of its {len(readable)} readable pairs both clips have the same content")
    write_rows(args.output, kept)
    print(summary(outcomes, 0))
    print(f"{args.output}: {len(kept)} of {len(rows)} pairs, {len(prompts)} prompts")
    if len(kept) < len(readable):
        print(f"{len(readable) - len(kept)} pairs are left out: both of their clips have the same content")
    return 0


def clips_of(pairs: Sequence[Pair], base: Path) -> dict[str, tuple[Path, str]]:
    """{run: (file, prompt)} of every clip of the pairs, sorted by run. Raises PairsError for a clip with two prompts."""
    found: dict[str, tuple[Path, str]] = {}
    for pair in pairs:
        for path in (pair.a, pair.b):
            known = found.setdefault(run_name(path, base), (path, pair.prompt))
            if known[1] != pair.prompt:
                raise PairsError(f"{path}: has two different prompts, '{known[1][:40]}' and '{pair.prompt[:40]}'")
    return dict(sorted(found.items()))


def run_name(path: Path, base: Path) -> str:
    """The name of a clip's run in the output folder: its path relative to the table's root, if it is below it."""
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


def _row(pair: Pair, base: Path) -> Row:
    return Row(text_id(pair.prompt), run_name(pair.a, base), run_name(pair.b, base), pair.outcome)


def _texts(prompts: dict[str, str], args) -> dict[str, torch.Tensor]:
    """{prompt id: embedding [words, width]}: from the output folder, from --texts, or computed by --text_encoder."""
    known = {}
    if (args.output / TEXTS).is_file():
        known |= read_embeddings(args.output / TEXTS)
    if args.texts is not None:
        known |= read_embeddings(args.texts)
    missing = {k: v for k, v in prompts.items() if k not in known}
    if missing and args.text_encoder is None:
        where = f"{args.texts} lacks" if args.texts else "--text_encoder or --texts is needed for"
        raise ValueError(f"{where} {len(missing)} prompts, such as '{next(iter(missing.values()))[:60]}'")
    if missing:
        known |= embed(missing.values(), encoder_options(args))
    return {k: known[k] for k in prompts}


def _encode(clips: dict[str, tuple[Path, str]], args) -> tuple[LatentSpace, dict[str, VideoOutcome], dict[str, str]]:
    """(latent space, {clip: outcome}, {clip: run that has its latents})."""
    videos = any(path.suffix.lower() not in LATENT_SUFFIXES for path, _ in clips.values())
    if videos and args.vae is None:
        raise ValueError(f"{args.pairs}: lists videos, so --vae is needed to encode them")
    settings = {
        "size": f"{args.width}x{args.height}", "fps": args.fps, "frames": args.frames, "dtype": args.latent_dtype,
    } | pt_axes_setting(args)  # fmt: skip
    vae = None
    if videos:
        device = pick_device(args.device)
        name = dtype_for(args.vae_dtype, device)
        vae = wan_vae.load(args.vae, DTYPES[name], device, args.tiling)
        settings |= {"vae_dtype": name, "tiling": args.tiling, "vae": vae.digest}
    space = vae.space if vae else list_clips([next(iter(clips.values()))[0]])[0].space
    present = shards.scan(args.output, settings)
    writer = shards.Writer(args.output, space, settings, provenance(args.argv, "trainers.prism"), size=args.shard_clips)
    options = DecodeOptions((lambda w, h: (args.width, args.height)), args.fps, args.frames)
    outcomes, runs = {}, {}
    try:
        with Bar("encoding", len(clips), "clip") as bar:
            for name, (path, prompt) in clips.items():
                entry = {"run": name, "prompt": text_id(prompt), "sigma": None}
                if path.suffix.lower() in LATENT_SUFFIXES:
                    outcomes[name] = _copy_latent(name, path, entry, writer, present, args.pt_axes)
                else:
                    source = SourceReport(name)
                    outcomes[name] = encode_video(path, source, options, vae, writer, present, entry, entry["prompt"])
                video = present.id_of(name, path, settings, entry["prompt"])
                runs[name] = present.clip_of(video).get("run", name)
                bar.add()
    except torch.OutOfMemoryError as e:
        raise wan_vae.VaeError(f"{name}: out of memory at {settings['size']}; try --tiling or a smaller size") from e
    finally:
        # Clips that are encoded are kept, even after an error.
        writer.flush()
        write_report(args.output / "report.json", outcomes, settings, len(clips) - len(outcomes))
        if len(outcomes) < len(clips):
            print(f"{len(outcomes)} of {len(clips)} clips done; run the same command again to continue", file=sys.stderr)
    return space, outcomes, runs


def _copy_latent(
    name: str, path: Path, entry: dict, writer: shards.Writer, present: shards.ShardContents, pt_axes: str
) -> VideoOutcome:
    """Copies a file of latents, which must hold one clip."""
    video = present.id_of(name, path, writer.settings, entry["prompt"])
    if present.has_video(video, 1):
        return VideoOutcome("already encoded", copy_of=copied_from(present, video, name))
    try:
        refs = list_clips([path], writer.space)
        if len(refs) != 1:
            raise LatentDataError(f"{path}: holds {len(refs)} clips, expected one")
        z = read_clip(refs[0], pt_axes=pt_axes)
    except ValueError as e:
        return VideoOutcome("skipped", reason=str(e))
    entry = {"source": name, "content": content_digest(path), "video": video, "window": 0} | entry
    clip_id = shards.clip_id(name, video, 0)
    present.add(clip_id, entry)
    present.videos[video] = {"source": name, "clips": 1, "max_clips": 1}
    writer.add(clip_id, z.to(DTYPES[writer.settings["dtype"]]), entry)
    writer.finish_video(video, present.videos[video])
    return VideoOutcome(clips=1)


def _check(args) -> None:
    if args.width % MULTIPLE or args.height % MULTIPLE or min(args.width, args.height) < MULTIPLE:
        raise ValueError(f"--width {args.width}, --height {args.height}: must be multiples of {MULTIPLE}")
    if args.frames < 5 or args.frames % 4 != 1:
        raise ValueError(f"--frames {args.frames} is not 4n+1, at least 5, as a Wan VAE needs")
    if not 0 < args.fps <= 1000:
        raise ValueError(f"--fps {args.fps} must be above 0 and at most 1000")
    if args.shard_clips < 1:
        raise ValueError(f"--shard_clips must be 1 or more, got {args.shard_clips}")
    if args.texts and args.text_encoder:
        raise ValueError("give --text_encoder or --texts, not both")
