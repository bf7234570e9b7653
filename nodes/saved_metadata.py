"""Add scores to extra_pnginfo, the dict that save nodes embed in their files."""

ENTRY = "intrinsic_reward"


def add(cls, entry: dict) -> None:
    """Adds `entry` under the node's id to the metadata of files that this prompt saves after the node.

    cls: a node with the hidden inputs unique_id and extra_pnginfo. Does nothing without metadata (an API prompt without
    it, or metadata switched off).
    """
    saved = cls.hidden.extra_pnginfo
    if isinstance(saved, dict):
        saved.setdefault(ENTRY, {})[str(cls.hidden.unique_id)] = entry
