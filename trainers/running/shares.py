"""Work shared by processes and machines: which items are this process's, and which files it alone writes.

Item k of all items belongs to share k mod count, in an order that follows from the items and not from what is done already.
A process has its share in one of two ways:

  launcher   `accelerate launch` or torchrun: the share is the rank. The main process waits for the others and finishes.
  job array  --shard_index I --shard_count N: no communication. When all shards are complete, the same command with --merge
             in place of --shard_index finishes.

Results are lines of NAME.jsonl, or with several shares of NAME-IIIII-of-NNNNN.jsonl, which one process alone writes. They are
looked for in all of these files, so a stopped run goes on with any other count. Finishing puts the lines of all files into
NAME.jsonl, sorted, and removes the others: the files do not depend on the count.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from . import results_log
from .device import ACCELERATORS, DistributedContext, init_distributed

Item = TypeVar("Item")
SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})")


class ShareError(ValueError):
    """The work cannot be shared or finished as asked; the message names the argument, or the shards that are missing."""


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`. context: of a process that a launcher started with others, else None."""

    index: int = 0
    count: int = 1
    context: DistributedContext | None = None

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_) -> None:
        if self.context is not None:
            self.context.close()

    @property
    def is_main(self) -> bool:
        """Whether this process shows progress: of a launcher's processes only the first does."""
        return self.context is None or self.context.is_main

    @property
    def whole(self) -> bool:
        """Whether one process has all items."""
        return self.count == 1

    @property
    def finishes(self) -> bool:
        """Whether this process finishes the command when it is done and has waited; none of a job array does."""
        return self.whole if self.context is None else self.context.is_main

    def of(self, items: Sequence[Item]) -> list[Item]:
        """This share's items."""
        return list(items[self.index :: self.count])

    def path(self, path: Path) -> Path:
        """The file that this share writes in place of `path`."""
        return path if self.whole else shard_path(path, self.index, self.count)

    def wait(self) -> None:
        """Returns when all processes of a launcher have got here; at once without one. Raises ShareError."""
        if self.context is None:
            return
        try:
            self.context.state.wait_for_everyone()
        except RuntimeError as e:
            # torch.distributed has no narrower exception for a peer that closed its connection.
            raise ShareError(
                "another process of this run has stopped and says why; what is done is kept: run the same command again"
            ) from e


WHOLE = Share()


def add_arguments(parser, merge: bool = True, earlier: Sequence[str] = ()) -> None:
    """Adds --shard_index and --shard_count, and --merge where a command has something to finish.

    earlier: names that --shard_count had before.
    """
    parser.add_argument(
        "--shard_index", type=int, metavar="I", help="do shard I, from 0, of --shard_count: for job arrays; with accelerate "
        "launch or torchrun, leave both out",
    )  # fmt: skip
    parser.add_argument("--shard_count", *earlier, type=int, metavar="N", help="in how many shards the work is divided")
    if merge:
        parser.add_argument(
            "--merge", action="store_true", help="compute nothing: gather what all shards have written, and finish; names "
            "the shards that are missing",
        )  # fmt: skip


def check(args) -> None:
    """Raises ShareError for arguments that exclude each other or are out of range."""
    index, count, merge = args.shard_index, args.shard_count, getattr(args, "merge", False)
    if count is not None and count < 1:
        raise ShareError(f"--shard_count must be 1 or more, got {count}")
    if merge and index is not None:
        raise ShareError("--merge gathers all shards: leave out --shard_index")
    if merge and getattr(args, "overwrite", False):
        raise ShareError("--merge gathers what --overwrite deletes: leave out one of them")
    if index is None:
        if not merge and (count or 1) > 1:
            raise ShareError(f"--shard_count {count} needs --shard_index, from 0 to {count - 1}")
    elif count is None:
        raise ShareError(f"--shard_index {index} needs --shard_count, the number of shards")
    elif not 0 <= index < count:
        raise ShareError(f"--shard_index {index} must lie between 0 and --shard_count - 1 ({count - 1})")


