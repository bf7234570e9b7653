"""Groups of items that belong on one side of a split: items that share a key, directly or over other items (union-find).

Keys are what makes two items resemble each other: the prompt, the video that they were cut from, the digest of their content.
"""

from collections.abc import Hashable, Iterable, Sequence

import torch


def linked(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """The group of each item, as the index of the group's first item. keys: those of each item."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[Hashable, int] = {}
    for i, own in enumerate(keys):
        for key in own:
            a, b = sorted((root(i), root(owner.setdefault(key, i))))
            parent[b] = a
    return [root(i) for i in range(len(keys))]


def linked_names(names: Sequence[str], keys: Sequence[Iterable[Hashable]]) -> list[str]:
    """A name for the group of each item: the first, in their order, of the names in it. Equal names are linked as well."""
    groups = linked([[("name", name), *own] for name, own in zip(names, keys, strict=True)])
    first: dict[int, str] = {}
    for group, name in zip(groups, names, strict=True):
        first[group] = min(first.get(group, name), name)
    return [first[group] for group in groups]


def draw(groups: Iterable[str], share: float, seed: int) -> set[str]:
    """The groups to hold out: a random `share` (0 to 1) of the different ones, at least one and never all.

    Deterministic given the seed. Expects at least two different groups.
    """
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {names[i] for i in order[: min(len(names) - 1, max(1, round(share * len(names))))]}
