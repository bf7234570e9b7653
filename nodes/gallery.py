"""The rewards gallery's data: saved clips with their scores, read from the files' metadata, and counts of preference records.

Save nodes write the prompt, and what this pack adds under `intrinsic_reward` (see saved_metadata.py), into every file. Files
are only read; a file that is damaged, foreign or without scores is left out.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image, UnidentifiedImageError

from ..kernels.files.preference_records import RECORDS, RecordError, parse_line
from .model_files import file_state
from .saved_metadata import ENTRY

# Suffix -> libav's format. Without one libav looks at the content, which may be a list of other files or of addresses.
VIDEO, ANIMATION = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska"}, {".webp"}
# Files that are looked at, the newest first, and folders below the output directory.
MOST_FILES, MOST_DEPTH = 500, 4
LONGEST_TEXT = 2000
# (path, modification time, size) -> entry: a gallery that is opened again reads new files only.
_known: dict[tuple, dict | None] = {}


def clips(output: str | Path) -> list[dict]:
    """Every saved clip with scores below an output directory, newest first, as JSON values."""
    output, found = Path(output), []
    paths = sorted(((p.stat().st_mtime, p) for p in _files(output, MOST_DEPTH)), reverse=True)[:MOST_FILES]
    seen = {}
    for changed, path in paths:
        key = (str(path), *file_state(str(path)))
        seen[key] = _known[key] if key in _known else entry_of(path)
        if seen[key] is not None:
            place = path.relative_to(output)
            subfolder = "" if place.parent == Path() else place.parent.as_posix()
            found.append({"filename": path.name, "subfolder": subfolder, "type": "output", "changed": changed, **seen[key]})
    _known.clear()
    _known.update(seen)
    return found


def _files(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for path in entries:
        # A link may lead out of the output directory.
        if path.is_symlink():
            continue
        if path.is_dir():
            if depth:
                yield from _files(path, depth - 1)
        elif path.suffix.lower() in {*VIDEO, *ANIMATION} and path.is_file():
            yield path


def entry_of(path: Path) -> dict | None:
    """What the gallery shows of a file; None without scores of this pack."""
    try:
        metadata, shape = read_video(path) if path.suffix.lower() in VIDEO else read_animation(path)
        saved, prompt = (json.loads(metadata.get(key, "null")) for key in (ENTRY, "prompt"))
    except (OSError, ValueError, RecursionError, av.FFmpegError, UnidentifiedImageError) as e:
        logging.debug("gallery: %s: %s", path, e)
        return None
    scores = scores_of(saved)
    if not scores:
        return None
    return {"scores": scores, "seed": seed_of(saved, prompt), **shape, **prompt_texts(prompt)}


def read_video(path: Path) -> tuple[dict[str, str], dict]:
    """(the tags, with names in lower case, as Matroska changes them; {"size": [width, height], "frames"}) of a video file."""
    with av.open(str(path), format=VIDEO[path.suffix.lower()], metadata_errors="replace") as container:
        video = container.streams.video[0] if container.streams.video else None
        shape = {"size": [0, 0] if video is None else [video.width, video.height], "frames": video.frames if video else 0}
        return {key.lower(): value for key, value in container.metadata.items()}, shape


def read_animation(path: Path) -> tuple[dict[str, str], dict]:
    """The same of an animated WebP: its EXIF texts are "name:value"."""
    with Image.open(path) as image:
        texts = [v for v in image.getexif().values() if isinstance(v, str) and ":" in v]
        shape = {"size": list(image.size), "frames": getattr(image, "n_frames", 1)}
    return {name.lower(): value for name, _, value in (t.partition(":") for t in texts)}, shape


def scores_of(saved) -> list[dict]:
    """[{"name", "value"}] of the metadata that this pack's nodes wrote; higher is better."""
    found = []
    for node in saved.values() if isinstance(saved, dict) else ():
        if not isinstance(node, dict):
            continue
        values = node.get("scores")
        if isinstance(node.get("candidates"), list):
            values = _winner_scores(node)
        if isinstance(values, list) and values and all(_is_number(v) for v in values):
            name = str(node.get("reward") or node.get("head") or node.get("node") or "score")
            found.append({"name": name[:80], "value": sum(values) / len(values)})
    return found


