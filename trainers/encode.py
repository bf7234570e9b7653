"""Encodes video files with a Wan VAE to normalised latents in safetensors shards, for fitting and evaluation.

    python -m trainers.encode --videos clips/ --vae wan_2.1_vae.safetensors --output latents/

Run the same command again after a crash or Ctrl-C: videos already encoded are skipped. Several processes share the work
under torchrun or `accelerate launch -m trainers.encode ...`, or with `--shard_index i --shard_count n`; with both, the
launched processes divide their shard further. Videos are known by their content: a copy under another name, or with other
times, is encoded once. A damaged file is skipped; report.json (report-i-of-n.json with several
processes) lists every video with its status and the reason. The exit code is 1 only when this process had videos and none of
them could be encoded, 2 for wrong arguments, 130 after Ctrl-C.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from .kernels.files.header import FormatError
from .kernels.latent_space import LatentSpaceError
from .kernels.version import CREATED_BY
from .kernels.video.clips import DecodeOptions, SourceReport
from .kernels.video.sizes import BUCKETS, MULTIPLE, nearest_bucket, nearest_lengths
from .latents import shards
from .latents.encode_videos import VideoOutcome, encode_video, summary, write_report
from .running import shares
from .running.device import DTYPES, dtype_for
from .running.identity import copies
from .running.inputs import InputError, describe, expand
from .running.output import require_output_folder
from .video.read import VIDEO_SUFFIXES
from .wan import vae as wan_vae

ERRORS = (
    InputError, shards.ShardError, shares.ShareError, wan_vae.VaeError, FormatError, LatentSpaceError, OSError, ImportError,
)  # fmt: skip


def parse(argv=None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m trainers.encode", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--videos", nargs="+", required=True, metavar="DIR_OR_GLOB", help="files, folders (searched recursively), patterns"
    )
    files.add_argument("--vae", required=True, metavar="FILE_OR_DIR", help="wan_2.1_vae.safetensors, or a diffusers folder")
    files.add_argument("--output", required=True, metavar="DIR", help="folder for the shards and report.json")
    files.add_argument("--overwrite", action="store_true", help="delete the shards in --output first")
    files.add_argument("--shard_clips", type=int, default=32, help="clips per shard; a crash loses no more (default 32)")
    clips = parser.add_argument_group("clips")
    clips.add_argument("--size", choices=list(BUCKETS), help="bucket of this size with the nearest aspect (default 480p)")
    clips.add_argument("--width", type=int, help=f"fixed width, a multiple of {MULTIPLE}; with --height, instead of --size")
    clips.add_argument("--height", type=int)
    clips.add_argument("--fps", type=float, default=16.0, help="frames per second (default 16); slower videos keep their rate")
    clips.add_argument("--frames", type=int, default=81, help="per clip, 4n+1 (default 81); shorter videos give shorter clips")
    clips.add_argument("--min_frames", type=int, default=5, help="shortest clip kept (default 5)")
    clips.add_argument("--max_clips_per_video", type=int, default=1, help="consecutive clips per video (default 1, 0 = all)")
    clips.add_argument("--hdr", choices=("tonemap", "refuse"), default="tonemap", help="PQ and HLG: map to BT.709, or skip")
    clips.add_argument("--no_upscale", action="store_true", help="skip videos smaller than their clip size")
    compute = parser.add_argument_group("computing")
    compute.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compute.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of the stored latents (default float16)")
    compute.add_argument("--vae_dtype", choices=["auto", *DTYPES], default="auto", help="auto: float32 on CPU, else bfloat16")
    compute.add_argument(
        "--tiling", action="store_true", help="encode in tiles of 256 pixels: less memory, slightly different latents at seams"
    )
    shares.add_arguments(compute, merge=False, earlier=("--num_shards",))
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def main(argv=None) -> int:
    args = parse(argv)
    try:
        share, device = shares.begin(args, args.device, accelerators=("cuda", "xpu"), nested=True)
        with share:
            return run(args, share, device)
    except ERRORS as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, share: shares.Share, device: torch.device) -> int:
    """Encodes this process's share of the videos. Returns the exit code."""
    from tqdm import tqdm

    left_out: Counter = Counter()
    files = expand(args.videos, VIDEO_SUFFIXES, "videos", left_out)
    if share.is_main and left_out:
        print(describe(left_out, "videos"), file=sys.stderr)
    same = copies(files)
    videos = videos_of(share, files, same)
    output = Path(args.output)
    require_output_folder(output)
    vae_dtype = dtype_for(args.vae_dtype, device)
    vae = wan_vae.load(args.vae, DTYPES[vae_dtype], device, args.tiling)
    settings = {
        "size": args.size or f"{args.width}x{args.height}",
        "fps": args.fps,
        "frames": args.frames,
        "hdr": args.hdr,
        "dtype": args.dtype,
        "vae_dtype": vae_dtype,
        "tiling": args.tiling,
        "vae": vae.digest,
    }
    options = DecodeOptions(
        (lambda w, h: nearest_bucket(args.size, w, h)) if args.size else (lambda w, h: (args.width, args.height)),
        args.fps,
        args.frames,
        args.min_frames,
        args.max_clips_per_video,
        args.hdr,
        not args.no_upscale,
    )
    output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        shards.remove(output, share.index, share.count)
    present = shards.ShardContents() if args.overwrite else shards.scan(output, settings)
    present.recognise([(name, files[name]) for name in {*same, *same.values()}], settings)
    provenance = {"created_by": CREATED_BY, "trainer": "encode", "vae": vae.name, "torch": torch.__version__}
    writer = shards.Writer(output, vae.space, settings, provenance, share.index, share.count, args.shard_clips)

    outcomes: dict[str, VideoOutcome] = {}
    suffix = "" if share.whole else f"-{share.index}-of-{share.count}"
    interrupted = False
    try:
        hidden = not (share.is_main and sys.stderr.isatty())
        for name, path in tqdm(videos, desc=f"encoding{suffix}", unit="video", disable=hidden):
            outcomes[name] = encode_video(path, SourceReport(name), options, vae, writer, present)
    except KeyboardInterrupt:
        interrupted = True
    except torch.OutOfMemoryError as e:
        raise wan_vae.VaeError(f"{name}: out of memory at {settings['size']}; try --tiling or a smaller size") from e
    finally:
        writer.flush()
        write_report(output / f"report{suffix}.json", outcomes, settings, len(videos) - len(outcomes))
    print(summary(outcomes, len(videos) - len(outcomes)))
    if interrupted:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    return 1 if outcomes and all(o.status == "skipped" for o in outcomes.values()) else 0


