"""Collects the latents and the embedded prompts of preference pairs once, into a folder that `train` and `eval` read.

--pairs takes what `python -m trainers.pairs build` writes, folders of preference records, and .csv or .jsonl tables (see
trainers.preferences.tables). Latents are copied as the sampler gave them; videos are encoded with --vae. Equal clips are
stored once, by content. An interrupted run continues where it stopped. A pair that cannot be used ends the command, or with
--skip_bad is left out and listed in report.json.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.files.latents import CLIP, IMAGE
from ..kernels.latent_space import LatentSpace, LatentSpaceError
from ..kernels.video.sizes import BUCKETS
from ..latents import shards
from ..latents.arguments import add_pt_axes, pt_axes_setting
from ..latents.read import LATENT_SUFFIXES
from ..preferences import manifest
from ..preferences.clips import BAD_CLIP, ClipOptions, ClipReader
from ..preferences.groups import Candidate
from ..running import results_log
from ..running.checkpoint import tensor_digest
from ..running.device import DTYPES, dtype_for, pick_device
from ..running.output import provenance, require_output_folder
from ..running.progress import Bar
from ..wan import vae as wan_vae
from ..wan.prompts import add_encoder, embed, encoder_options, read_embeddings, read_prompts, text_id, write_embeddings
from . import sources
from .data import PREFERENCES, TEXTS, DpoDataError
from .sources import SourcePair

REPORT = "report.json"


def add_arguments(parser) -> None:
    what = parser.add_argument_group("files")
    what.add_argument(
        "--pairs", nargs="+", required=True, metavar="FILE_OR_DIR", help="pairs.jsonl, folders of records, .csv or .jsonl"
    )
    what.add_argument("--root", metavar="DIR", help="folder of the tables' relative paths (default: each table's own)")
    what.add_argument("--by", metavar="NAME", help="score or dimension that decides (default: the preference itself)")
    what.add_argument(
        "--pairs_per_group", type=int, default=1,
        help="with --by a score: so many of a group's pairs, those with the largest margins (default 1: best against worst)",
    )  # fmt: skip
    what.add_argument("--min_margin", type=float, default=0.0, help="leave out pairs whose scores differ by less (default 0)")
    what.add_argument("--vae", metavar="FILE_OR_DIR", help="wan_2.1_vae.safetensors, or a diffusers folder; for videos")
    add_encoder(what, required=False)
    what.add_argument("--embeddings", metavar="FILE", help="prompts embedded by `trainers.prism embed`")
    what.add_argument("--validation_prompts", type=Path, metavar="FILE.txt", help="also embed these, one per line")
    what.add_argument("--negative_prompt", default="", metavar="TEXT", help="also embed it, for validation (default: empty)")
    what.add_argument(
        "--image_to_video", action="store_true", help="also encode each winner's first frame as the image, with --vae"
    )
    what.add_argument("--output", required=True, type=Path, metavar="DIR")
    what.add_argument("--overwrite", action="store_true", help="first delete the files of an earlier run in --output")
    what.add_argument("--skip_bad", action="store_true", help="leave out pairs that cannot be used")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--size", choices=list(BUCKETS), default="480p", help="that videos are encoded at (default 480p)")
    clips.add_argument("--fps", type=float, default=16.0, help="that videos are encoded at (default 16)")
    clips.add_argument("--frames", type=int, default=81, help="per video at most, 4n+1 (default 81)")
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
    pairs = sources.read(args.pairs, args.root, args.by, args.pairs_per_group)
    known = [p for p in pairs if p.margin is None or p.margin >= args.min_margin]
    if not known:
        raise DpoDataError(f"none of the {len(pairs)} pairs has a margin of {args.min_margin:g} or more (--min_margin)")
    args.output.mkdir(parents=True, exist_ok=True)
    _require_own(args.output)
    if args.overwrite:
        shards.remove(args.output, 0, 1)
        for name in (TEXTS, PREFERENCES):
            (args.output / name).unlink(missing_ok=True)
    texts, prompts = _texts(known, args)
    rows, rejected, space = _collect(known, args)
    report = {
        "pairs": len(rows), "prompts": len({r["prompt"] for r in rows}), "left_out": rejected,
        "below_min_margin": len(pairs) - len(known), "provenance": provenance(args.argv, "trainers.dpo"),
    }  # fmt: skip
    manifest.write_report(args.output / REPORT, report)
    if not rows:
        raise DpoDataError(f"none of the {len(known)} pairs can be used; {args.output / REPORT} has the reasons")
    write_embeddings(args.output / TEXTS, texts, space, provenance(args.argv, "trainers.dpo"), prompts)
    results_log.write(args.output / PREFERENCES, rows)
    clips = {r[side] for r in rows for side in ("winner", "loser")}
    print(f"{args.output}: {len(rows)} of {len(pairs)} pairs, {len(clips)} clips, {report['prompts']} prompts")
    for reason in rejected[:5]:
        print(f"        left out: {reason}")
    return 0


def _collect(pairs: Sequence[SourcePair], args) -> tuple[list[dict], list[str], LatentSpace]:
    """(rows of preferences.jsonl, reasons of the pairs left out, latent space); latents go to shards as they are read."""
    files = {f: None for p in pairs for f in (p.winner, p.loser)}
    videos = [f for f in files if f.suffix.lower() not in LATENT_SUFFIXES]
    if videos and args.vae is None:
        raise DpoDataError(f"{videos[0]}: is a video, so --vae is needed to encode it; or give pairs of latents")
    if args.image_to_video and args.vae is None:
        raise DpoDataError("--image_to_video needs --vae, to decode the first frame and to encode it as the image")
    options = ClipOptions(args.vae, args.vae_dtype, args.tiling, args.size, args.fps, args.frames, args.device, args.pt_axes)
    reader, settings = ClipReader(options), {"dtype": args.latent_dtype} | pt_axes_setting(args)
    if videos or args.image_to_video:
        settings |= {
            "size": args.size, "fps": args.fps, "frames": args.frames, "tiling": args.tiling, "vae": reader.vae.digest,
            "vae_dtype": dtype_for(args.vae_dtype, pick_device(args.device)),
        }  # fmt: skip
    store = _Store(args.output, settings, reader, args.shard_clips, provenance(args.argv, "trainers.dpo"))
    rows, rejected, seen = [], [], set()
    try:
        with Bar("collecting latents", len(pairs), "pair") as bar:
            for pair in pairs:
                try:
                    row = _row(pair, store, args.image_to_video)
                except BAD_CLIP as e:
                    if not args.skip_bad or isinstance(e, shards.ShardError):
                        raise
                    rejected.append(str(e))
                else:
                    key = (row["prompt"], row["winner"], row["loser"])
                    if key not in seen:
                        rows.append(row)
                    seen.add(key)
                bar.add()
    except torch.OutOfMemoryError as e:
        raise wan_vae.VaeError(f"out of memory at {args.size}; try --tiling or a smaller --size") from e
    finally:
        # What was read is kept, even after an error.
        store.flush()
    return rows, rejected, store.space


def _row(pair: SourcePair, store: "_Store", with_image: bool) -> dict:
    """Raises one of BAD_CLIP, naming the file, for a pair that cannot be used."""
    winner, loser = store.add(pair.winner), store.add(pair.loser)
    if winner[0] == loser[0]:
        raise DpoDataError(f"{pair.winner} and {pair.loser}: winner and loser have the same content; leave the pair out")
    if winner[1] != loser[1]:
        raise DpoDataError(
            f"{pair.winner} is {winner[1]} and {pair.loser} is {loser[1]} (channels, frames, height, width): both clips of a "
            "pair must have one size; leave the pair out"
        )
    return {
        "prompt": text_id(pair.prompt), "winner": winner[0], "loser": loser[0], "shape": winner[1], "margin": pair.margin,
        "scores": pair.scores, "source": pair.source, "image": store.add(pair.winner, True)[0] if with_image else None,
    }  # fmt: skip


@torch.no_grad()
def image_latent(vae: wan_vae.WanVae, z: Tensor) -> Tensor:
    """The latent of a clip's first frame followed by grey, [C, T, h, w] like the clip's normalised latent z, fp32.

    What Wan's image-to-video models are given of their image, in addition to the mask.
    """
    weight = next(vae.model.parameters())
    first = vae.space.denormalise(z[None, :, :1].to(weight.device, torch.float32)).to(weight.dtype)
    image = vae.model.decode(first).sample.clamp(-1, 1)
    frames = (z.shape[1] - 1) * vae.space.temporal_stride + 1
    video = torch.cat([image, image.new_zeros(1, 3, frames - 1, *image.shape[3:])], dim=2)
    return vae.space.normalise(vae.model.encode(video).latent_dist.mode().float())[0].cpu()


class _Store:
    """The output folder's latents by content. A file's entry in "videos" of a shard keeps the digest of its content, so that
    a later run need not read the file again.
    """

    def __init__(self, folder: Path, settings: dict, reader: ClipReader, size: int, notes: dict):
        self.present = shards.scan(folder, settings)
        self.reader, self.settings, self.folder, self.notes, self.size = reader, settings, folder, notes, size
        self.space: LatentSpace | None = None
        self.first: Path | None = None
        self.writer: shards.Writer | None = None
        self.known: dict[tuple[Path, bool], tuple[str, list[int]]] = {}

    def add(self, path: Path, image: bool = False) -> tuple[str, list[int]]:
        """(clip id, [C, T, h, w]) of a file's latents, or of its `image_latent`, which are stored unless they are.

        Raises some of BAD_CLIP.
        """
        key = (path, image)
        if key in self.known:
            return self.known[key]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: this clip is missing; restore the file, or leave its pairs out (--skip_bad)")
        name, variant = (f"image of {path.as_posix()}", IMAGE) if image else (path.as_posix(), "")
        video = self.present.id_of(name, path, self.settings, variant)
        if video in self.present.videos:
            entry = self.present.videos[video]
            self._use_space(path, LatentSpace.from_json(entry["space"]))
            self.known[key] = entry["content"], entry["shape"]
            return self.known[key]
        z, space = self._read(path)
        self._use_space(path, space)
        if image:
            if not space.same_as(self.reader.vae.space):
                raise LatentSpaceError(f"{path}: holds '{space.id}' latents, and --vae is of '{self.reader.vae.space.id}'")
            z = image_latent(self.reader.vae, z)
        stored = z.to(DTYPES[self.settings["dtype"]])
        if not bool(torch.isfinite(stored).all()):
            raise DpoDataError(f"{path}: contains NaN, Inf or values beyond {stored.dtype}; create the file again")
        content, shape = tensor_digest(stored), list(z.shape)
        if self.writer is None:
            self.writer = shards.Writer(self.folder, space, self.settings, self.notes, size=self.size)
        entry = {"source": path.name, "clips": 1, "max_clips": 1, "content": content, "shape": shape}
        self.present.videos[video] = entry | {"space": space.to_json()}
        self.writer.finish_video(video, self.present.videos[video])
        if content not in self.present.clips:
            clip = {"source": path.name, "video": content, "holds": IMAGE if image else CLIP}
            self.present.add(content, clip)
            self.writer.add(content, stored, clip)
        self.known[key] = content, shape
        return self.known[key]

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def _read(self, path: Path) -> tuple[Tensor, LatentSpace]:
        latents = path.suffix.lower() in LATENT_SUFFIXES
        candidate = Candidate(path.name, None if latents else path, path if latents else None)
        self.reader.prepare(candidate)
        return self.reader.latents(candidate)

    def _use_space(self, path: Path, space: LatentSpace) -> None:
        if self.space is None:
            self.space, self.first = space, path
        elif not space.same_as(self.space):
            raise LatentSpaceError(
                f"{path}: holds '{space.id}' latents and {self.first} '{self.space.id}' latents; give pairs of one model's"
            )


def _texts(pairs: Sequence[SourcePair], args) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({text id: embedding}, {text id: prompt}): from the output folder, from --embeddings, or by --text_encoder."""
    required = {text_id(p.prompt): p.prompt for p in pairs}
    if args.validation_prompts is not None:
        required |= {text_id(p): p for p in read_prompts(args.validation_prompts)}
    known: dict[str, Tensor] = {}
    if (args.output / TEXTS).is_file():
        known |= read_embeddings(args.output / TEXTS)
    if args.embeddings is not None:
        known |= read_embeddings(args.embeddings)
    # Needed for validation with classifier-free guidance only, so not asked for where no encoder is given.
    negative = {text_id(args.negative_prompt): args.negative_prompt}
    wanted = required | (negative if args.text_encoder or negative.keys() <= known.keys() else {})
    missing = {k: v for k, v in wanted.items() if k not in known}
    if missing and args.text_encoder is None:
        where = f"{args.embeddings} lacks" if args.embeddings else "--text_encoder or --embeddings is needed for"
        raise DpoDataError(f"{where} {len(missing)} prompts, such as '{next(iter(missing.values()))[:60]}'")
    if missing:
        known |= embed(missing.values(), encoder_options(args))
    for key, prompt in wanted.items():
        if not bool(torch.isfinite(known[key]).all()):
            raise DpoDataError(f"the embedding of '{prompt[:60]}' contains NaN or Inf; embed it again")
    return {k: known[k] for k in wanted}, wanted


def _require_own(folder: Path) -> None:
    """Raises DpoDataError for a folder with shards of another command, which --overwrite would delete."""
    foreign = [p for p in (folder / manifest.COMPARISONS, folder / manifest.PAIRS) if p.is_file()]
    if foreign:
        raise DpoDataError(f"{foreign[0]}: written by another command; give another --output")


def _check(args) -> None:
    if args.frames < 5 or args.frames % 4 != 1:
        raise DpoDataError(f"--frames {args.frames} is not 4n+1, at least 5, as a Wan VAE needs")
    if not 0 < args.fps <= 1000:
        raise DpoDataError(f"--fps {args.fps} must be above 0 and at most 1000")
    for name in ("shard_clips", "pairs_per_group"):
        if getattr(args, name) < 1:
            raise DpoDataError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if not args.min_margin >= 0:
        raise DpoDataError(f"--min_margin must be 0 or more, got {args.min_margin}")