def _winner_scores(node: dict) -> list:
    """The last score of a Best-of-N's first winner, as a list of at most one."""
    winners = node["winners"] if isinstance(node.get("winners"), list) and node["winners"] else [None]
    board = [c for c in node["candidates"] if isinstance(c, dict) and isinstance(c.get("scores"), list) and c["scores"]]
    return [c["scores"][-1] for c in board if c.get("seed") == winners[0]][:1]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def seed_of(saved, prompt) -> str | None:
    """The seed of a clip as a string, which JavaScript can hold: of a Best-of-N's winner, else of the prompt's sampler."""
    for node in saved.values() if isinstance(saved, dict) else ():
        if isinstance(node, dict) and isinstance(node.get("winners"), list) and node["winners"]:
            return str(node["winners"][0])
    for node in nodes_of(prompt):
        for name in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(name), int):
                return str(node["inputs"][name])
    return None


def prompt_texts(prompt) -> dict:
    """{"prompt", "negative", "model", "vae"} of an API prompt: the texts, and the names of the files; "" where not found."""
    by_id = {k: n for k, n in prompt.items() if _is_node(n)} if isinstance(prompt, dict) else {}
    found = {"prompt": "", "negative": "", "model": "", "vae": ""}
    for node in by_id.values():
        for name, key in (("positive", "prompt"), ("negative", "negative")):
            found[key] = found[key] or _text_behind(node["inputs"].get(name), name, by_id)
        for name, key in (("unet_name", "model"), ("ckpt_name", "model"), ("vae_name", "vae")):
            if isinstance(node["inputs"].get(name), str):
                found[key] = found[key] or node["inputs"][name][:LONGEST_TEXT]
    for node in by_id.values():
        # A guider without a negative prompt.
        if str(node.get("class_type")).endswith("Guider"):
            found["prompt"] = found["prompt"] or _text_behind(node["inputs"].get("conditioning"), "positive", by_id)
    return found


def _text_behind(link, name: str, by_id: dict) -> str:
    """The first text on the way from an input back to its text encoder."""
    for _ in range(len(by_id)):
        node = by_id.get(link[0]) if isinstance(link, list) and len(link) == 2 and isinstance(link[0], str) else None
        if node is None:
            return ""
        if isinstance(node["inputs"].get("text"), str):
            return node["inputs"]["text"][:LONGEST_TEXT]
        before = (node["inputs"].get(k) for k in (name, "conditioning", "text"))
        link = next((value for value in before if isinstance(value, list)), None)
    return ""


def nodes_of(prompt) -> Iterator[dict]:
    """The nodes of an API prompt that have inputs."""
    yield from (n for n in prompt.values() if _is_node(n)) if isinstance(prompt, dict) else ()


def _is_node(node) -> bool:
    return isinstance(node, dict) and isinstance(node.get("inputs"), dict)


def preference_counts(folder: str | Path) -> list[dict]:
    """[{"name", "records", "chosen", "prompts"}] of every folder of preference records: how many records there are, how many
    with a chosen pair, and of how many prompts those are."""
    counts = []
    for path in sorted(Path(folder).glob(f"*/{RECORDS}")):
        records = []
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError:
            continue
        for line in filter(bytes.strip, lines):
            try:
                records.append(parse_line(line, path.parent, str(path)))
            except RecordError as e:
                logging.debug("gallery: %s", e)
        chosen = [r for r in records if r.preference is not None]
        counts.append({"name": path.parent.name, "records": len(records), "chosen": len(chosen),
                       "prompts": len({r.prompt for r in chosen})})  # fmt: skip
    return counts
