"""A LoRA merged into its backbone: W + strength * alpha / rank * B A, as a full checkpoint in the original layout.

Read, changed in fp32 and written tensor by tensor, so that memory holds one weight and not the checkpoint.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.files.stream import DTYPES, write_streamed
from ..running.output import require_output
from ..wan import stored_weights
from ..wan.dit import DIFFUSERS, PREFIXES, WHAT, DitError, read_folder_config, transformer_folder
from ..wan.dit_keys import to_diffusers, to_original
from ..wan.weight_files import OpenWeights, shards_of
from . import lora_files
from .backbone import EXPERTS, expert_folder, name_of

# Entry of a merged checkpoint's header: a JSON object with the LoRA's name, the strength and the LoRA's training record.
MERGED = "intrinsic_reward.merged"


class MergeError(ValueError):
    """A LoRA cannot be merged as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the backbone: its open file, its key there, its dtype and shape; name: its diffusers name, None for a
    tensor that belongs to another model in the same file.
    """

    file: object
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    name: str | None


def add_arguments(parser) -> None:
    parser.add_argument("--backbone", required=True, metavar="FILE_OR_DIR", help="Wan .safetensors or diffusers folder")
    parser.add_argument("--expert", choices=tuple(EXPERTS), help="for a folder with two transformers")
    parser.add_argument("--lora", required=True, metavar="FILE.safetensors", help="layout of ComfyUI, diffusers or kohya")
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="full checkpoint in the original layout")
    parser.add_argument("--strength", type=float, default=1.0, help="of the LoRA (default 1)")
    parser.add_argument(
        "--dtype", choices=tuple(lora_files.DTYPES), help="of the output (default: the backbone's; needed for one in fp8)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output")


def run(args) -> int:
    require_output(Path(args.output), args.overwrite)
    dtype = lora_files.DTYPES[args.dtype] if args.dtype else None
    changed = merge(args.backbone, args.lora, args.output, args.strength, dtype, args.expert)
    print(f"wrote {args.output}: {changed} weights changed")
    return 0


def merge(
    backbone: str | Path,
    lora: str | Path,
    output: str | Path,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    expert: str | None = None,
) -> int:
    """Writes the merged checkpoint atomically and returns the number of weights changed.

    A single file keeps its keys, other models in it included; a diffusers folder becomes one file with the original names.
    dtype: None keeps each tensor's. Raises MergeError, WeightFileError, LoraFileError, FileNotFoundError or OSError.
    """
    backbone, lora, output = Path(backbone), Path(lora), Path(output)
    modules, lora_header = lora_files.read_modules(lora)
    with _open_backbone(backbone, expert) as (stored, header):
        _check(stored, modules, backbone, lora, dtype)
        keys = set(next(iter(stored.values())).file.keys())

        def read(key: str) -> Tensor:
            entry = stored[key]
            if entry.name is None:
                # Of another model in the file: copied as it is.
                return entry.file.get_tensor(entry.key)
            try:
                tensor, scale = stored_weights.read_stored(entry.file, entry.key, keys)
            except stored_weights.StorageError as e:
                raise MergeError(f"{backbone}: {e}") from e
            tensor = tensor if scale is None else tensor.float() * scale
            module = entry.name.removesuffix(".weight")
            if module in modules:
                a, b, factor = modules[module]
                tensor = torch.addmm(tensor.float(), b.float(), a.float(), alpha=strength * factor)
            return tensor.to(entries[key][0])

        entries = {
            k: (dtype if dtype and e.name and e.dtype.is_floating_point else e.dtype, e.shape) for k, e in stored.items()
        }
        note = {"lora": lora.name, "strength": strength, "training": json.loads(lora_header.get(lora_files.RECORD, "null"))}
        title = {"modelspec.title": f"{name_of(backbone)} with {lora.stem}"}
        write_streamed(output, entries, read, header | title | {MERGED: json.dumps(note, sort_keys=True)})
    return len(modules)


@contextmanager
def _open_backbone(path: Path, expert: str | None) -> Iterator[tuple[dict[str, Stored], dict[str, str]]]:
    """({key of the output: the tensor}, entries of the header) of a backbone whose files stay open within."""
    with ExitStack() as stack:
        if path.is_dir():
            folder = transformer_folder(expert_folder(path, expert))
            files, diffusers = shards_of(folder), read_folder_config(folder)["_class_name"] == DIFFUSERS
        elif path.is_file():
            files, diffusers = [path], False
        else:
            raise FileNotFoundError(f"{path}: no such file or folder; give a Wan .safetensors or a diffusers folder")
        f = stack.enter_context(OpenWeights(files, WHAT))
        names = {k: (to_original(k), k) for k in f.keys()} if diffusers else _original_names(f.keys(), path)  # noqa: SIM118
        stored = {}
        for key, (new, name) in names.items():
            s = f.get_slice(key)
            if s.get_dtype() not in DTYPES:
                raise DitError(f"{path}: {key} is stored as {s.get_dtype()}, which cannot be merged")
            stored[new] = Stored(f, key, DTYPES[s.get_dtype()], tuple(s.get_shape()), name)
        yield stored, {"format": "pt"} | (f.metadata() if path.is_file() else {})


def _original_names(keys: list[str], path: Path) -> dict[str, tuple[str, str | None]]:
    """{key: (key of the output, diffusers name or None)} of a single file, without what describes its quantisation."""
    prefix = next((p for p in PREFIXES if f"{p}patch_embedding.weight" in keys), None)
    if prefix is None:
        raise DitError(f"{path}: has no patch_embedding.weight, so it is not a Wan transformer")
    found = {}
    for key in keys:
        own = key.startswith(prefix)
        if not (own and key.endswith(stored_weights.STORAGE)):
            found[key] = (key, to_diffusers(key.removeprefix(prefix)) if own else None)
    return found


def _check(stored: dict[str, Stored], modules: dict, backbone: Path, lora: Path, dtype: torch.dtype | None) -> None:
    own = {e.name: e for e in stored.values() if e.name}
    for name, entry in own.items():
        if not entry.dtype.is_floating_point:
            raise MergeError(f"{backbone}: {name} is stored in a quantised form that cannot be merged; give a bf16 file")
        if entry.dtype in stored_weights.FP8 and dtype is None:
            raise MergeError(
                f"{backbone}: is stored in fp8, which would round the LoRA away; add --dtype bf16 to expand it, or load the "
                "LoRA together with it"
            )
    for module, (a, b, _) in modules.items():
        entry = own.get(f"{module}.weight")
        if entry is None:
            raise MergeError(f"{lora}: changes {module}, which {backbone.name} does not have: a LoRA of another model")
        if entry.shape != (b.shape[0], a.shape[1]):
            raise MergeError(
                f"{lora}: {module} is {b.shape[0]} x {a.shape[1]}, and in {backbone.name} "
                f"{' x '.join(map(str, entry.shape))}: a LoRA of another model"
            )
