"""Weights of one safetensors file, or of all shards of a folder, opened as one; and what is wrong with files that are none."""

import json
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.files.header import describe_foreign
from ..kernels.files.lines import TextError, read_text

INDEX = "*.safetensors.index.json"


class WeightFileError(ValueError):
    """A file or a folder of weights is missing, damaged or incomplete; the message names it and what to do."""


class OpenWeights:
    """Context manager: the tensors of some safetensors files, read one by one. what: for messages, such as "a text encoder".

    Has the methods of safetensors' own handle that readers use: keys, get_tensor, get_slice, metadata. Raises WeightFileError
    naming the file that cannot be opened or read.
    """

    def __init__(self, files: list[Path], what: str):
        self.files, self.what, self.stack = files, what, ExitStack()
        self.file_of: dict[str, tuple[Path, object]] = {}
        self.notes: dict[str, str] = {}

    def __enter__(self) -> "OpenWeights":
        with ExitStack() as stack:
            for path in self.files:
                try:
                    handle = stack.enter_context(safe_open(path, framework="pt"))
                    self.file_of |= dict.fromkeys(handle.keys(), (path, handle))  # noqa: SIM118 (not a mapping)
                    self.notes |= handle.metadata() or {}
                except SafetensorError:
                    raise WeightFileError(f"{path}: {describe_foreign(path)}; expected {self.what} as .safetensors") from None
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def keys(self) -> list[str]:
        return list(self.file_of)

    def metadata(self) -> dict[str, str]:
        return self.notes

    def get_tensor(self, key: str) -> Tensor:
        path, handle = self.file_of[key]
        try:
            return handle.get_tensor(key)
        except SafetensorError as e:
            raise WeightFileError(f"{path}: '{key}' cannot be read ({e}); copy or download the file again") from e

    def get_slice(self, key: str):
        return self.file_of[key][1].get_slice(key)


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index where it has one. Raises WeightFileError for shards that are missing or
    whose download was not completed."""
    unfinished = sorted(p for p in folder.rglob("*.incomplete") if p.is_file())
    found = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob(INDEX))
    wanted = sorted({name for index in indices for name in read_index(index).values()})
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        why = f", and {unfinished[0].name} is an unfinished download" if unfinished else ""
        raise WeightFileError(
            f"{folder}: {len(missing)} of {len(wanted)} shards that {indices[0].name} lists are missing, the first is "
            f"{missing[0]}{why}; download the folder again"
        )
    if not found:
        why = f" ({unfinished[0].name} is an unfinished download)" if unfinished else ""
        raise WeightFileError(f"{folder}: no .safetensors file in this folder{why}")
    return [folder / name for name in wanted] if wanted else found


def require_listed(folder: Path, keys: list[str]) -> None:
    """Raises WeightFileError for tensors that the folder's index lists and its shards lack."""
    for index in sorted(folder.glob(INDEX)):
        lost = sorted(read_index(index).keys() - set(keys))
        if lost:
            raise WeightFileError(
                f"{index}: lists {len(lost)} tensors that its shards lack, such as '{lost[0]}'; download the folder again"
            )


def read_index(path: Path) -> dict[str, str]:
    """{tensor: name of the shard} of an index. Raises WeightFileError."""
    try:
        table = json.loads(read_text(path))["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in table.values()):
            raise TypeError("weight_map names no files of this folder")
        return table
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise WeightFileError(f"{path}: not an index of shards ({type(e).__name__} {e}); download it again") from e


def read_json(path: Path, what: str) -> dict:
    """The object of a JSON file. Raises WeightFileError."""
    try:
        found = json.loads(read_text(path))
    except (OSError, TextError, ValueError, RecursionError) as e:
        raise WeightFileError(f"{path.parent}: no readable {path.name} ({e}); expected {what}") from e
    if not isinstance(found, dict):
        raise WeightFileError(f"{path}: not a JSON object; expected the configuration of {what}")
    return found
