"""Core's EasyCache and LazyCache on a model: taken off, or given a memory of its own."""

import comfy.model_patcher

# The key of both nodes' memory in transformer_options, and the keys of their wrappers.
HOLDER = "easycache"
WRAPPERS = ("easycache", "lazycache")


def is_used(options: dict) -> bool:
    """Whether a model's options carry a step cache."""
    return HOLDER in options.get("transformer_options", {})


def without(options: dict) -> dict:
    """The options for a forward that no cache answers, changes or remembers."""
    if not is_used(options):
        return options
    out = comfy.model_patcher.create_model_options_clone(options)
    inner = out["transformer_options"]
    inner.pop(HOLDER)
    for wrappers in inner.get("wrappers", {}).values():
        for key in WRAPPERS:
            wrappers.pop(key, None)
    return out


def with_memory_of_its_own(options: dict, model_sampling) -> dict:
    """The options with an empty memory instead of the one they carry."""
    out = comfy.model_patcher.create_model_options_clone(options)
    inner = out["transformer_options"]
    inner[HOLDER] = inner[HOLDER].clone().prepare_timesteps(model_sampling)
    return out
