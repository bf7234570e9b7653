"""Scores in the files that are saved: what save nodes write beside the workflow, ComfyUI hands around as one dict."""

ENTRY = "intrinsic_reward"


def note(cls, entry: dict) -> None:
    """Adds what the running node found to the metadata of whatever this prompt saves after it, under the node's id.

    cls: a node with the hidden inputs unique_id and extra_pnginfo. Without metadata (a bare API prompt, or switched off)
    nothing happens.
    """
    saved = cls.hidden.extra_pnginfo
    if isinstance(saved, dict):
        saved.setdefault(ENTRY, {})[str(cls.hidden.unique_id)] = entry
