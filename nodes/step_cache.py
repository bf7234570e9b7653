"""EasyCache and LazyCache: whether a model has one, and the model without it."""

import comfy.model_patcher

# The key of both nodes' state in transformer_options, and the keys of their wrappers.
STATE = "easycache"
WRAPPERS = ("easycache", "lazycache")


def is_used(options: dict) -> bool:
    """Whether the model options contain a step cache."""
    return STATE in options.get("transformer_options", {})


def without(options: dict) -> dict:
    """The options without a step cache: the forward neither reads nor updates its state."""
    if not is_used(options):
        return options
    out = comfy.model_patcher.create_model_options_clone(options)
    inner = out["transformer_options"]
    inner.pop(STATE)
    for wrappers in inner.get("wrappers", {}).values():
        for key in WRAPPERS:
            wrappers.pop(key, None)
    return out


def remove_from(patcher) -> None:
    """Removes a step cache from a clone of a model."""
    patcher.model_options = without(patcher.model_options)
    for wrappers in patcher.wrappers.values():
        for key in WRAPPERS:
            wrappers.pop(key, None)
