"""Encodes the clips of a table of preferences, and its prompts, once, into a folder that `train` and `eval` read.

The table is a .csv or .jsonl such as `trainers.preferences.tables` describes: VideoAlign's or VideoGen-RewardBench's pairs,
rows of scores, a manifest of `trainers.pairs build`, or a folder of our preference records. Its clips are videos, or latents
(.safetensors, .latent) that are taken as they are. A run that was cut off goes on where it was; a clip that cannot be read
loses its pairs, and report.json says why.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import encode
from ..encode import VideoOutcome
from ..kernels.latent_space import LatentSpace
from ..latents import read as latent_data
from ..latents import shards
from ..preferences import tables as prism_pairs
from ..preferences.tables import Pair, PairsError
from ..running import device as shell_lcc_device
from ..running.device import DTYPES
from ..running.output import provenance
from ..running.progress import Bar
from ..video.read import Reading, Source
from ..video.sizes import MULTIPLE
from ..wan import prompts as prism_texts
from ..wan import vae as wan_vae
from ..wan.prompts import write_embeddings
from . import data as prism_data
from .data import Row


def add_arguments(parser) -> None:
    what = parser.add_argument_group("files")
    what.add_argument("--pairs", required=True, type=Path, metavar="FILE", help="a .csv or .jsonl, or a folder of records")
    what.add_argument("--root", type=Path, metavar="DIR", help="what the table's paths are relative to (default: its folder)")
    what.add_argument("--dimensions", nargs="+", metavar="NAME", help="which of the table's dimensions (default: all)")
    what.add_argument("--vae", metavar="FILE_OR_DIR", help="wan_2.1_vae.safetensors, or a diffusers folder; for videos")
    prism_texts.add_encoder(what, required=False)
    what.add_argument("--texts", metavar="FILE", help="instead of --text_encoder: the prompts embedded by `embed`")
    what.add_argument("--output", required=True, type=Path, metavar="DIR")
    what.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in --output first")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--width", type=int, default=832, help="of all clips, scaled to cover and cropped (default 832)")
    clips.add_argument("--height", type=int, default=480)
    clips.add_argument("--frames", type=int, default=81, help="longest, 4n+1 (default 81); short videos use what they have")
    clips.add_argument("--fps", type=float, default=16.0, help="frames per second (default 16); slower videos keep theirs")
    clips.add_argument("--latent_dtype", choices=("float16", "float32"), default="float16", help="stored (default float16)")
    compute = parser.add_argument_group("computing")
    compute.add_argument(
        "--vae_dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on a CPU, else bfloat16"
    )
    compute.add_argument("--tiling", action="store_true", help="encode in tiles: less memory, not quite the same latents")
    compute.add_argument("--shard_clips", type=int, default=32, help="clips per shard: what a crash can lose (default 32)")
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def run(args) -> int:
    _check(args)
    pairs = prism_pairs.read(args.pairs, args.root, args.dimensions)
    prism_pairs.require_files(pairs, str(args.pairs))
    prism_pairs.require_classes(pairs, str(args.pairs))
    args.output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        shards.remove(args.output, 0, 1)
        for name in (prism_data.TEXTS, prism_data.PAIRS):
            (args.output / name).unlink(missing_ok=True)
    base = prism_pairs.base_of(args.pairs, args.root)
    clips = clips_of(pairs, base)
    said = {prism_texts.text_id(p.prompt): p.prompt for p in pairs}
    texts = _texts(said, args)
    space, outcomes = _encode(clips, args)
    notes = provenance(args.argv, "trainers.prism")
    write_embeddings(args.output / prism_data.TEXTS, texts, space, notes, said)
    rows = [_row(p, base) for p in pairs]
    usable = {name for name, o in outcomes.items() if o.status != "skipped"}
    kept = [r for r in rows if r.a in usable and r.b in usable]
    if not kept:
        raise PairsError(f"{args.pairs}: of none of its {len(rows)} pairs could both clips be read; see report.json")
    prism_data.write_rows(args.output, kept)
    print(encode.table(outcomes, 0))
    print(f"{args.output}: {len(kept)} of {len(rows)} pairs, {len(said)} prompts")
    return 0


def clips_of(pairs: Sequence[Pair], base: Path) -> dict[str, tuple[Path, str]]:
    """{run's name: (file, prompt)} of every clip that pairs name, sorted. Raises PairsError for one under two prompts."""
    found: dict[str, tuple[Path, str]] = {}
    for pair in pairs:
        for path in (pair.a, pair.b):
            known = found.setdefault(run_name(path, base), (path, pair.prompt))
            if known[1] != pair.prompt:
                raise PairsError(f"{path}: compared under two prompts, '{known[1][:40]}' and '{pair.prompt[:40]}'")
    return dict(sorted(found.items()))


def run_name(path: Path, base: Path) -> str:
    """How a clip is known in the folder: its path below the table's root."""
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()


def _row(pair: Pair, base: Path) -> Row:
    return Row(prism_texts.text_id(pair.prompt), run_name(pair.a, base), run_name(pair.b, base), pair.outcome)


def _texts(said: dict[str, str], args) -> dict[str, torch.Tensor]:
    """{prompt's id: its embedding}: what the folder has already, from --texts, or by --text_encoder."""
    known = {}
    if (args.output / prism_data.TEXTS).is_file():
        known |= prism_texts.read_embeddings(args.output / prism_data.TEXTS)
    if args.texts is not None:
        known |= prism_texts.read_embeddings(args.texts)
    missing = {k: v for k, v in said.items() if k not in known}
    if missing and args.text_encoder is None:
        where = f"{args.texts} lacks" if args.texts else "--text_encoder or --texts is needed for"
        raise ValueError(f"{where} {len(missing)} prompts, such as '{next(iter(missing.values()))[:60]}'")
    if missing:
        known |= prism_texts.embed(missing.values(), args)
    return {k: known[k] for k in said}


def _encode(clips: dict[str, tuple[Path, str]], args) -> tuple[LatentSpace, dict[str, VideoOutcome]]:
    videos = any(path.suffix.lower() not in latent_data.LATENT_SUFFIXES for path, _ in clips.values())
    if videos and args.vae is None:
        raise ValueError(f"{args.pairs}: names videos, so --vae is needed to encode them")
    vae, settings = (
        None,
        {"size": f"{args.width}x{args.height}", "fps": args.fps, "frames": args.frames, "dtype": args.latent_dtype},
    )
    if videos:
        device = shell_lcc_device.pick_device(args.device)
        name = args.vae_dtype if args.vae_dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
        vae = wan_vae.load(args.vae, DTYPES[name], device)
        if args.tiling:
            vae.model.enable_tiling()
        settings |= {"vae_dtype": name, "tiling": args.tiling, "vae": vae.digest}
    space = vae.space if vae else latent_data.list_clips([next(iter(clips.values()))[0]])[0].space
    done = shards.scan(args.output, settings)
    writer = shards.Writer(args.output, space, settings, provenance(args.argv, "trainers.prism"), size=args.shard_clips)
    reading = Reading((lambda w, h: (args.width, args.height)), args.fps, args.frames)
    outcomes = {}
    try:
        with Bar("encoding", len(clips), "clip") as bar:
            for name, (path, prompt) in clips.items():
                entry = {"run": name, "prompt": prism_texts.text_id(prompt), "sigma": None}
                if path.suffix.lower() in latent_data.LATENT_SUFFIXES:
                    outcomes[name] = _take_latent(name, path, entry, writer, done)
                else:
                    outcomes[name] = encode.encode_video(path, Source(name), reading, vae, writer, done, entry)
                bar.add()
    except torch.OutOfMemoryError as e:
        raise wan_vae.VaeError(f"{name}: out of memory at {settings['size']}; try --tiling or a smaller size") from e
    finally:
        # Whatever stopped it, clips that are encoded are kept.
        writer.flush()
        encode.write_report(args.output / "report.json", outcomes, settings, len(clips) - len(outcomes))
        if len(outcomes) < len(clips):
            print(f"{len(outcomes)} of {len(clips)} clips done; run the same command again to go on", file=sys.stderr)
    return space, outcomes


def _take_latent(name: str, path: Path, entry: dict, writer: shards.Writer, done: shards.Done) -> VideoOutcome:
    """Copies the one clip of a file of latents."""
    video = shards.video_id(name, path, writer.settings)
    if done.has(video, 1):
        return VideoOutcome("already encoded")
    try:
        refs = latent_data.list_clips([path], writer.space)
        if len(refs) != 1:
            raise latent_data.LatentDataError(f"{path}: holds {len(refs)} clips, expected one")
        z = latent_data.read_clip(refs[0])
    except ValueError as e:
        return VideoOutcome("skipped", reason=str(e))
    source = {"source": name, "video": video, "window": 0}
    writer.add(shards.clip_id(name, video, 0), z.to(DTYPES[writer.settings["dtype"]]), source | entry)
    writer.finish_video(video, {"source": name, "clips": 1, "max_clips": 1})
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