def begin(args, device: str, accelerators: Sequence[str] = ACCELERATORS, nested: bool = False) -> tuple[Share, torch.device]:
    """(this process's share, its device) by the arguments, or by the launcher that started it.

    nested: whether a launcher's processes may divide a shard further. Raises ShareError, or InputError for a device that
    cannot be used.
    """
    check(args)
    context = init_distributed(device, accelerators)
    index, count, world = args.shard_index or 0, args.shard_count or 1, context.world_size
    merge = getattr(args, "merge", False)
    if context.state is None and torch.distributed.is_torchelastic_launched():
        # Every process would take itself for the only one and do all of the work.
        raise ShareError("torchrun needs accelerate, which is not installed: pip install accelerate")
    if world == 1:
        return (Share(index, count) if count > 1 and not merge else WHOLE), context.device
    if merge or (count > 1 and not nested):
        context.close()
        flag = "--merge" if merge else "--shard_count"
        raise ShareError(f"{flag} is for commands without a launcher, but {world} processes were launched: leave it out")
    return Share(index * world + context.rank, count * world, context), context.device


def shard_path(path: Path, index: int, count: int) -> Path:
    """NAME-IIIII-of-NNNNN.jsonl for NAME.jsonl."""
    return path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}{path.suffix}")


def shard_files(path: Path) -> dict[Path, tuple[int, int]]:
    """{file: (index, count)} of the shards of `path` that exist, sorted."""
    found = {}
    for file in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")):
        named = SHARD.fullmatch(file.stem)
        if named and named[1] == path.stem:
            found[file] = (int(named[2]), int(named[3]))
    return found


def rows(path: Path) -> list[dict]:
    """The objects of `path`, then of its shards' files. Raises LogError for a damaged file."""
    return [row for file in (path, *shard_files(path)) for row in results_log.read(file)]


def remove(path: Path, share: Share) -> None:
    """Deletes this share's part of `path` and its shards' files: shares 0 to count - 1 together delete all of them."""
    for file, index in {path: 0, **{file: index for file, (index, _) in shard_files(path).items()}}.items():
        if index % share.count == share.index:
            file.unlink(missing_ok=True)


def settle(path: Path, found: Iterable[dict]) -> None:
    """Replaces `path` and its shards' files by one file with these rows, which are theirs. Raises OSError."""
    merged = list(shard_files(path))
    results_log.write(path, found)
    for file in merged:
        file.unlink(missing_ok=True)


def done_text(share: Share, path: Path, what: str) -> str:
    """What a shard of a job array says when it is done. what: such as "125 of 1000 clips"."""
    return (
        f"{path}: {what}, shard {share.index} of {share.count} (from 0); when all shards are complete, run the same command "
        "with --merge in place of --shard_index"
    )


def require_none(missing: Collection[int], total: int, what: str, path: Path, count: int | None) -> None:
    """Raises ShareError naming the shards that the missing ones of 0 to total - 1 belong to.

    path: the file that results go into; count: --shard_count, None to take it from the names of the shards' files.
    """
    if not missing:
        return
    said = f"{path}: {len(missing)} of {total} {what} are not done"
    again = "or leave out --merge to do them here"
    counts = {count} if count is not None else {n for _, n in shard_files(path).values()}
    if len(counts) != 1:
        raise ShareError(f"{said}; run the shards that are missing again (--merge --shard_count N names them), {again}")
    (count,) = counts
    shards = sorted({k % count for k in missing})
    named = f"shard {shards[0]}" if len(shards) == 1 else f"shards {', '.join(map(str, shards))}"
    raise ShareError(
        f"{said}, those of {named} of {count}; run {'it' if len(shards) == 1 else 'them'} again with --shard_index I "
        f"--shard_count {count}, {again}"
    )