def videos_of(share: shares.Share, files: Mapping[str, Path], same: Mapping[str, str]) -> list[tuple[str, Path]]:
    """This process's videos, in the order of `files`; copies follow their originals, so that one process has both.

    same: {copy: original}.
    """
    groups: dict[str, list[str]] = {name: [name] for name in files if name not in same}
    for name, original in same.items():
        groups[original].append(name)
    return [(name, files[name]) for group in share.of(list(groups.values())) for name in group]


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.width is None) != (args.height is None):
        parser.error("--width and --height must be given together")
    if args.width is not None and args.size:
        parser.error("give --size, or --width and --height, not both")
    for name in ("width", "height"):
        value = getattr(args, name)
        if value is not None and (value < MULTIPLE or value % MULTIPLE):
            near = max(MULTIPLE, value // MULTIPLE * MULTIPLE)
            parser.error(f"--{name} {value} is not a multiple of {MULTIPLE}: use {near} or {near + MULTIPLE}")
    if args.width is None and not args.size:
        args.size = "480p"
    if args.frames < 1 or args.frames % 4 != 1:
        below, above = nearest_lengths(args.frames)
        parser.error(f"--frames {args.frames} is not 4n+1, as a Wan VAE needs: use {below} or {above}")
    if not 1 <= args.min_frames <= args.frames:
        parser.error(f"--min_frames {args.min_frames} must lie between 1 and --frames {args.frames}")
    if not 0.0 < args.fps <= 1000.0:
        parser.error(f"--fps {args.fps} must be above 0 and at most 1000")
    if args.max_clips_per_video < 0:
        parser.error("--max_clips_per_video must be 0 (all) or more")
    if args.shard_clips < 1:
        parser.error("--shard_clips must be 1 or more")
    try:
        shares.check(args)
    except shares.ShareError as e:
        parser.error(str(e))


if __name__ == "__main__":
    raise SystemExit(main())
